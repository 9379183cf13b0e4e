"""`vit-jax data show`: draw augmented training images."""

from vit_jax.commands import flags, process


def add_flags(parser):
  flags.add_dataset_name(parser)
  flags.add_data_dir(parser)
  parser.add_argument("--split", default="train")
  parser.add_argument(
    "--preprocess", default="inception_crop(size)|flip_lr", metavar="OPS"
  )
  flags.add_image_size(parser, default=224)
  parser.add_argument("--output", default="show.png", help="the file to write")
  parser.add_argument("--seed", type=int, default=0, help="chooses the images")


def run(args):
  process.use_cpu()
  from vit_jax.tools import datasets

  file = datasets.show(**flags.options(args))
  print(
    f"{datasets.NUM_SHOWN} images of {args.name} {args.split} are in {file}"
  )
