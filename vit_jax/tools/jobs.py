"""Runs of `train` as processes, several at once.

Every run is a process of its own with a folder of its own, so that many of them
are resumed run by run: what is finished stays, what was interrupted goes on.
What a run has come to is read from its folder; nothing else is remembered.

One command works in a folder at a time. Its lock is flock's, which other
machines see only where the file system says so; this is for one machine.
"""

import collections
import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vit_jax import config as configuration
from vit_jax.errors import UserError, check_folder
from vit_jax.tools import runs
from vit_jax.training.lock import is_alive
from vit_jax.training.metrics import duration

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2

# `python -m vit_jax`, but for one thing: should we be killed, Linux sends
# our runs SIGTERM, on which they save and stop. 1 is PR_SET_PDEATHSIG.
_CHILD = """
import ctypes, os, runpy, signal, sys
if sys.platform == "linux":
  ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv.pop(1)):
  sys.exit("the sweep is gone")
runpy.run_module("vit_jax", run_name="__main__", alter_sys=True)
"""

_PROBE = """
import jax
d = jax.local_devices()
print(d[0].platform, len({str(getattr(x, "coords", x.id)) for x in d}))
"""
# How many chips -> their shape; a process that sees some of them is told it.
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}


class Trial(NamedTuple):
  """One training of a sweep, begun or not.

  Attributes:
    name: of its folder, and in tables.
    workdir: its folder.
    config: "CONFIG[:ARG]".
    overrides: {key: text}, all of them.
    setting: {key: text} of the grid alone.
    seed: the configuration's.
  """

  name: str
  workdir: Path
  config: str
  overrides: dict[str, str]
  setting: dict[str, str]
  seed: int

  def arguments(self) -> list[str]:
    """Returns the command line of `train`."""
    changes = [f"--config.{key}={x}" for key, x in self.overrides.items()]
    where = f"--workdir={self.workdir}"
    return ["train", f"--config={self.config}", where, *changes]


# --- what they have come to ---


def inspect_trial(trial: Trial) -> dict[str, Any]:
  """Reads a trial's folder.

  Returns:
    {"status": "waiting", "interrupted" or "finished", "step", "total_steps",
    "results": the last evaluation, "recipe": data and preprocessing}.
  """
  run = runs.read_run(trial.workdir)
  if run is None:
    return {"status": "waiting", "step": 0, "total_steps": 0, "results": {}}
  # A run saves, then evaluates, and may be stopped before or in that.
  saved = (trial.workdir / "checkpoints" / str(run.total_steps)).is_dir()
  return {
    "status": "finished" if saved and run.results else "interrupted",
    "step": run.step,
    "total_steps": run.total_steps,
    "results": next(reversed(run.evaluations.values()), {}),
    "recipe": describe_recipe(run.config),
  }


def describe_recipe(flat: dict[str, Any]) -> dict[str, Any]:
  """Returns what was trained and evaluated on, and how it was prepared."""
  test_set = configuration.find_test_set(flat)
  return {
    "image_size": flat["image_size"],
    "train": f"{flat['train.dataset']} {flat['train.split']}",
    "train_preprocess": flat["train.preprocess"],
    "eval": f"{test_set} {flat['eval.split']}",
    "eval_preprocess": flat["eval.preprocess"],
  }


# --- running them ---


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[int]:
  """Makes a folder this process's own; yields the lock's file descriptor.

  Who has the descriptor has the lock: runs inherit it. So, should their sweep
  be killed, the next one waits until they have saved.

  Raises:
    UserError: another sweep is at work there.
  """
  check_folder(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "lock", "a+") as file:
    waiting = False
    while not _try_lock(file):
      file.seek(0)
      owner = file.read().strip()
      if owner and is_alive(int(owner)):
        raise UserError(
          f"{folder}: another sweep (process {owner}) is at work there; wait "
          "for it, or choose another --workdir"
        )
      if not waiting:
        log.info("%s: waiting for the runs of a sweep that was killed", folder)
      waiting = True
      time.sleep(_POLL_SECONDS)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    yield file.fileno()


