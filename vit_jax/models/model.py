"""Models as pairs of pure functions, made from Flax modules."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError, check_choice
from vit_jax.models.variants import Variant
from vit_jax.state import flatten


class Model(NamedTuple):
  """A model as two pure functions, with its sizes.

  Attributes:
    init: key -> params, a nested dictionary of float32 arrays. The same key
      gives the same values, scanned or not.
    apply: `(params, images, *, train=False, key=None, intermediates=False,
      statistics=False)` -> logits f32[b k], or (logits, {name: array}). Images
      are f32[b h w 3] in [-1, 1]. Training needs the `key`, for dropout and
      stochastic depth. With 0 classes the representation f32[b d] takes the
      logits' place. `intermediates` "tokens" gives each block's tokens
      f32[b n d] as "block00/encoded", ..., and no attention weights. With
      `statistics` it returns a pair: the result without, and the new running
      statistics {path: f32 array}, which only `train` has.
    image_size: (h, w) in pixels.
    grid: (h, w) in tokens, or in cells of the last convolution's output.
    num_layers: the encoder's blocks, 0 for a ResNet or an EfficientNet.
    num_prefix: tokens before those of the patches.
    has_class_token: whether the first of these is a class token.
    has_statistics: whether some of `params` are running statistics, see
      `state.is_statistic`.
  """

  init: Callable[..., Any]
  apply: Callable[..., Any]
  image_size: tuple[int, int]
  grid: tuple[int, int]
  num_layers: int
  num_prefix: int = 0
  has_class_token: bool = False
  has_statistics: bool = False


@contextlib.contextmanager
def _promoting():
  """Allows promotions that the user's own code may have disabled."""
  rank = jax.numpy_rank_promotion("allow")
  with rank, jax.numpy_dtype_promotion("standard"):
    yield


def as_model(make, config, image_size, grid, *inputs) -> Model:
  """Returns the `Model` of the Flax module `make(config)`.

  `inputs` are examples of the module's inputs after one image.
  """
  module = make(config)
  # The unrolled form is always initialised, so that a seed gives the same
  # numbers in both forms.
  initial = make(dataclasses.replace(config, scan=False))

  @_promoting()
  def init(key):
    image = jnp.zeros((1, *image_size, 3))
    params = initial.init(key, image, *inputs)["params"]
    return params if module == initial else stack_blocks(params)

  @_promoting()
  def apply(
    params,
    images,
    *inputs,
    train=False,
    key=None,
    intermediates=False,
    statistics=False,
  ):
    assert key is not None or not train, "training needs a key"
    rngs = {} if key is None else {"dropout": key}
    options = {"train": train, "intermediates": intermediates, "rngs": rngs}
    options["mutable"] = ["statistics"] if statistics else False
    found = module.apply({"params": params}, images, *inputs, **options)
    (logits, out), updated = found if statistics else (found, {})
    result = (logits, out) if intermediates else logits
    if not statistics:
      return result
    return result, flatten(updated.get("statistics", {}))

  depth = config.num_layers
  tokens = (config.num_prefix, config.has_class_token) if depth else (0, False)
  has_statistics = config.scaling is not None
  return Model(init, apply, image_size, grid, depth, *tokens, has_statistics)


def representation(intermediates: dict[str, jax.Array]) -> jax.Array:
  """Returns the head's input f32[b d] from a model's intermediates."""
  last = (name for name in ("pre_logits", "projected") if name in intermediates)
  return intermediates[next(last, "pooled")]


# The kinds of features of an image.
FEATURES = ("pooled", "cls", "mean", "cls+mean", "patches")


def make_features(
  model: Model, what: str = "pooled", layers: Sequence[int] = (-1,)
) -> Callable:
  """Returns (params, images f32[b h w 3] in [-1, 1]) -> features, float32.

  Args:
    model: the model; its head does not matter.
    what: "pooled", the head's input, [b d]; "cls", the class token; "mean" of
      the patches; "cls+mean", side by side; "patches", [b h w d].
    layers: blocks whose tokens are concatenated along d, -1 the last one. The
      last LayerNorm is applied to each if it precedes the pooling
      (`final_norm` "tokens"). Not of "pooled".

  Raises:
    UserError: features that the model does not have.
  """
  check_choice("what", what, FEATURES)
  depth = model.num_layers
  if what == "pooled":
    if tuple(layers) != (-1,):
      raise UserError(
        f"layers {tuple(layers)} select blocks, but 'pooled' is of the last "
        "one; take 'cls', 'mean', 'cls+mean' or 'patches'"
      )
  elif not depth:
    raise UserError(
      f"a convolutional network has no {what!r} features; take 'pooled'"
    )
  elif what.startswith("cls") and not model.has_class_token:
    raise UserError(
      f"this model has no class token for {what!r}; take 'pooled', 'mean' or "
      "'patches'"
    )
  elif not layers or not all(-depth <= i < depth for i in layers):
    raise UserError(
      f"layers {tuple(layers)} must be some of 0 to {depth - 1}, or -1 to "
      f"{-depth}"
    )

  def select(x):
    x = x.astype(jnp.float32)
    cls, patches = x[:, 0], x[:, model.num_prefix :]
    if what == "patches":
      return patches.reshape(len(x), *model.grid, -1)
    values = {"cls": cls, "mean": patches.mean(axis=1)}
    return jnp.concatenate([values[name] for name in what.split("+")], -1)

  def features(params, images):
    _, out = model.apply(params, images, intermediates="tokens")
    if what == "pooled":
      return representation(out).astype(jnp.float32)
    tokens = [out[f"block{i % depth:02d}/encoded"] for i in layers]
    return jnp.concatenate([select(x) for x in tokens], axis=-1)

  return features


def check_image_size(image_size, sizes: Variant) -> tuple[int, int]:
  """Returns (h, w) in pixels; a UserError unless the model can take them.

  An encoder needs whole patches, because its convolution would drop the pixels
  of partial ones. Convolutional networks take any image of at least one cell.
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
