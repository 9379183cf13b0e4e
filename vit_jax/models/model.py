"""A model as two pure functions, whatever module it is made from."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.variants import Variant


class Model(NamedTuple):
  """A model as two pure functions and what others need to know of it.

  Attributes:
    init: key -> params, a nested dictionary of float32 arrays. The same key
      gives the same values, scanned or not.
    apply: `(params, images, *, train=False, key=None, intermediates=False)` ->
      logits f32[b k], or (logits, {name: array}). Images are f32[b h w 3] in
      [-1, 1]. Training needs the `key`, for dropout and stochastic depth. With
      0 classes the representation f32[b d] takes the logits' place.
      `intermediates` "tokens" gives each block's tokens f32[b n d] as
      "block00/encoded", ..., and no attention weights.
    image_size: (h, w) in pixels.
    grid: (h, w) in tokens, or in cells of a ResNet's output.
    num_layers: the encoder's blocks, 0 for a ResNet.
    num_prefix: tokens before those of the patches.
  """

  init: Callable[..., Any]
  apply: Callable[..., Any]
  image_size: tuple[int, int]
  grid: tuple[int, int]
  num_layers: int
  num_prefix: int


@contextlib.contextmanager
def _promoting():
  """Allows the promotions that the user's own code may forbid itself."""
  rank = jax.numpy_rank_promotion("allow")
  with rank, jax.numpy_dtype_promotion("standard"):
    yield


def as_model(make, config, image_size, grid, *inputs) -> Model:
  """Returns the `Model` of a kind of module, made from a `ViTConfig`.

  `inputs` are examples of what the module takes after one image.
  """
  module = make(config)
  # The unrolled form is always the one initialised, so that a seed means the
  # same numbers in both forms.
  initial = make(dataclasses.replace(config, scan=False))

  @_promoting()
  def init(key):
    image = jnp.zeros((1, *image_size, 3))
    params = initial.init(key, image, *inputs)["params"]
    return params if module == initial else stack_blocks(params)

  @_promoting()
  def apply(
    params, images, *inputs, train=False, key=None, intermediates=False
  ):
    assert key is not None or not train, "training needs a key"
    rngs = {} if key is None else {"dropout": key}
    options = {"train": train, "intermediates": intermediates, "rngs": rngs}
    logits, out = module.apply({"params": params}, images, *inputs, **options)
    return (logits, out) if intermediates else logits

  prefix = config.num_prefix if config.num_layers else 0
  return Model(init, apply, image_size, grid, config.num_layers, prefix)


def representation(intermediates: dict[str, jax.Array]) -> jax.Array:
  """Returns what the head gets, f32[b d], of a model's intermediates."""
  last = (name for name in ("pre_logits", "projected") if name in intermediates)
  return intermediates[next(last, "pooled")]


def check_image_size(image_size, sizes: Variant) -> tuple[int, int]:
  """Returns (h, w) in pixels; a UserError unless the model can take them.

  An encoder needs whole patches: its convolution would drop the pixels of a
  part of one. A ResNet takes any image of at least one cell.
  """
  pair = (image_size,) * 2 if isinstance(image_size, int) else image_size
  is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
  if not is_pair or not all(type(side) is int for side in pair):
    raise UserError(
      f"image_size {image_size!r} is neither an integer nor (height, width)"
    )
  height, width = pair
  patch = sizes.stride
  given = height if height == width else (height, width)
  if sizes.encoder is None:
    if min(height, width) < patch:
      raise UserError(f"image_size {given} is too small; at least {patch}")
  elif min(height, width) < patch or height % patch or width % patch:
    nearest = [max(patch, round(s / patch) * patch) for s in (height, width)]
    better = nearest[0] if nearest[0] == nearest[1] else tuple(nearest)
    raise UserError(
      f"image_size {given} is not divisible by the patch size {patch}; "
      f"nearest valid: {better}"
    )
  return height, width


def stack_blocks(params):
  """Unrolled parameters -> scan form: encoderblock_{i} stacked on axis 0."""
  encoder = dict(params["Transformer"])
  count = sum(name.startswith("encoderblock_") for name in encoder)
  blocks = [encoder.pop(f"encoderblock_{i}") for i in range(count)]
  encoder["encoderblock"] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
  return {**params, "Transformer": encoder}
