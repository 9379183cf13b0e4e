"""A Pallas kernel of LayerNorm's backward pass, for TPUs.

XLA computes the statistics of rows in one pass, then moves them from lanes to
rows for the next one, which takes longer than the memory (RESULTS.md).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

_CHUNK = 16  # rows of one step, two tiles of bfloat16
_UNROLL = 8  # chunks that the compiler may interleave to hide latency
_BLOCK = 11 * 2**17  # bytes of each array in one program
# Instructions for 1,024 numbers, from the compiler's final bundles for v5e
# (libtpu 0.0.52). XLA keeps the arrays on the chip; from memory and back at
# 819 GB/s, the four would take 15 cycles.
_CYCLES = 4.9


def measure(x, epsilon: float):
  """Returns mean and 1 / standard deviation f32[... 1] of x [... d]."""
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  variance = jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean)
  return mean, jax.lax.rsqrt(jnp.maximum(variance, 0) + epsilon)


def differentiate(epsilon: float, x, dy, beside):
  """Returns the gradient of x, for y = (x - mean) factor, plus `beside`.

  It is factor (dy - mean(dy) - y mean(dy y)) + beside, where mean(dy y) is
  factor times the covariance of x and dy.

  Args:
    epsilon: is added to the variance.
    x, dy, beside: [r d]; the last is the gradient of other uses of x, such as
      the residual connection.
  """
  dtype = x.dtype
  x, dy, beside = (array.astype(jnp.float32) for array in (x, dy, beside))
  mean, factor = measure(x, epsilon)
  mean_dy = dy.mean(-1, keepdims=True)
  covariance = (x * dy).mean(-1, keepdims=True) - mean * mean_dy
  slope = covariance * (factor * factor)
  shift = mean_dy - slope * mean
  return (factor * (dy - (slope * x + shift)) + beside).astype(dtype)


def _kernel(x_ref, dy_ref, beside_ref, dx_ref, *, epsilon):
  def one(i, _):
    rows = pl.ds(i * _CHUNK, _CHUNK)
    arrays = (ref[rows] for ref in (x_ref, dy_ref, beside_ref))
    dx_ref[rows] = differentiate(epsilon, *arrays)

  jax.lax.fori_loop(0, x_ref.shape[0] // _CHUNK, one, None, unroll=_UNROLL)


def run_kernel(epsilon: float, x, dy, beside, interpret: bool = False):
  """Computes `differentiate` on one device."""
  rows, width = x.shape
  size = width * x.dtype.itemsize
  # The last block may be smaller: rows that are not there are not written.
  step = _CHUNK * _UNROLL
  steps, most = pl.cdiv(rows, step), max(1, _BLOCK // (size * step))
  block = step * max(i for i in range(1, most + 1) if steps % i == 0)
  spec = pl.BlockSpec((block, width), lambda i: (i, 0))
  return pl.pallas_call(
    functools.partial(_kernel, epsilon=epsilon),
    grid=(pl.cdiv(rows, block),),
    in_specs=[spec] * 3,
    out_specs=spec,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    interpret=interpret,
    cost_estimate=pl.CostEstimate(
      flops=16 * x.size, transcendentals=rows, bytes_accessed=4 * rows * size
    ),
    metadata={"cycles": str(round(_CYCLES * x.size / 1024))},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
  )(x, dy, beside)


# Jitted so that a model's layers share one trace.
@functools.partial(jax.jit, static_argnums=0)
def run(epsilon: float, x, dy, beside):
  """Computes `differentiate` for the rows of all devices."""
  return jax.lax.platform_dependent(
    *(x, dy, beside),
    tpu=functools.partial(
      run_on_each_device, functools.partial(run_kernel, epsilon)
    ),
    default=functools.partial(differentiate, epsilon),
  )


def run_on_each_device(kernel, *arrays):
  """Runs a kernel on each device's images; XLA cannot partition the call."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return kernel(*arrays)
  rows = P(mesh.axis_names)
  split = {"in_specs": rows, "out_specs": rows, "check_vma": False}
  return jax.shard_map(kernel, **split)(*arrays)
