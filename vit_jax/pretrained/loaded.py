"""Callable models made from `Weights`."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.data import preprocess as preprocessing
from vit_jax.data.sizes import as_pair, scale_side
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.pretrained.warmstart import (
  HEADS,
  POS_EMBEDDING,
  Report,
  warm_start,
)
from vit_jax.pretrained.weights import LazyArray, Weights
from vit_jax.state import flatten, unflatten

log = logging.getLogger(__name__)


class Config(NamedTuple):
  """The description of a loaded model.

  Attributes:
    origin: the project whose format it was read from.
    variant: such as "ViT-B_16".
    patch: pixels along a side of a token, or of a cell of the last convolution.
    grid: (h, w) in tokens or cells.
    image_size: (h, w) in pixels.
    num_classes: 0 for no head.
    classifier: "token", "gap", "map" or "token+gap"; convolutional models have
      "gap".
    representation_size: width of the tanh layer before the head, 0 for none.
    pos_embedding: its kind.
    activation: such as "gelu_tanh"; a ResNet has "relu", an EfficientNet
      "silu".
    layer_norm_epsilon: added to variances.
    switches: {option of `models.create`: value} of features that the paper's
      models do not have, such as {"registers": 4}.
    preprocess: evaluation preprocessing, for images of `image_size`.
    resize: how position embeddings are resized.
    loss: "softmax" or "sigmoid": what turns logits into probabilities.
    class_names: None where the file has none.
  """

  origin: str
  variant: str
  patch: int
  grid: tuple[int, int]
  image_size: tuple[int, int]
  num_classes: int
  classifier: str
  representation_size: int
  pos_embedding: str
  activation: str
  layer_norm_epsilon: float
  switches: dict[str, Any]
  preprocess: str
  resize: str
  loss: str
  class_names: list[str] | None


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model with its weights.

  Attributes:
    config: its description.
    params: nested dictionary of float32 arrays.
    model: the pure functions, see `models.Model`.
    report: which arrays were taken, resized, new or dropped.
    notes: for the user, one line each.
  """

  config: Config
  params: Any
  model: models.Model
  report: Report
  notes: tuple[str, ...] = ()

  def __call__(self, images) -> jax.Array:
    """Returns logits f32[b k] of images f32[b h w 3] in [-1, 1].

    Raises:
      UserError: no head, or images of another size, rank or type.
    """
    if not self.config.num_classes:
      raise UserError(
        "the model has no head: vit_jax.load(..., num_classes=K) makes a new "
        "one, .features(images) returns its input"
      )
    return self._call(self._forward, images)

  def features(
    self, images, *, what: str = "pooled", layers: Sequence[int] = (-1,)
  ) -> jax.Array:
    """Returns float32 features of images f32[b h w 3] in [-1, 1].

    Example::

      model = vit_jax.load("hf:facebook/dinov2-small")
      model.features(images, what="cls+mean")  # f32[b 768]
      model.features(images, what="patches", layers=(-1, -4))

    Args:
      images: of the size that the model takes.
      what: "pooled", the input of the head, [b d]; "cls", the class token;
        "mean" of the patches; "cls+mean", concatenated; "patches", [b h w d].
      layers: blocks whose tokens are concatenated along d; -1 is the last one.
        The last LayerNorm is applied if it precedes the pooling. Not for
        "pooled".

    Raises:
      UserError: unsupported features, or images that the model does not take.
    """
    return self._call(self._make_features(what, tuple(layers)), images)

  @functools.cached_property
  def _make_features(self):
    make = functools.partial(models.make_features, self.model)
    return functools.cache(lambda *choice: jax.jit(make(*choice)))

  def probabilities(self, images) -> jax.Array:
    """Returns probabilities f32[b k] of images f32[b h w 3] in [-1, 1]."""
    return self.to_probabilities(self(images))

  def to_probabilities(self, logits) -> jax.Array:
    """Returns the softmax or sigmoid of logits f32[b k], as in training.

    Raises:
      UserError: a softmax over one class, which is 1 for every image.
    """
    if self.config.loss == "sigmoid":
      return jax.nn.sigmoid(logits)
    if self.config.num_classes == 1:
      raise UserError(
        "the head has 1 output and a softmax, which is 100 % for every image; "
        "take the logits: vit_jax.load(...)(images)"
      )
    return jax.nn.softmax(logits)

  def _call(self, function, images):
    """Applies a function of parameters and images; the batch may be empty."""
    images = self.check(images)
    if len(images):
      return function(self.params, images)
    one = jnp.zeros((1, *np.shape(images)[1:]))
    shape = jax.eval_shape(function, self.params, one).shape
    return jnp.zeros((0, *shape[1:]))

  @functools.cached_property
  def _forward(self):
    return jax.jit(self.model.apply)

  def check(self, images):
    """Returns the images if the model takes them.

    Raises:
      UserError: images of another size, rank or type.
    """
    height, width = self.model.image_size
    shape = np.shape(images)
    # Convolutional models have no position embedding and take any size.
    size = shape[1:3] if not self.model.num_layers else (height, width)
    if len(shape) != 4 or shape[1:] != (*size, 3):
      raise UserError(
        f"images are {list(shape)}; this model takes [b, {height}, {width}, 3];"
        " load(..., image_size=(h, w)) makes it take others"
      )
    if not jnp.issubdtype(jnp.result_type(images), jnp.floating):
      raise UserError(
        f"images are {jnp.result_type(images)}; give floats in [-1, 1]: "
        "(x - 127.5) / 127.5"
      )
    return images


