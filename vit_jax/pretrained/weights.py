"""What every reader returns.

Arrays are lazy: nothing is in memory until it is asked for, so that reading
needs little more than the model itself.
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
  """An array that `read` reads when it is asked for."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def as_lazy(x: np.ndarray) -> LazyArray:
  """Returns an array that is there already as a `LazyArray`."""
  return LazyArray(x.shape, x.dtype, lambda: x)


class Weights(NamedTuple):
  """A model's parameters as a file has them, in our names and our layout.

  Attributes:
    origin: the code that reads this format, such as "vision_transformer".
    source: the file or folder.
    model: arguments of `models.create` but `num_classes` and `image_size`.
    image_size: (h, w) in pixels that the position embedding was made for.
    num_classes: width of the head, 0 for none.
    class_names: as the file has them, else None.
    preprocess: the evaluation preprocessing that its authors use, or the
      nearest that there is here, see `notes`.
    mean, std: of pixels in [0, 1], a triple each. Our models take [-1, 1],
      which is 0.5 and 0.5.
    loss: "softmax" or "sigmoid": what turns logits into probabilities.
    resize: how its authors resize position embeddings, see `positions`.
    params: {path: LazyArray}, blocks stacked if `model` has `scan`.
    notes: what a user should know, one line each.
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

    In float32 unless it was trained here with another dtype. The file's own
    image size may be no multiple of the patch, see `cut_off`.
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
    """Returns sixteen hexadecimal digits that change with any array."""
    digest = hashlib.sha256()
    for path, x in sorted(self.params.items()):
      digest.update(f"{path} {x.shape} {x.dtype}".encode())
      digest.update(x.read().tobytes())
    return digest.hexdigest()[:16]

  def options(self) -> dict[str, Any]:
    """Returns the arguments of `models.create`, defaults included.

    Of values that mean the same here it has the default.
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
    """Returns the pixels (at the bottom, to the right) that are in no patch.

    Other libraries take images of such sizes; their convolution, as ours,
    leaves these pixels out.
    """
    sizes = variants.parse(self.model["variant"])
    if sizes.encoder is None:  # convolutions pad them
      return 0, 0
    height, width = self.image_size
    return height % sizes.stride, width % sizes.stride

  def shapes(self) -> dict[str, Any]:
    """Returns {path: shape and dtype} of the model's parameters."""
    model = self.create_model()
    # A key outside would initialise the devices, and a run's processes connect
    # after its configuration has been read.
    return flatten(jax.eval_shape(lambda: model.init(jax.random.key(0))))
