"""The `sweep` command: many runs of `train` that differ in a few keys.

With a `final` configuration it is the paper's protocol: the settings are tried
once each, on what is held out of the training set; then the best one is trained
on all of it, with several seeds.

  WORKDIR/SETTING,seed=0                  WORKDIR/sweep.json
  or, with a final configuration,
  WORKDIR/{select/SETTING,seed=0 and sweep.json, final/seed=0 and sweep.json}
"""

import ast
import collections
import hashlib
import itertools
import logging
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_jax import checkpoint, files, pretrained
from vit_jax import config as configuration
from vit_jax.errors import RunStopped, UserError
from vit_jax.tools.jobs import (
  Trial,
  divide_devices,
  inspect_trial,
  lock,
  run_all,
)
from vit_jax.tools.runs import choose_metric, order
from vit_jax.tools.text import format_columns
from vit_jax.training import inputs, run_folder

log = logging.getLogger(__name__)


# --- which runs ---


def parse_grids(texts: Sequence[str]) -> dict[str, list[str]]:
  """Reads ["schedule.base_lr=0.001,0.003", ...].

  Commas in brackets or quotes belong to a value.

  Raises:
    UserError: no key, no value, or one that comes twice.
  """
  grid = {}
  for text in texts:
    key, _, values = text.partition("=")
    values = [v.strip() for v in _split(values)]
    if not key or not all(values):
      raise UserError(
        f"--grid={text} needs a key and values, as in "
        "--grid=schedule.base_lr=0.001,0.003"
      )
    if key == "seed":
      raise UserError("--grid=seed: give --seeds=N for N seeds")
    if key in grid or len({_plain(v) for v in values}) < len(values):
      raise UserError(f"--grid={text}: a key or value is given twice")
    grid[key] = values
  return grid


def _split(text):
  """Splits at the commas that stand in no brackets and no quotes."""
  pieces = re.findall(r"(?:'[^']*'|\"[^\"]*\"|[\[\](){}]|[^,])|,", text)
  parts, depth = [""], 0
  for piece in pieces:
    depth += (piece in "([{") - (piece in ")]}")
    if piece == "," and not depth:
      parts.append("")
    else:
      parts[-1] += piece
  return parts


def _plain(text):
  """A value as Python has it: 1e-3 and 0.001 are the same."""
  try:
    return repr(ast.literal_eval(text))
  except (ValueError, SyntaxError):
    return text


def plan(
  config: str,
  workdir: Path,
  overrides: dict[str, str],
  grid: dict[str, list[str]],
  seeds: int,
) -> list[Trial]:
  """Returns the trials of a sweep, checked, and touches nothing.

  Args:
    config: "CONFIG[:ARG]".
    workdir: the folder that gets one folder a run.
    overrides: {key: text}, of all runs.
    grid: {key: texts}; every combination is a setting.
    seeds: how many of each setting, from the configuration's seed on.

  Raises:
    UserError: a configuration that cannot be run, or a folder that holds a run
      of another one.
  """
  if seeds < 1:
    raise UserError(f"--seeds is {seeds}; it must be 1 or more")
  both = sorted(grid.keys() & overrides.keys())
  if both:
    raise UserError(f"{both[0]} is in --grid and in --config.{both[0]}")
  first_seed = configuration.load(config, overrides).seed
  trials = []
  for values in itertools.product(*grid.values()):
    setting = dict(zip(grid, values, strict=True))
    for seed in range(first_seed, first_seed + seeds):
      name = make_name(setting, seed)
      changed = {**overrides, **setting, "seed": str(seed)}
      trial = Trial(name, workdir / name, config, changed, setting, seed)
      _check(trial)
      trials.append(trial)
  return trials


def make_name(setting: dict[str, str], seed: int) -> str:
  """Returns a folder's name: "base_lr=0.003,seed=1".

  The same for the same setting; a long one is cut, and gets a digest.
  """
  lasts = collections.Counter(key.rpartition(".")[2] for key in setting)
  parts = []
  for key, value in setting.items():
    last = key.rpartition(".")[2]
    parts.append(f"{last if lasts[last] == 1 else key}={value}")
  whole = ",".join([*parts, f"seed={seed}"])
  name = re.sub(r"[^\w.,=+-]+", "_", whole)
  if name == whole and len(name) <= 100:
    return name
  digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
  return f"{name[:80]},{digest}"


