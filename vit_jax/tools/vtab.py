"""The `vtab` command: VTAB-1k, from a checkpoint to the mean of its tasks.

Two sweeps. The first tries a few settings on 800 images of each task and looks
at 200 others; one setting is chosen, by default as in the paper (Appendix
B.1.1): the same for all tasks, that with the best mean. The second trains with
it on all 1,000 images, and reports the test set, which nothing else looks at.

  WORKDIR/TASK/select/SETTING,seed=0    WORKDIR/TASK/final/seed=0
  WORKDIR/TASK/{select,final}/sweep.json    WORKDIR/vtab.json
"""

import contextlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax import data, files, pretrained
from vit_jax.errors import UserError
from vit_jax.tools import sweep
from vit_jax.tools.jobs import divide_devices, lock
from vit_jax.tools.text import format_columns

log = logging.getLogger(__name__)

# Of the paper's two learning rates and two schedules only the winner is
# printed: 0.01 and 2,500 steps. The others here are ours.
GRID = {"schedule.base_lr": ["0.003", "0.01"], "total_steps": ["500", "2500"]}
MINI_GRID = {"schedule.base_lr": ["0.02", "0.05"]}
_SELECTION = {"train.split": "train800", "eval.split": "val200"}
_FINAL = {"train.split": "train800val200", "eval.split": "test"}

# What of a model its weights decide.
_OF_THE_WEIGHTS = (
  "classifier",
  "pos_embedding",
  "pos_embedding_at",
  "activation",
  "layer_norm_epsilon",
)


def vtab(
  source: str,
  workdir: str,
  *,
  tasks: str = "all",
  overrides: dict[str, str] | None = None,
  grid: dict[str, list[str]] | None = None,
  per_task: bool = False,
  seeds: int = 1,
  jobs: int = 1,
) -> dict[str, Any]:
  """Runs VTAB, or what is left of it, and writes `workdir`/vtab.json.

  Args:
    source: the weights, whatever `vit_jax.load` reads.
    workdir: a local folder.
    tasks: "all", "mini" or names: "caltech101,dtd".
    overrides: {key: text} of configs/vtab.py, for all tasks.
    grid: {key: texts}; unset: `GRID`, or `MINI_GRID` for the mini tasks.
    per_task: whether each task gets the setting that is best for it.
    seeds: how many final trainings of each task.
    jobs: how many runs at once.

  Returns:
    See `summarize`.

  Raises:
    UserError: no such task, weights or data; see `sweep.plan`.
    RunStopped: a run failed.
  """
  if seeds < 1:
    raise UserError(f"--seeds is {seeds}; it must be 1 or more")
  chosen = parse_tasks(tasks)
  folder = sweep.local_folder(workdir)
  overrides = overrides or {}
  _check_overrides(overrides)
  if not grid:  # what is given is not tried
    default = MINI_GRID if _is_mini(chosen[0]) else GRID
    grid = {k: v for k, v in default.items() if k not in overrides}
  plan = _make_plan(source, folder, overrides)
  trials = {t.name: plan(t, "select", _SELECTION, grid, 1) for t in chosen}
  environments = divide_devices(jobs)
  _open_data(chosen, overrides.get("data_dir"))
  with lock(folder) as lock_fd:

    def run(trials):
      """Returns the results of each task's trials, None if stopped."""
      results, stopped = sweep.run_groups(trials, environments, lock_fd, None)
      sweep.raise_if_failed([r for s in results.values() for r in s["runs"]])
      return None if stopped else results

    log.info("selecting: %d images of each task, %s", 800, grid)
    selected = run(trials)
    settings = selected and choose(selected, per_task)
    finals = None
    if settings:
      log.info("final: 1,000 images of each task, %s", settings)
      finals = run(
        {
          t.name: plan(t, "final", _FINAL | settings[t.name], {}, seeds)
          for t in chosen
        }
      )
    if not finals:
      log.info("stopped; run it again to go on")
    result = summarize(source, chosen, grid, selected, settings, finals)
    files.write_json(folder / "vtab.json", result)
  return result


def _check_overrides(overrides):
  given = sorted(overrides.keys() & {*_FINAL, "train.dataset", "init_from"})
  if given:
    raise UserError(f"--config.{given[0]} is for vtab to set; leave it out")


def _is_mini(task):
  return task.name.startswith(data.MINI)


def _make_plan(source, folder, overrides):
  """Returns (task, "select" or "final", changes, grid, seeds) -> trials."""
  weights = pretrained.read(source)
  model = {
    f"model.{name}": str(weights.model[name])
    for name in _OF_THE_WEIGHTS
    if name in weights.model
  }
  common = {**model, "init_from": source, **overrides}
  variant = weights.model["variant"]

  def plan(task, kind, changes, grid, seeds):
    name = "vtab_mini" if _is_mini(task) else "vtab"
    return sweep.plan(
      f"configs/{name}.py:{variant},{task.name}",
      folder / task.name.partition(":")[2] / kind,
      {**common, **changes},
      grid,
      seeds,
    )

  return plan


