"""Multi-head attention; fused in bfloat16, with no [n n] array in memory.

GPUs use cuDNN's kernel, TPUs the Pallas kernel of this module. Without it, XLA
writes every head's [n n] scores to memory and reads them again, several times.
The kernel keeps them on the chip. Each of its programs takes some images and as
many heads as fill the lanes, with all their tokens. The backward pass
recomputes the scores. Of long sequences a program takes one image and some of
its queries, and the backward pass reuses the softmax's normaliser.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from vit_jax.models import posemb
from vit_jax.models.config import ViTConfig
from vit_jax.models.layers import LANES, ROWS, Dense, Dropout, LayerNorm

_UNROLL = 4  # images that the compiler may interleave to hide latency
_MAX_TOKENS = 640  # the scores of more do not fit on the chip at once
_QUERIES = 256  # of a long sequence, in one program
_KEYS = 512  # whose scores its backward pass computes at once
_MEMORY = 48 * 2**20  # for it on the chip; v5p and tpu7x have 64 MiB
_BLOCK = 2**19  # bytes of each array in one program of the kernel
_MINUS = -1e30  # the score of padding
# The kernel compiler has no bfloat16 matmuls for these.
_OLD_TPUS = ("TPU v2", "TPU v3")
_SMALL_TPUS = ("TPU v4",)  # 16 MiB on the chip
_AMPERE = 8  # compute capability of the first GPUs with cuDNN's kernel


def _tiles(head, head_dim):
  """Yields (offset, first, last) of the lane tiles that a head occupies."""
  start, end = head * head_dim, (head + 1) * head_dim
  for tile in range(start // LANES, -(-end // LANES)):
    offset = tile * LANES
    yield offset, max(start, offset) - offset, min(end, offset + LANES) - offset


def _only(x, first, last):
  """Zeroes the lanes of [n 128] that are not in [first, last)."""
  if (first, last) == (0, LANES):
    return x
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.where((lane >= first) & (lane < last), x, 0)


def _dot(x, y, contract):
  return jax.lax.dot_general(
    x, y, (contract, ((), ())), preferred_element_type=jnp.float32
  )


_NT = ((1,), (1,))
_NN = ((1,), (0,))
_TN = ((0,), (0,))


def _scores(x_ref, y_ref, i, head, head_dim):
  """Returns the dot products [n n] of one head's rows of x and y."""
  total: Any = 0.0
  for offset, first, last in _tiles(head, head_dim):
    at = (i, slice(None), pl.ds(offset, LANES))
    total += _dot(_only(x_ref[at], first, last), y_ref[at], _NT)
  return total


def _exponentials(x_ref, y_ref, i, head, head_dim, valid, axis):
  """Returns the exponentials of a softmax over the keys, and 1 / their sum.

  The keys are those of one head, along `axis`.
  """
  s = _scores(x_ref, y_ref, i, head, head_dim) / math.sqrt(head_dim)
  key = jax.lax.broadcasted_iota(jnp.int32, s.shape, axis)
  s = jnp.where(key < valid, s, _MINUS)
  e = jnp.exp(s - s.max(axis, keepdims=True))
  return e, 1 / e.sum(axis, keepdims=True)


