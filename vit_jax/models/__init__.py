"""Models: by name, and outside this package nothing but pure functions.

`create(...)` checks what it is given and returns a `Model`, whose `init` and
`apply` map plain nested dictionaries of arrays; Flax stays in this package.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError, suggest
from vit_jax.models import posemb as posemb
from vit_jax.models import variants, vit
from vit_jax.models.variants import VARIANTS as VARIANTS


class Model(NamedTuple):
  """A model as two pure functions and what others need to know of it.

  Attributes:
    init: key -> params, a nested dictionary of float32 arrays. The same key
      gives the same values, scanned or not.
    apply: (params, images f32[b h w 3] in [-1, 1], *, train=False, key=None,
      intermediates=False) -> logits f32[b k], or (logits, {name: array}).
      `key` feeds dropout and stochastic depth; it is needed when training.
    image_size: (h, w) in pixels.
    grid: (h, w) in patches.
    num_layers: the encoder's blocks.
  """

  init: Callable[..., Any]
  apply: Callable[..., Any]
  image_size: tuple[int, int]
  grid: tuple[int, int]
  num_layers: int


def create(
  *,
  variant: str,
  num_classes: int,
  image_size,
  classifier: str = "token",
  representation_size: int = 0,
  pos_embedding: str = "learned",
  dropout_rate: float = 0.0,
  attention_dropout_rate: float = 0.0,
  stochastic_depth_rate: float = 0.0,
  head_bias_init: float = 0.0,
  dtype: str = "bfloat16",
  scan: bool = False,
  remat: str = "none",
) -> Model:
  """Returns the model of a variant name such as "ViT-B_16".

  Args:
    variant: size and patch, see `models/variants.py`.
    num_classes: k, the width of the head.
    image_size: pixels, an integer or (h, w); divisible by the patch.
    classifier: "token" (a class token), "gap" (mean of the patch tokens) or
      "map" (attention pooling).
    representation_size: width of the tanh layer before the head; 0 for none,
      -1 for the hidden size.
    pos_embedding: "learned" or "none".
    dropout_rate: after every dense layer but query, key and value, and after
      the position embedding (the paper, Appendix B.1).
    attention_dropout_rate: of the attention weights.
    stochastic_depth_rate: of the last block; earlier ones linearly less.
    head_bias_init: the head's initial bias.
    dtype: of the matrix products, "float32" or "bfloat16".
    scan: trace one block and loop over stacked parameters.
    remat: "none", "dots" or "full".

  Raises:
    UserError: a value that is not one of the choices, or an image size that
      the patch size does not divide.
  """
  sizes, patch = variants.parse(variant)
  check_choice("model.classifier", classifier, ("token", "gap", "map"))
  check_choice("model.pos_embedding", pos_embedding, ("learned", "none"))
  check_choice("model.dtype", dtype, ("float32", "bfloat16"))
  check_choice("model.remat", remat, tuple(vit.REMAT_POLICIES))
  for name, rate in (
    ("dropout_rate", dropout_rate),
    ("attention_dropout_rate", attention_dropout_rate),
    ("stochastic_depth_rate", stochastic_depth_rate),
  ):
    if not 0 <= rate < 1:
      raise UserError(f"model.{name} is {rate}; it must be in [0, 1)")
  height_width = check_image_size(image_size, patch)
  if representation_size < -1:
    raise UserError(
      f"model.representation_size is {representation_size}; it must be a "
      "width, 0 for no layer or -1 for the hidden size"
    )
  if representation_size == -1:
    representation_size = sizes.hidden_size
  options = {
    "num_classes": num_classes,
    "patch_size": patch,
    "classifier": classifier,
    "representation_size": representation_size,
    "pos_embedding": pos_embedding,
    "dropout_rate": dropout_rate,
    "attention_dropout_rate": attention_dropout_rate,
    "stochastic_depth_rate": stochastic_depth_rate,
    "head_bias_init": head_bias_init,
    "dtype": jnp.dtype(dtype),
    "remat": remat,
    **sizes._asdict(),
  }
  module = vit.VisionTransformer(scan=scan, **options)

  def init(key):
    # The unrolled form is always the one initialised, so that a seed means the
    # same numbers in both forms.
    unrolled = vit.VisionTransformer(**options)
    params = unrolled.init(key, jnp.zeros((1, *height_width, 3)))["params"]
    return stack_blocks(params) if scan else params

  def apply(params, images, *, train=False, key=None, intermediates=False):
    assert key is not None or not train, "training needs a key"
    rngs = {} if key is None else {"dropout": key}
    logits, out = module.apply(
      {"params": params},
      images,
      train=train,
      intermediates=intermediates,
      rngs=rngs,
    )
    return (logits, out) if intermediates else logits

  grid = (height_width[0] // patch, height_width[1] // patch)
  return Model(init, apply, height_width, grid, sizes.num_layers)


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises a UserError unless `value` is one of `choices`."""
  if value not in choices:
    raise UserError(
      f"config.{key} is {value!r}; the choices are "
      f"{', '.join(choices)}{suggest(str(value), choices)}"
    )


def check_image_size(image_size, patch: int) -> tuple[int, int]:
  """Returns (h, w) in pixels; a UserError unless the patch divides both."""
  pair = (image_size,) * 2 if isinstance(image_size, int) else image_size
  is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
  if not is_pair or not all(type(side) is int for side in pair):
    raise UserError(
      f"image_size {image_size!r} is neither an integer nor (height, width)"
    )
  height, width = pair
  if min(height, width) < patch or height % patch or width % patch:
    nearest = [max(patch, round(s / patch) * patch) for s in (height, width)]
    given = height if height == width else (height, width)
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
