"""EfficientNets (arXiv 1905.11946), as in the authors' TensorFlow code.

One factor scales B0's widths, another its numbers of blocks. L2 is from
"Noisy Student" (arXiv 1911.04252). Convolutions run in `dtype`, with
TensorFlow's "SAME" padding; batch normalisation computes in float32.

Statistics (running means and variances, and the mean and std of pixels) are
stored as parameters, see `models.is_statistic`. Pixels are normalised here, not
in the stem's kernel, because its padding comes after the normalisation.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import layers
from vit_jax.models.config import ViTConfig
from vit_jax.models.variants import Scaling

_MOMENTUM = 0.99  # of the running statistics
_EPSILON = 1e-3
# ImageNet's statistics, for pixels in [0, 1].
_PIXEL_MEAN = (0.485, 0.456, 0.406)
_PIXEL_STD = (0.229, 0.224, 0.225)

# B0's stages: blocks, kernel size, strides, expansion, width.
_STAGES = (
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280  # B0's widths


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of one block."""

  stage: int
  kernel_size: int
  strides: int
  expansion: int
  inputs: int
  outputs: int


def scale_width(width: int, scaling: Scaling) -> int:
  """Returns a scaled width, rounded to a multiple of 8, at most 10 % down."""
  scaled = width * scaling.width
  rounded = max(8, int(scaled + 4) // 8 * 8)
  return rounded + 8 * (rounded < 0.9 * scaled)


def list_blocks(scaling: Scaling) -> list[Sizes]:
  """Returns the sizes of all blocks."""
  blocks, inputs = [], scale_width(_STEM, scaling)
  for stage, (count, kernel, strides, expansion, width) in enumerate(_STAGES):
    outputs = scale_width(width, scaling)
    for i in range(math.ceil(count * scaling.depth)):
      step = strides if i == 0 else 1
      blocks.append(Sizes(stage, kernel, step, expansion, inputs, outputs))
      inputs = outputs
  return blocks


def _normal(fan_out):
  return nn.initializers.normal(math.sqrt(2 / fan_out))


class Pixels(nn.Module):
  """Normalises pixels with a mean and a std that are not trained."""

  @nn.compact
  def __call__(self, images):
    """[b h w 3] in [-1, 1] -> [b h w 3]."""
    mean, std = jnp.array(_PIXEL_MEAN), jnp.array(_PIXEL_STD)
    mean = self.param("mean", lambda _: 2 * mean - 1)
    return (images - mean) / self.param("std", lambda _: 2 * std)


class Conv(nn.Module):
  """Convolution without bias, full or depthwise."""

  features: int
  kernel_size: int = 1
  strides: int = 1
  depthwise: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[b h w i] -> [b h/strides w/strides o]."""
    size, inputs = self.kernel_size, 1 if self.depthwise else x.shape[-1]
    # As the authors', whose depthwise kernels are [h w i 1].
    init = _normal(size**2 * (1 if self.depthwise else self.features))
    kernel = self.param("kernel", init, (size, size, inputs, self.features))
    return layers.convolve(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.strides, self.strides),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=x.shape[-1] // inputs,
    )


class BatchNorm(nn.Module):
  """Batch normalisation (arXiv 1502.03167), over the global batch.

  Training uses the batch's mean and biased variance, and updates the running
  statistics with them; these are stored as "statistics" for `Model.apply`.
  """

  train: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[b h w c] -> [b h w c]."""
    shape = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    mean = self.param("mean", nn.initializers.zeros, shape)
    variance = self.param("var", nn.initializers.ones, shape)
    y = x.astype(jnp.float32)
    if self.train:
      old = {"mean": mean, "var": variance}
      mean = y.mean((0, 1, 2))
      variance = jnp.square(y).mean((0, 1, 2)) - jnp.square(mean)
      variance = jnp.maximum(variance, 0)
      for name, now in (("mean", mean), ("var", variance)):
        new = _MOMENTUM * old[name] + (1 - _MOMENTUM) * now
        self.sow("statistics", name, new, lambda _, x: x, lambda: None)
    factor = jax.lax.rsqrt(variance + _EPSILON) * scale
    return ((y - mean) * factor + bias).astype(self.dtype)


class Block(nn.Module):
  """Inverted bottleneck: wide depthwise convolution between two narrow ends."""

  sizes: Sizes
  drop_rate: float  # of stochastic depth
  train: bool
  dtype: Any = jnp.float32

  def _convolve(self, x, name, features, **options):
    """Applies a convolution and batch normalisation."""
    conv = Conv(features, dtype=self.dtype, name=f"{name}_conv", **options)
    norm = BatchNorm(self.train, self.dtype, name=f"{name}_norm")
    return norm(conv(x))

  def _excite(self, x):
    """Applies squeeze-and-excitation (arXiv 1709.01507)."""
    width = max(1, int(0.25 * self.sizes.inputs))
    gate = x.mean((1, 2), dtype=jnp.float32)
    for name, features in (("se_reduce", width), ("se_expand", x.shape[-1])):
      dense = nn.Dense(
        features,
        dtype=self.dtype,
        kernel_init=_normal(features),
        name=name,
      )
      gate = dense(gate)
      if name == "se_reduce":
        gate = nn.silu(gate)
    return x * nn.sigmoid(gate)[:, None, None, :]

  @nn.compact
  def __call__(self, x):
    """[b h w i] -> [b h/strides w/strides o]."""
    sizes, inputs = self.sizes, x
    width = sizes.inputs * sizes.expansion
    if sizes.expansion != 1:
      x = nn.silu(self._convolve(x, "expand", width))
    x = self._convolve(
      x,
      "depthwise",
      width,
      kernel_size=sizes.kernel_size,
      strides=sizes.strides,
      depthwise=True,
    )
    x = self._excite(nn.silu(x))
    x = self._convolve(x, "project", sizes.outputs)
    if sizes.strides != 1 or sizes.inputs != sizes.outputs:
      return x
    if self.train and self.drop_rate:
      rate = jnp.float32(self.drop_rate)
      x = layers.drop_path(x, rate, self.make_rng("dropout"))
    return x + inputs


class EfficientNet(nn.Module):
  """Images to logits."""

  config: ViTConfig

  @nn.compact
  def __call__(self, images, *, train=False, intermediates=False):
    """[b h w 3] in [-1, 1] -> f32[b k] and the intermediates by name."""
    config, scaling = self.config, self.config.scaling
    assert scaling is not None
    options = {"train": train, "dtype": config.dtype}
    block = nn.remat(Block) if config.remat == "full" else Block
    width = scale_width(_STEM, scaling)
    x = Pixels(name="pixels")(images)
    x = Conv(width, 3, 2, dtype=config.dtype, name="stem_conv")(x)
    x = nn.silu(BatchNorm(**options, name="stem_norm")(x))
    out, blocks = {"stem": x}, list_blocks(scaling)
    for i, sizes in enumerate(blocks):
      rate = config.stochastic_depth_rate * i / len(blocks)
      x = block(sizes, rate, **options, name=f"block{i:02d}")(x)
      out[f"block{i:02d}/out"] = x
    width = scale_width(_HEAD, scaling)
    x = Conv(width, dtype=config.dtype, name="head_conv")(x)
    x = nn.silu(BatchNorm(**options, name="head_norm")(x))
    x = out["pooled"] = x.mean((1, 2), dtype=jnp.float32)
    if config.num_classes:
      x = layers.dropout(config, not train)(x)
      x = out["logits"] = _make_head(config)(x)
    return x, out


def _make_head(config):
  """Returns the logits' layer, with the authors' kernel initialisation."""
  limit = config.num_classes**-0.5
  return nn.Dense(
    config.num_classes,
    kernel_init=lambda key, shape, dtype: jax.random.uniform(
      key, shape, dtype, -limit, limit
    ),
    bias_init=nn.initializers.constant(config.head_bias_init),
    name="head",
  )
