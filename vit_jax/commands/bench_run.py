"""`vit-jax bench run`: measure where the time of a whole run goes."""

from vit_jax.commands import flags, process


def add_flags(parser):
  parser.add_argument(
    "--config",
    default="configs/quickstart_finetune.py",
    metavar="CONFIG[:ARG]",
    help="a short run; --config.key=value changes one of its keys",
  )
  flags.add_overrides(parser)
  flags.add_data_dir(parser)
  flags.add_json(parser)


def run(args):
  process.use_cpu()  # the runs are processes of their own
  from vit_jax.tools.bench import run as run_bench

  overrides = dict(args.overrides)
  if args.data_dir:
    overrides["data_dir"] = args.data_dir
  found = run_bench.bench(args.config, overrides)
  flags.print_result(args, found, run_bench.format_report)
