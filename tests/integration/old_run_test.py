"""A run folder of 2026-11: it resumes, evaluates, and others start from it.

tests/stored_run.tar.xz was made with commit e00d843: `run`, stopped at step 4
of 12, and what that commit then made of it. `expected.npz` has the parameters
at the end of the resumed run, and those that a run at 24 pixels started from;
`evaluate.json` is what `vit-jax evaluate --json` printed. Another CPU rounds
otherwise: what was computed is compared closely, what was read exactly.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import read_losses, read_state

from vit_jax.__main__ import main

_ARCHIVE = Path(__file__).parents[1] / "stored_run.tar.xz"
_OPTIONS = (
  "model.variant=ViT-w16d2m32h2_8",
  "ema_decay=0.9",
  "checkpoint_every=4",
  "eval_every=4",
  "total_steps=12",
  "schedule.base_lr=0.02",
)


@pytest.fixture
def stored(tmp_path):
  with tarfile.open(_ARCHIVE) as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path


def _expected(stored, kind):
  with np.load(stored / "expected.npz") as arrays:
    return {
      name.removeprefix(f"{kind}/"): arrays[name]
      for name in arrays
      if name.startswith(f"{kind}/")
    }


@pytest.mark.ci
def test_it_resumes(runs, stored):
  before = read_losses(stored / "run")
  assert main(runs.train_args(stored / "run", *_OPTIONS)) == 0
  step, found = read_state(stored / "run")
  assert step == 12
  for name, x in _expected(stored, "resumed").items():
    if name.endswith("key/bias"):
      continue  # no gradient but rounding errors, which Adam blows up
    np.testing.assert_allclose(
      found[f"params/{name}"], x, rtol=1e-4, atol=1e-5, err_msg=name
    )
  losses = read_losses(stored / "run")
  assert {step: losses[step] for step in before} == before
  assert [*losses] == [*range(1, 13)]


@pytest.mark.ci
def test_it_is_evaluated(runs, stored, capsys):
  args = [f"--checkpoint={stored / 'run'}", f"--data_dir={runs.data_dir}"]
  assert main(["evaluate", *args, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  expected = json.loads((stored / "evaluate.json").read_text())
  for name in ("loss", "accuracy", "accuracy@5"):
    assert found.pop(name) == pytest.approx(expected.pop(name), rel=1e-5)
  assert Path(found.pop("checkpoint")) == stored / "run" / "best" / "4"
  del expected["checkpoint"]
  assert found == expected


@pytest.mark.ci
def test_others_start_from_it(runs, stored):
  """At another size, with the learning rate 0 of the first warm-up step."""
  options = (*_OPTIONS, "image_size=24", f"init_from={stored / 'run'}")
  options += ("total_steps=3", "checkpoint_every=1")
  assert main(runs.train_args(stored / "new", *options)) == 0
  for step in (2, 3):
    shutil.rmtree(stored / "new" / "checkpoints" / str(step))
  step, found = read_state(stored / "new")
  assert step == 1
  for name, x in _expected(stored, "warm").items():
    compare = np.testing.assert_array_equal
    if "pos_embedding" in name:  # resized
      compare = np.testing.assert_allclose
    compare(found[f"params/{name}"], x, err_msg=name)
