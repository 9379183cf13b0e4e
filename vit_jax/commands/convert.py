"""`vit-jax convert`: write weights in another format."""

from vit_jax.commands import flags, process


def add_flags(parser):
  parser.add_argument("source", metavar="SOURCE", help=flags.SOURCE)
  parser.add_argument("out", metavar="OUT", help="the file or folder to write")
  parser.add_argument(
    "--to", required=True, help="npz, big_vision, hf, timm or orbax"
  )


def run(args):
  process.use_cpu()
  from vit_jax import pretrained

  weights = pretrained.read(args.source)
  for note in pretrained.write(weights, args.out, args.to):
    print(f"note: {note}")
  print(f"{args.out}: {args.source} as {args.to}")
