"""`vit-jax convert`: write weights in another format."""

from vit_jax.commands import flags, process


def add_flags(parser):
  parser.add_argument("source", metavar="SOURCE", help=flags.SOURCE)
  parser.add_argument("out", metavar="OUT", help="the file or folder to write")
  parser.add_argument("--to", help="npz, big_vision, hf, timm or orbax")
  flags.add_resize(parser)
  parser.add_argument(
    "--push",
    action="store_true",
    help="OUT is hf:OWNER/NAME: upload there, as hf (the default) or timm",
  )


def run(args):
  process.use_cpu()
  from vit_jax import pretrained

  to = args.to or ("hf" if args.push else "")
  weights = pretrained.read(args.source, args.resize)
  out = args.out
  if args.push:
    out, notes = pretrained.push(weights, args.out, to)
  else:
    notes = pretrained.write(weights, args.out, to)
  for note in notes:
    print(f"note: {note}")
  print(f"{out}: {args.source} as {to}")