def _check(trial):
  loaded = configuration.load(trial.config, trial.overrides)
  configuration.check_ranges(loaded)
  if not run_folder.check(loaded, checkpoint.absolute(trial.workdir)):
    configuration.check_unused(loaded)
  if not loaded.eval.split:
    raise UserError(
      "a sweep compares evaluations; set --config.eval.split to a held-out part"
    )


def check_sources(trials: Sequence[Trial]) -> None:
  """Opens the data and the weights of all trials, each once.

  Raises:
    UserError: what is missing or unsuitable; no run has begun.
  """
  seen = set()
  for trial in trials:
    loaded = configuration.load(trial.config, trial.overrides)
    parts = (loaded.train.dataset, loaded.train.split, loaded.data_dir)
    parts += tuple(configuration.list_evals(loaded))
    if parts not in seen:
      inputs.open_inputs(loaded)
    if loaded.init_from and loaded.init_from not in seen:
      pretrained.read(loaded.init_from)
    seen |= {parts, loaded.init_from}


# --- what comes out ---


def sweep(
  config: str,
  workdir: str,
  *,
  overrides: dict[str, str],
  grid: dict[str, list[str]],
  seeds: int = 3,
  jobs: int = 1,
  select: str | None = None,
) -> dict[str, Any]:
  """Runs a sweep, or what is left of it, and writes `workdir`/sweep.json.

  Args:
    config, overrides, grid, seeds: see `plan`.
    workdir: a local folder; it gets a folder a run.
    jobs: how many runs at once.
    select: the result that is compared; unset: accuracy, or what is in its
      place. Of "loss" less is better.

  Returns:
    See `summarize`.

  Raises:
    UserError: see `plan`, `lock`, `divide_devices`, `check_sources`; no such
      result.
  """
  folder = local_folder(workdir)
  trials = plan(config, folder, overrides, grid, seeds)
  environments = divide_devices(jobs)
  check_sources(trials)
  with lock(folder) as lock_fd:
    results, stopped = run_groups({"": trials}, environments, lock_fd, select)
  if stopped:
    log.info("stopped; run it again to go on")
  return results[""]


def select_and_train(
  config: str,
  final: str,
  workdir: str,
  *,
  overrides: dict[str, str],
  grid: dict[str, list[str]],
  seeds: int = 3,
  jobs: int = 1,
  select: str | None = None,
) -> dict[str, Any]:
  """Tries every setting once, then trains the best with several seeds.

  Args:
    config: "CONFIG[:ARG]" that holds out a part of the training set.
    final: "CONFIG[:ARG]" that trains on all of it.
    workdir, overrides, grid, jobs, select: as `sweep`, of both.
    seeds: how many of the final run.

  Returns:
    {"select", "final"}, each `summarize`; what was not begun is None.

  Raises:
    UserError: as `sweep`.
    RunStopped: a run of the selection failed.
  """
  folder = local_folder(workdir)

  def plan_final(setting):
    changed = {**overrides, **setting}
    trials = plan(final, folder / "final", changed, {}, seeds)
    return [trial._replace(setting=setting) for trial in trials]

  trials = plan(config, folder / "select", overrides, grid, 1)
  environments = divide_devices(jobs)
  # A mistake in the final runs shows now.
  check_sources([*trials, *plan_final(trials[0].setting)])
  found: dict[str, Any] = {"select": None, "final": None}
  with lock(folder) as lock_fd:

    def run(name, trials):
      results, stopped = run_groups(
        {name: trials}, environments, lock_fd, select
      )
      found.update(results)
      return stopped

    stopped = run("select", trials)
    if not stopped:
      raise_if_failed(found["select"]["runs"])
      setting = found["select"]["best"]["setting"]
      log.info("selected: %s", setting)
      stopped = run("final", plan_final(setting))
  if stopped:
    log.info("stopped; run it again to go on")
  return found


def run_groups(
  groups: dict[str, list[Trial]],
  environments,
  lock_fd: int,
  select: str | None,
) -> tuple[dict[str, dict[str, Any]], bool]:
  """Runs what is not finished; writes a sweep.json for each group.

  Args:
    groups: {name: trials of one folder}; all of them share the devices.
    environments, lock_fd: as `jobs.run_all`.
    select: as `sweep`.

  Returns:
    ({name: `summarize`}, whether it was stopped).

  Raises:
    UserError: no such result.
  """
  every = [trial for trials in groups.values() for trial in trials]
  failed, stopped = run_all(every, environments, lock_fd)
  results = {}
  for name, trials in groups.items():
    results[name] = summarize(trials, failed, select)
    files.write_json(trials[0].workdir.parent / "sweep.json", results[name])
  return results, stopped