def _forward(q_ref, k_ref, v_ref, o_ref, *, head_dim, valid):
  images, q, lanes = q_ref.shape

  def one(i, _):
    outs = [jnp.zeros((q, LANES), jnp.float32)] * (lanes // LANES)
    for head in range(lanes // head_dim):
      e, scale = _exponentials(q_ref, k_ref, i, head, head_dim, valid, 1)
      e = e.astype(v_ref.dtype)
      for offset, first, last in _tiles(head, head_dim):
        v = v_ref[i, :, pl.ds(offset, LANES)]
        out = _only(_dot(e, v, _NN) * scale, first, last)
        outs[offset // LANES] += out
    for tile, out in enumerate(outs):
      o_ref[i, :, pl.ds(tile * LANES, LANES)] = out.astype(o_ref.dtype)
    return 0

  jax.lax.fori_loop(0, images, one, 0, unroll=min(images, _UNROLL))


def _backward(
  q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, *, head_dim, valid
):
  """Scores are [keys queries], so that only one matmul needs a transpose."""
  images, _, lanes = q_ref.shape
  dtype = q_ref.dtype

  def one(i, _):
    tiles = lanes // LANES
    dq, dk, dv = (
      [jnp.zeros((ref.shape[1], LANES), jnp.float32)] * tiles
      for ref in (q_ref, k_ref, v_ref)
    )
    for head in range(lanes // head_dim):
      e, scale = _exponentials(k_ref, q_ref, i, head, head_dim, valid, 0)
      p = e * scale
      dp = _scores(v_ref, do_ref, i, head, head_dim)
      ds = p * (dp - (p * dp).sum(0, keepdims=True)) / math.sqrt(head_dim)
      p, ds = p.astype(dtype), ds.astype(dtype)
      for offset, first, last in _tiles(head, head_dim):
        at = (i, slice(None), pl.ds(offset, LANES))
        tile = offset // LANES
        dv[tile] += _only(_dot(p, do_ref[at], _NN), first, last)
        dk[tile] += _only(_dot(ds, q_ref[at], _NN), first, last)
        dq[tile] += _only(_dot(ds, k_ref[at], _TN), first, last)
    for tile in range(tiles):
      at = (i, slice(None), pl.ds(tile * LANES, LANES))
      dq_ref[at] = dq[tile].astype(dtype)
      dk_ref[at] = dk[tile].astype(dtype)
      dv_ref[at] = dv[tile].astype(dtype)
    return 0

  jax.lax.fori_loop(0, images, one, 0, unroll=min(images, _UNROLL))


def run_kernel(which: str, head_dim: int, valid: int, *arrays, interpret=False):
  """Runs a kernel over the images and groups of heads of one device.

  Args:
    which: "forward" of query [b q d], key and value [b n d]; "backward" of
      these and the result's gradient [b q d], whose padding is zero.
    head_dim, valid: width of a head; how many tokens are not padding.
    *arrays: the inputs, see `which`.
    interpret: whether to interpret it without a TPU, for tests.

  Returns:
    [the result], or the gradients of query, key and value.
  """
  kernel, num_outputs = _KERNELS[which]
  b, n, d = arrays[1].shape
  lanes = math.lcm(LANES, head_dim)
  size = n * lanes * arrays[1].dtype.itemsize
  images = math.gcd(b, max(1, 2 ** int(math.log2(max(1, _BLOCK / size)))))

  def block(x):
    return pl.BlockSpec((images, x.shape[1], lanes), lambda i, j: (i, 0, j))

  # The result is like the query; gradients are like query, key and value.
  outputs = [
    jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:num_outputs]
  ]
  cost, cycles = _count_cost(arrays, outputs, head_dim)
  return pl.pallas_call(
    functools.partial(kernel, head_dim=head_dim, valid=valid),
    grid=(b // images, d // lanes),
    in_specs=[*map(block, arrays)],
    out_specs=[*map(block, outputs)],
    out_shape=outputs,
    interpret=interpret,
    cost_estimate=cost,
    metadata={"cycles": str(cycles)},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel")
    ),
  )(*arrays)


_KERNELS = {"forward": (_forward, 1), "backward": (_backward, 3)}


def _forward_long(q_ref, k_ref, v_ref, o_ref, sum_ref, *, head_dim, valid):
  """Returns the result and log2 of the sum of each query's exponentials."""
  _, queries, lanes = q_ref.shape
  factor = math.log2(math.e) / math.sqrt(head_dim)
  outs = [jnp.zeros((queries, LANES), jnp.float32)] * (lanes // LANES)
  for head in range(lanes // head_dim):
    s = _scores(q_ref, k_ref, 0, head, head_dim)
    key = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
    s = jnp.where(key < valid, s, _MINUS)
    top = s.max(1, keepdims=True)
    e = jnp.exp2((s - top) * factor)
    total = e.sum(1, keepdims=True)
    row = top * factor + jnp.log(total) * math.log2(math.e)
    row = jnp.broadcast_to(row, (queries, LANES)).T[:1]
    sum_ref[0, 0, pl.ds(head, 1)] = row
    e, scale = e.astype(v_ref.dtype), 1 / total
    for offset, first, last in _tiles(head, head_dim):
      v = v_ref[0, :, pl.ds(offset, LANES)]
      outs[offset // LANES] += _only(_dot(e, v, _NN) * scale, first, last)
  for tile, out in enumerate(outs):
    o_ref[0, :, pl.ds(tile * LANES, LANES)] = out.astype(o_ref.dtype)


def _backward_long(*refs, head_dim: int, valid: int, total: int):
  """Returns the gradients; of queries, those from `total` on are not there."""
  q_ref, k_ref, v_ref, o_ref, sum_ref, do_ref, *refs = refs
  dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs
  _, queries, lanes = q_ref.shape
  n, dtype = k_ref.shape[1], q_ref.dtype
  scale, block = 1 / math.sqrt(head_dim), pl.program_id(2)
  left = total - block * queries

  @pl.when(block == 0)
  def clear():
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)

  def read(ref, tile):
    offset, first, last = tile
    x = ref[0, :, pl.ds(offset, LANES)]
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return _only(jnp.where(row < left, x, 0), first, last)

  outs = [jnp.zeros((queries, LANES), jnp.float32)] * (lanes // LANES)
  for head in range(lanes // head_dim):
    tiles = [*_tiles(head, head_dim)]
    q, do = ([read(ref, tile) for tile in tiles] for ref in (q_ref, do_ref))
    mean: Any = 0.0  # of the gradients of the weights
    for x, tile in zip(do, tiles, strict=True):
      x = x.astype(jnp.float32) * read(o_ref, tile).astype(jnp.float32)
      mean += x.T.sum(0, keepdims=True)
    logs = sum_ref[0, 0, pl.ds(head, 1)]
    query = jax.lax.broadcasted_iota(jnp.int32, logs.shape, 1)
    logs = jnp.where(query < left, logs, 0)
    for start in range(0, n, _KEYS):
      size = min(_KEYS, n - start)
      keys = pl.ds(start, size)
      s: Any = 0.0
      dp: Any = 0.0
      for i, (offset, *_) in enumerate(tiles):
        at = (0, keys, pl.ds(offset, LANES))
        s += _dot(k_ref[at], q[i], _NT)
        dp += _dot(v_ref[at], do[i], _NT)
      p = jnp.exp2(s * (scale * math.log2(math.e)) - logs)
      if start + size > valid:
        key = jax.lax.broadcasted_iota(jnp.int32, p.shape, 0) + start
        p = jnp.where(key < valid, p, 0)
      ds = (p * (dp - mean)).astype(dtype)
      p = p.astype(dtype)
      for i, (offset, first, last) in enumerate(tiles):
        at = (0, keys, pl.ds(offset, LANES))
        dv_sum[at] += _dot(p, do[i], _NN)
        dk_sum[at] += _dot(ds, q[i], _NN)
        dq = _only(_dot(ds, k_ref[at], _TN), first, last)
        outs[offset // LANES] += dq
  for tile, out in enumerate(outs):
    at = (0, slice(None), pl.ds(tile * LANES, LANES))
    dq_ref[at] = (out * scale).astype(dtype)

  @pl.when(block == pl.num_programs(2) - 1)
  def write():
    dk_ref[...] = (dk_sum[...] * scale).astype(dtype)
    dv_ref[...] = dv_sum[...].astype(dtype)


def run_long_kernel(
  which: str,
  head_dim: int,
  valid: int,
  *arrays,
  queries: int = _QUERIES,
  interpret=False,
):
  """Runs a kernel like `run_kernel`, for sequences of any length.

  Args:
    which: "forward" of query, key and value, see `run_kernel`; "backward" of
      these, what the forward pass returns, and the result's gradient.
    head_dim, valid, *arrays, interpret: see `run_kernel`.
    queries: how many a program takes.

  Returns:
    [the result, log2 of the sums of exponentials f32[b d/l l/h q]], where l
    lanes hold whole heads; or the gradients of query, key and value.
  """
  (b, total, d), n = arrays[0].shape, arrays[1].shape[1]
  queries, lanes = min(queries, total), math.lcm(LANES, head_dim)
  heads = lanes // head_dim
  some = pl.BlockSpec((1, queries, lanes), lambda i, j, k: (i, k, j))
  every = pl.BlockSpec((1, n, lanes), lambda i, j, k: (i, 0, j))
  row = pl.BlockSpec((1, 1, heads, queries), lambda i, j, k: (i, j, 0, k))
  sums = jax.ShapeDtypeStruct((b, d // lanes, heads, total), jnp.float32)
  like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:3]]
  if which == "forward":
    kernel, options = _forward_long, {}
    ins, outs, outputs = [some, every, every], [some, row], [like[0], sums]
    scratch = []
  else:
    kernel, options = _backward_long, {"total": total}
    ins, outs, outputs = (
      [some, every, every, some, row, some],
      [some, every, every],
      like,
    )
    scratch = [pltpu.VMEM((1, n, lanes), jnp.float32)] * 2
  counted = outputs[:1] if which == "forward" else outputs
  cost, cycles = _count_cost(arrays, counted, head_dim)
  return pl.pallas_call(
    functools.partial(kernel, head_dim=head_dim, valid=valid, **options),
    grid=(b, d // lanes, -(-total // queries)),
    in_specs=ins,
    out_specs=outs,
    out_shape=outputs,
    scratch_shapes=scratch,
    interpret=interpret,
    cost_estimate=cost,
    metadata={"cycles": str(cycles)},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=_count_memory(n, lanes),
    ),
  )(*arrays)


def _count_memory(n, lanes):
  """Returns the bytes on the chip of a program of `run_long_kernel`.

  Inputs and outputs are there twice, so that the next program's are copied
  meanwhile. A quarter is for what the compiler adds.
  """
  of_keys = n * lanes * (4 * 2 * 2 + 2 * 4)
  of_queries = _QUERIES * lanes * (4 * 2 * 2 + 2 * 4)
  scores = _QUERIES * (12 * n + 20 * _KEYS)
  return (of_keys + of_queries + scores) * 5 // 4


# Instructions for each register of scores, forward and backward, if heads keep
# to their registers or straddle two. From the compiler's final bundles for v5e
# (libtpu 0.0.52), of eight heads: 2,493 and 5,631 with 200 tokens; straddling,
# 6,251 and 12,809 with 264. With eight queries 471 and 3,469; 886 and 5,902.
_CYCLES = {1: (6.3, 7.9), 3: (14.1, 16.2)}
_CYCLES_OF_FEW = {1: (29.4, 36.9), 3: (17.3, 22.4)}
# Of a long sequence, from benchmarks/attention.py.
_CYCLES_OF_LONG = {1: (4.7, 6.8), 3: (10.7, 14.7)}


def _count_cost(arrays, outputs, head_dim):
  """Returns (cost, cycles) of a kernel, which the compiler cannot estimate."""
  (b, q, d), n = arrays[0].shape, arrays[1].shape[1]
  heads = b * (d // head_dim)
  # Lanes hold the keys in the forward pass, the queries in the backward.
  rows, lanes = (q, n) if len(outputs) == 1 else (n, q)
  registers = heads * (-(-rows // ROWS)) * (-(-lanes // LANES))
  cost = pl.CostEstimate(
    flops={1: 4, 3: 10}[len(outputs)] * heads * q * n * head_dim,
    transcendentals=heads * q * n,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs)),
  )
  straddling = LANES % head_dim > 0 and head_dim % LANES > 0
  many = _CYCLES_OF_LONG if n > _MAX_TOKENS else _CYCLES
  cycles = _CYCLES_OF_FEW if q < LANES else many
  return cost, round(cycles[len(outputs)][straddling] * registers)


# Jitted so that a model's layers share one trace.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(which, head_dim, valid, *arrays):
  """Runs a kernel on each device's images; XLA cannot partition the call."""
  long = arrays[1].shape[1] > _MAX_TOKENS
  run = run_long_kernel if long else run_kernel
  call = functools.partial(run, which, head_dim, valid)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return call(*arrays)
  rows = P(mesh.axis_names)
  split = {"in_specs": rows, "out_specs": rows, "check_vma": False}
  return jax.shard_map(call, **split)(*arrays)


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
  lanes, kind = math.lcm(LANES, head_dim), device.device_kind
  if width % lanes or tokens % ROWS or kind in _OLD_TPUS:
    return None
  if tokens <= _MAX_TOKENS:
    return attend
  fits = _count_memory(tokens, lanes) <= _MEMORY and kind not in _SMALL_TPUS
  return attend_long if fits else None


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
    tpu=lambda *x: _run("forward", head_dim, valid, *x)[0],
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
    scores = jnp.where(jnp.arange(scores.shape[-1]) < valid, scores, _MINUS)
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
    tpu=lambda *x: tuple(_run("backward", head_dim, valid, *x)),
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
    tpu=lambda *x: tuple(_run("forward", head_dim, valid, *x)),
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
      return dense(rows, affine).reshape(like.shape)

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
      norm = LayerNorm(self.config, whole=True, name=f"{name}_norm")
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
