"""`vit-jax quickstart`: pre-train, fine-tune and predict, in minutes."""

import shlex
from pathlib import Path

EXTRA = "train,figures"


def add_flags(parser):
  parser.add_argument(
    "--workdir", default="runs/quickstart", help="folder of data and runs"
  )


def run(args):
  from vit_jax.tools import quickstart

  folder = Path(args.workdir)
  is_old = (folder / quickstart.REPORT).exists()
  report = quickstart.quickstart(folder)
  if report is None:
    print("Interrupted; run it again to resume.")
    return
  print(quickstart.make_table(report))
  quoted = shlex.quote(str(folder))
  if is_old:
    print(f"This is from an earlier run; to run it again: rm -r {quoted}")
  print(f"Written to {folder / quickstart.REPORT}.")
  print(f"Attention maps: {folder / 'figures' / 'rollout.png'}")
  print(f"A page on the runs: vit-jax report {quoted} --out=report.html")
