"""docs/extending.md: its additions, made to a copy, add up to a run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import copy

_REPO = Path(__file__).parents[2]
_TEXT = (_REPO / "docs" / "extending.md").read_text(encoding="utf-8")


def _add(root):
  """Copies the project, and makes the changes of the document.

  Returns:
    {heading: {changed file: whether it is new}}
  """
  copy(root)
  touched = {}
  for section in re.split(r"^## ", _TEXT, flags=re.M)[1:]:
    heading, _, blocks = section.partition("\n")
    files = _add_section(root, blocks)
    if files:
      touched[heading.lower()] = files
  return touched


def _add_section(root, blocks):
  touched = {}
  for kind, name, text in re.findall(
    r"^```(python|diff)\n# (\S+)\n(.*?)^```$", blocks, re.M | re.S
  ):
    path = root / name
    if kind == "python":
      assert not path.exists()
      path.write_text(text)
      touched[name] = True
      continue
    lines = text.splitlines(keepends=True)
    old, new = (
      "".join(line[1:] for line in lines if line[0] in marks)
      for marks in (" -", " +")
    )
    before = path.read_text()
    if old:
      assert before.count(old) == 1, f"{name} has not once:\n{old}"
      path.write_text(before.replace(old, new))
    touched.setdefault(name, False)
  return touched


def test_the_table_says_what_is_touched(tmp_path):
  touched = _add(tmp_path)
  rows = re.findall(r"^\| (an? .*?) \| .* \| (\d of \d) \|$", _TEXT, re.M)
  assert dict(rows) == {
    heading: f"{sum(files.values())} of {len(files)}"
    for heading, files in touched.items()
  }


@pytest.mark.nightly
def test_the_additions_run(tmp_path):
  _add(tmp_path)
  commands = re.findall(r"^vit-jax (.+)$", _TEXT, re.M)
  environment = {
    **os.environ,
    "PYTHONPATH": str(tmp_path),
    "TFDS_DATA_DIR": str(tmp_path / "data"),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
  }
  (tests,) = re.findall(r"^python (-m pytest .+)$", _TEXT, re.M)
  subprocess.run(
    [sys.executable, *tests.split()], cwd=tmp_path, env=environment, check=True
  )

  def call(command):
    return subprocess.run(
      [sys.executable, "-m", "vit_jax", *command.split()],
      cwd=tmp_path,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )

  said = {}
  for command in commands:
    done = call(command)
    assert done.returncode == 0, done.stderr
    said[command.split()[0]] = done.stdout
  assert said["classes"].split() == ["lying", "standing"]
  run = tmp_path / "runs" / "stripes"
  config = json.loads((run / "config.json").read_text())["config"]
  assert config["model"]["logit_scale"] == 2
  lines = (run / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  steps = {
    name: [line["step"] for line in found if name in line]
    for name in ("eval/accuracy", "sure/confidence", "few/5shot")
  }
  assert steps == {
    "eval/accuracy": [30, 60],
    "sure/confidence": [20, 40, 60],
    "few/5shot": [30, 60],
  }
  last = {name: x for line in found for name, x in line.items()}
  assert last["few/5shot"] > 0.7
  assert last["eval/accuracy"] > 0.7
  masked = "--config.objective=masked_patches --config.loss.name=sigmoid"
  train = f"train --config=stripes --workdir=runs/masked {masked}"
  refused = call(train)
  assert "config.model.logit_scale is 2.0 and has no effect" in refused.stderr
  refused = call(f"{train} --config.model.logit_scale=1")
  assert "config.evals.sure.type is 'confidence'; it needs" in refused.stderr