HEAD_OF_ZEROS = (
  "the head is all zeros, as in the original ImageNet-21k files: every class "
  "gets the same score; fine-tune it, or take .features(images)"
)


def assemble(
  weights: Weights,
  *,
  image_size=None,
  num_classes=None,
  dtype=None,
  place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> Pretrained:
  """Returns the model of `weights`; the other arguments are those of `load`.

  Arrays are read and put on the device one at a time. `place(path, x)` replaces
  the default placement, on the first device.
  """
  place = place or (lambda _, x: jnp.asarray(x))
  if num_classes is None:
    num_classes = weights.num_classes
  if num_classes < 0:
    raise UserError(f"num_classes is {num_classes}; it must be 0 or more")
  if "mpp_head/kernel" in weights.params and not num_classes:
    raise UserError(
      f"{weights.source} was trained on masked patches and has no classes; "
      "fine-tune it: vit-jax train --config.init_from="
    )
  model = weights.create_model(
    num_classes=num_classes,
    image_size=weights.image_size if image_size is None else image_size,
    **({"dtype": dtype} if dtype else {}),
  )
  same_classes = num_classes == weights.num_classes
  shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
  given, report = warm_start(
    shapes,
    fold_normalization(weights).params,
    old_grid=weights.create_model().grid,
    new_grid=model.grid,
    same_classes=same_classes,
    source=weights.source,
    resize=weights.resize,
  )
  # One at a time, because pending copies would keep their source arrays alive.
  flat = {
    path: place(path, x.read().astype(np.float32)).block_until_ready()
    for path, x in given.items()
  }
  notes = list(weights.notes)
  if "head/kernel" in flat and not flat["head/kernel"].any():
    notes.append(HEAD_OF_ZEROS)
  for path in shapes.keys() - given.keys():
    # Everything but the head comes from the file.
    assert path.startswith(HEADS), path
    flat[path] = jnp.zeros(shapes[path].shape, jnp.float32)
  for note in notes:
    log.warning("%s: %s", weights.source, note)
  preprocess = weights.preprocess
  if model.image_size != weights.image_size:  # the same part of an image
    preprocess = rescale(preprocess, weights.image_size, model.image_size)
  config = describe(weights)._replace(
    grid=model.grid,
    image_size=model.image_size,
    num_classes=num_classes,
    class_names=weights.class_names if same_classes else None,
    preprocess=preprocess,
  )
  return Pretrained(config, unflatten(flat), model, report, tuple(notes))


def describe(weights: Weights) -> Config:
  """Describes the weights, before anything is resized or replaced."""
  sizes = variants.parse(weights.model["variant"])
  model, options = weights.create_model(), weights.options()
  if sizes.encoder is None:
    options |= {"classifier": "gap", "pos_embedding": "none"}
    options["activation"] = "silu" if sizes.scaling else "relu"
    options["layer_norm_epsilon"] = 0.0
  names = ("classifier", "pos_embedding", "activation", "layer_norm_epsilon")
  pre_logits = weights.params.get("pre_logits/bias")
  return Config(
    origin=weights.origin,
    variant=weights.model["variant"],
    patch=sizes.stride,
    grid=model.grid,
    image_size=model.image_size,
    num_classes=weights.num_classes,
    **{name: options[name] for name in names},
    switches={
      name: options[name]
      for name in models.SWITCHES
      if options[name] != models.DEFAULTS[name]
    },
    representation_size=pre_logits.shape[-1] if pre_logits else 0,
    preprocess=weights.preprocess,
    resize=weights.resize,
    loss=weights.loss,
    class_names=weights.class_names,
  )


def fold_normalization(weights: Weights) -> Weights:
  """Returns equivalent weights for pixels in [-1, 1].

  (pixel - mean) / std is affine, so it can be folded into the patch embedding,
  which has no padding. Without a bias, the shift is added to the patches'
  position embeddings. It survives resizing, because interpolation weights sum
  to 1.
  """
  if set(weights.mean) == {0.5} and set(weights.std) == {0.5}:
    return weights
  mean, std = np.array(weights.mean), np.array(weights.std)
  kernel = weights.params["embedding/kernel"]
  name = "embedding/bias"
  rows = slice(None)
  if name not in weights.params:
    name, grid = POS_EMBEDDING, weights.create_model().grid
    rows = slice(-grid[0] * grid[1], None)  # the patches come last
  bias = weights.params[name]

  def read_kernel():
    return (kernel.read() * (0.5 / std)[:, None]).astype(np.float32)

  def read_bias():
    shift = np.einsum(
      "hwcd,c->d", kernel.read().astype(np.float64), (0.5 - mean) / std
    )
    values = np.atleast_2d(bias.read()).astype(np.float64)
    values[..., rows, :] += shift
    return values.astype(np.float32).reshape(bias.shape)

  params = dict(weights.params)
  float32 = np.dtype(np.float32)
  params["embedding/kernel"] = LazyArray(kernel.shape, float32, read_kernel)
  params[name] = LazyArray(bias.shape, float32, read_bias)
  half = (0.5, 0.5, 0.5)
  return weights._replace(params=params, mean=half, std=half)


def check_numerics(weights: Weights, config) -> None:
  """Raises a UserError if a model's numerical settings are not the weights'.

  Args:
    weights: the model's initial weights.
    config: the model's configuration, with the keys of `models.create`.
  """
  names = (
    *("activation", "layer_norm_epsilon", "pos_embedding_at"),
    *("prefix_positions", "rope", "rope_base"),
  )
  changes = [
    f"--config.model.{name}={value}"
    for name in names
    if (value := weights.model.get(name, models.DEFAULTS[name])) != config[name]
  ]
  if changes:
    raise UserError(
      f"{weights.source} was trained with other numerical settings; add "
      f"{' '.join(changes)}"
    )


def rescale(
  text: str,
  old_size: int | tuple[int, int],
  new_size: int | tuple[int, int],
) -> str:
  """Rescales evaluation preprocessing to another resolution.

  All sizes are scaled, fixed ones as well as `size`, to keep the same part of
  the image: resize_small(256)|central_crop(size) for 224 pixels becomes
  resize_small(512)|central_crop(448) for 448.

  Args:
    text: the preprocessing string, for images of `old_size`.
    old_size: in pixels, (height, width) or one number for both.
    new_size: likewise.

  Raises:
    UserError: the string is invalid.
  """
  old_size, new_size = as_pair(old_size), as_pair(new_size)
  ops = []
  for name, arguments in preprocessing.parse(text, old_size, evaluation=True):
    key, size = next(iter(arguments.items()))  # operations take the size first
    sides = tuple(map(scale_side, as_pair(size), old_size, new_size))
    scaled = max(sides) if name == "resize_small" else sides
    values = {**arguments, key: scaled}
    ops.append(f"{name}({', '.join(f'{k}={v!r}' for k, v in values.items())})")
  return "|".join(ops)
