"""Models: by name, and outside this package nothing but pure functions.

`create(...)` checks what it is given and returns a `Model`, whose `init` and
`apply` map plain nested dictionaries of arrays; Flax stays in this package.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models import layers as layers
from vit_jax.models import masking, mpp, resnet, variants, vit
from vit_jax.models import posemb as posemb
from vit_jax.models.config import DEFAULTS as DEFAULTS
from vit_jax.models.config import check_choice as check_choice
from vit_jax.models.config import make as make_config
from vit_jax.models.variants import ENCODERS as ENCODERS


class Model(NamedTuple):
  """A model as two pure functions and what others need to know of it.

  Attributes:
    init: key -> params, a nested dictionary of float32 arrays. The same key
      gives the same values, scanned or not.
    apply: (params, images f32[b h w 3] in [-1, 1], *, train=False, key=None,
      intermediates=False) -> logits f32[b k], or (logits, {name: array}).
      `key` feeds dropout and stochastic depth; it is needed when training.
      With 0 classes the representation f32[b d] takes the logits' place.
    image_size: (h, w) in pixels.
    grid: (h, w) in tokens, or in cells of a ResNet's output.
    num_layers: the encoder's blocks, 0 for a ResNet.
  """

  init: Callable[..., Any]
  apply: Callable[..., Any]
  image_size: tuple[int, int]
  grid: tuple[int, int]
  num_layers: int


def create(
  *, variant: str, num_classes: int, image_size, **options: Any
) -> Model:
  """Returns the model of a variant name such as "ViT-B_16".

  Args:
    variant: "ViT-B_16", "R50+ViT-B_16" or "R50x1", see `models/variants.py`.
      A ResNet takes only `head_bias_init`, `dtype` and `remat` of the options.
    num_classes: k, the width of the head; 0 for none.
    image_size: pixels, an integer or (h, w); divisible by the patch.
    **options: keys of `config.model`, the attributes of `config.ViTConfig`.

  Raises:
    UserError: a value that is not one of the choices, or an image size that
      the patch size does not divide.
  """
  config = make_config(variant, num_classes, options)
  sizes = variants.parse(variant)
  height_width = check_image_size(image_size, sizes)
  grid = tuple(-(-side // sizes.stride) for side in height_width)
  make = vit.VisionTransformer if config.num_layers else resnet.BiT
  return _as_model(make, config, height_width, grid)


def create_masked(*, target: str, variant: str, image_size, **options) -> Model:
  """Returns the model that predicts masked patches, see `masking`.

  Its `apply` takes a `masking.Corruption` after the images, and returns the
  predictions f32[b m o] for the m corrupted patches. Its parameters are those
  of the ViT, "mask_token" and "mpp_head"; of the classifier it has at most the
  class token.

  Args:
    target: what is predicted, one of `masking.TARGETS`.
    variant: a ViT's, such as "ViT-B_16".
    image_size: as in `create`; at least two patches.
    **options: as in `create`, but for what only a classifier has.

  Raises:
    UserError: as `create`; a variant without patches of pixels, a patch size
      that the target's cells do not divide, an option that means nothing.
  """
  check_choice("masked_target", target, tuple(masking.TARGETS))
  sizes = variants.parse(variant)
  _check_masked(target, variant, sizes, options)
  config = make_config(variant, 0, options)
  height_width = check_image_size(image_size, sizes)
  grid = tuple(side // sizes.patch_size for side in height_width)
  num_patches = grid[0] * grid[1]
  if num_patches < 2:
    raise UserError(
      f"image_size {image_size} is one patch of {variant}; to predict a patch "
      "from others there must be two at least"
    )
  keys = jax.random.split(jax.random.key(0), 1)
  corruption = masking.draw_corruption(keys, num_patches)
  make = functools.partial(
    mpp.MaskedPatchPredictor,
    num_outputs=masking.count_outputs(target, sizes.patch_size),
  )
  return _as_model(make, config, height_width, grid, corruption)


def _check_masked(target, variant, sizes, options):
  """Raises a UserError for what `create_masked` cannot take."""
  if sizes.encoder is None or sizes.units is not None:
    raise UserError(
      f"masked patches are patches of pixels, which {variant} does not have; "
      "choose a plain ViT such as ViT-B_16"
    )
  cells, patch = masking.TARGETS[target], sizes.patch_size
  if cells and patch % cells:
    raise UserError(
      f"masked_target {target!r} sees a patch as {cells}x{cells} cells, which "
      f"the patch size {patch} of {variant} is not divisible into; choose a "
      f"patch size that {cells} divides, or 'mean_colour'"
    )
  for name in ("representation_size", "head_bias_init"):
    if options.get(name):
      raise UserError(
        f"model.{name} is {options[name]!r}, which means nothing for masked "
        "patches: they have no classifier; leave it at 0"
      )


def _promoting(function):
  """Allows the promotions that the user's own code may forbid itself."""

  @functools.wraps(function)
  def run(*args, **kwargs):
    rank = jax.numpy_rank_promotion("allow")
    with rank, jax.numpy_dtype_promotion("standard"):
      return function(*args, **kwargs)

  return run


def _as_model(make, config, image_size, grid, *inputs):
  """Returns the `Model` of a kind of module, made from a `ViTConfig`.

  `inputs` are examples of what the module takes after one image.
  """
  module = make(config)
  # The unrolled form is always the one initialised, so that a seed means the
  # same numbers in both forms.
  initial = make(dataclasses.replace(config, scan=False))

  @_promoting
  def init(key):
    image = jnp.zeros((1, *image_size, 3))
    params = initial.init(key, image, *inputs)["params"]
    return params if module == initial else stack_blocks(params)

  @_promoting
  def apply(
    params, images, *inputs, train=False, key=None, intermediates=False
  ):
    assert key is not None or not train, "training needs a key"
    rngs = {} if key is None else {"dropout": key}
    logits, out = module.apply(
      {"params": params},
      images,
      *inputs,
      train=train,
      intermediates=intermediates,
      rngs=rngs,
    )
    return (logits, out) if intermediates else logits

  return Model(init, apply, image_size, grid, config.num_layers)


def representation(intermediates: dict[str, jax.Array]) -> jax.Array:
  """Returns what the head gets, f32[b d], of a model's intermediates."""
  if "pre_logits" in intermediates:
    return intermediates["pre_logits"]
  return intermediates["pooled"]


def check_image_size(image_size, sizes: variants.Variant) -> tuple[int, int]:
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


def unstack_blocks(params):
  """Scan form -> unrolled parameters; the inverse of `stack_blocks`."""
  encoder = dict(params["Transformer"])
  stacked = encoder.pop("encoderblock")
  count = jax.tree.leaves(stacked)[0].shape[0]
  for i in range(count):
    encoder[f"encoderblock_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
  return {**params, "Transformer": encoder}
