"""`vit-jax verify`: compare features with published values."""

from vit_jax.commands import flags


def add_flags(parser):
  parser.add_argument("source", metavar="SOURCE", help=flags.SOURCE)
  parser.add_argument(
    "--image",
    required=True,
    metavar="FILE",
    help="the published values' image: 000000039769.jpg of COCO's val2017",
  )
  flags.add_json(parser)


def run(args):
  from vit_jax.evaluation import verify

  found = verify.verify(args.source, args.image)
  flags.print_result(args, found, lambda x: _format(x, verify.TOLERANCE))
  return 0 if found["equal"] else 1


def _format(found, tolerance):
  lines = [found["model"]]
  for row in found["rows"]:
    for name in ("published", "found"):
      numbers = " ".join(f"{x:9.5f}" for x in row[name])
      lines.append(f"  {row['token']:<12} {name:<10} {numbers}")
  verdict = "the same" if found["equal"] else "NOT the same"
  lines.append(
    f"{verdict}: they differ by {found['difference']:.5f} at most, up to "
    f"{tolerance} is expected"
  )
  return "\n".join(lines)
