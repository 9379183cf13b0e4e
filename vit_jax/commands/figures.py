"""`vit-jax figures`: draw the paper's figures for any weights."""

from vit_jax.commands import flags


def add_flags(parser):
  parser.add_argument(
    "--checkpoint",
    dest="checkpoints",
    action="append",
    default=[],
    metavar="SOURCE",
    help=f"{flags.SOURCE}; may be repeated, one panel each",
  )
  parser.add_argument(
    "images", nargs="*", metavar="IMAGE", help="for rollout and distances"
  )
  parser.add_argument(
    "--runs", metavar="DIR", help="a folder with runs, for curves and compute"
  )
  parser.add_argument(
    "--out", required=True, metavar="DIR", help="the folder to write to"
  )
  parser.add_argument(
    "--only",
    metavar="NAMES",
    help="rollout, filters, positions, distances, curves, compute",
  )
  flags.add_image_size(parser, help="default: the checkpoint's")
  flags.add_resize(parser)


def run(args):
  from vit_jax.tools.figures import make_figures

  args.only = args.only.split(",") if args.only else ()
  written = make_figures(**flags.options(args))
  print("\n".join(written))
