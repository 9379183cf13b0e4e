"""Masked patch prediction: corruption, targets and loss.

The paper's self-supervision (arXiv 2010.11929, Appendix B.1.2): half of the
patch embeddings are corrupted, and the model predicts the colours of those
patches from the encoder's output. Pure functions of arrays.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Shares of the corrupted patches; the others are kept unchanged, so that the
# model must also predict patches that look intact.
MASKED = 0.8
SWAPPED = 0.1

COLOURS = 512  # 3 bits for each of red, green and blue

# Target -> cells along a side of a patch, each with one colour; None for pixels
# instead of colours.
TARGETS = {"mean_colour": 1, "colour_grid": 4, "pixels": None}


class Corruption(NamedTuple):
  """The corruption of the n patch embeddings of each image.

  Attributes:
    corrupted: i32[b m], the patches to predict, in random order.
    source: i32[b n], the patch whose embedding each patch gets: itself, or
      another patch of the same image.
    masked: bool[b n], the patches that get the [mask] embedding instead.
  """

  corrupted: jax.Array
  source: jax.Array
  masked: jax.Array


def draw_corruption(keys, num_patches: int) -> Corruption:
  """Draws the corruption of one image for each of the keys [b].

  Half of the patches, rounded down, are corrupted: the first of a random
  permutation, so that shapes are static. Each is masked, swapped or kept
  independently, so the shares hold on average.

  Args:
    keys: PRNG keys [b].
    num_patches: n, at least 2.
  """
  return jax.vmap(functools.partial(_draw_one, num_patches=num_patches))(keys)


def _draw_one(key, num_patches):
  which_key, kind_key, other_key = jax.random.split(key, 3)
  count = num_patches // 2
  corrupted = jax.random.permutation(which_key, num_patches)[:count]
  kind = jax.random.uniform(kind_key, (count,))
  # 1 to n - 1 places further on, in a circle: every patch but itself.
  distance = jax.random.randint(other_key, (count,), 1, num_patches)
  other = (corrupted + distance) % num_patches
  swapped = (kind >= MASKED) & (kind < MASKED + SWAPPED)
  source = jnp.where(swapped, other, corrupted)
  return Corruption(
    corrupted=corrupted,
    source=jnp.arange(num_patches).at[corrupted].set(source),
    masked=jnp.zeros(num_patches, bool).at[corrupted].set(kind < MASKED),
  )


def count_outputs(target: str, patch_size: int) -> int:
  """Returns how many numbers a model predicts for a patch."""
  cells = TARGETS[target]
  return 3 * patch_size**2 if cells is None else COLOURS * cells**2


def make_targets(images, patch_size: int, target: str):
  """Returns the targets of each patch.

  Args:
    images: u8[b h w 3].
    patch_size: p.
    target: "mean_colour", "colour_grid" or "pixels".

  Returns:
    "pixels": f32[b n 3pp] in [-1, 1], row by row. "mean_colour": i32[b n 1],
    "colour_grid": i32[b n 16], the cells row by row; a colour is
    64 red + 8 green + blue.
  """
  cells = TARGETS[target]
  if cells is None:
    patches = split_patches(images, patch_size)
    patches = patches.reshape(*patches.shape[:2], -1)
    return patches.astype(jnp.float32) / 127.5 - 1
  patches = split_patches(images.astype(jnp.int32), patch_size)
  side = patch_size // cells
  shape = (*patches.shape[:2], cells, side, cells, side, 3)
  totals = patches.reshape(shape).sum((3, 5)).reshape(*shape[:2], cells**2, 3)
  # floor(mean / 32), the upper three bits of the mean: eight bins of equal
  # width. In integers, so that a mean on the edge falls to the same side on
  # every machine.
  return totals // (32 * side**2) @ jnp.array([64, 8, 1])


def split_patches(images, patch_size: int):
  """[b h w 3] -> [b n p p 3], row by row, as the model's tokens are."""
  b, h, w, c = images.shape
  p = patch_size
  x = images.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
  return x.reshape(b, -1, p, p, c)


def take_patches(x, corrupted):
  """[b n ...] at i32[b m] -> [b m ...]."""
  index = corrupted.reshape(*corrupted.shape, *[1] * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def prediction_loss(predictions, targets, target: str):
  """Returns the loss of each image, f32[b], a mean over its corrupted patches.

  Colours: the cross-entropy, in nats, a mean over the cells. Pixels: the mean
  squared error.

  Args:
    predictions: f32[b m o], see `count_outputs`.
    targets: [b m ...], of the same patches, see `make_targets`.
    target: as in `make_targets`.
  """
  if TARGETS[target] is None:
    return jnp.mean((predictions - targets) ** 2, (1, 2))
  log_p = jax.nn.log_softmax(split_cells(predictions))
  log_p = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  return -jnp.mean(log_p, (1, 2))


def split_cells(predictions):
  """Logits [b m o] -> [b m cells 512]."""
  return predictions.reshape(*predictions.shape[:2], -1, COLOURS)
