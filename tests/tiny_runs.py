"""Helpers of the end-to-end tests: tiny runs of the real command line."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import forks
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vit_jax import config as configuration
from vit_jax import sharding, state, train

REPO = Path(__file__).parents[1]
TIMEOUT = 300  # seconds; a run takes about 15, most of them to start


class Runs:
  """Starts commands that share a data set and a configuration."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.data_dir = folder / "data"
    self.config = folder / "configs" / "tiny_config.py"
    self.config.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(REPO / "configs" / "common.py", self.config.parent)
    shutil.copy(REPO / "tests" / "tiny_config.py", self.config.parent)

  def train_args(self, workdir, *overrides, config=None) -> list[str]:
    """Returns the arguments of `train`; overrides as "key=value"."""
    return [
      "train",
      f"--config={config or self.config}",
      f"--workdir={workdir}",
      f"--config.data_dir={self.data_dir}",
      *(f"--config.{text}" for text in overrides),
    ]

  def start(self, args, *, devices=4, record=None, anew=False) -> "Process":
    """Starts a command.

    Args:
      args: of the command line.
      devices: how many fake ones.
      record: a file for the digests of its batches, see record_batches.py.
      anew: with a new interpreter, as a user does; else as a fork.
    """
    entry = ["-m", "vit_jax"]
    if record:
      entry = [str(REPO / "tests" / "record_batches.py"), str(record)]
    # Unoptimised code is there sooner, and fast enough.
    flags = (
      f"--xla_force_host_platform_device_count={devices} "
      "--xla_backend_optimization_level=0"
    )
    environment = {
      **os.environ,
      "PYTHONPATH": str(REPO),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": flags,
    }
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # as a user has it
    command = [*entry, *map(str, args)]
    if anew:
      return Process([sys.executable, *command], environment)
    return Process(command, environment, forks.Fork)

  def train(self, workdir, *overrides, **kwargs) -> "Process":
    """Starts `train`."""
    return self.start(self.train_args(workdir, *overrides), **kwargs)

  def train_to_end(self, workdir, *overrides, **kwargs) -> "Process":
    """Runs `train` and expects that it ends well."""
    process = self.train(workdir, *overrides, **kwargs)
    assert process.wait() == 0, process.stderr()
    return process

  def pair(self, args, **kwargs) -> list["Process"]:
    """Starts two processes that work as one."""
    return self.start_together([args] * 2, **kwargs)

  def start_together(self, commands, **kwargs) -> list["Process"]:
    """Starts processes that work as one.

    Args:
      commands: the arguments of each.
      **kwargs: of `start`; a list has a value for each.
    """
    flags = [f"--coordinator=localhost:{find_port()}"]
    flags.append(f"--num_processes={len(commands)}")
    return [
      self.start(
        [*args, *flags, f"--process_id={i}"],
        **{k: v[i] if isinstance(v, list) else v for k, v in kwargs.items()},
      )
      for i, args in enumerate(commands)
    ]


class Reference(NamedTuple):
  """The folder of a run that was never interrupted, and what it said."""

  workdir: Path
  stderr: str


class Process:
  """A command that runs, and what it has said so far."""

  def __init__(self, command, environment, start=subprocess.Popen):
    """Starts it.

    Args:
      command: its words; of a fork those after "python".
      environment: all its variables.
      start: subprocess.Popen or forks.Fork.
    """
    # A pipe would block when nobody reads it.
    self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
    self._process = start(
      command,
      cwd=REPO,
      env=environment,
      stdout=self._files[0],
      stderr=self._files[1],
    )

  def wait(self) -> int:
    """Returns the exit code."""
    try:
      return self._process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
      self._process.kill()
      raise AssertionError(f"it hangs:\n{self.stderr()}") from None

  def is_running(self) -> bool:
    return self._process.poll() is None

  def send(self, number: int) -> None:
    """Sends a signal."""
    self._process.send_signal(number)

  def stdout(self) -> str:
    return forks.read_log(self._files[0])

  def stderr(self) -> str:
    return forks.read_log(self._files[1])

  def steps(self) -> list[int]:
    """Returns the steps that it has reported."""
    return [int(s) for s in re.findall(r"^step (\d+)/", self.stderr(), re.M)]

  def wait_until(self, condition) -> bool:
    """Waits for condition(); False if the process ended before."""
    end = time.monotonic() + TIMEOUT
    while self.is_running():
      if condition():
        return True
      assert time.monotonic() < end, f"never came:\n{self.stderr()}"
      time.sleep(0.002)
    return False


