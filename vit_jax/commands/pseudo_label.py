"""`vit-jax pseudo-label`: label images with a trained model."""

from vit_jax.commands import distributed, flags
from vit_jax.errors import RunStopped


def add_flags(parser):
  flags.add_checkpoint(parser)
  parser.add_argument(
    "--dataset",
    required=True,
    help="the images; labels are not used; images:PATH is any folder",
  )
  parser.add_argument("--split", default="train")
  parser.add_argument(
    "--out",
    required=True,
    metavar="PATH",
    help="a folder or gs:// address; load the data set as pseudo:PATH",
  )
  parser.add_argument(
    "--soft",
    action="store_true",
    help="store the ten likeliest classes' probabilities, not just one label",
  )
  parser.add_argument(
    "--min_confidence",
    type=float,
    default=0.3,
    help="minimum probability of the likeliest class",
  )
  parser.add_argument(
    "--per_class", type=int, default=130_000, help="maximum images per class"
  )
  parser.add_argument(
    "--no_balance",
    dest="balance",
    action="store_false",
    help="do not oversample smaller classes to the size of the largest, which "
    "is the default",
  )
  parser.add_argument(
    "--batch_size", type=int, default=64, help="images per batch"
  )
  flags.add_data_dir(parser)
  flags.add_json(parser)
  distributed.add_flags(parser)


def run(args):
  distributed.connect(args)
  import jax

  from vit_jax.tools.pseudo_label import pseudo_label
  from vit_jax.training.stop import Stopping, StopSignal

  given = flags.options(args, "checkpoint")
  try:
    with StopSignal() as stop:
      found = pseudo_label(args.checkpoint, before_batch=stop.check, **given)
  except Stopping as e:
    raise RunStopped(
      "stopped; the scores so far are saved beside --out; run the same command "
      "again to resume"
    ) from e
  if not jax.process_index():
    flags.print_result(args, found, lambda found: _format(args.out, found))


def _format(out, found):
  least, median, most = found["per_class"].values()
  empty = found["empty"]
  lines = [
    f"pseudo:{out}: {found['kept']:,} images of {found['classes']:,} classes, "
    f"{found['distinct']:,} distinct, {found['repeated']:,} repeated",
    f"  of {found['examples']:,} images {found['confident']:,} were confident "
    f"enough; mean confidence of the kept ones {found['mean_confidence']:.3f}",
    f"  distinct images per class: {least:,} to {most:,}, median {median:,g}; "
    f"with repeats at most {found['largest']:,}",
  ]
  if empty:
    more = ", ..." if len(empty) > 5 else ""
    lines.append(
      f"  {len(empty):,} classes have none: {', '.join(empty[:5])}{more}"
    )
  if found["agreement"] is not None:
    lines.append(
      f"  {found['agreement']:.2%} agree with the data set's own labels, which "
      "were not used"
    )
  return "\n".join(lines)
