"""Run folders, sweeps and what commands write on gs://, see fake_gcs.py."""

import json
import math
import re
import shutil

import fake_gcs
import numpy as np
import pytest
from etils import epath
from tiny_runs import assert_same_run, saved_steps

from vit_jax import data, pretrained
from vit_jax.__main__ import main

pytestmark = pytest.mark.ci

# As in train_test.py.
SHORT = (
  "model.variant=ViT-w16d2m32h2_8",
  "total_steps=6",
  "eval_every=4",
  "keep_checkpoints=2",
)
WRITES = ("POST", "PUT", "DELETE")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  folder = tmp_path_factory.mktemp("gcs")
  (folder / "bucket").mkdir()
  with fake_gcs.serve(folder) as server, pytest.MonkeyPatch.context() as patch:
    for name, value in server.environment().items():
      patch.setenv(name, value)
    yield server


@pytest.fixture(autouse=True)
def no_faults(server):
  server.reset()
  yield
  server.fault = lambda number, request: None


@pytest.fixture(scope="module")
def whole(runs, sharing, tmp_path_factory):
  """The folder of a short run on a disk, not interrupted."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  assert main(runs.train_args(workdir, *SHORT)) == 0
  return workdir


@pytest.fixture(scope="module")
def moments(runs, sharing, server):
  """Trains in gs://bucket/run; returns [(copy before a write, the write)]."""
  bucket, copies = server.folder / "bucket", []

  def copy(_, request):
    if request.startswith(WRITES) and (bucket / "run").exists():
      copies.append((f"killed-{len(copies)}", request))
      shutil.copytree(bucket / "run", bucket / copies[-1][0])

  server.fault = copy
  assert main(runs.train_args("gs://bucket/run", *SHORT)) == 0
  server.fault = lambda number, request: None
  return copies


def test_a_run_in_a_bucket_ends_as_on_a_disk(server, moments, whole):
  assert_same_run(server.folder / "bucket" / "run", whole)
  uploads = [r for _, r in moments if re.search("PUT.*metrics.jsonl", r)]
  # At the start, before each of 3 saves, after 2 evaluations; not for each of
  # 6 steps.
  assert len(uploads) == 6


