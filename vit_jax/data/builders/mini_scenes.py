"""Synthetic images of balls on a floor, in perspective.

32 x 32 pixels with one to six balls of one size. `label_count` is their number,
`label_distance` the distance of the nearest. A stand-in for VTAB's structured
tasks that needs no download.

Image i is a pure function of i, see `vit_jax.data.drawn`.
"""

import itertools
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vit_jax.data.drawn import SIZE, DrawnBuilder, Draws

_STREAM = 102  # of random numbers
MOST_BALLS = 6
# The nearest ball's distance lies between two of these; a ball at 1 has a
# radius of 5.5 pixels, one at d has 5.5 / d.
DISTANCES = (1.0, 1.3, 1.7, 2.2, 2.9, 3.8)
_FARTHEST = 4.2
_RADIUS, _HORIZON, _HEIGHT = 5.5, 8.0, 16.0  # pixels, at distance 1
_COLOURS = np.array(
  [
    [225, 60, 50],
    [60, 190, 80],
    [70, 100, 235],
    [240, 210, 70],
    [215, 90, 205],
    [80, 215, 225],
    [240, 150, 60],
  ]
)


def draw_images(
  index: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws the images int64[n].

  Returns:
    (uint8[n SIZE SIZE 3], number of balls - 1 int64[n], the nearest ball's
    interval of DISTANCES int64[n]).
  """
  draws = Draws(_STREAM, index)
  count = draws.integer(0, MOST_BALLS)
  near = draws.integer(0, len(DISTANCES) - 1)
  bounds = np.array(DISTANCES)
  low, high = bounds[near], bounds[near + 1]
  nearest = (low + (high - low) * draws.uniform(0.02, 0.98))[:, None]
  depth = nearest + (_FARTHEST - nearest) * draws.uniform(0, 1, (MOST_BALLS,))
  depth[:, :1] = nearest
  # Balls stand in columns, in random order, so that none hides another.
  column = np.argsort(draws.bits((MOST_BALLS,)), axis=1, kind="stable")
  x = 3 + 5.2 * (column + draws.uniform(-0.15, 0.15, (MOST_BALLS,)))
  order = np.argsort(-depth, axis=1, kind="stable")
  rows = np.arange(len(index))
  image = _draw_floor(draws)
  colour = draws.integer(0, len(_COLOURS), (MOST_BALLS,))
  tint = draws.integer(-20, 21, (MOST_BALLS, 3))
  for k in range(MOST_BALLS):
    ball = order[:, k]  # the farthest first
    image = _draw_ball(
      image,
      x=x[rows, ball],
      depth=depth[rows, ball],
      colour=_COLOURS[colour[rows, ball]] + tint[rows, ball],
      exists=ball <= count,
    )
  image = image + draws.integer(-8, 9, (SIZE, SIZE, 3))
  return np.clip(image, 0, 255).astype(np.uint8), count, near


def _draw_floor(draws):
  """Returns a wall above a floor, int64[n h w 3]."""
  wall, floor = draws.integer(60, 120, (2, 1)).swapaxes(0, 1) + np.array(
    [[[-8, 0, 14]], [[8, 2, -8]]]
  ).reshape(2, 1, 3)
  is_floor = (np.arange(SIZE) >= _HORIZON + 2)[:, None, None]
  light = np.arange(SIZE)[:, None, None]
  image = np.where(is_floor, floor[:, None, None] + light, wall[:, None, None])
  return image + np.zeros((1, 1, SIZE, 1), np.int64)


def _draw_ball(image, *, x, depth, colour, exists):
  """Paints a ball with a highlight at its upper left; arguments are [n ...]."""
  x, depth = x[:, None, None], depth[:, None, None]
  radius = _RADIUS / depth
  pixel = np.arange(SIZE) + 0.5
  dx = (pixel - x) / radius
  dy = (pixel[:, None] - (_HORIZON + _HEIGHT / depth)) / radius
  inside = np.clip((1 - (dx * dx + dy * dy)) * radius + 0.5, 0, 1)
  inside = np.floor(256 * inside * exists[:, None, None]).astype(np.int64)
  lx, ly = dx + 0.35, dy + 0.35
  light = np.floor(70 * np.clip(1 - (lx * lx + ly * ly), -0.6, 1))
  paint = colour[:, None, None] + light.astype(np.int64)[..., None]
  return image + (paint - image) * inside[..., None] // 256


class MiniScenes(DrawnBuilder):
  """Balls on a floor, labelled with their number and the nearest distance."""

  LABELS: ClassVar = {
    "label_count": tfds.features.ClassLabel(
      names=["1 ball", *(f"{n} balls" for n in range(2, MOST_BALLS + 1))]
    ),
    "label_distance": tfds.features.ClassLabel(
      names=[f"{a:g} to {b:g}" for a, b in itertools.pairwise(DISTANCES)]
    ),
  }

  def draw(self, index):
    yield from zip(*draw_images(index), strict=True)
