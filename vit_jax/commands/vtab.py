"""`vit-jax vtab`: fine-tune on VTAB's tasks, 1,000 images each."""

from vit_jax.commands import flags, process

EXTRA = "sweep,train"


def add_flags(parser):
  parser.add_argument(
    "--init_from",
    "--checkpoint",
    required=True,
    dest="source",
    metavar="SOURCE",
    help=f"{flags.SOURCE}; --config.key=value as for train",
  )
  flags.add_overrides(parser)
  flags.add_workdir(parser, "folder with one subfolder per task")
  parser.add_argument(
    "--tasks",
    default="all",
    help="all 19, mini (no download needed), or names: caltech101,dtd",
  )
  flags.add_grid(
    parser,
    "values to try on the 200 validation images (default: learning rate and "
    "schedule)",
  )
  parser.add_argument(
    "--per_task",
    action="store_true",
    help="select the setting per task; default: one for all, as in the paper",
  )
  parser.add_argument(
    "--seeds", type=int, default=1, help="final runs per task"
  )
  flags.add_jobs(parser)
  flags.add_json(parser)


def run(args):
  process.use_cpu()
  from vit_jax.tools import sweep, vtab

  args.grid = sweep.parse_grids(args.grid)
  result = vtab.vtab(**flags.options(args))
  flags.print_result(args, result, vtab.format_report)
