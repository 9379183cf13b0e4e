"""`vit-jax data build`: make a data set of your own labelled images."""

from vit_jax.commands import flags, process


def add_flags(parser):
  parser.add_argument("name", metavar="NAME", help="name of the new data set")
  parser.add_argument(
    "--images",
    required=True,
    help="a folder, .tar or .parquet files, or tfds:DATASET:SPLIT",
  )
  parser.add_argument(
    "--labels",
    help="CSV (image,label[,confidence]), .jsonl, or the word folders: the "
    "name of an image's folder or tar file is then its class",
  )
  parser.add_argument("--classes", help="a file with one class per line")
  parser.add_argument(
    "--min_confidence", type=float, default=0.0, help="drop labels below this"
  )
  parser.add_argument(
    "--against",
    action="append",
    default=[],
    metavar="DATASET:SPLIT",
    help="exclude images and near-duplicates of this test set (repeatable)",
  )
  parser.add_argument(
    "--holdout", type=float, default=0.0, help="fraction for the split `test`"
  )
  parser.add_argument("--workers", type=int, help="default: one per core")
  parser.add_argument(
    "--beam_runner",
    metavar="RUNNER",
    help="use Apache Beam instead of local processes: DataflowRunner, "
    "FlinkRunner, SparkRunner, DirectRunner",
  )
  parser.add_argument(
    "--beam_options",
    metavar="KEY=VALUE,...",
    help="options of Beam's pipeline, without leading dashes",
  )
  flags.add_data_dir(parser)


def run(args):
  process.use_cpu()
  from vit_jax.tools.build_data import labelled

  folder, report = labelled.build(**flags.options(args))
  for what, found in report.items():
    count = found if isinstance(found, int) else len(found)
    print(f"{what:20}{count:,}")
  print(
    f"{args.name} is ready in {folder}; report.json lists what was left out"
  )
