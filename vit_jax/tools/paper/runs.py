"""Run folders as results: what was trained on what, from what, how well."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vit_jax import checkpoint
from vit_jax import config as configuration
from vit_jax.errors import UserError
from vit_jax.pretrained.names import PUBLISHED
from vit_jax.tools.paper import data

log = logging.getLogger(__name__)

# What two pre-trainings of a model and a data set may differ in.
_KINDS = {
  "optimizer.name": "adam",
  "model.pos_embedding": "learned",
  "model.pos_embedding_at": "input",
}
# Of keys that the first runs do not have.
_OLD_DEFAULTS = {
  "objective": "classification",
  "init_from": None,
  "ema_decay": 0.0,
  "total_epochs": 0.0,
  "optimizer.clip_norm": 0.0,
}
# Without these a folder is no run of ours.
NEEDED = {"model.variant", "train.dataset", "train.split", "eval.split"}
NEEDED |= {"image_size", "batch_size", "optimizer.name", "schedule.decay"}
# Folders of a run; they have many files and no runs.
_OF_A_RUN = ("checkpoints", "best", "damaged", "tensorboard", "profile")
# What runs of the same setting may differ in.
_OF_ONE_RUN = {"seed", "init_from", *configuration.RESUMABLE}
# A step more or less, or some images held out, is the same number of epochs.
_EPOCHS_TOLERANCE = 0.03


class Pretraining(NamedTuple):
  """What weights come from.

  Attributes:
    variant: our name of the model.
    dataset: our name of the data set.
    epochs: of it.
    overrides: ((key, value), ...) where it is not the model's usual one.
  """

  variant: str
  dataset: str
  epochs: int
  overrides: tuple[tuple[str, Any], ...] = ()

  def published(self) -> str | None:
    """Returns the name of the weights that the paper's authors published.

    Of their ImageNet-21k files, which are those of 90 epochs.
    """
    if self.dataset == "imagenet21k" and self.epochs == 90:
      name = f"{self.variant}-imagenet21k"
      if name in PUBLISHED and not self.overrides:
        return name
    return None


class Run(NamedTuple):
  """A run folder.

  Attributes:
    path: of it.
    config: flat, {"schedule.base_lr": 0.03}.
    total_steps: of the whole run.
    finished: whether the last step has been done.
    results: of the evaluation after the last step; {} until then.
  """

  path: Any
  config: dict[str, Any]
  total_steps: int
  finished: bool
  results: dict[str, float]

  def setting(self) -> str:
    """Returns what is equal for runs that differ in their seeds alone."""
    return json.dumps(
      {k: v for k, v in sorted(self.config.items()) if k not in _OF_ONE_RUN}
    )

  def read_json(self, name: str) -> dict[str, Any]:
    """Returns what a command wrote into the folder, {} for nothing.

    Raises:
      UserError: something else is there.
    """
    file = self.path / name
    if not file.exists():
      return {}
    return _parse(file.read_text(), file)


def _parse(text, file):
  try:
    found = json.loads(text)
  except json.JSONDecodeError as e:
    raise UserError(f"{file} is damaged: {e}; move its folder away") from e
  if not isinstance(found, dict):
    raise UserError(f"{file} is not what a run writes; move its folder away")
  return found


def find_runs(folder: str) -> list[Run]:
  """Returns the runs below a folder, in the order of their paths.

  Raises:
    UserError: no such folder, none in it, or a file that cannot be read.
  """
  root = checkpoint.absolute(folder)
  if not root.is_dir():
    raise UserError(f"--runs={folder}: there is no such folder")
  runs = [run for path in walk(root) if (run := read_run(path))]
  if not runs:
    raise UserError(
      f"--runs={folder} has no run in it or below it; a run is a folder with "
      "config.json and metrics.jsonl, which `vit-jax train` writes"
    )
  return runs


def walk(folder) -> Iterator:
  """Yields what may be run folders: this one and those below it, each once.

  They have a config.json. What a run itself made in its folder is left out. Of
  a folder and links to it the folder is taken, or the first link.
  """
  yield from _walk(folder, set())


def _walk(folder, seen):
  real = os.path.realpath(folder)
  if real in seen:
    return
  seen.add(real)
  names = {path.name: path for path in folder.iterdir()}
  is_run = "config.json" in names
  if is_run:
    yield folder
  for name in sorted(names, key=lambda n: (os.path.islink(names[n]), n)):
    if names[name].is_dir() and not (is_run and name in _OF_A_RUN):
      yield from _walk(names[name], seen)


def name_runs(paths: Sequence[str]) -> list[str]:
  """Returns a name for each path: what follows the folders of all."""
  if len(paths) < 2:
    return [path.rstrip("/").split("/")[-1] for path in paths]
  common = os.path.commonpath(paths) if "://" not in "".join(paths) else ""
  names = [os.path.relpath(p, common) if common else p for p in paths]
  names = [common.split("/")[-1] if n == "." else n for n in names]
  return names if len({*names}) == len(names) else [*paths]


def read_metrics(run_folder) -> tuple[list[dict[str, Any]], int]:
  """Returns the lines of a run's metrics.jsonl, and how many are damaged.

  The last one is left out while it is being written. Each has a "step".
  """
  file = run_folder / "metrics.jsonl"
  text = file.read_bytes().decode(errors="replace") if file.exists() else ""
  lines = text.splitlines(keepends=True)
  if lines and not lines[-1].endswith("\n"):
    del lines[-1]
  found = []
  for line in lines:
    try:
      values = json.loads(line)
      found.append(values | {"step": int(values["step"])})
    except (ValueError, KeyError, TypeError):
      continue
  return found, len(lines) - len(found)


def read_run(path) -> Run | None:
  """Returns a run, None for a folder that is none.

  Raises:
    UserError: a file that cannot be read.
  """
  written = _parse((path / "config.json").read_text(), path / "config.json")
  measured = (path / "metrics.jsonl").exists()
  if not measured or not {"config", "total_steps"} <= written.keys():
    return None
  config = _OLD_DEFAULTS | configuration.flatten(written["config"])
  if not config.keys() >= NEEDED:
    return None
  total_steps = written["total_steps"]
  last = _read_last(path, total_steps)
  return Run(path, config, total_steps, last is not None, last or {})


def _read_last(path, total_steps):
  """Returns what was measured after the last step, None before it."""
  lines, damaged = read_metrics(path)
  if damaged:
    file = path / "metrics.jsonl"
    log.warning("%s: %d lines cannot be read and are left out", file, damaged)
  found = None
  for values in lines:
    if values["step"] == total_steps:
      found = found or {}
      found |= {
        name.removeprefix("eval/"): x
        for name, x in values.items()
        if name.startswith("eval/")
      }
  return found


def plain_name(dataset: str) -> str:
  """Returns a data set's name without configuration and version.

  "imagenet21k_clean", that is freed of test images, is "imagenet21k": as the
  paper's are.
  """
  if dataset.startswith(("vtab:", "mini:", "folder:")):
    return dataset
  return dataset.partition(":")[0].partition("/")[0].removesuffix("_clean")


def is_pretraining(run: Run, wanted: Pretraining) -> bool:
  """Returns whether a run is this pre-training, finished or not."""
  kinds = _KINDS | {k: v for k, v in wanted.overrides if k in _KINDS}
  return (
    run.config["objective"] == "classification"
    and run.config["model.variant"] == wanted.variant
    and plain_name(run.config["train.dataset"]) == wanted.dataset
    and not run.config["init_from"]
    and abs(count_epochs(run) / wanted.epochs - 1) < _EPOCHS_TOLERANCE
    and all(run.config.get(k, v) == v for k, v in kinds.items())
  )


def count_epochs(run: Run) -> float:
  """Returns a run's epochs, from the paper's sizes where it counts steps."""
  if run.config["total_epochs"]:
    return run.config["total_epochs"]
  examples = run.total_steps * run.config["batch_size"]
  for known in data.load()["pretraining"].values():
    if known["dataset"] == plain_name(run.config["train.dataset"]):
      return examples / known["images"]
  return 0


def find_origin(run: Run, runs: list[Run]) -> Run | None:
  """Returns the run whose weights a run started from, None for no run.

  Folders may have been moved together: then the last name has to do, if there
  is but one run of that name.
  """
  source = run.config["init_from"]
  if not source:
    return None
  parts = source.rstrip("/").split("/")
  if parts[-1].isdigit() and parts[-2:-1] in (["checkpoints"], ["best"]):
    parts = parts[:-2]
  path = checkpoint.absolute("/".join(parts))
  exact = [other for other in runs if other.path == path]
  named = [other for other in runs if other.path.name == parts[-1]]
  candidates = exact or named
  return candidates[0] if len(candidates) == 1 else None


def comes_from(run: Run, wanted: Pretraining, runs: list[Run]) -> bool:
  """Returns whether a run started from this pre-training's weights."""
  source = run.config["init_from"] or ""
  name = wanted.published()
  file = f"/imagenet21k/{wanted.variant}.npz"
  if name and (source == name or source.endswith(file)):
    return True
  origin = find_origin(run, runs)
  return origin is not None and is_pretraining(origin, wanted)
