"""`vit-jax bench input`: measure the input pipeline of this host."""

from vit_jax.commands import flags, process


def add_flags(parser):
  parser.add_argument("--dataset", help="default: JPEGs made for the benchmark")
  parser.add_argument("--split", default="train")
  flags.add_data_dir(parser)
  flags.add_image_size(parser, default=224)
  parser.add_argument("--batch_size", type=int, default=256)
  parser.add_argument(
    "--needs",
    type=float,
    metavar="IMAGES_PER_SECOND",
    help="throughput of a slice; prints how many such hosts can feed it",
  )
  flags.add_json(parser)


def run(args):
  process.use_cpu()
  from vit_jax.tools.bench import input as input_bench

  found = input_bench.bench(**flags.options(args))
  flags.print_result(args, found, input_bench.format_report)