def parse_tasks(text: str) -> list[data.Task]:
  """Returns the tasks of "all", "mini" or "caltech101,dtd".

  Raises:
    UserError: there is no such task, or tasks of both kinds.
  """
  for word, prefix in (("all", data.VTAB), ("mini", data.MINI)):
    if text == word:
      return data.list_tasks(prefix)
  names = [name.strip() for name in text.split(",")]
  names = [name if ":" in name else data.VTAB + name for name in names]
  if len(set(names)) < len(names):
    raise UserError(f"--tasks={text}: a task is given twice")
  found = []
  for name in names:
    task = data.find_task(name)
    if task is None or not name.startswith((data.VTAB, data.MINI)):
      raise UserError(f"--tasks={text}: {name} is no task of VTAB")
    found.append(task)
  if len({name.partition(":")[0] for name in names}) > 1:
    raise UserError(f"--tasks={text}: take tasks of vtab or of mini, not both")
  return found


def _open_data(tasks, data_dir):
  """Sees that all splits are there, before the first run starts.

  Raises:
    UserError: one is not.
  """
  for task in tasks:
    if _is_mini(task):  # made in seconds, without a download
      # TFDS prints its progress; stdout is for the result.
      with contextlib.redirect_stdout(sys.stderr):
        data.prepare(task.name, data_dir)
    for split in ("train800", "val200", "test"):
      data.get_source(task.name, split, data_dir)


def choose(
  selected: dict[str, dict[str, Any]], per_task: bool
) -> dict[str, dict[str, str]]:
  """Returns the setting of each task.

  Args:
    selected: {task: `sweep.summarize` of it}; the same settings in each.
    per_task: its own best, or that with the best mean over the tasks.
  """
  if per_task:
    return {name: found["best"]["setting"] for name, found in selected.items()}
  columns = zip(*(f["settings"] for f in selected.values()), strict=True)
  best = max(columns, key=lambda column: np.mean([e["mean"] for e in column]))
  setting: dict[str, str] = dict(best[0]["setting"])
  return dict.fromkeys(selected, setting)


def summarize(
  source, tasks, grid, selected, settings, finals
) -> dict[str, Any]:
  """Returns the results of the tasks, their groups and all.

  Returns:
    {"checkpoint", "grid", "tasks": [{"task", "title", "group", "setting",
    "validation": accuracy on 200 images with it, "accuracy": the mean on the
    test set, "spread": the sample standard deviation, None for one seed,
    "accuracies": of each seed, "recipe"}], "groups": {group: the mean of its
    tasks}, "mean": of all tasks}. What is not known yet is None.
  """
  rows = []
  for task in tasks:
    row = {"task": task.name, "title": task.title, "group": task.group}
    row |= dict.fromkeys(("setting", "validation", "accuracy", "spread"))
    if settings:
      row["setting"] = settings[task.name]
      entries = selected[task.name]["settings"]
      row["validation"] = next(
        entry["mean"] for entry in entries if entry["setting"] == row["setting"]
      )
    if finals:
      (entry,) = finals[task.name]["settings"]
      runs = finals[task.name]["runs"]
      row |= {
        "accuracy": entry["mean"],
        "spread": entry["spread"],
        "accuracies": [run["metric"] for run in runs],
        "examples": runs[0]["results"]["examples"],
        "recipe": runs[0]["recipe"],
      }
    rows.append(row)

  def mean(some: Sequence[dict]) -> float | None:
    return float(np.mean([r["accuracy"] for r in some])) if finals else None

  groups = dict.fromkeys(task.group for task in tasks)
  return {
    "checkpoint": source,
    "grid": grid,
    "tasks": rows,
    "groups": {g: mean([r for r in rows if r["group"] == g]) for g in groups},
    "mean": mean(rows),
  }


def format_report(result: dict[str, Any]) -> str:
  """Returns the result as lines for people."""

  def show(value):
    return "-" if value is None else f"{value:.2%}"

  rows: list[tuple[str, ...]]
  rows = [("task", "val200", "test", "spread", "setting")]
  for row in result["tasks"]:
    numbers = (row["validation"], row["accuracy"], row["spread"])
    setting = ",".join(f"{k}={v}" for k, v in (row["setting"] or {}).items())
    rows.append((row["title"], *map(show, numbers), setting))
  for name, value in {**result["groups"], "mean": result["mean"]}.items():
    rows.append((name, "", show(value), "", ""))
  return "\n".join(format_columns(rows, "<>>><"))
