"""The flags of a run on several machines, and how its processes connect."""

import logging

from vit_jax.errors import UserError


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
  from vit_jax import distributed

  distributed.start(*given, args.start_timeout, args.lost_timeout)
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
