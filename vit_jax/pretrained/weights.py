"""Weights, the common result of all readers.

Arrays are lazy, so loading needs little more memory than the model itself.
"""

import hashlib
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax import models
from vit_jax.data.sizes import as_pair
from vit_jax.models import variants
from vit_jax.state import flatten


class LazyArray(NamedTuple):
  """An array that is loaded only when `read` is called."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def as_lazy(x: np.ndarray) -> LazyArray:
  """Returns a `LazyArray` of an array that is already in memory."""
  return LazyArray(x.shape, x.dtype, lambda: x)


class Weights(NamedTuple):
  """A model's parameters from a file, in our names and our layout.

  Attributes:
    origin: the project whose format this is, such as "vision_transformer".
    source: the file or folder.
    model: arguments of `models.create` except `num_classes` and `image_size`.
    image_size: (h, w) in pixels that the position embedding was made for.
    num_classes: width of the head, 0 for none.
    class_names: as the file has them, else None.
    preprocess: the evaluation preprocessing of its authors, or the nearest
      supported one, see `notes`.
    mean, std: of pixels in [0, 1], a triple each. All are 0.5 for our models,
      which take [-1, 1].
    loss: "softmax" or "sigmoid": what turns logits into probabilities.
    resize: how its authors resize position embeddings, see `positions`.
    params: {path: LazyArray}, blocks stacked if `model` has `scan`.
    notes: for the user, one line each.
    run: the contents of config.json, for a run of ours; else None.
  """

  origin: str
  source: str
  model: dict[str, Any]
  image_size: tuple[int, int]
  num_classes: int
  params: Mapping[str, LazyArray] = types.MappingProxyType({})
  class_names: list[str] | None = None
  preprocess: str = "resize(size)"
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  loss: str = "softmax"
  resize: str = "corner_aligned"
  notes: tuple[str, ...] = ()
  run: dict[str, Any] | None = None

  def create_model(self, **changes) -> models.Model:
    """Returns the model; `changes` override the file's options.

    The dtype is float32 unless a run of ours used another. The file's image
    size need not be a multiple of the patch size, see `cut_off`.
    """
    options = {
      "dtype": "float32",
      "num_classes": self.num_classes,
      "image_size": self.image_size,
      **self.model,
      **changes,
    }
    if not any(self.cut_off()) or (
      as_pair(options["image_size"]) != self.image_size
    ):
      return models.create(**options)
    height, width = self.image_size
    bottom, right = self.cut_off()
    options["image_size"] = (height - bottom, width - right)
    return models.create(**options)._replace(image_size=self.image_size)

  def digest(self) -> str:
    """Returns sixteen hexadecimal digits of a hash of all arrays."""
    digest = hashlib.sha256()
    for path, x in sorted(self.params.items()):
      digest.update(f"{path} {x.shape} {x.dtype}".encode())
      digest.update(x.read().tobytes())
    return digest.hexdigest()[:16]

  def options(self) -> dict[str, Any]:
    """Returns the arguments of `models.create`, defaults included.

    Options without effect on this model have their default values.
    """
    options = models.DEFAULTS | self.model
    encoder = variants.parse(self.model["variant"]).encoder
    without_effect = {
      "class_token": options["classifier"].startswith("token"),
      "map_heads": encoder and options["map_heads"] == encoder.num_heads,
      "prefix_positions": options["pos_embedding"] != "learned"
      or (not options["registers"] and options["prefix_positions"] == "all"),
    }
    return options | {
      name: models.DEFAULTS[name] for name, x in without_effect.items() if x
    }

  def cut_off(self) -> tuple[int, int]:
    """Returns how many pixels (bottom, right) belong to no patch.

    Other libraries take images of such sizes. Their convolution ignores these
    pixels, like ours.
    """
    sizes = variants.parse(self.model["variant"])
    if sizes.encoder is None:  # convolutions pad them
      return 0, 0
    height, width = self.image_size
    return height % sizes.stride, width % sizes.stride

  def shapes(self) -> dict[str, Any]:
    """Returns {path: shape and dtype} of the model's parameters."""
    model = self.create_model()
    # A key created outside eval_shape would initialise the devices, before the
    # processes of a run have connected.
    return flatten(jax.eval_shape(lambda: model.init(jax.random.key(0))))
