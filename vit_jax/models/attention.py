"""Multi-head attention; fused in bfloat16, with no [n n] array in memory.

GPUs use cuDNN's kernel, TPUs those of attention_kernels.py. Without one, XLA
writes every head's [n n] scores to memory and reads them again, several times.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import attention_kernels as kernels
from vit_jax.models import posemb
from vit_jax.models.config import ViTConfig
from vit_jax.models.layers import (
  LANES,
  ROWS,
  Dense,
  Dropout,
  LayerNorm,
  save,
)

_AMPERE = 8  # compute capability of the first GPUs with cuDNN's kernel


def find_fused(tokens: int, width: int, num_heads: int) -> Callable | None:
  """Returns a fused function like `attend` for the devices that are traced for.

  None if they have no kernel for as many `tokens`, padded, and this `width` d.
  """
  head_dim = width // num_heads
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  if device.platform == "gpu":
    capability = getattr(jax.devices()[0], "compute_capability", "")
    number = re.fullmatch(r"(\d+)\.\d+", capability)  # AMD's have names
    recent = number is not None and int(number[1]) >= _AMPERE
    fits = recent and head_dim % 8 == 0 and head_dim <= 128
    return attend_by_cudnn if fits else None
  if not kernels.takes(tokens, width, head_dim, device.device_kind):
    return None
  return attend if tokens <= kernels.MAX_TOKENS else attend_long


def attend_by_cudnn(query, key, value, num_heads: int, valid: int):
  """Computes `attend` with cuDNN, for bfloat16 on NVIDIA GPUs."""
  b, n, _ = key.shape
  arrays = (split_heads(x, num_heads) for x in (query, key, value))
  lengths = jnp.full(b, valid, jnp.int32) if valid < n else None
  x = jax.nn.dot_product_attention(
    *arrays, key_value_seq_lengths=lengths, implementation="cudnn"
  )
  return x.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(query, key, value, num_heads: int, valid: int):
  """Returns softmax(query key^T / sqrt(d/a)) value of each head, [b q d].

  Args:
    query, key, value: [b q d] and [b n d], of which rows from `valid` on are
      padding; the columns of a head are side by side.
    num_heads, valid: a; how many tokens are not padding.
  """
  head_dim = query.shape[-1] // num_heads
  return jax.lax.platform_dependent(
    *(query, key, value),
    tpu=lambda *x: kernels.run("forward", head_dim, valid, *x)[0],
    default=functools.partial(_attend_alone, num_heads, valid),
  )


def attend_plainly(
  query, key, value, num_heads: int, valid: int, offsets=None, drop=None
):
  """Returns `attend`'s result, without a kernel, and the weights f32[b a q n].

  `offsets`, f32[b a q n], are added to the scores; `drop` is a function of the
  weights, applied before the matmul with the values.
  """
  query, key, value = (split_heads(x, num_heads) for x in (query, key, value))
  query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
  scores = jnp.einsum(
    "bqad,bnad->baqn", query, key, preferred_element_type=jnp.float32
  )
  if offsets is not None:
    scores = scores + offsets
  if valid < scores.shape[-1]:
    scores = jnp.where(
      jnp.arange(scores.shape[-1]) < valid, scores, kernels.MINUS
    )
  weights = jax.nn.softmax(scores, axis=-1)
  dropped = drop(weights) if drop else weights
  x = jnp.einsum("baqn,bnad->bqad", dropped.astype(value.dtype), value)
  return x.reshape(*x.shape[:2], -1), weights


def _attend_alone(num_heads, valid, query, key, value):
  return attend_plainly(query, key, value, num_heads, valid)[0]


def split_heads(x, num_heads: int):
  """[b n d] -> [b n a d/a]."""
  return x.reshape(*x.shape[:2], num_heads, -1)


def _attend_forward(query, key, value, num_heads, valid):
  return attend(query, key, value, num_heads, valid), (query, key, value)


def _attend_backward(num_heads, valid, saved, gradient):
  head_dim = gradient.shape[-1] // num_heads
  plain = functools.partial(_attend_alone, num_heads, valid)
  return jax.lax.platform_dependent(
    *(*saved, gradient),
    tpu=lambda *x: tuple(kernels.run("backward", head_dim, valid, *x)),
    default=lambda *x: jax.vjp(plain, *x[:3])[1](x[-1]),
  )


attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend_long(query, key, value, num_heads: int, valid: int):
  """Computes `attend` for sequences of any length."""
  return _attend_long_forward(query, key, value, num_heads, valid)[0]


def _attend_long_forward(query, key, value, num_heads, valid):
  (b, q, d), head_dim = query.shape, query.shape[-1] // num_heads
  lanes = math.lcm(LANES, head_dim)
  shape = (b, d // lanes, lanes // head_dim, q)

  def plainly(*arrays):
    # Only the kernel's backward pass uses the sums.
    return _attend_alone(num_heads, valid, *arrays), jnp.zeros(shape)

  out, sums = jax.lax.platform_dependent(
    *(query, key, value),
    tpu=lambda *x: tuple(kernels.run("forward", head_dim, valid, *x)),
    default=plainly,
  )
  return out, (query, key, value, out, sums)


attend_long.defvjp(_attend_long_forward, _attend_backward)


class MultiHeadDotProductAttention(nn.Module):
  """Multi-head attention with a float32 softmax.

  Query, key and value have separate projections, because one fused matmul costs
  layout copies on TPUs and published files store them separately.
  """

  config: ViTConfig
  relative: bool = False  # position embeddings of key minus query
  angles: Any = None  # f64[n d/a/2] of the tokens, see `posemb.rotate`
  dropout_rate: float = 0.0  # of the attention weights
  deterministic: bool = True

  @nn.compact
  def __call__(self, inputs_q, inputs_kv, valid, weights=False, affine=None):
    """[b q d] attends to [b n d] -> [b q d] and the weights f32[b a q n].

    Rows of `inputs_kv` from `valid` on are padding. The returned weights may be
    None unless `weights` is set. `affine` of both inputs: see `LayerNorm`.
    """
    width, num_heads = inputs_q.shape[-1], self.config.num_heads
    heads = (num_heads, width // num_heads)

    # In rows, so that XLA adds the three gradients in LayerNorm's backward
    # pass; a reshape in between costs one more pass.
    rows_q = rows_kv = inputs_q.reshape(-1, width)
    if inputs_q is not inputs_kv:
      rows_kv = inputs_kv.reshape(-1, width)

    def project(name, rows, like):
      biased = name[0] in {"all": "qkv", "none": ""}.get(bias, bias)
      dense = Dense(self.config, (width, *heads), use_bias=biased, name=name)
      return save(self.config, dense(rows, affine)).reshape(like.shape)

    bias = self.config.qkv_bias
    query = project("query", rows_q, inputs_q)
    key = project("key", rows_kv, inputs_kv)
    value = project("value", rows_kv, inputs_kv)
    query, key = self.place("query", query), self.place("key", key)
    n, fused = inputs_kv.shape[1], None
    drops = self.dropout_rate > 0 and not self.deterministic
    whole = inputs_q.shape[1] % ROWS == 0 and self.config.use_tpu_layout
    if whole and not (weights or self.relative or drops):
      fused = find_fused(n, width, num_heads)
    what = (query, key, value, num_heads, valid)
    if fused:
      x, found = fused(*what), None
    else:
      offsets = self.score_offsets(query, n, valid) if self.relative else None
      drop = Dropout(self.dropout_rate, self.deterministic)
      x, found = attend_plainly(*what, offsets, drop)
    shape = {"kernel_shape": (*heads, width), "in_axes": 2, "fsdp_axis": 1}
    return Dense(self.config, **shape, name="out")(x), found

  def place(self, name, x):
    """Normalises each head of queries or keys [b n d], then rotates them."""
    num_heads = self.config.num_heads
    if self.config.qk_norm:
      norm: Any = LayerNorm(self.config, whole=True, name=f"{name}_norm")
      x = norm(split_heads(x, num_heads))[0].reshape(x.shape)
    if self.angles is not None:
      x = posemb.rotate(x, self.angles[: x.shape[1]], num_heads)
    return x

  def score_offsets(self, query, num_keys, valid):
    """[b q d] -> f32[b a q n]: the query times each offset's embedding.

    One-dimensional relative attention (the paper, Appendix D.4): the offset is
    the distance in the sequence, which includes the class token.
    """
    num_queries, n = query.shape[1], valid
    query = split_heads(query[:, :n], self.config.num_heads)
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    init, shape = nn.initializers.normal(0.02), (2 * n - 1, *query.shape[2:])
    embedding = self.param("relative_embedding", init, shape)
    embedding = embedding.astype(query.dtype)
    by_offset = jnp.einsum(
      "bqad,rad->baqr", query, embedding, preferred_element_type=jnp.float32
    )
    # Row q holds the offsets -q .. n-1-q of its keys 0 .. n-1.
    row = jnp.arange(query.shape[1])[:, None]
    index = jnp.arange(n)[None, :] - row + n - 1
    offsets = by_offset[:, :, row, index]
    padding = (0, num_queries - len(row)), (0, num_keys - n)
    return jnp.pad(offsets, ((0, 0), (0, 0), *padding))
