"""The flags of a run on several machines, and how its processes connect."""

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
    "Run the same command on each. On TPU pods and under Slurm --distributed "
    "is enough; elsewhere give all three of the others.",
  )
  group.add_argument(
    "--distributed", action="store_true", help="processes find each other"
  )
  group.add_argument(
    "--coordinator", metavar="HOST:PORT", help="where process 0 listens"
  )
  group.add_argument("--num_processes", type=int, help="of the run, in all")
  group.add_argument("--process_id", type=int, help="of this one, from 0")
  group.add_argument(
    "--start_timeout",
    type=float,
    default=300,
    metavar="SECONDS",
    help="how long to wait for the other processes (default: 300)",
  )
  group.add_argument(
    "--lost_timeout",
    type=float,
    default=60,
    metavar="SECONDS",
    help="without a heartbeat for so long, a process is dead (default: 60)",
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
  """Raises a UserError for flags that make no sense."""
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
      f"--process_id={process_id} of --num_processes={num_processes}; it goes "
      f"from 0 to {num_processes - 1}"
    )


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
  abort as well without naming it (JAX 0.10 to 0.12), so a timer ends this one
  before, with one line and exit code 1.

  Args:
    coordinator: "host:port" of process 0. None: from the TPU pod or Slurm.
    num_processes, process_id: how many, and which this is, from 0; likewise.
    start_timeout, lost_timeout: seconds.

  Raises:
    UserError: neither the arguments nor the cluster number the processes.
    RunStopped: the port is taken, or the cluster's answer is not usable.
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
