"""Attention maps by rollout, and attention distances.

The numbers behind the paper's Figures 6, 7 (right), 11 and 14.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vit_jax.errors import UserError
from vit_jax.pretrained import Pretrained

# The least divisor, so that 0 / 0 is 0 and not NaN.
_LEAST = np.finfo(np.float32).tiny
# The picture's brightness where there is no attention.
_DARKEST = 0.15


class Looks(NamedTuple):
  """A model's probabilities, attention maps and distances for images.

  Attributes:
    probabilities: f32[b k]; of a model without a head f32[b 0].
    maps: f32[b h w], a number for each patch. They sum to 1 for an image, or
      are 0 if no patch reaches the output.
    distances: f32[b layers heads], in pixels, see `attention_distance`.
  """

  probabilities: Any
  maps: Any
  distances: Any


def make_look(model: Pretrained) -> Callable[[Any], Looks]:
  """Returns images f32[b h w 3] in [-1, 1] -> `Looks`, compiled once a shape.

  The attention weights are reduced on the device. Attention is computed without
  a fused kernel.

  Raises:
    UserError: a ResNet, which has no attention.
  """
  _check_attends(model)

  @jax.jit
  def look(params, images):
    weights, logits, out = _apply(model, params, images)
    n = weights[0].shape[-1]
    prefix, grid = model.model.num_prefix, model.model.grid
    if "pooling_weights" in out:
      pooling = out["pooling_weights"].mean(1)
    else:
      parts = model.config.classifier.split("+")
      token = jnp.zeros(n).at[0].set("token" in parts)
      mean = jnp.zeros(n).at[prefix:].set(("gap" in parts) / (n - prefix))
      pooling = jnp.tile((token + mean) / len(parts), (len(images), 1))
    seen = jnp.einsum("bn,bnm->bm", pooling, roll_out(weights))[:, prefix:]
    seen = seen / jnp.maximum(seen.sum(1, keepdims=True), _LEAST)
    distances = attention_distance(weights, grid, model.config.patch)
    return Looks(
      model.to_probabilities(logits),
      seen.reshape(-1, *grid),
      jnp.moveaxis(distances, 0, 1),
    )

  return lambda images: look(model.params, model.check(images))


def capture(model: Pretrained, images) -> list[jax.Array]:
  """Returns each layer's attention weights f32[b a n n], query before key.

  They are large: 1.6 GB for one image of 512 pixels and ViT-L/16.

  Args:
    model: with an encoder.
    images: f32[b h w 3] in [-1, 1].

  Raises:
    UserError: a ResNet, or images that the model does not take.
  """
  _check_attends(model)
  run = jax.jit(lambda params, x: _apply(model, params, x)[0])
  return run(model.params, model.check(images))


def _check_attends(model):
  if not model.model.num_layers:
    raise UserError(
      f"{model.config.variant} has no attention; give a ViT or a hybrid"
    )


def _apply(model, params, images):
  """Returns the weights of each layer, the logits, and the intermediates."""
  logits, out = model.model.apply(params, images, intermediates=True)
  layers = range(model.model.num_layers)
  weights = [out[f"block{i:02d}/attention_weights"] for i in layers]
  return weights, logits if model.config.num_classes else logits[:, :0], out


def roll_out(weights: Sequence) -> jax.Array:
  """Computes attention rollout over all layers (arXiv 2005.00928).

  It averages each layer's heads, adds the identity for the residual connection,
  scales rows to sum to 1, and multiplies the matrices of all layers.

  Args:
    weights: [b a n n] of each layer, the first one first.

  Returns:
    [b n n]: how much of each input token (the last axis) is in each output
    token. Rows sum to 1.
  """

  def mix(layer):
    mixed = (layer.mean(1) + jnp.eye(layer.shape[-1])) / 2
    # The rows of softmax sum to 1 but for rounding, which layers would add up.
    return mixed / mixed.sum(-1, keepdims=True)

  return functools.reduce(lambda rolled, x: x @ rolled, map(mix, weights))


def attention_distance(
  weights: Sequence, grid: tuple[int, int], patch: int
) -> jax.Array:
  """Returns each head's mean attention distance, in pixels: f[layers b a].

  The distance between the centres of the query's and the key's patch, weighted
  by attention, mean over the queries (the paper, Figure 7, right). The class
  token has no position and is left out; the remaining weights are scaled to sum
  to 1. Without any the distance is 0.

  Args:
    weights: [b a n n] of each layer; the patches are the last of the n tokens.
    grid: (h, w) in patches.
    patch: pixels along a side of one.
  """
  rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1)
  apart = patch * np.hypot(*(np.subtract.outer(x, x) for x in (rows, columns)))

  def measure(layer):
    extra = layer.shape[-1] - len(apart)
    layer = layer[..., extra:, extra:]
    sums = (layer * apart).sum(-1) / jnp.maximum(layer.sum(-1), _LEAST)
    return sums.mean(-1)

  return jnp.stack([measure(layer) for layer in weights])


def overlay(pixels: np.ndarray, seen) -> np.ndarray:
  """Returns a picture u8[h w 3], dark where attention is low.

  Args:
    pixels: u8[h w 3].
    seen: f[h' w'], one of `Looks.maps`; enlarged smoothly to the picture.
  """
  light = np.asarray(seen, np.float32)
  light = light - light.min()
  image = Image.fromarray(light / max(light.max(), _LEAST))
  smooth = image.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)
  # Bicubic overshoots at edges.
  light = np.asarray(smooth).clip(0, 1)[..., None]
  return np.rint(pixels * (_DARKEST + (1 - _DARKEST) * light)).astype(np.uint8)
