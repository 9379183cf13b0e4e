"""`vit-jax predict`: classify image files."""

import json
import sys

from vit_jax.commands import flags


def add_flags(parser):
  flags.add_classifier(parser)
  parser.add_argument(
    "images", nargs="+", metavar="IMAGE", help="image files or folders"
  )
  parser.add_argument("--top", type=int, default=5, help="classes to show")
  flags.add_json(parser)


def run(args):
  from vit_jax.evaluation.predict import predict

  results = predict(args.checkpoint, args.images, args.top, args.class_names)
  if args.json:
    print(json.dumps(results))
  else:
    _print(results)
  errors = [result["error"] for result in results if "error" in result]
  for error in errors:
    print(f"error: {error}", file=sys.stderr)
  return 2 if errors else 0


def _print(results):
  for result in results:
    if "classes" in result:
      print(result["image"])
      for entry in result["classes"]:
        print(f"  {entry['probability']:7.2%}  {entry['name']}")
