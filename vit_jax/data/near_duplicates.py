"""Finds images of a pre-training set that are also in a test set.

The paper de-duplicates its pre-training sets with respect to the test sets of
the downstream tasks, as BiT did (arXiv 1912.11370). Here that takes two steps.
A signature, a small grey image of length one, finds the test image that an
image looks most like: one matrix product. The two are then laid over each
other in colour, mirrored and with a few per cent cut off either; they are
near-duplicates if they fit above a threshold. Scale, re-encoding, brightness
and contrast hardly matter to either step.
"""

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 16  # pixels of a signature's side
THUMBNAIL = 48  # pixels of the images that are laid over each other
_FIT = 24  # pixels at which they are compared
CANDIDATE = 0.75  # similarity of signatures that is worth a second look
THRESHOLD = 0.98  # of the colour images; README has what it finds and claims
# Pixels of a thumbnail that may be missing at each side, up to a tenth, and
# where the search for them begins.
_MOST = 5
_STARTS = (0, 2, 4)


class Twin(NamedTuple):
  """The test image that an image nearly is."""

  name: str
  similarity: float


def make_thumbnail(image: Image.Image) -> np.ndarray:
  """Returns u8[THUMBNAIL THUMBNAIL 3]."""
  size = (THUMBNAIL, THUMBNAIL)
  small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
  return np.asarray(small)


def make_signature(thumbnail: np.ndarray) -> np.ndarray:
  """Returns f32[SIDE * SIDE] of length one; zeros for a flat image."""
  cells = thumbnail.reshape(SIDE, THUMBNAIL // SIDE, SIDE, -1, 3)
  return _unit(cells.mean((1, 3, 4)))


def _unit(x):
  x = x.astype(np.float32).ravel()
  x -= x.mean()
  length = np.linalg.norm(x)
  # A grey level of noise on a flat image is no content.
  return x / length if length > np.sqrt(x.size) else np.zeros_like(x)


class Index:
  """The test images, to be asked for twins."""

  def __init__(self, images: Iterable[tuple[str, Image.Image]]):
    """Takes (name, image) of every test image; keeps 7 kB of each."""
    pairs = [(name, make_thumbnail(image)) for name, image in images]
    self._names = [name for name, _ in pairs]
    self._thumbnails = [thumbnail for _, thumbnail in pairs]
    self._matrix = np.stack(
      [make_signature(x) for x in self._both_ways()]
      or [np.zeros(SIDE * SIDE, np.float32)],
      axis=1,
    )

  def _both_ways(self):
    return [x for t in self._thumbnails for x in (t, t[:, ::-1])]

  def find(self, image: Image.Image) -> Twin | None:
    """Returns the twin of an image, None if it has none."""
    thumbnail = make_thumbnail(image)
    similarity = make_signature(thumbnail) @ self._matrix
    best = int(similarity.argmax())
    if similarity[best] < CANDIDATE:
      return None
    which, mirrored = divmod(best, 2)
    other = self._thumbnails[which]
    if mirrored:
      other = other[:, ::-1]
    fit = max(_fit(thumbnail, other), _fit(other, thumbnail))
    return Twin(self._names[which], fit) if fit >= THRESHOLD else None


def _fit(whole, part) -> float:
  """Returns how well the best cut-out of `whole` fits `part`, at most 1.

  The four cuts are climbed to, a pixel at a time, from several beginnings.
  """
  target = _unit(_shrink(Image.fromarray(part), (0, 0, 0, 0)))
  image = Image.fromarray(whole)

  @functools.cache
  def measure(cuts):
    return float(_unit(_shrink(image, cuts)) @ target)

  best = 0.0
  for start in _STARTS:
    cuts = (start,) * 4
    while True:
      steps = [cuts, *_neighbours(cuts)]
      better = max(steps, key=measure)
      if better == cuts:
        break
      cuts = better
    best = max(best, measure(cuts))
  return best


def _neighbours(cuts):
  for side, step in itertools.product(range(4), (-1, 1)):
    cut = cuts[side] + step
    if 0 <= cut <= _MOST:
      yield (*cuts[:side], cut, *cuts[side + 1 :])


def _shrink(image, cuts):
  left, top, right, bottom = cuts
  box = (left, top, THUMBNAIL - right, THUMBNAIL - bottom)
  size = (_FIT, _FIT)
  return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))