@pytest.mark.parametrize(
  "operation",
  [
    pytest.param("PUT .*config.json", marks=pytest.mark.nightly),
    pytest.param("PUT .*4%2Fcommit_success.txt", marks=pytest.mark.nightly),
    pytest.param("PUT .*best.json", marks=pytest.mark.nightly),
    "DELETE .*checkpoints%2F2%2F.*manifest",
    pytest.param("PUT .*metrics.jsonl", marks=pytest.mark.nightly),
  ],
)
def test_a_run_killed_here_ends_as_if_it_had_not_been(
  operation, runs, server, moments, whole
):
  found = [name for name, request in moments if re.search(operation, request)]
  name = found[len(found) // 2]
  assert main(runs.train_args(f"gs://bucket/{name}", *SHORT)) == 0
  assert_same_run(server.folder / "bucket" / name, whole)


@pytest.mark.nightly
def test_a_run_outlives_faults(runs, server, whole):
  faults = {20: 503, 60: "drop", 100: 503, 140: "drop", 180: 503}
  server.fault = lambda number, request: faults.get(number)
  assert main(runs.train_args("gs://bucket/faults", *SHORT)) == 0
  assert len(server.requests) > max(faults)
  assert_same_run(server.folder / "bucket" / "faults", whole)


def test_a_second_run_in_the_folder_is_refused(runs, server, moments, capsys):
  workdir = server.folder / "bucket" / "locked"
  shutil.copytree(server.folder / "bucket" / "run", workdir)
  owner = {"host": "elsewhere", "process": 1, "token": "x", "beat": 1}
  (workdir / "lock").write_text(json.dumps(owner))

  def beat(*_):
    owner["beat"] += 1
    (workdir / "lock").write_text(json.dumps(owner))

  server.fault = beat
  args = runs.train_args("gs://bucket/locked", *SHORT)
  assert main(args) == 2
  assert "process 1 on elsewhere trains in gs://" in capsys.readouterr().err


def test_a_bucket_that_may_not_be_read_is_one_line(runs, server, capsys):
  server.fault = lambda number, request: 403
  assert main(runs.train_args("gs://bucket/forbidden", *SHORT)) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "gs://bucket/forbidden cannot be read: " in line
  assert "403" in line


@pytest.mark.nightly
def test_weights_are_read_and_written(server, moments):
  bucket = server.folder / "bucket"

  def count(source):
    params = pretrained.read(source).params.values()
    return sum(math.prod(x.shape) for x in params)

  for to, out in (("npz", "a.npz"), ("orbax", "c")):
    args = ["convert", "gs://bucket/run", f"gs://bucket/{out}", f"--to={to}"]
    assert main(args) == 0
    assert count(str(bucket / out)) == count("gs://bucket/run")
    assert main(args) == 2  # nothing is overwritten


def test_a_report_and_an_export(server, moments):
  bucket = server.folder / "bucket"
  assert main(["report", "gs://bucket/run", "--out=gs://bucket/a.html"]) == 0
  assert "accuracy" in (bucket / "a.html").read_text()
  assert (
    main(["export", "gs://bucket/run", "gs://bucket/out", "--to=stablehlo"])
    == 0
  )
  about = json.loads((bucket / "out/export.json").read_text())
  assert (bucket / "out" / about["file"]).exists()


@pytest.mark.nightly
def test_a_sweep(runs, server, tmp_path, monkeypatch):
  monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
  _, *rest = runs.train_args("gs://bucket/sweep", *SHORT)
  grid = ["--grid=schedule.base_lr=0.001,0.003", "--seeds=1"]
  assert main(["sweep", *rest, *grid]) == 0
  result = json.loads((server.folder / "bucket/sweep/sweep.json").read_text())
  assert len(result["settings"]) == 2
  folders = sorted((server.folder / "bucket/sweep").glob("base_lr*"))
  assert [saved_steps(f)[-1] for f in folders] == [6, 6]
  server.reset()
  assert main(["sweep", *rest, *grid]) == 0  # nothing is left to do
  assert not [r for r in server.requests if "checkpoints" in r and "POST" in r]


def test_pseudo_labels_in_a_bucket(server, runs, tmp_path, capsys):
  def label(out):
    model = ["--checkpoint=ViT-N_8-digits", f"--data_dir={runs.data_dir}"]
    data_set = ["--dataset=digits", "--split=train[:50]", f"--out={out}"]
    return main(["pseudo-label", *model, *data_set, "--soft", "--json"])

  assert label(tmp_path / "set") == label("gs://bucket/set") == 0
  first, second = capsys.readouterr().out.splitlines()
  assert json.loads(first) == json.loads(second)
  folder = server.folder / "bucket" / "set"
  files = ["about.json", "index.npy", "labels.npy", "probabilities.npy"]
  assert sorted(path.name for path in folder.iterdir()) == files
  for name in files:
    assert (folder / name).read_bytes() == (
      tmp_path / "set" / name
    ).read_bytes()
  assert not (folder.parent / "set.parts").exists()
  names = (f"pseudo:{tmp_path}/set", "pseudo:gs://bucket/set")
  here, there = (data.get_source(x, "", str(runs.data_dir)) for x in names)
  assert here.read(np.arange(9)) == there.read(np.arange(9))
  assert here.identity() == there.identity()
  assert label("gs://bucket/set") == 0  # complete
  about = epath.Path("gs://bucket/set/about.json")
  about.unlink()  # killed while it was uploaded
  (folder / "labels.npy").write_bytes(b"half")
  assert label("gs://bucket/set") == 0
  for name in files:
    assert (folder / name).read_bytes() == (
      tmp_path / "set" / name
    ).read_bytes()
  about.unlink()
  (folder / "else").touch()
  assert label("gs://bucket/set") == 2  # not only such arrays
