"""Dense layer, LayerNorm and dropout, in the layout that suits TPUs.

The plain form, in float32, is the reference in tests.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from vit_jax.models import norm_kernel
from vit_jax.models.config import ViTConfig

ROWS, LANES = 8, 128  # of a vector register
SAVED = "saved"  # see `save`


def save(config: ViTConfig, x):
  """Marks a value that `model.remat` "dots" saves for the backward pass.

  Saved are queries, keys, values, the MLP's hidden layer before GELU and the
  statistics of LayerNorm. Attention and its last matmul, which cost less than
  copying their results into a scan's stacks and out again, are recomputed.
  """
  return checkpoint_name(x, SAVED) if config.remat == "dots" else x


def drop_path(x, rate, key):
  """Drops whole examples of a residual branch [b ...] (arXiv 1603.09382).

  `rate` is the probability of dropping, which may be traced.
  """
  shape = (x.shape[0], *[1] * (x.ndim - 1))
  keep = jax.random.bernoulli(key, 1 - rate, shape)
  return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


class Dropout(nn.Module):
  """Dropout (arXiv 1207.0580).

  The barrier keeps XLA from drawing the mask again for each matmul that uses
  it, forward and backward, which would take as long as these (RESULTS.md).
  """

  rate: float
  deterministic: bool

  @nn.compact
  def __call__(self, x):
    """[...] -> [...]"""
    if self.deterministic or not self.rate:
      return x
    keep = 1 - self.rate
    kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
    return jnp.where(jax.lax.optimization_barrier(kept), x / keep, 0)


def dropout(config: ViTConfig, deterministic: bool) -> Dropout:
  """Returns the dropout of everything but attention weights."""
  return Dropout(config.dropout_rate, deterministic)


def count_rows(config: ViTConfig, n: int) -> int:
  """Returns the number of rows after `pad_tokens`, 200 for 197 tokens."""
  return n + -n % ROWS if config.use_tpu_layout else n


def pad_tokens(config: ViTConfig, x):
  """Appends zeros to [b n d], so that n fills the rows of TPU registers.

  The result has the memory layout of [b*n d], so that reshapes need no copy.
  """
  n = x.shape[1]
  return jnp.pad(x, ((0, 0), (0, count_rows(config, n) - n), (0, 0)))


def _split_axis() -> str | None:
  """Returns the mesh axis that splits kernels or their moments, if any."""
  mesh = jax.sharding.get_abstract_mesh()
  split = [name for name in ("fsdp", "zero1") if mesh.shape.get(name, 1) > 1]
  return split[0] if split else None


def gather(kernel):
  """Constrains a kernel that is sharded by fsdp to be replicated.

  Otherwise XLA's partitioner splits its matmul into a loop of small ones.
  """
  if not _split_axis():
    return kernel
  return jax.lax.with_sharding_constraint(kernel, P())


@jax.custom_vjp
def keep_whole(kernel):
  """Keeps a kernel replicated whose gradient is split ("zero1").

  Otherwise the partitioner splits it like the gradient that it is multiplied by
  (see `affine` of `Dense`), and gathers it again for the forward pass.
  """
  return gather(kernel) if _split_axis() == "zero1" else kernel


keep_whole.defvjp(
  lambda kernel: (keep_whole(kernel), None), lambda _, gradient: (gradient,)
)


def matmul(x, kernel, fsdp_axis: int) -> Any:
  """[r i] @ [i o], with the kernel sharded by fsdp along `fsdp_axis`.

  With fsdp, the kernel is all-gathered. Its gradient, with "zero1" too, is
  summed by a reduce-scatter. XLA's partitioner would all-reduce it whole.
  """
  size = jax.sharding.get_abstract_mesh().size
  split = _split_axis() and len(x) % size == 0
  return _matmul(x, kernel, fsdp_axis) if split else x @ gather(kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, kernel, fsdp_axis):
  return _matmul_forward(x, kernel, fsdp_axis)[0]


def _matmul_forward(x, kernel, fsdp_axis):
  del fsdp_axis
  kernel = gather(kernel)
  return x @ kernel, (x, kernel)


def _matmul_backward(fsdp_axis, saved, gradient):
  x, kernel = saved
  mesh = jax.sharding.get_abstract_mesh()
  rows, name = P(mesh.axis_names), mesh.axis_names[1]
  # libtpu all-reduces an array that is to be cut into parts of 128 columns, as
  # L/16's [4096 1024] with fsdp=8, but not its transpose.
  turned = fsdp_axis == 1 and kernel.shape[1] == LANES * mesh.shape[name]

  def multiply(x, gradient):
    whole = gradient.T @ x if turned else x.T @ gradient
    mine = jax.lax.psum_scatter(
      whole, name, scatter_dimension=0 if turned else fsdp_axis, tiled=True
    )
    mine = jax.lax.psum(mine, "data")
    return mine.T if turned else mine

  out = P(*[None] * fsdp_axis, name)
  split = {"in_specs": (rows, rows), "out_specs": out, "check_vma": False}
  return gradient @ kernel.T, jax.shard_map(multiply, **split)(x, gradient)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def spread(x):
  """Constrains [b*n d] to stay sharded by images over all devices.

  Otherwise the partitioner may all-gather x where kernels are sharded by fsdp.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(mesh.axis_names))


def convolve(x, kernel, *args, **kwargs):
  """Returns a convolution whose kernel is all-gathered by `gather`."""
  return jax.lax.conv_general_dilated(x, gather(kernel), *args, **kwargs)


