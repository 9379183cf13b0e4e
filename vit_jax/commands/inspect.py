"""`vit-jax inspect`: describe a file of weights."""

from vit_jax.commands import flags, process


def add_flags(parser):
  parser.add_argument(
    "source",
    nargs="?",
    metavar="SOURCE",
    help=f"{flags.SOURCE}; omit it to list the published names",
  )
  flags.add_json(parser)


def run(args):
  process.use_cpu()
  if args.source is None:
    print(_list_published())
    return
  from vit_jax.pretrained.inspect import inspect

  flags.print_result(args, inspect(args.source), _format)


def _list_published():
  from vit_jax.pretrained import embedded
  from vit_jax.pretrained.names import PUBLISHED

  places = PUBLISHED | dict.fromkeys(
    embedded.MODELS, "in the package: no download"
  )
  width = max(map(len, places))
  return "\n".join(
    f"{name:{width}}  {place}" for name, place in sorted(places.items())
  )


def _format(found):
  by = "x".join
  size, grid = (by(map(str, found[name])) for name in ("image_size", "grid"))
  names = found["class_names"]
  lines = [
    f"{found['source']}",
    f"origin         {found['origin']}",
    f"variant        {found['variant']}, "
    f"{found['num_parameters']:,} parameters",
    f"image size     {size}, patch {found['patch']}, grid {grid}",
    f"classes        {found['num_classes']}, "
    + ("named " + ", ".join(names[:3]) + ", ..." if names else "without names"),
    f"head           {found['head'].upper()}"
    f", from {found['classifier']}"
    + (
      f" through a tanh layer of {found['representation_size']}"
      if found["representation_size"]
      else ""
    ),
    f"positions      {found['pos_embedding']}, resized {found['resize']}",
    f"activation     {found['activation']}, LayerNorm epsilon "
    f"{found['layer_norm_epsilon']:g}",
    f"preprocessing  {found['preprocess']}, mean {_triple(found['mean'])}, "
    f"std {_triple(found['std'])}, {found['loss']}",
    "",
  ]
  width = max(len(row["path"]) for row in found["parameters"])
  lines += [
    f"{row['path']:{width}}  {by(map(str, row['shape'])) or 'scalar':>16}  "
    f"{row['dtype']:8}  mean {row['mean']:+.4f}  std {row['std']:.4f}"
    for row in found["parameters"]
  ]
  lines += [f"NOTE: {note}" for note in found["notes"]]
  return "\n".join(lines)


def _triple(values):
  return "/".join(f"{x:g}" for x in values)
