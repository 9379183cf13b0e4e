"""`vit-jax plan`: estimate a run's time, memory and cost on TPUs."""

import json

from vit_jax.commands import flags, process
from vit_jax.errors import UserError

EXTRA = "plan"


def add_flags(parser):
  parser.add_argument(
    "--config",
    action="append",
    default=[],
    metavar="CONFIG[:ARG]",
    help="as for train, with --config.key=value; may be repeated",
  )
  flags.add_overrides(parser)
  parser.add_argument(
    "--topology",
    default="v5e:4x4",
    metavar="CHIP:SIZE",
    help="default: v5e:4x4; several: v5e:4x4,v5e:8x8",
  )
  parser.add_argument(
    "--num_classes", type=int, help="for data sets not in the catalogue"
  )
  parser.add_argument(
    "--num_examples", type=int, help="for data sets not in the catalogue"
  )
  parser.add_argument("--price", type=float, help="dollars per chip-hour")
  parser.add_argument(
    "--dump-hlo", metavar="FILE", help="write the compiled train step"
  )
  parser.add_argument(
    "--fastest",
    action="store_true",
    help="compare fsdp 1, 2, 4, ..., each with what it needs to fit",
  )
  flags.add_json(parser)


def run(args):
  process.use_cpu()
  from vit_jax.tools import plan
  from vit_jax.tools.plan import report

  if not args.config:
    raise UserError("plan needs --config=CONFIG[:ARG]")
  pairs = [(c, t) for c in args.config for t in args.topology.split(",")]
  if args.dump_hlo and len(pairs) > 1:
    raise UserError(
      "--dump-hlo writes the program of a single plan; give one --config and "
      "one --topology"
    )
  given = flags.options(args, "config", "topology", "fastest")
  if args.fastest:
    if len(pairs) > 1 or args.dump_hlo:
      raise UserError(
        "--fastest takes one --config, one --topology, no --dump-hlo"
      )
    del given["dump_hlo"]
    found = plan.find_fastest(*pairs[0], **given)
    print(json.dumps(found) if args.json else report.format_fastest(found))
    return
  found = [plan.plan(*pair, **given) for pair in pairs]
  if args.json:
    print(json.dumps(found if len(found) > 1 else found[0]))
  else:
    print(report.format_plans(found))
