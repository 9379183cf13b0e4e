"""What is read of run folders."""

import math
import shutil
from pathlib import Path

import fake_runs
import pytest

from vit_jax.errors import UserError
from vit_jax.tools import runs


def _write(path, lines=(), **others):
  config = fake_runs.load("quickstart_finetune.py")
  return fake_runs.write(path, config, lines, total_steps=40, **others)


def test_runs_are_found_once_and_named_as_short_as_they_differ(tmp_path):
  a = _write(tmp_path / "sweep" / "lr=1" / "seed=0")
  b = _write(tmp_path / "sweep" / "lr=2" / "seed=0")
  # What a run made in its own folder, and what others made, are no runs.
  shutil.copytree(a, a / "checkpoints" / "1")
  converted = tmp_path / "sweep" / "converted"
  converted.mkdir()
  (converted / "config.json").write_text('{"config": {"model": {}}}')
  found = runs.find_runs([str(tmp_path / "sweep"), str(a)])
  assert [run.name for run in found] == ["lr=1/seed=0", "lr=2/seed=0"]
  assert [Path(run.path) for run in found] == [a, b]
  assert [run.name for run in runs.find_runs([str(b)])] == ["seed=0"]


def test_a_run_in_progress_is_read_as_far_as_it_is(tmp_path):
  lines = [
    {"step": 10, "train/loss": math.nan},
    {"step": 10, "eval/accuracy": 0.5, "eval/examples": 5},
    {"step": 20, "train/loss": 0.4},
    {"train/loss": 0.3},
  ]
  path = _write(tmp_path / "run", lines, unfinished='{"step": 40, "train/l')
  (run,) = runs.find_runs([str(path)])
  assert (run.step, run.total_steps, run.finished) == (20, 40, False)
  assert run.series["train/loss"] == [(20, 0.4)]
  assert run.evaluations == {10: {"accuracy": 0.5, "examples": 5}}
  assert run.results == {}
  assert run.notes == [
    "1 lines of metrics.jsonl are corrupt.",
    "Values that are not finite are left out: train/loss.",
  ]
  (path / "metrics.jsonl").unlink()
  (run,) = runs.find_runs([str(path)])
  assert (run.step, run.series) == (0, {})
  assert runs.read_run(tmp_path) is None


def test_what_runs_are_compared_by():
  assert runs.find_main({"loss": 1.0, "prec@1": 0.5}) == "prec@1"
  assert runs.choose_metric({"loss": 1.0, "accuracy": 0.5}, "loss") == "loss"
  assert runs.choose_metric({}, "loss") is None
  with pytest.raises(UserError, match=r"is 'f1'; choose from accuracy, loss$"):
    runs.choose_metric({"loss": 1.0, "accuracy": 0.5, "examples": 9}, "f1")
  assert runs.order("loss", 0.1) < runs.order("loss", 0.2)
  assert runs.order("accuracy", 0.2) < runs.order("accuracy", 0.1)
