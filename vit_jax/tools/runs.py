"""Readers of run folders, as `vit-jax train` and other commands write them."""

import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax import checkpoint, files
from vit_jax import config as configuration
from vit_jax.errors import UserError, check_choice

log = logging.getLogger(__name__)

# Metrics to compare runs by; the first that exists is used.
MAIN_METRICS = ("accuracy", "prec@1", "r2", "loss")
# Results that are counts of images.
COUNTS = {"examples", "labelled"}

# Subfolders of a run folder; they have many files and no runs.
_OF_A_RUN = (
  *("checkpoints", "best", "damaged", "tensorboard", "profile", "wandb"),
)
# Keys in which runs of the same setting may differ.
_OF_ONE_RUN = {"seed", "init_from", *configuration.RESUMABLE}
_ADVICE = "move its folder away"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A run folder, read once."""

  path: Any  # absolute
  name: str  # short, and unique among the runs found together
  written: dict[str, Any]  # config.json
  lines: list[dict[str, Any]]  # of metrics.jsonl, in the order of their "step"
  num_corrupt: int  # its corrupt lines

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The flat configuration with current keys: {"schedule.base_lr": 0.03}."""
    flat = configuration.flatten(self.written["config"])
    return configuration.modernize(flat)

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    return self.written["total_steps"]

  @property
  def step(self) -> int:
    """The last step in metrics.jsonl, 0 before the first."""
    return self.lines[-1]["step"] if self.lines else 0

  @property
  def finished(self) -> bool:
    """Whether the last step has been done."""
    return self.step == self.total_steps

  @property
  def setting(self) -> str:
    """A text that is equal for runs that differ only in their seeds."""
    evals = {key for key in self.config if key.startswith("evals.")}
    kept = sorted(self.config.keys() - _OF_ONE_RUN - evals)
    return json.dumps({key: self.config[key] for key in kept})

  @functools.cached_property
  def series(self) -> dict[str, list[tuple[int, float]]]:
    """{"train/loss": [(step, value), ...]}, finite values only."""
    series = {}
    for values in self.lines:
      for name, x in values.items():
        if name != "step" and math.isfinite(x):
          series.setdefault(name, []).append((values["step"], x))
    return series

  @functools.cached_property
  def results(self) -> dict[str, float]:
    """The evaluations after the last step, {} until then.

    {"accuracy": 0.9, ...}; those of `config.evals` as NAME/METRIC.
    """
    return {
      name.removeprefix("eval/"): x
      for values in self.lines
      for name, x in values.items()
      if values["step"] == self.total_steps
      and name.partition("/")[0] not in ("step", "train", "speed")
    }

  @property
  def is_complete(self) -> bool:
    """Whether the last step is saved and has all its evaluations.

    A run evaluates after it saves, and may be stopped before or during that.
    """
    wanted = {""} if self.config["eval.split"] else set()
    wanted |= {k.split(".")[1] for k in self.config if k.startswith("evals.")}
    found = {name.rpartition("/")[0] for name in self.results}
    saved = checkpoint.list_steps(self.path)
    return self.total_steps in saved and wanted <= found

  def find_result(self, select: str | None = None) -> tuple[str, float]:
    """Returns the name and value of the metric to compare a complete run by.

    That is `select` (METRIC or NAME/METRIC), else `config.best_metric`, else
    one of `MAIN_METRICS`.

    Raises:
      UserError: it has not been evaluated.
    """
    results = self.results
    name = select or self.config.get("best_metric") or find_main(results) or ""
    name = name.removeprefix("eval/")
    choices = (x for x in sorted(results) if x.split("/")[-1] not in COUNTS)
    check_choice("--select", name, choices)
    return name, results[name]

  @property
  def notes(self) -> list[str]:
    """Problems of metrics.jsonl, one sentence each."""
    notes = []
    if self.num_corrupt:
      notes.append(f"{self.num_corrupt} lines of metrics.jsonl are corrupt.")
    pairs = [pair for values in self.lines for pair in values.items()]
    if names := {name for name, x in pairs if not math.isfinite(x)}:
      infinite = ", ".join(sorted(names))
      notes.append(f"Values that are not finite are left out: {infinite}.")
    return notes

  def read_json(self, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file in the folder, {} without the file.

    Raises:
      UserError: the file is corrupt.
    """
    file = self.path / name
    return files.read_json(file, _ADVICE) if file.exists() else {}


def find_main(results) -> str | None:
  """Returns the main metric in a run's results, None without one."""
  return next((name for name in MAIN_METRICS if name in results), None)


def order(metric: str, value: float) -> float:
  """Returns a sort key that puts the best result first."""
  return value if metric.rpartition("/")[2] == "loss" else -value


def find_runs(folders: Sequence[str]) -> list[Run]:
  """Returns the runs in and below folders, each once.

  Raises:
    UserError: a folder is missing or has no run, or a config.json cannot be
      read.
  """
  found = {}
  for folder in folders:
    root = checkpoint.absolute(folder)
    if not root.is_dir():
      raise UserError(f"{folder}: no such folder")
    inside = [path for path in _walk(root, set()) if _has_run(path)]
    if not inside:
      raise UserError(
        f"{folder} has no run in it or below it; a run is a folder with "
        "config.json and metrics.jsonl, which `vit-jax train` writes"
      )
    for path in inside:
      found.setdefault(os.path.realpath(path), path)
  names = name_paths([str(path) for path in found.values()])
  runs = [*map(_read, found.values(), names)]
  for run in runs:
    if run.num_corrupt:
      file = run.path / "metrics.jsonl"
      log.warning("%s: %d corrupt lines left out", file, run.num_corrupt)
  return runs


def read_run(folder) -> Run | None:
  """Returns the run in a folder, None before it has begun.

  Raises:
    UserError: a config.json that cannot be read.
  """
  path = checkpoint.absolute(folder)
  return _read(path, path.name) if files.has_run(path) else None


def _has_run(path) -> bool:
  try:
    written = files.read_run(path, _ADVICE)
  except files.NotOfARun:
    return False
  # Converted checkpoints do not have these keys.
  return "total_steps" in written and "train" in written["config"]


def _read(path, name) -> Run:
  lines, num_corrupt = files.read_metrics(path)
  return Run(path, name, files.read_run(path, _ADVICE), lines, num_corrupt)


def _walk(folder, seen) -> Iterator:
  """Yields the folders with a config.json, this one and those below it.

  Each is yielded once, as a folder rather than as a link to it.
  """
  real = os.path.realpath(folder)
  if real in seen:
    return
  seen.add(real)
  is_run = files.has_run(folder)
  if is_run:
    yield folder
  for path in sorted(folder.iterdir(), key=lambda p: (os.path.islink(p), p)):
    if path.is_dir() and not (is_run and path.name in _OF_A_RUN):
      yield from _walk(path, seen)


def name_paths(paths: Sequence[str]) -> list[str]:
  """Returns a short name for each path, without their common folders."""
  parts = [path.rstrip("/").split("/") for path in paths]
  folders = zip(*(words[:-1] for words in parts), strict=False)
  shared = itertools.takewhile(lambda names: len({*names}) == 1, folders)
  start = len(list(shared))
  return ["/".join(words[start:]) for words in parts]


def find_origin(run: Run, runs: list[Run]) -> Run | None:
  """Returns the run whose weights a run started from, None for no run.

  Because folders may have been moved together, the folder's name is enough if
  it is unique.
  """
  source = run.config["init_from"]
  if not source:
    return None
  folder = re.sub(r"(^|/)(checkpoints|best)/\d+$", "", source.rstrip("/"))
  path = checkpoint.absolute(folder)
  exact = [other for other in runs if other.path == path]
  named = [other for other in runs if other.path.name == path.name]
  candidates = exact or named
  return candidates[0] if len(candidates) == 1 else None
