"""The processes of a run: how they start together, and what they must share.

`jax.distributed` connects them, and ends all others when one is lost. With
other settings, code or data on one of them they would train a wrong model, or
wait for ever. So they compare what must be equal before the first step.
"""

import hashlib
import json
import logging
import os
import pathlib
import platform
import socket
import sys
import threading
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax import __version__
from vit_jax.errors import RunStopped, UserError

log = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  start_timeout: float = 300,
  lost_timeout: float = 60,
) -> None:
  """Connects the processes of a run; all have to call it before using JAX.

  JAX aborts (exit code 134) with the number of a process that has had no
  heartbeat for `lost_timeout` seconds. Without all processes in time it would
  abort as well and name nobody (JAX 0.10 to 0.12), so a timer ends this one
  before, with one line and exit code 1.

  Args:
    coordinator: "host:port" of process 0. None: the TPU pod or Slurm says.
    num_processes, process_id: how many, and which this is, from 0; likewise.
    start_timeout, lost_timeout: seconds.

  Raises:
    UserError: neither the arguments nor the cluster say who is who.
    RunStopped: the port is taken, or the cluster's answer is not usable.
  """
  if coordinator and process_id == 0:
    _check_port(coordinator)
  count = num_processes or os.environ.get("SLURM_NTASKS")
  what = f"all {count} processes" if count else "all processes of this cluster"
  what += f" at {coordinator}" if coordinator else ""
  log.info(
    "waiting up to %g s for %s; start the same command on every host",
    *(start_timeout, what),
  )
  given = None not in (coordinator, num_processes, process_id)
  timer = exit_after(
    start_timeout,
    1,
    f"stopped: waited {start_timeout:g} s for {what}; was the same command "
    "started on every host, did it end there with an error, does a firewall "
    "keep them from process 0?",
  )
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      cluster_detection_method="deactivate" if given else None,
      initialization_timeout=int(start_timeout) + 60,
      heartbeat_timeout_seconds=max(1, int(lost_timeout)),
      shutdown_timeout_seconds=int(lost_timeout) + 300,
    )
  except ValueError as e:  # what it needs is neither given nor found
    raise UserError(
      "--distributed finds no TPU pod and no Slurm step here; on other "
      "machines give --coordinator=HOST:PORT, --num_processes, --process_id"
    ) from e
  except Exception as e:  # of whatever the cluster is asked with
    raise RunStopped(f"--distributed: {e!r}") from e
  finally:
    timer.cancel()
  index, count = jax.process_index(), jax.process_count()
  log.info("all %d processes are there; this is number %d", count, index)


def exit_after(seconds: float, code: int, line: str = "") -> threading.Timer:
  """Ends this process later, even if its main thread waits inside of JAX."""

  def end():
    if line:
      print(line, file=sys.stderr, flush=True)
    os._exit(code)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  return timer


def _check_port(coordinator):
  """Raises RunStopped if another program has it: JAX would crash."""
  try:
    port = int(coordinator.rpartition(":")[2])
    socket.create_server(("", port)).close()
  except OSError as e:
    raise RunStopped(
      f"process 0 cannot open {coordinator}: {e.strerror}; is an older run "
      "still there? Stop it, or give another port"
    ) from e


def check_same(facts: dict[str, Any]) -> None:
  """Raises unless all processes give the same facts; all have to call it.

  Args:
    facts: {name: value}; values are compared by their `repr`.

  Raises:
    UserError: on every process; names the first host that differs from
      process 0, and what differs there.
  """
  if jax.process_count() == 1:
    return
  mine = {name: repr(value) for name, value in facts.items()}
  hosts, everyone = zip(*gather([socket.gethostname(), mine]), strict=True)
  for i, other in enumerate(everyone):
    names = sorted(everyone[0].keys() | other.keys())
    different = [
      f"{name} is {other.get(name)} there and {everyone[0].get(name)} here"
      for name in names
      if other.get(name) != everyone[0].get(name)
    ]
    if different:
      more = f" and {len(different) - 3} more" if different[3:] else ""
      raise UserError(
        f"process {i} on {hosts[i]} differs from process 0 on {hosts[0]}: "
        f"{'; '.join(different[:3])}{more}; start the same command with the "
        "same files on every host"
      )


def digest_package() -> str:
  """Returns a digest of the package's own source files."""
  folder = pathlib.Path(__file__).parent
  digest = hashlib.sha256()
  for file in sorted(folder.glob("**/*.py")):
    digest.update(str(file.relative_to(folder)).encode())
    digest.update(file.read_bytes())
  return digest.hexdigest()[:12]


def read_versions() -> dict[str, str]:
  """Returns {package: version} of what has to be the same everywhere."""
  versions = {"python": platform.python_version(), "vit_jax": __version__}
  for name in _PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name] = "none"
  return versions


def gather(value) -> list:
  """Returns the values of all processes, of JSON's types, by process."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(data.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]
