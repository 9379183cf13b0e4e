"""Flags and start-up of runs with several processes."""

import logging
import os
import socket
import sys
import threading

from vit_jax.errors import RunStopped, UserError

log = logging.getLogger(__name__)


def add_flags(parser):
  group = parser.add_argument_group(
    "several machines",
    "Run the same command on each. On TPU pods and under Slurm, --distributed "
    "is enough; elsewhere give --coordinator, --num_processes, --process_id.",
  )
  group.add_argument(
    "--distributed", action="store_true", help="detect the other processes"
  )
  group.add_argument(
    "--coordinator", metavar="HOST:PORT", help="address of process 0"
  )
  group.add_argument("--num_processes", type=int, help="number of processes")
  group.add_argument("--process_id", type=int, help="index of this one, from 0")
  group.add_argument(
    "--start_timeout",
    type=float,
    default=300,
    metavar="SECONDS",
    help="time to wait for the other processes (default: 300)",
  )
  group.add_argument(
    "--lost_timeout",
    type=float,
    default=60,
    metavar="SECONDS",
    help="time without a heartbeat until a process is dead (default: 60)",
  )


def connect(args) -> None:
  """Connects to the other processes of a run, if there are any."""
  given = (args.coordinator, args.num_processes, args.process_id)
  if not args.distributed and given == (None, None, None):
    return
  _check(args, *given)
  start(*given, args.start_timeout, args.lost_timeout)
  import jax

  args.connected = True
  if jax.process_index():
    logging.getLogger("vit_jax").setLevel(logging.WARNING)


def _check(args, coordinator, num_processes, process_id):
  """Raises a UserError for invalid combinations of flags."""
  given = (coordinator, num_processes, process_id)
  if not args.distributed and None in given:
    raise UserError(
      "--coordinator, --num_processes and --process_id are given together"
    )
  if coordinator is not None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
      raise UserError(
        f"--coordinator={coordinator}: give HOST:PORT of process 0"
      )
  if None not in given and not 0 <= process_id < num_processes:
    raise UserError(
      f"--process_id={process_id} with --num_processes={num_processes}; it "
      f"must be from 0 to {num_processes - 1}"
    )


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  start_timeout: float = 300,
  lost_timeout: float = 60,
) -> None:
  """Connects the processes of a run; all have to call it before using JAX.

  If a process has no heartbeat for `lost_timeout` seconds, JAX aborts (exit
  code 134) and names it. If processes do not connect in time, JAX (0.10 to
  0.12) aborts without naming them. A timer therefore ends this process first,
  with one line and exit code 1.

  Args:
    coordinator: "host:port" of process 0. None: from the TPU pod or Slurm.
    num_processes: how many there are. None: likewise.
    process_id: index of this process, from 0. None: likewise.
    start_timeout, lost_timeout: seconds.

  Raises:
    UserError: no process numbers, neither as arguments nor from the cluster.
    RunStopped: the port is in use, or cluster detection failed.
  """
  import jax

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
    "block the port of process 0?",
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
  except ValueError as e:  # required values are neither given nor detected
    raise UserError(
      "--distributed finds no TPU pod and no Slurm step here; on other "
      "machines give --coordinator=HOST:PORT, --num_processes, --process_id"
    ) from e
  except Exception as e:  # from any client that cluster detection uses
    raise RunStopped(f"--distributed: {e!r}") from e
  finally:
    timer.cancel()
  index, count = jax.process_index(), jax.process_count()
  log.info("all %d processes are connected; this is %d", count, index)


def exit_after(seconds: float, code: int, line: str = "") -> threading.Timer:
  """Ends this process later, even if its main thread is blocked in JAX."""

  def end():
    if line:
      print(line, file=sys.stderr, flush=True)
    os._exit(code)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  return timer


def _check_port(coordinator):
  """Raises RunStopped if the port is in use, because JAX would crash."""
  try:
    port = int(coordinator.rpartition(":")[2])
    socket.create_server(("", port)).close()
  except OSError as e:
    raise RunStopped(
      f"process 0 cannot open {coordinator}: {e.strerror}; is an older run "
      "still running? Stop it, or give another port"
    ) from e