@jax.custom_vjp
def add_bias(x, bias):
  """[r o] + [o]; in bfloat16 the bias's gradient is a matmul with ones.

  It is a sum over all tokens, which XLA estimates on v5e at 256,000 cycles for
  B/16's keys alone, as much as two of their matmuls. A matmul with ones also
  adds in float32 and costs one pass through memory.
  """
  return x + bias


def _add_bias_backward(_, gradient):
  if gradient.dtype != jnp.bfloat16:
    # Float32 matmuls are rounded to bfloat16 on TPUs; sums are not.
    return gradient, gradient.sum(0)
  ones = jnp.ones((ROWS, gradient.shape[0]), gradient.dtype)
  # One row would be enough, but XLA would turn its matmul into a sum.
  sums = jnp.matmul(ones, gradient, preferred_element_type=jnp.float32)
  return gradient, sums[0].astype(gradient.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, None), _add_bias_backward)


class Dense(nn.Module):
  """A dense layer, whose kernel may have a separate axis for heads.

  The matmul uses the flattened kernel, so that its result has the heads side by
  side, as `attention.attend` takes them, without a copy.
  """

  config: ViTConfig
  kernel_shape: tuple[int, ...]
  in_axes: int = 1  # leading axes of the kernel that are summed over
  fsdp_axis: int = 0  # of the flattened kernel, as in `sharding.RULES`
  use_bias: bool = True
  bias_init: Any = nn.initializers.zeros
  sum_by_product: bool = True  # see `add_bias`

  @nn.compact
  def __call__(self, x, affine=None):
    """[... i] -> [... o]; `affine` see `LayerNorm`."""
    shape, dtype = self.kernel_shape, self.config.dtype
    flat = math.prod(shape[: self.in_axes]), math.prod(shape[self.in_axes :])
    # Xavier initialisation of the flattened shape, not of one head's.
    init = nn.initializers.xavier_uniform()
    kernel = self.param("kernel", lambda key: init(key, flat).reshape(shape))
    kernel, bias = keep_whole(kernel.reshape(flat)), jnp.zeros(flat[1])
    if self.use_bias:
      bias = self.param("bias", self.bias_init, shape[self.in_axes :])
      bias = bias.reshape(-1)
    if affine:
      # (x scale + shift) kernel + bias, with scale and shift folded into kernel
      # and bias, so that their gradients need no sums over tokens.
      scale, shift = affine
      moved = jnp.broadcast_to(shift, (ROWS, flat[0]))
      moved = moved.astype(dtype) @ kernel.astype(dtype)
      kernel = keep_whole(kernel * scale[:, None])
      bias = bias + moved[0]
    kernel, bias = (y.astype(dtype) for y in (kernel, bias))
    if len(shape) > 2 or self.config.scan:
      # Otherwise XLA slices a scan's kernel from its stack for each tile of the
      # matmul. With heads, it computes the gradient in the stored layout and
      # transposes the tokens for it: 117,000 cycles for each kernel of B/16.
      kernel = jax.lax.optimization_barrier(kernel)
    y = matmul(x.astype(dtype).reshape(-1, flat[0]), kernel, self.fsdp_axis)
    if not (self.use_bias or affine):
      return y.reshape(*x.shape[:-1], flat[1])
    add = add_bias if self.sum_by_product else jnp.add
    return add(y, bias).reshape(*x.shape[:-1], flat[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalize(config: ViTConfig, x):
  """Returns the rows of x [r d] with mean 0 and variance 1, and x for the rest.

  The gradients of both results are added in one pass.
  """
  return _normalize(config, x)[0]


def _normalize(config, x):
  mean, factor = _measure(config, x)
  y = (x.astype(jnp.float32) - mean) * factor
  return (y.astype(config.dtype), x), x


normalize.defvjp(
  _normalize,
  lambda config, x, gradients: (
    norm_kernel.run(config.layer_norm_epsilon, x, *gradients),
  ),
)


def _measure(config, x):
  found = norm_kernel.measure(x, config.layer_norm_epsilon)
  return [save(config, statistic) for statistic in found]


class LayerNorm(nn.Module):
  """LayerNorm for the `Dense` layers that follow.

  In the TPU layout these layers apply the scale and bias, whose gradients then
  follow from the kernel's. Here they would be sums over all tokens, which cost
  as much as a matmul. With `whole` they are applied here.
  """

  config: ViTConfig
  whole: bool = False

  @nn.compact
  def __call__(self, x):
    """Normalises x [... d].

    Returns:
      The result [... d]; x, for its other uses, such as the residual connection
      (see `normalize`); and (scale f32[d], bias f32[d]), None if applied.
    """
    shape, dtype = x.shape[-1:], self.config.dtype
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    if self.config.use_tpu_layout and not self.whole:
      both: Any = normalize(self.config, x.reshape(-1, *shape))
      return *(rows.reshape(x.shape) for rows in both), (scale, bias)
    mean, factor = _measure(self.config, x)
    y = (x.astype(jnp.float32) - mean) * (factor * scale) + bias
    return y.astype(dtype), x, None


class LayerScale(nn.Module):
  """A factor for each channel of a residual branch (arXiv 2103.17239)."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x):
    """[... d] -> [... d]"""
    init = nn.initializers.constant(self.config.layer_scale_init)
    return x * self.param("scale", init, x.shape[-1:]).astype(x.dtype)


def make_head(config: ViTConfig, name: str = "head") -> nn.Dense:
  """Returns the logits' layer, in float32, with a kernel of zeros at first."""
  return nn.Dense(
    config.num_classes,
    kernel_init=nn.initializers.zeros,
    bias_init=nn.initializers.constant(config.head_bias_init),
    name=name,
  )
