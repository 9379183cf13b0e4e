"""`vit-jax sweep`: train with every value of some keys."""

import json

from vit_jax.commands import flags, process

EXTRA = "sweep,train"


def add_flags(parser):
  flags.add_config(parser, "as for train, with --config.key=value")
  parser.add_argument(
    "--final",
    metavar="CONFIG[:ARG]",
    help="trained with the best setting; only this then has several --seeds",
  )
  flags.add_workdir(parser, "folder with one subfolder per run")
  flags.add_grid(
    parser, "a key and its values; several grids: their Cartesian product"
  )
  parser.add_argument("--seeds", type=int, default=3, help="runs per setting")
  flags.add_jobs(parser)
  parser.add_argument(
    "--select",
    metavar="[NAME/]METRIC",
    help="metric to select by (default: config.best_metric, or accuracy)",
  )
  flags.add_json(parser)


def run(args):
  process.use_cpu()
  from vit_jax import config
  from vit_jax.training import early

  early.check_select(args.select)
  if not args.grid:  # a grid may complete the configuration
    early.check(config.load(args.config, args.overrides))
  from vit_jax.tools import sweep

  args.grid = sweep.parse_grids(args.grid)
  result = sweep.sweep(**flags.options(args))
  if args.json:
    print(json.dumps(result if args.final else result["sweep"]))
  else:
    print("\n\n".join(map(sweep.format_summary, result.values())))
