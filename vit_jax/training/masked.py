"""The objective of masked patch prediction; see `objectives` for its parts."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.models import masking
from vit_jax.state import make_key
from vit_jax.training.steps import normalize


@dataclasses.dataclass(frozen=True)
class MaskedPatches:
  """Prediction of corrupted patches, without labels, see `masking`.

  Attributes:
    model: that of `models.create_masked`.
    target: what is predicted, one of `masking.TARGETS`.
    class_names: none.
  """

  model: models.Model
  target: str
  class_names: list[str] = dataclasses.field(default_factory=list)

  def prepare(self, batch, key):
    return self._corrupt(
      batch["image"], jax.random.split(key, len(batch["image"]))
    )

  def loss(self, params, examples, key):
    images, corruption, targets = examples
    predictions = self.model.apply(
      params, images, corruption, train=True, key=key
    )
    loss = masking.prediction_loss(predictions, targets, self.target)
    return jnp.mean(loss), {}

  def eval_step(self, params, batch):
    """Returns sums over the unmasked examples.

    The index of an image in its data set seeds its corruption.

    The sums are "examples" and "loss". For colours, over the corrupted patches:
    "correct" (predictions, one a cell) and "colours" f32[cells 512], how often
    each was the target. For pixels: "patches", their number, and "sum" and
    "squares" of the targets, f32[3pp] each.
    """
    fold_in = functools.partial(jax.random.fold_in, make_key(0))
    images, corruption, targets = self._corrupt(
      batch["image"], jax.vmap(fold_in)(batch["index"])
    )
    predictions = self.model.apply(params, images, corruption)
    loss = masking.prediction_loss(predictions, targets, self.target)
    sums = {
      "examples": jnp.sum(batch["mask"]),
      "loss": jnp.sum(jnp.where(batch["mask"], loss, 0)),
    }
    mask = batch["mask"][:, None, None]
    if self.target == "pixels":
      patches = jnp.sum(mask) * targets.shape[1]
      targets = jnp.where(mask, targets, 0)
      return sums | {
        "patches": patches,
        "sum": targets.sum((0, 1)),
        "squares": (targets**2).sum((0, 1)),
      }
    found = jnp.argmax(masking.split_cells(predictions), -1)
    is_colour = targets[..., None] == jnp.arange(masking.COLOURS)
    return sums | {
      "correct": jnp.sum(mask & (found == targets)),
      "colours": jnp.sum(mask[..., None] & is_colour, (0, 1)),
    }

  def summarize(self, totals, multilabel) -> Iterator[tuple[str, float]]:
    """Turns the sums of `eval_step` over a test set into metrics.

    The trivial predictor is the same for every patch: the most frequent colour
    (its loss is that of the colours' frequencies), or the mean pixels. Both are
    computed on the evaluated patches, so that no constant does better.

    Yields:
      "examples" and "loss", the mean over the corrupted patches. Colours:
      "accuracy", the share of correct predictions (one a cell, of 512 colours);
      pixels: "r2", the share of explained variance. Then "trivial_loss" and,
      for colours, "trivial_accuracy".
    """
    loss = totals["loss"] / max(totals["examples"], 1)
    yield "examples", int(totals["examples"])
    yield "loss", float(loss)
    if self.target == "pixels":
      patches = totals["patches"]
      mean = totals["sum"] / patches
      trivial_loss = np.mean(totals["squares"] / patches - mean**2)
      yield "r2", float(1 - loss / trivial_loss)
      yield "trivial_loss", float(trivial_loss)
      return
    # f64[cells 512]: each cell has its own constant.
    counts = totals["colours"]
    frequency = counts / counts.sum(-1, keepdims=True)
    nats = -np.log(np.maximum(frequency, 1e-300))
    yield "accuracy", float(totals["correct"] / counts.sum())
    yield "trivial_loss", float((counts * nats).sum() / counts.sum())
    yield "trivial_accuracy", float(counts.max(-1).sum() / counts.sum())

  def _corrupt(self, images, keys):
    """Returns (images f32[b h w 3], their corruption, the targets [b m ...]).

    Args:
      images: u8[b h w 3].
      keys: PRNG keys [b], one for each image.
    """
    patch_size = self.model.image_size[0] // self.model.grid[0]
    targets = masking.make_targets(images, patch_size, self.target)
    corruption = masking.draw_corruption(keys, targets.shape[1])
    targets = masking.take_patches(targets, corruption.corrupted)
    return normalize(images), corruption, targets
