"""The `sweep` command: many runs of `train` that differ in a few keys.

With a `final` configuration it follows the paper's protocol. Each setting is
run once and evaluated on a held-out part of the training set. The best one is
then trained on the whole training set, with several seeds.

  WORKDIR/SETTING,seed=0                  WORKDIR/sweep.json
  or, with a final configuration,
  WORKDIR/{select/SETTING,seed=0 and sweep.json, final/seed=0 and sweep.json}
"""

import hashlib
import itertools
import logging
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vit_jax import checkpoint, files, pretrained
from vit_jax import config as configuration
from vit_jax.errors import RunStopped, UserError, check_folder
from vit_jax.tools import jobs, runs
from vit_jax.tools.text import format_columns
from vit_jax.training import inputs, lock, run_folder

log = logging.getLogger(__name__)

TRAIN = [sys.executable, "-m", "vit_jax", "train"]
_POLL_SECONDS = 0.2


class Trial(NamedTuple):
  """One run of a sweep, started or not.

  Attributes:
    workdir: its folder, a Path, or an epath.Path for a bucket.
    config: "CONFIG[:ARG]".
    overrides: {key: text}, all of them.
    setting: {key: text} of the grid alone.
    select: the metric to compare; None: see `plan`.
  """

  workdir: Any
  config: str
  overrides: dict[str, str]
  setting: dict[str, str]
  select: str | None

  def command(self) -> list[str]:
    """Returns the command line that trains."""
    changes = [f"--config.{key}={x}" for key, x in self.overrides.items()]
    where = f"--workdir={self.workdir}"
    return [*TRAIN, f"--config={self.config}", where, *changes]

  def inspect(self) -> dict[str, Any]:
    """Returns {"workdir", "setting", "seed", "select", "metric", "results"}.

    "select" is the name of the metric to compare and "metric" its value. Both
    are None unless the run is finished.
    """
    run = runs.read_run(self.workdir)
    name = value = None
    if run and run.is_complete:
      name, value = run.find_result(self.select)
    return {
      "workdir": str(self.workdir),
      "setting": self.setting,
      "seed": int(self.overrides["seed"]),
      "select": name,
      "metric": value,
      "results": run.results if run else {},
    }


# --- trials ---


def parse_grids(texts: Sequence[str]) -> dict[str, list[str]]:
  """Parses ["schedule.base_lr=0.001,0.003", ...].

  Commas in brackets or quotes belong to a value.

  Raises:
    UserError: no key, no value, or a duplicate.
  """
  grid = {}
  for text in texts:
    key, _, rest = text.partition("=")
    inner = r"(?:'[^']*'|\"[^\"]*\"|[^,()])"
    values = re.findall(rf"(?:\((?:{inner}|,|\({inner}*\))*\)|{inner})+", rest)
    if not key or ",".join(values) != rest or not rest or key == "seed":
      raise UserError(
        f"--grid={text} needs a key and values, as in "
        "--grid=schedule.base_lr=0.001,0.003; for N seeds give --seeds=N"
      )
    values = [value.strip() for value in values]
    if key in grid or len(set(values)) < len(values):
      raise UserError(f"--grid={text}: a key or value is given twice")
    grid[key] = values
  return grid


def plan(
  config: str,
  folder,
  overrides: dict[str, str],
  grid: dict[str, list[str]],
  seeds: int,
  select: str | None = None,
) -> list[Trial]:
  """Checks and returns the trials of a sweep; writes nothing.

  Args:
    config: "CONFIG[:ARG]".
    folder: gets one folder per run.
    overrides: {key: text}, of all runs.
    grid: {key: texts}; every combination is a setting.
    seeds: number of seeds of each setting, from the configuration's seed on.
    select: the metric to compare; None: `config.best_metric`, or the first of
      `runs.MAIN_METRICS` that exists. Only for "loss" lower is better.

  Raises:
    UserError: an invalid configuration, or a folder with a run of another one.
  """
  if seeds < 1:
    raise UserError(f"--seeds is {seeds}; it must be 1 or more")
  for key in grid.keys() & overrides.keys():
    raise UserError(f"{key} is in --grid and in --config.{key}")
  first_seed = configuration.load(config, overrides).seed
  trials = []
  for values in itertools.product(*grid.values()):
    setting = dict(zip(grid, values, strict=True))
    for seed in range(first_seed, first_seed + seeds):
      workdir = folder / make_name({**setting, "seed": str(seed)})
      changed = {**overrides, **setting, "seed": str(seed)}
      trials.append(Trial(workdir, config, changed, setting, select))
      _check(trials[-1])
  return trials


