"""Runs of `train` as submitit jobs, on this machine or through Slurm.

It has few imports, because every job imports it before its run starts.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from vit_jax.errors import UserError, check_choice, one_line
from vit_jax.training.lock import is_alive

log = logging.getLogger(__name__)

LOG = "log.txt"
_NO_LIMIT = 10**6  # minutes
# How often Slurm's time limit may end a run, which is requeued and resumes.
_REQUEUES = 100
_PROBE = """
import jax
d = jax.local_devices()
print(d[0].platform, len({str(getattr(x, "coords", x.id)) for x in d}))
"""
# Chips -> topology bounds, required by a process that uses a part of a host.
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}


class TrainJob(submitit.helpers.Checkpointable):
  """Callable that submitit runs in a job's process; starts a child process."""

  def __call__(
    self,
    command: list[str],
    folder: Path,
    environment: dict[str, str | None],
    owner: int | None,
  ) -> int | None:
    """Returns the exit code of the command, None if it was not started.

    Args:
      command: its arguments; it must save and stop on SIGTERM.
      folder: its file `LOG` gets the output.
      environment: variables of the command alone; None unsets one.
      owner: ID of a process whose end stops the command, or None.
    """
    # SIGUSR2 announces the time limit; submitit's handler requeues the job.
    requeue = signal.getsignal(signal.SIGUSR2)
    stops = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
      signal.signal(number, lambda number, _: stops.append(number))
    variables = {**os.environ, **environment}
    with open(folder / LOG, "a") as file:
      with contextlib.suppress(OSError):  # not every file system has locks
        fcntl.flock(file, fcntl.LOCK_EX)  # which the command inherits
      if owner and not is_alive(owner):
        return None
      child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=file,
        env={name: x for name, x in variables.items() if x is not None},
        start_new_session=True,  # only the sweep handles Ctrl-C
      )
      is_stopped = False
      while child.poll() is None:
        if not is_stopped and (stops or (owner and not is_alive(owner))):
          child.terminate()
          is_stopped = True
        time.sleep(0.1)
      if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        file.write(f"the run was ended by {name}\n")
    if signal.SIGUSR2 in stops and callable(requeue):
      requeue(signal.SIGUSR2, None)
    return child.returncode


class Executor:
  """Executor of runs, on this machine or through Slurm.

  Attributes:
    slots: the environment of each concurrent run; None for any number of runs.
  """

  def __init__(self, executor: str, jobs: int | None, slurm: Sequence[str]):
    """Checks --executor, --jobs and --slurm; raises a UserError."""
    check_choice("--executor", executor, ("local", "slurm"))
    if jobs is not None and jobs < 1:
      raise UserError(f"--jobs is {jobs}; it must be 1 or more")
    # submitit prints to stdout, which is reserved for results.
    logging.getLogger("submitit").handlers.clear()
    self._is_local = executor == "local"
    if self._is_local:
      self._parameters = {"timeout_min": _NO_LIMIT}
      if slurm:
        raise UserError(f"--slurm={slurm[0]} needs --executor=slurm")
      self.slots = divide_devices(jobs or 1)
    else:
      self._parameters = _parse_slurm(slurm)
      self.slots = jobs and [{}] * jobs
      self._connect(Path())

  def _connect(self, folder):
    """Returns submitit's executor, whose files go into `folder`."""
    try:
      made = (
        submitit.LocalExecutor(folder)
        if self._is_local
        else submitit.SlurmExecutor(folder, max_num_timeout=_REQUEUES)
      )
      made.update_parameters(**self._parameters)
    except (RuntimeError, ValueError) as e:
      words = one_line(e, 2000).replace(" (default: None)", "")
      raise UserError(f"--executor=slurm: {words}") from e
    return made

  def start(self, workdir, command: list[str], slot) -> submitit.Job:
    """Starts a run, or returns its job if Slurm's queue already has it.

    Raises:
      UserError: sbatch rejects it.
    """
    place = find_folder(workdir)
    folder = place / "job"
    owner = os.getpid() if self._is_local else None
    for file in [] if self._is_local else folder.glob("*_submitted.pkl"):
      job = submitit.SlurmJob(folder, file.name.partition("_")[0])
      if job.state != "UNKNOWN" and not job.done():
        return job
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Processes that submitit starts inherit that these signals are ignored.
    ignored = (signal.SIGINT, signal.SIGHUP)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    try:
      return self._connect(folder).submit(
        TrainJob(), command, place, slot, owner
      )
    except (FailedJobError, OSError) as e:
      raise UserError(f"cannot submit {workdir}: {one_line(e)}") from e
    finally:
      for number, handler in zip(ignored, handlers, strict=True):
        signal.signal(number, handler)

  def wait_for_runs(self, workdirs: Sequence) -> None:
    """Waits for local runs of a dead sweep to save and end."""
    for workdir in workdirs if self._is_local else []:
      log_file = find_folder(workdir) / LOG
      with contextlib.suppress(OSError), open(log_file) as file:
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          log.info("%s: waiting for a run of an earlier sweep", workdir)
          fcntl.flock(file, fcntl.LOCK_EX)


