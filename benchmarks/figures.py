"""Measures `vit-jax figures`: seconds and memory, as in docs/look.md.

  .venv/bin/python benchmarks/figures.py

Uses the quickstart's fine-tuned run, if there is one, and a ViT-B_16 with
weights from a formula (350 MB in a temporary folder).
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from vit_jax.pretrained import Weights, vision_transformer
from vit_jax.pretrained.weights import LazyArray

_QUICKSTART = Path("runs/quickstart")


def write_formula(file):
  """Writes a ViT-B_16 with value 0.05 sin(i^2) at place i of each array."""
  weights = Weights(
    "formula", "formula", {"variant": "ViT-B_16"}, (224, 224), 1000, {}
  )

  def make(x):
    places = np.arange(np.prod(x.shape), dtype=np.float64)
    values = 0.05 * np.sin(places**2)
    return values.astype(np.float32).reshape(x.shape)

  params = {
    path: LazyArray(x.shape, np.dtype(np.float32), lambda x=x: make(x))
    for path, x in weights.shapes().items()
  }
  vision_transformer.write(weights._replace(params=params), file)


def write_pictures(folder, count=8):
  """Writes pictures of discs; returns their paths."""
  y, x = np.mgrid[:256, :320]
  paths = []
  for i in range(count):
    inside = np.hypot(y - 128, x - 40 * (i + 1) + 20) < 20 + 5 * i
    channels = [np.where(inside, 220 - 20 * c, 30 + 9 * i) for c in range(3)]
    paths.append(folder / f"{i}.png")
    Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(paths[-1])
  return paths


def measure(*args):
  """Runs `vit-jax figures`; returns (seconds, peak GiB)."""
  begin = time.monotonic()
  process = subprocess.Popen(
    [sys.executable, "-m", "vit_jax", "figures", *map(str, args)],
    stdout=subprocess.DEVNULL,
  )
  _, status, usage = os.wait4(process.pid, 0)
  assert status == 0
  return time.monotonic() - begin, usage.ru_maxrss / 2**20


def main():
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    pictures = write_pictures(folder)
    file = folder / "ViT-B_16.npz"
    write_formula(file)
    rows = [("ViT-B_16 at 224, formula weights, 8 images", file, pictures, [])]
    size = ["--image_size=384"]
    rows.append(("the same at 384", file, pictures, size))
    if _QUICKSTART.exists():
      images = sorted((_QUICKSTART / "images").glob("*.png"))
      source = _QUICKSTART / "finetune"
      rows.append((f"{source}, 8 images", source, images, []))
    for i, (title, source, images, options) in enumerate(rows):
      out = f"--out={folder / str(i)}"
      seconds, memory = measure(
        f"--checkpoint={source}", *images, out, *options
      )
      print(f"| {title} | {seconds:.0f} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
  main()