def _try_lock(file):
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def divide_devices(jobs: int) -> list[dict[str, str]]:
  """Returns for each job the environment that gives it its devices.

  CPUs are shared, GPUs and TPU chips are divided.

  Raises:
    UserError: more jobs than devices, or chips that have no such part.
  """
  if jobs < 1:
    raise UserError(f"--jobs is {jobs}; it must be 1 or more")
  if jobs == 1:
    return [{}]
  probe = subprocess.run(
    [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False
  )
  if probe.returncode:
    last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
    raise UserError(f"no devices to divide among --jobs={jobs}: {last}")
  platform, count = probe.stdout.split()[-2:]
  return make_environments(platform, int(count), jobs, os.environ)


def make_environments(platform, count, jobs, environment):
  """Returns `divide_devices` for `count` devices of a platform."""
  if platform == "cpu":
    return [{}] * jobs
  share = count // jobs
  if not share:
    raise UserError(f"--jobs={jobs}: there are {count} devices, one a job")
  if platform == "tpu":
    if share not in _TPU_BOUNDS:
      share = max(n for n in _TPU_BOUNDS if n <= share)
    shape = {
      "TPU_CHIPS_PER_PROCESS_BOUNDS": _TPU_BOUNDS[share],
      "TPU_PROCESS_BOUNDS": "1,1,1",
    }
    name, known = "TPU_VISIBLE_CHIPS", ""
  else:
    shape, name = {}, "CUDA_VISIBLE_DEVICES"
    known = environment.get(name, "")
  devices = known.split(",") if known else [str(i) for i in range(count)]
  return [
    {name: ",".join(devices[j * share : (j + 1) * share]), **shape}
    for j in range(jobs)
  ]


class _Job(NamedTuple):
  trial: Trial
  process: subprocess.Popen
  environment: dict[str, str]
  started: float


class _Signals:
  """Counts SIGTERM and Ctrl-C instead of ending the sweep."""

  def __enter__(self):
    self.count = 0
    self._previous = {
      number: signal.signal(number, self._handle)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, *_):
    self.count += 1


def run_all(
  trials: Sequence[Trial], environments: list[dict[str, str]], lock_fd: int
) -> tuple[dict[Path, str], bool]:
  """Runs what is not finished, as many at once as there are environments.

  Args:
    trials: from `plan`.
    environments: from `divide_devices`.
    lock_fd: from `lock`.

  Returns:
    ({workdir: line} of the runs that failed, or ended unfinished though nobody
    stopped the sweep; whether it was stopped).
  """
  waiting = collections.deque(
    trial for trial in trials if inspect_trial(trial)["status"] != "finished"
  )
  progress = _Progress(trials, len(trials) - len(waiting))
  free, active, failed = list(environments), [], {}
  try:
    with _Signals() as signals:
      told = 0  # how many signals the runs have been passed
      while (waiting and not signals.count) or active:
        while waiting and free and not signals.count:
          active.append(_start(waiting.popleft(), free.pop(0), lock_fd))
        if told < min(signals.count, 2):
          told += 1
          log.info("stopping: %d runs save; once more to quit", len(active))
          for job in active:
            (job.process.terminate, job.process.kill)[told - 1]()
        for job in [job for job in active if job.process.poll() is not None]:
          active.remove(job)
          free.append(job.environment)
          error = None if signals.count else _find_error(job)
          if error:
            failed[job.trial.workdir] = error
          progress.ended(job, error)
        progress.show(active)
        time.sleep(_POLL_SECONDS)
      return failed, bool(signals.count)
  finally:
    progress.close()
    for job in active:
      job.process.kill()


def _start(trial, environment, lock_fd):
  trial.workdir.mkdir(parents=True, exist_ok=True)
  with open(trial.workdir / "log.txt", "a") as file:
    process = subprocess.Popen(
      [sys.executable, "-c", _CHILD, str(os.getpid()), *trial.arguments()],
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=file,
      env={**os.environ, **environment},
      # The terminal's Ctrl-C is for the sweep, which passes it on.
      start_new_session=True,
      pass_fds=(lock_fd,),
    )
  return _Job(trial, process, environment, time.monotonic())


def _find_error(job):
  """Returns a line on why a run that has ended is not finished, or None."""
  if job.process.returncode:
    return _last_line(job.trial.workdir / "log.txt")
  found = inspect_trial(job.trial)
  if found["status"] == "finished":
    return None
  return (
    f"unfinished: it stopped at step {found['step']} of {found['total_steps']}"
  )


def _last_line(file):
  lines = file.read_text(errors="replace").strip().splitlines()
  line = lines[-1] if lines else "no message"
  return line if len(line) <= 300 else f"{line[:140]} ... {line[-150:]}"


class _Progress:
  """The table of the runs at work, on stderr: in place on a terminal."""

  def __init__(self, trials, done):
    self._total, self._done = len(trials), done
    self._root = os.path.commonpath([t.workdir.parent for t in trials])
    self._terminal = sys.stderr.isatty()
    self._lines = 0
    self._shown = (0.0, None)

  def ended(self, job, error):
    """Says what became of a run."""
    found = inspect_trial(job.trial)
    self._done += found["status"] == "finished"
    self._erase()
    took = duration(time.monotonic() - job.started)
    what = f"FAILED: {error}" if error else found["status"]
    log.info("%s  %s  %s", self._format(job.trial, found), what, took)

  def show(self, active):
    """Shows the runs at work, if something is new."""
    names = [job.trial.workdir for job in active]
    now = time.monotonic()
    due = now - self._shown[0] > (1 if self._terminal else 60)
    if (names == self._shown[1] and not due) or not names:
      return
    self._erase()
    rows = [self._format(job.trial, inspect_trial(job.trial)) for job in active]
    rows.append(self._count())
    print("\n".join(rows), file=sys.stderr, flush=True)
    self._lines = len(rows)
    self._shown = (now, names)

  def close(self):
    """Leaves one line instead of the table."""
    self._erase()
    log.info("%s", self._count())

  def _count(self):
    return f"{self._done} of {self._total} runs finished"

  def _erase(self):
    if self._terminal and self._lines:
      print(f"\x1b[{self._lines}A\x1b[J", end="", file=sys.stderr, flush=True)
    self._lines = 0

  def _format(self, trial, found):
    steps = f"{found['step']}/{found['total_steps'] or '?'}"
    name = runs.find_main(found["results"])
    result = f"{name} {found['results'][name]:.4f}" if name else ""
    path = os.path.relpath(trial.workdir, self._root)
    return f"  {path:36} {steps:>12}  {result:16}"
