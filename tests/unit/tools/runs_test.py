"""What is read of run folders."""

import math
import shutil
from pathlib import Path

import fake_runs
import pytest

from vit_jax.errors import UserError
from vit_jax.tools import runs


def _write(path, lines=(), config=None, **others):
  config = fake_runs.load("quickstart_finetune.py") | (config or {})
  return fake_runs.write(path, config, lines, total_steps=40, **others)


def test_runs_are_found_once_and_named_as_short_as_they_differ(tmp_path):
  a = _write(tmp_path / "sweep" / "lr=1" / "seed=0")
  b = _write(tmp_path / "sweep" / "lr=2" / "seed=0")
  # What a run made in its own folder, and what others made, are no runs.
  shutil.copytree(a, a / "checkpoints" / "1")
  for name, text in (
    ("converted", '{"config": {"model": {}}}'),
    ("huggingface", '{"model_type": "vit"}'),
  ):
    (tmp_path / "sweep" / name).mkdir()
    (tmp_path / "sweep" / name / "config.json").write_text(text)
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
    {"step": 20, "train/loss": "0.3"},
  ]
  path = _write(tmp_path / "run", lines, unfinished='{"step": 40, "train/l')
  (run,) = runs.find_runs([str(path)])
  assert (run.step, run.total_steps, run.finished) == (20, 40, False)
  assert run.series["train/loss"] == [(20, 0.4)]
  assert run.series["eval/accuracy"] == [(10, 0.5)]
  assert run.results == {}
  assert run.notes == [
    "2 lines of metrics.jsonl are corrupt.",
    "Values that are not finite are left out: train/loss.",
  ]
  (path / "metrics.jsonl").unlink()
  (run,) = runs.find_runs([str(path)])
  assert (run.step, run.series) == (0, {})
  assert runs.read_run(tmp_path) is None


def test_a_run_is_complete_once_all_is_evaluated(tmp_path):
  """One may be told to stop between its last checkpoint and its evaluation."""
  lines = [
    {"step": 40, "train/loss": 1.0},
    {"step": 40, "eval/accuracy": 0.5, "eval/loss": 1.5, "eval/examples": 9},
    {"step": 40, "small/5shot": 0.25},
  ]
  config = {
    "evals": {"small": {"type": "fewshot"}},
    "best_metric": "small/5shot",
  }
  found = {}
  for count in range(4):
    path = _write(tmp_path / str(count), lines[:count], config)
    (path / "checkpoints" / "40").mkdir(parents=True)
    found[count] = runs.read_run(path)
  assert [run.is_complete for run in found.values()] == [False] * 3 + [True]
  run = found[3]
  assert run.find_result() == ("small/5shot", 0.25)
  assert run.find_result("loss") == ("loss", 1.5)
  with pytest.raises(UserError, match=r"from accuracy, loss, small/5shot$"):
    run.find_result("f1")
  assert runs.order("small/loss", 0.1) < runs.order("small/loss", 0.2)
  assert runs.order("accuracy", 0.2) < runs.order("accuracy", 0.1)
