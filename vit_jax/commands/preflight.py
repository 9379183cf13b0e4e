"""`vit-jax preflight`: check what a run needs, on all its hosts."""

from vit_jax.commands import distributed, flags
from vit_jax.errors import RunStopped


def add_flags(parser):
  flags.add_config(parser, "the run's; --config.key=value as for train")
  flags.add_workdir(parser, "the run's")
  parser.add_argument(
    "--hosts", type=int, help="how many processes there have to be"
  )
  parser.add_argument(
    "--topology", metavar="CHIP:SIZE", help="plan the memory: v5e:4x4"
  )
  distributed.add_flags(parser)


def run(args):
  place = distributed.find_place(args)
  from vit_jax import config
  from vit_jax.tools import preflight
  from vit_jax.training import hosts

  place = place or hosts.Place("", 1, 0)
  loaded = config.load(args.config, args.overrides)
  facts = preflight.examine(loaded, args.workdir, place.count)
  try:
    everyone = hosts.call_roll(place, facts, args.start_timeout)
  except RunStopped:
    _print(facts["found"])
    raise
  found = preflight.compare(everyone, args.hosts)
  if place.index == 0:
    given = (args.config, args.overrides, args.topology)
    found |= preflight.check_plan(everyone, *given)
    _print(found)
  preflight.raise_if_failed(found)


def _print(found):
  width = max(map(len, found)) + 2
  for name, (state, text) in found.items():
    print(f"{name:{width}}{state:9}{text}", flush=True)
