"""Evaluation preprocessing as a JAX graph, for pictures of any size.

`vit_jax.data.preprocess` does it in NumPy. Here height and width are values
in the graph: all shapes but the input's are fixed, as far as a picture is not
stretched by its area, so that one file takes pictures of every size.

An operation is therefore not run when it is met. A `View` says how to compute
some rows and columns of its result, and asks the view before it for those that
it needs itself; what the last one is asked for is as large as the model's
image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.data.preprocess import as_pair, parse, scale_side
from vit_jax.errors import UserError


class View(NamedTuple):
  """A picture that is not computed yet.

  Attributes:
    size: (height, width), each an integer or int32[].
    known: whether these are integers, or the sides of the input: what may be
      counted through from one end to the other.
    least: (height, width) that it has at least, integers.
    sample: (rows i32[r], columns i32[c]) -> f32[b r c 3], whole numbers.
  """

  size: tuple[Any, Any]
  known: bool
  least: tuple[int, int]
  sample: Callable[[Any, Any], jax.Array]


def prepare(
  pictures: jax.Array, text: str, image_size: tuple[int, int]
) -> jax.Array:
  """Runs an evaluation preprocessing string: u8[b H W 3] -> f32[b h w 3].

  Args:
    pictures: b, H and W may be symbolic.
    text: the preprocessing string.
    image_size: (h, w), for the word `size`.

  Returns:
    Whole numbers from 0 to 255.

  Raises:
    UserError: the string is wrong, or stretches by area what has no fixed size.
  """

  def sample(rows, columns):
    found = jnp.take(pictures, rows, axis=1, mode="clip")
    found = jnp.take(found, columns, axis=2, mode="clip")
    return found.astype(jnp.float32)

  _, height, width, _ = pictures.shape
  view = View((height, width), True, (1, 1), sample)
  for name, arguments in parse(text, image_size, evaluation=True):
    view = _OPS[name](view, **arguments)
  return view.sample(*map(jnp.arange, image_size))


def _resize(view, size, method="bilinear"):
  size = as_pair(size)
  return _stretch(view, size, method, known=True, least=size)


def _resize_small(view, smaller_size, method="area"):
  height, width = (_value(side) for side in view.size)
  short = jnp.minimum(height, width)
  size = tuple(scale_side(x, short, smaller_size) for x in (height, width))
  least = (smaller_size, smaller_size)
  return _stretch(view, size, method, known=False, least=least)


def _central_crop(view, size):
  crop = as_pair(size)
  if any(x < y for x, y in zip(view.least, crop, strict=True)):
    # Enlarged until the crop fits; if it does already, by nothing.
    height, width = (_value(side) for side in view.size)
    enlarged = (
      jnp.maximum(jnp.maximum(height, crop[0]), -(height * -crop[1] // width)),
      jnp.maximum(jnp.maximum(width, crop[1]), -(width * -crop[0] // height)),
    )
    view = _stretch(view, enlarged, "bilinear", known=False, least=crop)
  top, left = (
    (_value(x) - y) // 2 for x, y in zip(view.size, crop, strict=True)
  )

  def sample(rows, columns):
    return view.sample(rows + top, columns + left)

  return View(crop, True, crop, sample)


_OPS = {
  "resize": _resize,
  "resize_small": _resize_small,
  "central_crop": _central_crop,
}


def _value(side):
  return jnp.asarray(side, jnp.int32)


def _stretch(view, size, method, *, known, least):
  sample = {"bilinear": _bilinear, "area": _area}[method](view, size)

  def whole(rows, columns):
    return jnp.round(sample(rows, columns))

  return View(size, known, least, whole)


# The arithmetic of both is that of `vit_jax.data.preprocess`, in its order.


def _bilinear(view, size):
  def sample(rows, columns):
    top, bottom, down = _bilinear_taps(rows, view.size[0], size[0])
    left, right, across = _bilinear_taps(columns, view.size[1], size[1])
    # One sample of all four corners: the view before this one may be costly.
    found = view.sample(
      jnp.concatenate([top, bottom]), jnp.concatenate([left, right])
    )
    x0, x1 = jnp.split(found, 2, axis=2)
    x = x0 + (x1 - x0) * across[:, None]
    y0, y1 = jnp.split(x, 2, axis=1)
    return y0 + (y1 - y0) * down[:, None, None]

  return sample


def _bilinear_taps(index, size_in, size_out):
  scale = _value(size_in).astype(jnp.float32) / _value(size_out)
  position = (index.astype(jnp.float32) + 0.5) * scale - 0.5
  below = jnp.floor(position)
  lower = jnp.maximum(below, 0).astype(jnp.int32)
  upper = jnp.ceil(position).astype(jnp.int32)
  return lower, jnp.minimum(upper, _value(size_in) - 1), position - below


def _area(view, size):
  if not view.known:
    raise UserError(
      "--preprocess cannot resize by area what resize_small has just made: "
      "its size is in no graph; use resize_small(..., 'bilinear') before it"
    )

  def sample(rows, columns):
    pixels = view.sample(*map(jnp.arange, view.size))
    down, row_scale = _area_weights(rows, view.size[0], size[0])
    across, column_scale = _area_weights(columns, view.size[1], size[1])
    # Rounded to bfloat16, as TPUs do if they may, pixels would be others.
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("bhwc,ow->bhoc", pixels, across, precision=exact)
    x = jnp.einsum("bhwc,oh->bowc", x, down, precision=exact)
    return x * (1 / (row_scale * column_scale))

  return sample


def _area_weights(index, size_in, size_out):
  """Returns f32[out in], how much of each pixel is covered, and the scale."""
  scale = _value(size_in).astype(jnp.float32) / _value(size_out)
  start = index.astype(jnp.float32) * scale
  end = (index.astype(jnp.float32) + 1) * scale
  cell = jnp.arange(size_in, dtype=jnp.float32)
  shape = (index.shape[0], size_in)

  def spread(x, axis):
    return jax.lax.broadcast_in_dim(x, shape, (axis,))

  covered = jnp.minimum(spread(cell + 1, 1), spread(end, 0)) - jnp.maximum(
    spread(cell, 1), spread(start, 0)
  )
  return jnp.maximum(covered, 0), scale
