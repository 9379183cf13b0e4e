"""`vit-jax plan`: estimate what a run would take on TPUs."""

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
    help="may be repeated; --config.key=value as for train",
  )
  flags.add_overrides(parser)
  parser.add_argument(
    "--topology", default="v5e:4x4", help="CHIP:SIZE (default: v5e:4x4)"
  )
  parser.add_argument("--num_classes", type=int, help="of unknown data")
  parser.add_argument("--num_examples", type=int, help="of unknown data")
  parser.add_argument("--price", type=float, help="dollars of a chip-hour")
  parser.add_argument("--dump-hlo", metavar="FILE", help="the compiled step")
  what = parser.add_mutually_exclusive_group()
  what.add_argument(
    "--scale", action="store_true", help="on larger slices as well"
  )
  what.add_argument(
    "--table2", action="store_true", help="the paper's core-days, estimated"
  )
  flags.add_json(parser)


def run(args):
  process.use_cpu()
  from vit_jax.tools import plan
  from vit_jax.tools.plan import report

  if args.table2:
    rows = plan.plan_table2()
    print(json.dumps(rows) if args.json else report.format_table2(rows))
    return
  if not args.config:
    raise UserError("plan needs --config=CONFIG[:ARG], or --table2")
  if args.dump_hlo and (len(args.config) > 1 or args.scale):
    raise UserError("--dump-hlo takes the program of one plan; give one config")
  options = {
    "overrides": args.overrides,
    "num_classes": args.num_classes,
    "num_examples": args.num_examples,
    "price": args.price,
  }
  found = []
  for spec in args.config:
    if args.scale:
      found += plan.plan_scale(spec, args.topology, **options)
    else:
      options["dump_hlo"] = args.dump_hlo
      found.append(plan.plan(spec, args.topology, **options))
  if args.json:
    print(json.dumps(found if len(found) > 1 else found[0]))
  elif args.scale:
    print(report.format_table(found), report.LEFT_OUT, sep="\n\n")
  else:
    print(report.format_plans(found))
