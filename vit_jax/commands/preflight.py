"""`vit-jax preflight`: check a run's requirements on all its hosts."""

from vit_jax.commands import distributed, flags
from vit_jax.errors import RunStopped, UserError


def add_flags(parser):
  flags.add_config(parser, "as for train, with --config.key=value")
  flags.add_workdir(parser, "as for train")
  parser.add_argument("--hosts", type=int, help="required number of processes")
  parser.add_argument(
    "--topology", metavar="CHIP:SIZE", help="estimate memory for, say, v5e:4x4"
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
