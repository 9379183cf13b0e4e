"""ResNets with group normalisation and standardised convolutions.

There are two kinds, whose details follow their published weights:

  `hybrid_stem`: the first stages of an R50+ViT-B_16. Post-activation units
    (ResNet-v1), "SAME" padding, weights divided by (std + 1e-5).
  `BiT`: the paper's baselines R50x1 ... R152x4 (arXiv 1912.11370).
    Pre-activation units (ResNet-v2), symmetric padding, weights divided by
    sqrt(variance + 1e-10), a larger epsilon in the group normalisation.

Kernels are standardised and groups normalised in float32; convolutions run in
`dtype`. Parameter names are those of the published files.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.config import ViTConfig
from vit_jax.models.layers import make_head

_NUM_GROUPS = 32


def standardize_hybrid(kernel):
  """f32[h w i o] -> the same, each output channel with mean 0 and std ~1."""
  kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
  return kernel / (kernel.std((0, 1, 2), keepdims=True) + 1e-5)


def standardize_bit(kernel):
  """As `standardize_hybrid`, with the epsilon inside the root."""
  kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
  variance = jnp.square(kernel).mean((0, 1, 2), keepdims=True)
  return kernel / jnp.sqrt(variance + 1e-10)


class StdConv(nn.Module):
  """Convolution without bias whose kernel is standardised first."""

  features: int
  kernel_size: int
  strides: int = 1
  padding: Any = "SAME"
  standardize: Any = standardize_hybrid
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[b h w i] -> [b h/strides w/strides o]."""
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(),
      (self.kernel_size, self.kernel_size, x.shape[-1], self.features),
    )
    return jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      self.standardize(kernel).astype(self.dtype),
      (self.strides, self.strides),
      self.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class HybridUnit(nn.Module):
  """Bottleneck unit of the hybrids: ReLU after the addition."""

  width: int
  strides: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[b h w i] -> [b h/strides w/strides 4*width]."""
    conv = functools.partial(StdConv, dtype=self.dtype)
    norm = functools.partial(
      nn.GroupNorm, _NUM_GROUPS, epsilon=1e-6, dtype=self.dtype
    )
    out = 4 * self.width
    residual = x
    if x.shape[-1] != out or self.strides != 1:
      residual = conv(out, 1, self.strides, name="conv_proj")(x)
      residual = norm(name="gn_proj")(residual)
    x = nn.relu(norm(name="gn1")(conv(self.width, 1, name="conv1")(x)))
    x = conv(self.width, 3, self.strides, name="conv2")(x)
    x = nn.relu(norm(name="gn2")(x))
    x = conv(out, 1, name="conv3")(x)
    # A unit starts as the identity (with its ReLU).
    x = norm(scale_init=nn.initializers.zeros, name="gn3")(x)
    return nn.relu(residual + x)


class BiTUnit(nn.Module):
  """Bottleneck unit of BiT: normalisation and ReLU come first."""

  width: int
  strides: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[b h w i] -> [b h/strides w/strides 4*width]."""
    conv = functools.partial(
      StdConv, standardize=standardize_bit, dtype=self.dtype
    )
    norm = functools.partial(_bit_norm, self.dtype)
    out = 4 * self.width
    residual = x
    x = nn.relu(norm("gn1")(x))
    if x.shape[-1] != out or self.strides != 1:
      residual = conv(out, 1, self.strides, name="conv_proj")(x)
    x = nn.relu(norm("gn2")(conv(self.width, 1, name="conv1")(x)))
    padding = ((1, 1), (1, 1))
    x = conv(self.width, 3, self.strides, padding, name="conv2")(x)
    x = nn.relu(norm("gn3")(x))
    return conv(out, 1, name="conv3")(x) + residual


def _bit_norm(dtype, name):
  # BiT's authors compute the variance from centred values.
  return nn.GroupNorm(
    _NUM_GROUPS,
    epsilon=1e-5,
    use_fast_variance=False,
    dtype=dtype,
    name=name,
  )


class Stage(nn.Module):
  """Units of one resolution; the first may halve it."""

  unit: Any
  num_units: int
  width: int
  strides: int
  digits: int  # of the unit numbers in the parameters' names
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[b h w i] -> [b h/strides w/strides 4*width]."""
    for i in range(self.num_units):
      x = self.unit(
        self.width,
        self.strides if i == 0 else 1,
        dtype=self.dtype,
        name=f"unit{i + 1:0{self.digits}d}",
      )(x)
    return x


def _run_stages(config, unit, x, width, digits):
  """Returns the last stage's result, and those of the root and each stage."""
  out = {"root": x}
  for i, num_units in enumerate(config.units or ()):
    x = out[f"stage{i + 1}"] = Stage(
      unit,
      num_units,
      width * 2**i,
      strides=1 if i == 0 else 2,
      digits=digits,
      dtype=config.dtype,
      name=f"block{i + 1}",
    )(x)
  return x, out


def hybrid_stem(config: ViTConfig, images):
  """[b h w 3] -> [b h/s w/s c], and the intermediates {name: array}.

  Call it in a compact method. The layers then belong to that module, as in the
  published files.

  Args:
    config: without `units` s is 4 and c is 64; with n stages s is 2**(n + 1)
      and c is 128 * 2**n.
    images: in [-1, 1].
  """
  dtype = config.dtype
  x = StdConv(64, 7, 2, dtype=dtype, name="conv_root")(images)
  x = nn.relu(nn.GroupNorm(32, epsilon=1e-6, dtype=dtype, name="gn_root")(x))
  x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="SAME")
  return _run_stages(config, HybridUnit, x, 64, digits=1)


class BiTRoot(nn.Module):
  """The first convolution and pooling, to a quarter of the resolution."""

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images):
    """[b h w 3] -> [b h/4 w/4 width]."""
    x = StdConv(
      self.width,
      7,
      2,
      ((3, 3), (3, 3)),
      standardize=standardize_bit,
      dtype=self.dtype,
      name="conv_root",
    )(images)
    # The authors' code pads with zeros here, not with minus infinity.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")


class BiT(nn.Module):
  """ResNet-v2 of arXiv 1912.11370: images to logits."""

  config: ViTConfig

  @nn.compact
  def __call__(self, images, *, train=False, intermediates=False):
    """[b h w 3] in [-1, 1] -> f32[b k] and the intermediates by name."""
    config, dtype = self.config, self.config.dtype
    unit = nn.remat(BiTUnit) if config.remat == "full" else BiTUnit
    width = 64 * config.width
    x = BiTRoot(width, dtype=dtype, name="root_block")(images)
    x, out = _run_stages(config, unit, x, width, digits=2)
    x = nn.relu(_bit_norm(dtype, "norm-pre-head")(x))
    x = out["pooled"] = x.mean((1, 2), dtype=jnp.float32)
    if config.num_classes:
      x = out["logits"] = make_head(config)(x)
    return x, out