def make_name(setting: dict[str, str]) -> str:
  """Returns a folder's name, "base_lr=0.003,seed=1"; truncates a long one."""
  lasts = [key.rpartition(".")[2] for key in setting]
  whole = ",".join(
    f"{key if lasts.count(last) > 1 else last}={value}"
    for (key, value), last in zip(setting.items(), lasts, strict=True)
  )
  name = re.sub(r"[^\w.,=+-]+", "_", whole)
  if name == whole and len(name) <= 100:
    return name
  return f"{name[:80]},{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _check(trial):
  loaded = configuration.load(trial.config, trial.overrides)
  configuration.check_ranges(loaded)
  if not run_folder.check(loaded, trial.workdir):
    configuration.check_unused(loaded)
  name, slash, _ = (trial.select or loaded.best_metric or "").partition("/")
  wanted = name if slash else "eval"
  if wanted not in [e.name for e in configuration.list_evals(loaded)]:
    raise UserError(
      f"a sweep compares evaluations, and {wanted!r} is missing; set "
      "--config.eval.split to a held-out part"
    )


def check_sources(trials: Sequence[Trial]) -> None:
  """Opens the data and weights of trials, to fail before the first starts."""
  seen = set()
  for trial in trials:
    loaded = configuration.load(trial.config, trial.overrides)
    train = (loaded.train.dataset, loaded.train.split, loaded.data_dir)
    weights = (loaded.init_from, loaded.teacher.source)
    sources = (*train, *configuration.list_evals(loaded), *weights)
    if sources not in seen:
      inputs.open_inputs(loaded)
      for source in filter(None, weights):
        pretrained.read(source)
    seen.add(sources)


def find_folder(workdir: str):
  """Returns an absolute path; raises a UserError if it is not a folder."""
  folder = checkpoint.absolute(workdir)
  if not files.is_remote(folder):
    check_folder(folder)
  return folder


# --- running ---


def sweep(
  config: str,
  workdir: str,
  *,
  overrides: dict[str, str],
  grid: dict[str, list[str]],
  seeds: int = 3,
  final: str | None = None,
  select: str | None = None,
  **where,
) -> dict[str, dict[str, Any]]:
  """Runs or resumes a sweep.

  Args:
    config, overrides, grid, select: see `plan`; with a final configuration,
      `config` holds out a part of the training set.
    workdir: a local path or a gs:// address; gets one folder per run.
    seeds: number of seeds of each setting, or only of the final one.
    final: "CONFIG[:ARG]" that trains on the whole training set.
    **where: see `jobs.Executor`.

  Returns:
    {"sweep": `summarize`}, or both {"select", "final"}.

  Raises:
    UserError: as `plan`; an executor, data or weights that cannot be used;
      another sweep uses the folder.
    RunStopped: a run has failed.
  """
  folder = find_folder(workdir)
  if final is None:
    trials = plan(config, folder, overrides, grid, seeds, select)
    executor = jobs.Executor(**where)
    check_sources(trials)
    with lock.hold(folder):
      return {"sweep": run_trials({"": trials}, executor)[""]}

  def plan_final(setting):
    changed = overrides | setting
    return plan(final, folder / "final", changed, {}, seeds, select)

  trials = plan(config, folder / "select", overrides, grid, 1, select)
  selected, finals = select_and_train(
    folder,
    {"": (trials, plan_final)},
    lambda found: {"": found[""]["best"]["setting"]},
    jobs.Executor(**where),
  )
  return {"select": selected[""], "final": finals[""]}


def select_and_train(
  folder,
  plans: dict[str, tuple[list[Trial], Callable]],
  choose: Callable,
  executor: jobs.Executor,
) -> tuple[dict[str, dict], dict[str, dict]]:
  """Tries settings on held-out images, then trains with the chosen ones.

  Args:
    folder: of the sweep.
    plans: {name: (trials to select by, setting -> the final trials)}.
    choose: {name: `summarize` of the selection} -> {name: setting}.
    executor: runs them.

  Returns:
    {name: `summarize`} of the selection, and of the final runs.
  """

  def plan_finals(settings):
    return {
      name: [t._replace(setting=settings[name]) for t in plan(settings[name])]
      for name, (_, plan) in plans.items()
    }

  trials = {name: first for name, (first, _) in plans.items()}
  # This finds mistakes in the final runs before the selection.
  likely = plan_finals({name: t[0].setting for name, t in trials.items()})
  check_sources([*itertools.chain(*trials.values(), *likely.values())])
  with lock.hold(folder):
    selected = run_trials(trials, executor)
    settings = choose(selected)
    log.info("selected: %s", settings)
    return selected, run_trials(plan_finals(settings), executor)