@contextlib.contextmanager
def shared_programs():
  """Lets runs of one configuration in this process trace and compile once.

  The second one then takes two seconds of CPU time, not six.
  """
  with pytest.MonkeyPatch.context() as patch:

    def by_config(config, *_, **__):
      return str(configuration.to_dict(config))

    for module, name in (
      (train.objectives, "create"),
      (train, "make_step"),
      (train.evaluation, "make_evaluators"),
    ):
      shared = _share(getattr(module, name), by_config)
      patch.setattr(module, name, shared)
    jit = _share(sharding.jit_train_step, lambda _, step, __: step)
    patch.setattr(sharding, "jit_train_step", jit)
    yield


def _share(make, key):
  """Returns `make`, which makes one result for each key(*args)."""
  made = {}

  def make_once(*args, **kwargs):
    name = key(*args)
    if name not in made:
      made[name] = make(*args, **kwargs)
    return made[name]

  return make_once


def find_port() -> int:
  """Returns a port that is free now."""
  with contextlib.closing(socket.socket()) as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def read_metrics(workdir) -> list[dict]:
  """Returns the lines of metrics.jsonl without what depends on the clock."""
  lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith("speed/")}
    for line in lines
  ]


def read_losses(workdir) -> dict[int, float]:
  """Returns {step: training loss}."""
  return {
    line["step"]: line["train/loss"]
    for line in read_metrics(workdir)
    if "train/loss" in line
  }


def saved_steps(workdir) -> list[int]:
  """Returns the steps of the complete checkpoints, oldest first."""
  folders = (Path(workdir) / "checkpoints").glob("*")
  return sorted(int(f.name) for f in folders if f.name.isdigit())


def best_step(workdir) -> int:
  """Returns the step of the best checkpoint."""
  return json.loads((Path(workdir) / "best.json").read_text())["step"]


def wait_until_gone(folder) -> None:
  """Waits for Orbax, which deletes in the background."""
  end = time.monotonic() + TIMEOUT
  while folder.exists():
    assert time.monotonic() < end
    time.sleep(0.002)


def read_state(workdir, step=None) -> tuple[int, dict]:
  """Returns (step, {path: array}) of a checkpoint, by default the newest."""
  step = saved_steps(workdir)[-1] if step is None else step
  folder = Path(workdir) / "checkpoints" / str(step) / "state"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(folder).item_metadata.tree
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    args = ocp.args.PyTreeRestore(restore_args=as_numpy)
    return step, state.flatten(reader.restore(folder, args=args))


def read_batches(file) -> dict[tuple[int, int], str]:
  """Returns {(step, row): digest}; a row that came twice came the same."""
  seen = {}
  for line in Path(file).read_text().splitlines():
    step, row, digest = json.loads(line)
    assert seen.setdefault((step, row), digest) == digest, (step, row)
  return seen


def snapshot(folder) -> dict[str, tuple[int, int]]:
  """Returns {file: (size, time of change)} of everything below a folder."""
  return {
    str(f.relative_to(folder)): (f.stat().st_size, f.stat().st_mtime_ns)
    for f in Path(folder).rglob("*")
    if f.is_file()
  }


def read_both_states(workdir, reference):
  """Yields (path, array, expected) of the best and of the newest states."""
  for find in (best_step, lambda run: saved_steps(run)[-1]):
    step, arrays = read_state(workdir, find(workdir))
    expected_step, expected = read_state(reference, find(reference))
    assert step == expected_step
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
      yield path, array, expected[path]


def assert_same_run(workdir, reference) -> None:
  """Checks that two runs ended the same, to the bit."""
  assert read_metrics(workdir) == read_metrics(reference)
  for path, array, expected in read_both_states(workdir, reference):
    assert array.dtype == expected.dtype, path
    assert array.tobytes() == expected.tobytes(), path