def local_folder(workdir: str) -> Path:
  """Returns the absolute path of a folder that can be locked.

  Raises:
    UserError: it is in a bucket.
  """
  if "://" in workdir:
    raise UserError(
      f"--workdir={workdir}: a sweep needs a local folder; single runs of "
      "`vit-jax train` can be in a bucket"
    )
  return Path(workdir).expanduser().absolute()


def summarize(
  trials: Sequence[Trial], failed: dict[Path, str], select: str | None
) -> dict[str, Any]:
  """Returns what the trials have come to.

  Returns:
    {"config", "select", "best": one of "settings" or None, "settings":
    [{"setting", "runs": how many are finished, "mean", "spread": the sample
    standard deviation, None for one run}], "runs": [{"name", "workdir",
    "setting", "seed", "status", "metric", "results", "recipe", "error"}]}. The
    best has the best mean of the settings whose runs are all finished.

  Raises:
    UserError: the evaluations have no `select`.
  """
  rows = [_summarize_trial(trial, failed, select) for trial in trials]
  select = select or next((r["select"] for r in rows if r["select"]), None)
  settings, best = compare(rows, select)
  return {
    "config": trials[0].config,
    "select": select,
    "best": best,
    "settings": settings,
    "runs": rows,
  }


def compare(rows, select) -> tuple[list[dict], dict | None]:
  """Returns `summarize`'s "settings" and "best" of its "runs"."""
  settings = []
  for setting, group in itertools.groupby(rows, key=lambda r: r["setting"]):
    group = list(group)
    metrics = [row["metric"] for row in group if row["status"] == "finished"]
    settings.append(
      {
        "setting": setting,
        "runs": len(metrics),
        "mean": statistics.fmean(metrics) if metrics else None,
        "spread": statistics.stdev(metrics) if len(metrics) > 1 else None,
        "complete": len(metrics) == len(group),
      }
    )
  complete = [entry for entry in settings if entry["complete"]]
  best = min(
    complete, key=lambda entry: order(select, entry["mean"]), default=None
  )
  return settings, best


def _summarize_trial(trial, failed, select):
  found = inspect_trial(trial)
  status = "failed" if trial.workdir in failed else found["status"]
  name = None
  if status == "finished":
    name = choose_metric(found["results"], select)
  return {
    "name": trial.name,
    "workdir": str(trial.workdir),
    "setting": trial.setting,
    "seed": trial.seed,
    "status": status,
    "select": name,
    "metric": found["results"].get(name),
    "step": found["step"],
    "results": found["results"],
    "recipe": found.get("recipe"),
    "error": failed.get(trial.workdir),
  }


def format_summary(result: dict[str, Any]) -> str:
  """Returns the result as lines for people."""
  rows = [("setting", result["select"] or "metric", "spread", "runs")]
  for entry in result["settings"]:
    name = make_name(entry["setting"], 0).removesuffix("seed=0").rstrip(",")
    mean = "-" if entry["mean"] is None else f"{entry['mean']:.4f}"
    spread = "-" if entry["spread"] is None else f"{entry['spread']:.4f}"
    mark = " *" if entry == result["best"] else ""
    rows.append(
      (name or "(as configured)", mean, spread, f"{entry['runs']}{mark}")
    )
  lines = format_columns(rows)
  recipe = next((r["recipe"] for r in result["runs"] if r["recipe"]), None)
  if recipe:
    lines.append(
      f"evaluated on {recipe['eval']} at {recipe['image_size']}: "
      f"{recipe['eval_preprocess']}"
    )
  for row in result["runs"]:
    if row["error"]:
      lines.append(f"FAILED {row['workdir']}: {row['error']}")
  return "\n".join(lines)


def raise_if_failed(rows: Sequence[dict[str, Any]]) -> None:
  """Raises RunStopped if one of `summarize`'s "runs" has an error."""
  failed = [row for row in rows if row["error"]]
  if failed:
    raise RunStopped(
      f"{len(failed)} of {len(rows)} runs failed, the first is "
      f"{failed[0]['workdir']} ({failed[0]['error']}); the same command tries "
      "them again and resumes the others"
    )
