"""`vit-jax preflight`: check what a run needs, on all its hosts."""

from vit_jax.commands import distributed, flags
from vit_jax.errors import RunStopped, UserError


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
  from vit_jax import config

  loaded = config.load(args.config, args.overrides)
  distributed.connect(args)
  import jax

  from vit_jax.tools import preflight

  count = jax.process_count()
  if args.hosts and args.hosts != count:
    raise RunStopped(
      f"there are {count} of {args.hosts} processes; start the same command on "
      "all hosts, with --distributed on a pod or under Slurm"
    )
  given = (args.config, args.overrides, args.topology)
  found = preflight.check(loaded, args.workdir, *given)
  if jax.process_index() == 0:
    width = max(map(len, found)) + 2
    for name, each in found.items():
      print(f"{name:{width}}{each.state:9}{each.text}", flush=True)
  failed = [name for name, each in found.items() if each.state == "failed"]
  if failed:
    raise UserError(f"not ready: {', '.join(failed)}")
