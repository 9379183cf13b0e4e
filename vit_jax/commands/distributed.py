"""The flags of a run on several machines, and how its processes connect."""

import logging
from typing import Any

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


def find_place(args) -> Any:
  """Returns the `hosts.Place` of this process, None if it is alone."""
  given = (args.coordinator, args.num_processes, args.process_id)
  if not args.distributed and given == (None, None, None):
    return None
  if not args.distributed and None in given:
    raise UserError(
      "--coordinator, --num_processes and --process_id are given together"
    )
  from vit_jax.training import hosts

  return hosts.find_place(*given, timeout=args.start_timeout)


def connect(args, say_saved=None) -> None:
  """Connects to the other processes of a run, if there are any.

  Sets `args.lifeline`, with which this process is told if one of them fails.
  """
  place = find_place(args)
  if place is None:
    return
  from vit_jax.training import hosts, lifeline

  args.lifeline = lifeline.hold(
    place, args.start_timeout, args.lost_timeout, say_saved
  )
  hosts.connect(place, args.start_timeout)
  if place.index:
    logging.getLogger("vit_jax").setLevel(logging.WARNING)
