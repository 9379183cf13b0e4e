"""`vit-jax demo`: classify pictures on a web page."""

import threading

from vit_jax.commands import flags


def add_flags(parser):
  flags.add_classifier(parser)
  parser.add_argument(
    "--host",
    default="127.0.0.1",
    help="default: 127.0.0.1, this machine only; 0.0.0.0 for all interfaces",
  )
  parser.add_argument(
    "--port", type=int, help="default: the first free port from 7860"
  )
  parser.add_argument(
    "--share",
    action="store_true",
    help="also create a public address through gradio's servers (for Colab)",
  )


def run(args):
  from vit_jax.tools import demo

  given = flags.options(args, "checkpoint")
  with demo.serve(args.checkpoint, **given) as url:
    print(f"{url} shows the demo; Ctrl-C ends it", flush=True)
    threading.Event().wait()  # forever
