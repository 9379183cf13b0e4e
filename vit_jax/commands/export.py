"""`vit-jax export`: write a model that runs without this package."""

from vit_jax.commands import flags


def add_flags(parser):
  parser.add_argument("source", metavar="SOURCE", help=flags.SOURCE)
  parser.add_argument("out", metavar="OUT", help="the folder to write")
  parser.add_argument(
    "--to", required=True, help="stablehlo, saved_model or onnx"
  )
  flags.add_image_size(
    parser, help="default: the checkpoint's; position embeddings are resized"
  )
  flags.add_resize(parser)


def run(args):
  from vit_jax.tools.export import export

  about = export(
    args.source,
    args.out,
    args.to,
    image_size=args.image_size,
    resize=args.resize,
  )
  shape = ", ".join(map(str, about["input"]["shape"]))
  print(
    f"{args.out}: {about['variant']} as {args.to}, "
    f"{about['bytes'] / 1e6:.1f} MB, images {about['input']['dtype']}[{shape}]"
  )
