"""`vit-jax embed`: write the features of image files."""

import sys

from vit_jax.commands import flags


def add_flags(parser):
  parser.add_argument("source", metavar="SOURCE", help=flags.SOURCE)
  parser.add_argument(
    "images", nargs="+", metavar="IMAGE", help="image files or folders"
  )
  parser.add_argument(
    "--out", required=True, metavar="FILE", help="FILE.npz or FILE.parquet"
  )
  flags.add_features(parser)
  flags.add_image_size(parser, help="default: the checkpoint's")
  flags.add_resize(parser)
  parser.add_argument(
    "--batch_size", type=int, default=64, help="images per batch"
  )
  flags.add_json(parser)


def run(args):
  from vit_jax.evaluation.embed import embed

  found = embed(**flags.options(args))

  def describe(found):
    shape = "x".join(map(str, found["shape"]))
    return f"{args.out}: {shape} features of {found['images']} images"

  flags.print_result(args, found, describe)
  for error in found["errors"]:
    print(f"error: {error}", file=sys.stderr)
  return 2 if found["errors"] else 0