def find_folder(workdir) -> Path:
  """Returns the folder of a run's job files and output.

  This is the run folder, or for one in a bucket a folder in ~/.cache/vit_jax.
  """
  address, is_bucket, path = str(workdir).partition("://")
  if not is_bucket:
    return Path(address)
  root = os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax"
  return Path(root).expanduser() / "jobs" / path


def _parse_slurm(texts):
  """Returns submitit's parameters for ["partition=gpu", "time=60"]."""
  parameters: dict[str, Any] = {"job_name": "vit-jax"}
  for text in texts:
    key, _, value = text.partition("=")
    if not key or not value or key in ("nodes", "ntasks_per_node"):
      raise UserError(
        f"--slurm={text} must be KEY=VALUE for a job of one process, as in "
        "--slurm=partition=gpu"
      )
    if key in ("setup", "teardown", "srun_args"):
      parameters.setdefault(key, []).append(value)
    else:
      parameters[key] = int(value) if value.isdecimal() else value
  if not isinstance(parameters.get("time"), int):
    raise UserError("--executor=slurm needs --slurm=time=MINUTES")
  return parameters


def divide_devices(jobs: int) -> list[dict[str, str | None]]:
  """Returns each job's environment variables that select its devices.

  CPUs are shared, GPUs and TPU chips are divided.

  Raises:
    UserError: more jobs than devices.
  """
  known = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit changes it
  if jobs == 1:
    return [{"CUDA_VISIBLE_DEVICES": known}]
  probe = subprocess.run(
    [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False
  )
  if probe.returncode:
    last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
    raise UserError(f"no devices to divide among --jobs={jobs}: {last}")
  platform, count = probe.stdout.split()[-2:]
  return make_environments(platform, int(count), jobs, known)


def make_environments(
  platform: str, count: int, jobs: int, known: str | None
) -> list[dict[str, str | None]]:
  """Returns `divide_devices`; `known` is the given CUDA_VISIBLE_DEVICES."""
  if platform == "cpu":
    return [{"CUDA_VISIBLE_DEVICES": known}] * jobs
  share = count // jobs
  if not share:
    raise UserError(f"--jobs={jobs} is too many; there are {count} devices")
  name, shape = "CUDA_VISIBLE_DEVICES", {}
  devices = known.split(",") if known else [str(i) for i in range(count)]
  if platform == "tpu":
    name, share = "TPU_VISIBLE_CHIPS", max(n for n in _TPU_BOUNDS if n <= share)
    shape = {
      "TPU_CHIPS_PER_PROCESS_BOUNDS": _TPU_BOUNDS[share],
      "TPU_PROCESS_BOUNDS": "1,1,1",
    }
  return [
    {name: ",".join(devices[j * share : (j + 1) * share]), **shape}
    for j in range(jobs)
  ]