def run_trials(
  groups: dict[str, list[Trial]], executor: jobs.Executor
) -> dict[str, dict[str, Any]]:
  """Runs unfinished trials; writes a sweep.json for each group.

  Returns {name: `summarize`} for {name: trials of one folder}, or raises a
  RunStopped for trials that have ended unfinished.
  """
  every = [*itertools.chain(*groups.values())]
  try:
    _run_all(every, executor)
  except KeyboardInterrupt:
    log.info(
      "stopped: runs on this machine save, Slurm jobs continue; the same "
      "command resumes the sweep"
    )
    raise
  results = {name: summarize(trials) for name, trials in groups.items()}
  for name, trials in groups.items():
    files.write_json(trials[0].workdir.parent / "sweep.json", results[name])
  rows = [row for result in results.values() for row in result["runs"]]
  failed = [row["workdir"] for row in rows if row["metric"] is None]
  if failed:
    raise RunStopped(
      f"{len(failed)} of {len(every)} runs failed, the first is {failed[0]} "
      f"({_find_error(failed[0])}); the same command tries them again"
    )
  return results


def _run_all(trials, executor):
  """Runs unfinished trials, as many at once as the executor has slots."""
  executor.wait_for_runs([trial.workdir for trial in trials])
  waiting = [t for t in trials if t.inspect()["metric"] is None]
  free, active = list(executor.slots or [{}] * len(waiting)), []
  done = len(trials) - len(waiting)
  while waiting or active:
    while waiting and free:
      trial, slot = waiting.pop(0), free.pop(0)
      log.info("%s: begins", trial.workdir)
      job = executor.start(trial.workdir, trial.command(), slot)
      active.append((trial, slot, job))
    for entry in [entry for entry in active if entry[2].done()]:
      active.remove(entry)
      trial, slot, _ = entry
      free.append(slot)
      row = trial.inspect()
      words = "FAILED"
      if row["metric"] is not None:
        done += 1
        words = f"{row['select']} {row['metric']:.4f}"
      log.info("%s: %s", trial.workdir, words)
      log.info("%d of %d runs finished", done, len(trials))
    time.sleep(_POLL_SECONDS)


def _find_error(workdir):
  """Returns one line about why a run is unfinished."""
  run = runs.read_run(workdir)
  where = f"step {run.step} of {run.total_steps}" if run else "the start"
  lines = ["no output"]
  # submitit's message is used if there is no other.
  folder = jobs.find_folder(workdir)
  for file in (*folder.glob("job/*.err"), folder / jobs.LOG):
    if file.exists():
      lines += file.read_text(errors="replace").strip().splitlines()
  return f"unfinished: it ended at {where}; its last line: {lines[-1][:300]}"


# --- results ---


def summarize(trials: Sequence[Trial]) -> dict[str, Any]:
  """Returns the results of the trials.

  Returns:
    {"config", "select": the name of the compared metric, "settings":
    [{"setting", "mean", "spread": the sample standard deviation, None for one
    seed}], "best": one of them, "runs": `Trial.inspect` of each}. Until all
    runs are finished, "settings" is empty and "best" is None.
  """
  rows = [trial.inspect() for trial in trials]
  settings = []
  if all(row["metric"] is not None for row in rows):
    for setting, group in itertools.groupby(rows, lambda row: row["setting"]):
      metrics = [row["metric"] for row in group]
      spread = statistics.stdev(metrics) if len(metrics) > 1 else None
      mean = statistics.fmean(metrics)
      settings.append({"setting": setting, "mean": mean, "spread": spread})
  select = rows[0]["select"]
  return {
    "config": trials[0].config,
    "select": select,
    "settings": settings,
    "best": min(
      settings, key=lambda e: runs.order(select, e["mean"]), default=None
    ),
    "runs": rows,
  }


def format_summary(result: dict[str, Any]) -> str:
  """Returns the result as a table."""
  rows = [("setting", result["select"], "spread", "")]
  for entry in result["settings"]:
    spread = "-" if entry["spread"] is None else f"{entry['spread']:.4f}"
    name = make_name(entry["setting"]) or "(as configured)"
    best = "best" if entry == result["best"] else ""
    rows.append((name, f"{entry['mean']:.4f}", spread, best))
  return "\n".join(format_columns(rows))
