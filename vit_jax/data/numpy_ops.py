"""Evaluation preprocessing in NumPy, numerically as in `vit_jax.data.ops`.

It lets `predict` run without TensorFlow.
"""

import math

import numpy as np

from vit_jax.data.pillow import check_pixels, resize_averaging
from vit_jax.data.sizes import as_pair, scale_side


def _resize(pixels, size, method="bilinear", antialias=False, *, name):
  height, width = as_pair(size)
  check_pixels(height, width, name)
  if antialias:
    return resize_averaging(pixels, (height, width), method)
  resize = {"bilinear": _resize_bilinear, "area": _resize_area}[method]
  return np.rint(resize(pixels, height, width)).astype(np.uint8)


def _resize_small(
  pixels, smaller_size, method="area", antialias=False, *, name
):
  height, width = pixels.shape[:2]
  short = min(height, width)
  size = [scale_side(side, short, smaller_size) for side in (height, width)]
  return _resize(pixels, size, method, antialias, name=name)


def _central_crop(pixels, size, *, name):
  crop_height, crop_width = as_pair(size)
  height, width = pixels.shape[:2]
  if height < crop_height or width < crop_width:
    # Enlarge until the crop fits, because padding would add a border.
    height, width = (
      max(crop_height, math.ceil(height * crop_width / width)),
      max(crop_width, math.ceil(width * crop_height / height)),
    )
    pixels = _resize(pixels, (height, width), name=name)
  top, left = (height - crop_height) // 2, (width - crop_width) // 2
  return pixels[top : top + crop_height, left : left + crop_width]


OPS = {
  "resize": _resize,
  "resize_small": _resize_small,
  "central_crop": _central_crop,
}


# The two resizes below repeat the float32 arithmetic of `tf.image.resize`
# operation by operation, so that ties are the same and round alike.


def _resize_bilinear(pixels, height, width):
  """Returns float32[height width c]; half-pixel centres, no antialiasing."""
  top, bottom, down = _bilinear_taps(pixels.shape[0], height)
  left, right, across = _bilinear_taps(pixels.shape[1], width)
  across, down = across[:, None], down[:, None, None]
  x0, x1 = (pixels[:, taps].astype(np.float32) for taps in (left, right))
  rows = x0 + (x1 - x0) * across
  return rows[top] + (rows[bottom] - rows[top]) * down


def _bilinear_taps(size_in, size_out):
  scale = np.float32(size_in) / np.float32(size_out)
  centre = np.arange(size_out, dtype=np.float32) + np.float32(0.5)
  position = centre * scale - np.float32(0.5)
  below = np.floor(position)
  lower = np.maximum(below, 0).astype(np.int64)
  upper = np.minimum(np.ceil(position), size_in - 1).astype(np.int64)
  return lower, upper, position - below


def _resize_area(pixels, height, width):
  """Returns float32[height width c], the mean of the area of each pixel."""
  rows, row_weights, row_scale = _area_taps(pixels.shape[0], height)
  columns, column_weights, column_scale = _area_taps(pixels.shape[1], width)
  narrow = np.zeros((pixels.shape[0], width, pixels.shape[2]), np.float32)
  for taps, weights in zip(columns, column_weights, strict=True):
    narrow += pixels[:, taps] * weights[:, None]
  out = np.zeros((height, width, pixels.shape[2]), np.float32)
  for taps, weights in zip(rows, row_weights, strict=True):
    out += narrow[taps] * weights[:, None, None]
  return out * (np.float32(1) / (row_scale * column_scale))


def _area_taps(size_in, size_out):
  """Returns input indices and weights, [taps size_out] each, and the scale."""
  scale = np.float32(size_in) / np.float32(size_out)
  out = np.arange(size_out, dtype=np.float32)
  start, end = out * scale, (out + np.float32(1)) * scale
  first = np.floor(start)
  num_taps = int((np.ceil(end) - first).max())
  cell = first + np.arange(num_taps, dtype=np.float32)[:, None]
  covered = np.minimum(cell + 1, end) - np.maximum(cell, start)
  weights = np.maximum(covered, 0).astype(np.float32)
  return np.minimum(cell, size_in - 1).astype(np.int64), weights, scale
