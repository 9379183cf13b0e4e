"""`vit-jax evaluate`: evaluate saved weights."""

import json

from vit_jax.commands import distributed, flags


def add_flags(parser):
  where = parser.add_mutually_exclusive_group(required=True)
  where.add_argument("--workdir", help="a run folder")
  where.add_argument("--checkpoint", metavar="SOURCE", help=flags.SOURCE)
  parser.add_argument("--dataset", help="default: the run's test set")
  parser.add_argument("--split", help="default: the run's")
  parser.add_argument(
    "--batch_size", type=int, help="images per batch; default: the run's, or 64"
  )
  flags.add_data_dir(parser)
  flags.add_json(parser)
  distributed.add_flags(parser)


def run(args):
  distributed.connect(args)
  import jax

  from vit_jax.evaluation.evaluate import evaluate

  given = flags.options(args, "workdir", "checkpoint")
  results = evaluate(args.workdir or args.checkpoint, **given)
  if jax.process_index():
    return
  if args.json:
    print(json.dumps(results))
    return
  width = max(map(len, results)) + 2
  for name, value in results.items():
    text = f"{value:.4f}" if isinstance(value, float) else value
    print(f"{name:{width}}{text}")
