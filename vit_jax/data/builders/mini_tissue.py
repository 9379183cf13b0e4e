"""Synthetic images in the style of stained tissue.

Cells on a slide, 32 x 32 pixels; the class is their shape and arrangement.
A stand-in for VTAB's specialized tasks that needs no download.

Image i is a pure function of i, see `vit_jax.data.drawn`.
"""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vit_jax.data.drawn import SIZE, DrawnBuilder, Draws

_STREAM = 101  # of random numbers
_MOST_CELLS = 28

# Class: (minimum, maximum of cells; minimum, maximum radius in pixels; length /
# width; relative radius of the pale centre; whether they cluster).
CLASSES = {
  "sparse": (3, 6, 2.0, 2.8, 1.0, 0.0, False),
  "dense": (20, 28, 2.0, 2.8, 1.0, 0.0, False),
  "elongated": (8, 13, 1.5, 2.0, 3.0, 0.0, False),
  "hollow": (7, 12, 2.8, 3.8, 1.0, 0.7, False),
  "clustered": (11, 17, 1.7, 2.4, 1.0, 0.0, True),
  "swollen": (4, 7, 4.5, 6.5, 1.0, 0.0, False),
}


def draw_images(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Draws the images int64[n]: (uint8[n SIZE SIZE 3], classes int64[n])."""
  draws = Draws(_STREAM, index)
  labels = draws.integer(0, len(CLASSES))
  slide = draws.integer(200, 245, (3,)) - np.array([0, 34, 12])
  stain = np.array([104, 52, 128]) + draws.integer(-26, 27, (3,))
  ink = _draw_cells(draws, labels)[..., None]  # [n h w 1]
  light = draws.integer(-20, 21, (2, 1, 1))
  ramp = np.arange(SIZE) - SIZE // 2
  light = light[:, 0] * ramp[:, None] + light[:, 1] * ramp  # [n h w]
  pixels = slide[:, None, None] * (256 - ink) + stain[:, None, None] * ink
  pixels = pixels // 256 + light[..., None] // SIZE
  pixels = pixels + draws.integer(-12, 13, (SIZE, SIZE, 3))
  return np.clip(pixels, 0, 255).astype(np.uint8), labels


def _draw_cells(draws, labels):
  """Returns the amount of stain, int64[n h w] in 0..256."""
  table = np.array(list(CLASSES.values()), np.float64)[labels]
  fewest, most, small, large, stretch, hollow, huddle = table.T[:, :, None]
  count = np.floor(fewest + (most + 1 - fewest) * draws.uniform(0, 1, (1,)))
  exists = np.arange(_MOST_CELLS) < count
  radius = small + (large - small) * draws.uniform(0, 1, (_MOST_CELLS,))
  # Random factors move the cells of a cluster towards its centre.
  middle = draws.uniform(10, 22, (1, 2))
  reach = draws.uniform(-1, 1, (_MOST_CELLS, 2))
  anywhere = 16 + 15 * reach
  near = middle + 9 * reach * draws.uniform(0.3, 1, (_MOST_CELLS, 1))
  place = np.where(huddle[..., None] > 0, near, anywhere)
  # One direction per slide, slightly different for each cell. Integers need no
  # sine, and odd ones are never both 0.
  heading = 2 * draws.integer(-40, 41, (1, 2)) + 1
  heading = heading + 2 * draws.integer(-9, 10, (_MOST_CELLS, 2))
  ink = np.zeros((len(labels), SIZE, SIZE))
  pixel = np.arange(SIZE) + 0.5
  for k in range(_MOST_CELLS):
    n = np.flatnonzero(exists[:, k])
    dx = pixel - place[n, k, 0, None, None]
    dy = pixel[:, None] - place[n, k, 1, None, None]
    p, q = heading[n, k, 0, None, None], heading[n, k, 1, None, None]
    wide = radius[n, k, None, None]
    long = wide * stretch[n, :, None]
    along, across = p * dx + q * dy, p * dy - q * dx
    square = along * along / (long * long) + across * across / (wide * wide)
    square = square / (p * p + q * q)  # 1 on the edge
    edge = np.clip(2.0 * (1.0 - square) + 0.5, 0, 1)
    middle = hollow[n, :, None]
    pale = np.clip(3.0 * (middle - square) + 0.5, 0, 1) * (middle > 0)
    ink[n] = np.maximum(ink[n], edge * (1 - 0.75 * pale))
  return np.floor(ink * 230).astype(np.int64)


class MiniTissue(DrawnBuilder):
  """Cells on a slide; the class is their shape and arrangement."""

  LABELS: ClassVar = {"label": tfds.features.ClassLabel(names=list(CLASSES))}

  def draw(self, index):
    yield from zip(*draw_images(index), strict=True)
