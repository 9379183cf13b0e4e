"""Models: by name, and outside this package nothing but pure functions.

`create(...)` checks what it is given and returns a `Model`, whose `init` and
`apply` map plain nested dictionaries of arrays; Flax stays in this package.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax import masking
from vit_jax.errors import UserError, suggest
from vit_jax.models import mpp, resnet, variants, vit
from vit_jax.models import posemb as posemb
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


# What a ResNet's configuration may say; the rest is about encoders.
_RESNET_OPTIONS = ("head_bias_init", "dtype", "remat")
_CHOICES = {
  "classifier": ("token", "gap", "map"),
  "pos_embedding": ("learned", "2d", "sincos2d", "relative", "none"),
  "pos_embedding_at": ("input", "every_layer", "every_layer_shared"),
  "activation": tuple(vit.ACTIVATIONS),
  "dtype": ("float32", "bfloat16"),
  "remat": tuple(vit.REMAT_POLICIES),
}
_RATES = ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate")


def create(
  *,
  variant: str,
  num_classes: int,
  image_size,
  classifier: str = "token",
  representation_size: int = 0,
  pos_embedding: str = "learned",
  pos_embedding_at: str = "input",
  activation: str = "gelu_tanh",
  layer_norm_epsilon: float = 1e-6,
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
    variant: "ViT-B_16", "R50+ViT-B_16" or "R50x1", see `models/variants.py`.
      A ResNet takes only `head_bias_init`, `dtype` and `remat` of what follows.
    num_classes: k, the width of the head; 0 for none.
    image_size: pixels, an integer or (h, w); divisible by the patch.
    classifier: "token" (a class token), "gap" (mean of the patch tokens) or
      "map" (attention pooling).
    representation_size: width of the tanh layer before the head; 0 for none,
      -1 for the hidden size.
    pos_embedding: "learned" (1-D), "2d" (learned, a half for each axis),
      "sincos2d" (fixed), "relative" (in the attention) or "none".
    pos_embedding_at: "input", "every_layer" or "every_layer_shared".
    activation: "gelu_tanh" (the paper) or "gelu_erf" (PyTorch).
    layer_norm_epsilon: added to variances.
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
  options = dict(locals())
  del options["variant"], options["num_classes"], options["image_size"]
  sizes = variants.parse(variant)
  _check_options(variant, sizes, options)
  options["dtype"] = jnp.dtype(dtype)
  height_width = check_image_size(image_size, sizes)
  grid = tuple(-(-side // sizes.stride) for side in height_width)
  if sizes.encoder is None:
    assert sizes.units is not None
    module = initial = resnet.BiT(
      num_classes,
      sizes.units,
      sizes.width,
      **{name: options[name] for name in _RESNET_OPTIONS},
    )
    return _as_model(module, initial, height_width, grid, 0)
  if representation_size == -1:
    options["representation_size"] = sizes.encoder.hidden_size
  options |= {"num_classes": num_classes, "units": sizes.units}
  return _as_encoder(vit.VisionTransformer, sizes, options, height_width, grid)


# What `create` takes for what it is not told.
DEFAULTS: dict[str, Any] = dict(create.__kwdefaults__ or {})


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
  options = DEFAULTS | options
  _check_options(variant, sizes, options)
  options["dtype"] = jnp.dtype(options["dtype"])
  options["num_classes"] = 0
  options["num_outputs"] = masking.count_outputs(target, sizes.patch_size)
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
  return _as_encoder(
    mpp.MaskedPatchPredictor, sizes, options, height_width, grid, corruption
  )


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


def _as_encoder(module_class, sizes, options, image_size, grid, *inputs):
  """Returns the `Model` of a kind of VisionTransformer; see `_as_model`."""
  options = options | sizes.encoder._asdict()
  options["patch_size"] = sizes.patch_size
  module = module_class(**options)
  # The unrolled form is always the one initialised, so that a seed means the
  # same numbers in both forms.
  initial = module_class(**options | {"scan": False})
  depth = sizes.encoder.num_layers
  return _as_model(module, initial, image_size, grid, depth, *inputs)


def _promoting(function):
  """Allows the promotions that the user's own code may forbid itself."""

  @functools.wraps(function)
  def run(*args, **kwargs):
    rank = jax.numpy_rank_promotion("allow")
    with rank, jax.numpy_dtype_promotion("standard"):
      return function(*args, **kwargs)

  return run


def _as_model(module, initial, image_size, grid, num_layers, *inputs):
  """Returns the `Model` of two modules that differ in their `scan` at most.

  `inputs` are examples of what the module takes after one image.
  """

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

  return Model(init, apply, image_size, grid, num_layers)


def _check_options(variant, sizes, options):
  """Raises a UserError for a value that `create` cannot take."""
  for name, choices in _CHOICES.items():
    check_choice(f"model.{name}", options[name], choices)
  for name in _RATES:
    if not 0 <= options[name] < 1:
      raise UserError(f"model.{name} is {options[name]}; it must be in [0, 1)")
  if options["representation_size"] < -1:
    raise UserError(
      f"model.representation_size is {options['representation_size']}; it must "
      "be a width, 0 for no layer or -1 for the hidden size"
    )
  if options["layer_norm_epsilon"] <= 0:
    raise UserError(
      f"model.layer_norm_epsilon is {options['layer_norm_epsilon']}; it must "
      "be positive"
    )
  if sizes.encoder is None:
    _check_resnet_options(variant, options)
  elif options["pos_embedding"] in ("none", "relative"):
    if options["pos_embedding_at"] != "input":
      raise UserError(
        f"model.pos_embedding {options['pos_embedding']!r} is not added "
        "anywhere; leave model.pos_embedding_at at 'input'"
      )
  elif options["pos_embedding"] in ("2d", "sincos2d"):
    parts = 2 if options["pos_embedding"] == "2d" else 4
    if sizes.encoder.hidden_size % parts:
      raise UserError(
        f"model.pos_embedding {options['pos_embedding']!r} needs a hidden size "
        f"divisible by {parts}; {variant} has {sizes.encoder.hidden_size}"
      )


def _check_resnet_options(variant, options):
  for name, value in options.items():
    if name not in _RESNET_OPTIONS and value != DEFAULTS[name]:
      raise UserError(
        f"model.{name} is {value!r}, which means nothing for the ResNet "
        f"{variant}; leave it at {DEFAULTS[name]!r}"
      )
  if options["remat"] == "dots":
    raise UserError(
      f"model.remat 'dots' keeps nothing of {variant}, which is all "
      "convolutions; use 'full' or 'none'"
    )


def representation(intermediates: dict[str, jax.Array]) -> jax.Array:
  """Returns what the head gets, f32[b d], of a model's intermediates."""
  if "pre_logits" in intermediates:
    return intermediates["pre_logits"]
  return intermediates["pooled"]


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises a UserError unless `value` is one of `choices`."""
  if value not in choices:
    raise UserError(
      f"config.{key} is {value!r}; the choices are "
      f"{', '.join(choices)}{suggest(str(value), choices)}"
    )


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
