"""The `vtab` command: VTAB-1k accuracies of a checkpoint.

It runs two sweeps. The first trains with a few settings on 800 images of each
task and evaluates on the other 200. By default the setting with the best mean
is chosen for all tasks, as in the paper (Appendix B.1.1). The second sweep
trains with it on all 1,000 images and evaluates on the test set, which is not
used before.

  WORKDIR/TASK/select/SETTING,seed=0    WORKDIR/TASK/final/seed=0
  WORKDIR/TASK/{select,final}/sweep.json    WORKDIR/vtab.json
"""

import contextlib
import statistics
import sys
from typing import Any

from vit_jax import data, files, pretrained
from vit_jax.errors import UserError
from vit_jax.tools import jobs, sweep
from vit_jax.tools.text import format_columns

# The paper tried two learning rates and two schedules, but prints only the
# best: 0.01 and 2,500 steps. The other values are ours.
GRID = {"schedule.base_lr": ["0.003", "0.01"], "total_steps": ["500", "2500"]}
MINI_GRID = {"schedule.base_lr": ["0.02", "0.05"]}
_SELECTION = {"train.split": "train800", "eval.split": "val200"}
_FINAL = {"train.split": "train800val200", "eval.split": "test"}

# Settings of a model that its weights determine.
_OF_THE_WEIGHTS = (
  *("classifier", "pos_embedding", "pos_embedding_at"),
  *("activation", "layer_norm_epsilon"),
)


def vtab(
  source: str,
  workdir: str,
  *,
  tasks: str = "all",
  overrides: dict[str, str],
  grid: dict[str, list[str]],
  per_task: bool = False,
  seeds: int = 1,
  **where,
) -> dict[str, Any]:
  """Runs or resumes VTAB, and writes `workdir`/vtab.json.

  Args:
    source: the weights, whatever `vit_jax.load` reads.
    workdir: a local path or a gs:// address; gets one folder per task.
    tasks: "all", "mini" or names: "caltech101,dtd".
    overrides: {key: text} of configs/vtab.py, for all tasks.
    grid: {key: texts}; empty: `GRID`, or `MINI_GRID` for the mini tasks.
    per_task: whether the setting is chosen for each task separately.
    seeds: number of final runs per task.
    **where: see `jobs.Executor`.

  Returns:
    See `summarize`.

  Raises:
    UserError: no such task, weights or data; see `sweep.plan`.
    RunStopped: a run failed.
  """
  chosen = parse_tasks(tasks)
  is_mini = chosen[0].name.startswith(data.MINI)
  folder = sweep.find_folder(workdir)
  for key in overrides.keys() & {*_FINAL, "train.dataset", "init_from"}:
    raise UserError(f"--config.{key} is set by vtab; leave it out")
  if not grid:  # overridden keys are not searched
    default = MINI_GRID if is_mini else GRID
    grid = {k: v for k, v in default.items() if k not in overrides}
  model = pretrained.read(source).model
  common = {f"model.{k}": str(model[k]) for k in _OF_THE_WEIGHTS if k in model}
  common |= {"init_from": source, **overrides}

  def plan(task):
    file = "vtab_mini" if is_mini else "vtab"
    config = f"configs/{file}.py:{model['variant']},{task.name}"
    path = folder / task.name.partition(":")[2]
    trials = sweep.plan(config, path / "select", common | _SELECTION, grid, 1)
    return trials, lambda setting: sweep.plan(
      config, path / "final", common | _FINAL | setting, {}, seeds
    )

  plans = {task.name: plan(task) for task in chosen}
  executor = jobs.Executor(**where)
  if is_mini:  # generated in seconds, without a download
    for task in chosen:
      # TFDS prints its progress; stdout is for the result.
      with contextlib.redirect_stdout(sys.stderr):
        data.prepare(task.name, overrides.get("data_dir"))
  selected, finals = sweep.select_and_train(
    folder, plans, lambda found: choose(found, per_task), executor
  )
  result = summarize(chosen, selected, finals)
  result |= {"checkpoint": source, "grid": grid}
  files.write_json(folder / "vtab.json", result)
  return result


def parse_tasks(text: str) -> list[data.Task]:
  """Returns the tasks of "all", "mini" or "caltech101,dtd".

  Raises:
    UserError: no such task, or tasks of both kinds.
  """
  for word, prefix in (("all", data.VTAB), ("mini", data.MINI)):
    if text == word:
      return data.list_tasks(prefix)
  names = [name.strip() for name in text.split(",")]
  names = [name if ":" in name else data.VTAB + name for name in names]
  kinds = {name.partition(":")[0] + ":" for name in names}
  if len({*names}) < len(names) or kinds not in ({data.VTAB}, {data.MINI}):
    raise UserError(
      f"--tasks={text} must be different tasks, all of vtab or all of mini"
    )
  return [task for name in names if (task := data.find_task(name))]


def choose(
  selected: dict[str, dict[str, Any]], per_task: bool
) -> dict[str, dict[str, str]]:
  """Returns the setting of each task.

  Args:
    selected: {task: its `sweep.summarize`}; the same settings in each.
    per_task: choose the best one of each task, else the one with the best mean.
  """
  if per_task:
    return {name: found["best"]["setting"] for name, found in selected.items()}
  columns = zip(*(f["settings"] for f in selected.values()), strict=True)
  best = max(columns, key=lambda c: statistics.fmean(e["mean"] for e in c))
  setting: dict[str, str] = best[0]["setting"]
  return dict.fromkeys(selected, setting)


def summarize(tasks, selected, finals) -> dict[str, Any]:
  """Returns the results by task, by group and overall.

  Returns:
    {"tasks": [{"task", "title", "group", "setting", "validation", "accuracy",
    "spread", "accuracies", "examples"}], "groups": {group: mean of its tasks},
    "mean": over all tasks}. "validation" is the accuracy on 200 images. On the
    test set, "accuracies" has each seed's, "accuracy" is their mean and
    "spread" their sample standard deviation, None for one seed.
  """
  rows = []
  for task in tasks:
    (final,), runs = finals[task.name]["settings"], finals[task.name]["runs"]
    entries = selected[task.name]["settings"]
    rows.append(
      {
        "task": task.name,
        "title": task.title,
        "group": task.group,
        "setting": final["setting"],
        "validation": next(
          e["mean"] for e in entries if e["setting"] == final["setting"]
        ),
        "accuracy": final["mean"],
        "spread": final["spread"],
        "accuracies": [run["metric"] for run in runs],
        "examples": runs[0]["results"]["examples"],
      }
    )
  groups: dict[str, list[float]] = {}
  for row in rows:
    groups.setdefault(row["group"], []).append(row["accuracy"])
  return {
    "tasks": rows,
    "groups": {name: statistics.fmean(some) for name, some in groups.items()},
    "mean": statistics.fmean(row["accuracy"] for row in rows),
  }


def format_report(result: dict[str, Any]) -> str:
  """Returns the result as a table."""
  rows = [("task", "val200", "test", "spread", "setting")]
  for row in result["tasks"]:
    spread = "-" if row["spread"] is None else f"{row['spread']:.2%}"
    setting = sweep.make_name(row["setting"])
    accuracies = f"{row['validation']:.2%}", f"{row['accuracy']:.2%}"
    rows.append((row["title"], *accuracies, spread, setting))
  for name, value in {**result["groups"], "mean": result["mean"]}.items():
    rows.append((name, "", f"{value:.2%}", "", ""))
  return "\n".join(format_columns(rows, "<>>><"))
