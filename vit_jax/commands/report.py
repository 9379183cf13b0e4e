"""`vit-jax report`: write an HTML page about runs."""

from vit_jax.commands import flags


def add_flags(parser):
  parser.add_argument(
    "workdirs",
    nargs="+",
    metavar="WORKDIR",
    help="a run folder, or one with runs below it",
  )
  parser.add_argument("--out", default="report.html", help="the file to write")
  flags.add_data_dir(parser)


def run(args):
  from vit_jax.tools.report import report

  file = report(args.workdirs, args.out, args.data_dir)
  print(f"{file}: {len(file.read_bytes()) / 1e3:,.0f} kB")
