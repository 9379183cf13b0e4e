"""`vit-jax linear`: evaluate features by few-shot, linear probe and k-NN."""

from vit_jax.commands import distributed, flags
from vit_jax.errors import UserError


def add_flags(parser):
  flags.add_checkpoint(parser)
  parser.add_argument("--dataset", required=True, help="one label per image")
  parser.add_argument("--train_split", default="train")
  parser.add_argument("--test_split", default="test")
  parser.add_argument(
    "--shots",
    default="5,10",
    help="training images per class; all: every image (default: 5,10)",
  )
  parser.add_argument(
    "--seeds", type=int, default=3, help="random draws of the shots"
  )
  parser.add_argument(
    "--l2", type=float, default=1024, help="regularisation strength"
  )
  parser.add_argument(
    "--knn",
    dest="neighbours",
    type=int,
    default=0,
    metavar="K",
    help="also evaluate a K-nearest-neighbour classifier, such as K=20",
  )
  flags.add_features(parser)
  flags.add_image_size(parser, help="default: the checkpoint's")
  flags.add_resize(parser)
  parser.add_argument(
    "--preprocess", metavar="OPS", help="default: the checkpoint's"
  )
  parser.add_argument(
    "--batch_size", type=int, default=64, help="images per batch"
  )
  flags.add_data_dir(parser)
  flags.add_json(parser)
  distributed.add_flags(parser)


def run(args):
  args.shots = _parse_shots(args.shots)
  distributed.connect(args)
  import jax

  from vit_jax.evaluation import linear

  given = flags.options(args, "checkpoint")
  found = linear.linear(args.checkpoint, **given)
  if not jax.process_index():
    flags.print_result(args, found, _format)


def _parse_shots(text):
  """Parses "5,10,all" to [5, 10, None]."""
  try:
    return [None if t == "all" else int(t) for t in text.split(",")]
  except ValueError as e:
    raise UserError(
      f"--shots is {text!r}; give numbers or 'all', such as 5,10,all"
    ) from e


def _format(found):
  lines = [
    f"{found['checkpoint']} on {found['dataset']}: {found['features']} "
    f"features, {found['preprocess']}, {found['train_examples']} images of "
    f"{found['train_split']}, {found['test_examples']} of "
    f"{found['test_split']}"
  ]
  for row in found["results"]:
    draws = len(row["accuracies"])
    spread = ""
    if row["spread"] is not None:
      spread = f" +- {row['spread']:.2%} over {draws} draws"
    lines.append(f"  {row['shots']:>4} shots {row['accuracy']:8.2%}{spread}")
  if "knn" in found:
    knn = found["knn"]
    lines.append(f"  {knn['neighbours']:>4}-NN   {knn['accuracy']:8.2%}")
  return "\n".join(lines)
