"""Multi-head attention; fused in bfloat16, with no [n n] array in memory.

GPUs use cuDNN's kernel, TPUs the Pallas kernel of this module. Without it, XLA
writes every head's [n n] scores to memory and reads them again, several times.
The kernel keeps them on the chip. Each of its programs takes some images and as
many heads as fill the lanes, with all their tokens. The backward pass
recomputes the scores.
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
from vit_jax.models.layers import (
  LANES,
  ROWS,
  Dense,
  Dropout,
  LayerNorm,
  save,
)

_UNROLL = 4  # images that the compiler may interleave to hide latency
_MAX_TOKENS = 640  # the scores of more do not fit on the chip
_BLOCK = 2**19  # bytes of each array in one program of the kernel
_MINUS = -1e30  # the score of padding
# The kernel compiler has no bfloat16 matmuls for these.
_OLD_TPUS = ("TPU v2", "TPU v3")
_AMPERE = 8  # compute capability of the first GPUs with cuDNN's kernel


def _registers(head, head_dim):
  """Returns the registers of a head, each a list of (tile, first, last) lanes.

  A head that straddles two tiles fits one register without rotating any lanes,
  because its lanes in the second tile precede those in the first.
  """
  start, end = head * head_dim, (head + 1) * head_dim
  parts = []
  for tile in range(start // LANES, -(-end // LANES)):
    offset = tile * LANES
    parts.append((tile, max(start - offset, 0), min(end - offset, LANES)))
  if parts[-1][2] > parts[0][1]:
    return [[part] for part in parts]
  first, *between, last = parts
  return [[first, last], *([part] for part in between)]


def _select(first, last, x, y):
  """Returns x [n 128] in the lanes [first, last), and y in the others."""
  if (first, last) == (0, LANES):
    return x
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.where((lane >= first) & (lane < last), x, y)


def _load(ref, at, head, head_dim, alone=False):
  """Returns the registers [n 128] of a head, of the image and rows `at`.

  Lanes of other heads are zero if `alone`, else any of theirs.
  """
  found = []
  for parts in _registers(head, head_dim):
    x = 0 if alone else None
    for tile, first, last in parts:
      part = ref[(*at, pl.ds(tile * LANES, LANES))]
      x = part if x is None else _select(first, last, part, x)
    found.append(x)
  return found


def _place(results, tiles, head, head_dim):
  """Writes the registers of a head into its lanes of all `tiles`."""
  for x, parts in zip(results, _registers(head, head_dim), strict=True):
    for tile, first, last in parts:
      tiles[tile] = _select(first, last, x, tiles[tile])


def _dot(x, y, contract):
  return jax.lax.dot_general(
    x, y, (contract, ((), ())), preferred_element_type=jnp.float32
  )


_NT = ((1,), (1,))
_NN = ((1,), (0,))
_TN = ((0,), (0,))


def _scores(x, y) -> Any:
  """Returns the dot products [n n] of the rows of a head's registers."""
  return sum(_dot(*each, _NT) for each in zip(x, y, strict=True))


def _mask(s, valid, axis):
  """Returns the scores without those of padded keys; keys are along `axis`."""
  key = jax.lax.broadcasted_iota(jnp.int32, s.shape, axis)
  return jnp.where(key < valid, s, _MINUS)


def _reciprocal(x):
  """Returns 1 / x of sums of exponentials, of which the largest is 1."""
  return pl.reciprocal(x, full_range=False)


def _interleave(start, finish, heads):
  """Calls `finish(head, *start(head))` of each, after the next head's `start`.

  In this order the compiler overlaps a head's softmax with the next one's
  matmuls.
  """
  started = start(0)
  for head in range(heads):
    following = start(head + 1) if head + 1 < heads else ()
    finish(head, *started)
    started = following


def _count_whole(tokens, valid):
  """Returns how many tokens are in lanes.

  A single token after full tiles is computed apart, as vectors. It would take
  as long as a tile of 128.
  """
  return valid - 1 if valid > LANES and valid % LANES == 1 else tokens


def _exponent(head_dim):
  """Returns 1 / sqrt(d/a), times log2(e) for a softmax by powers of two."""
  return 1 / (math.sqrt(head_dim) * math.log(2))


def _forward(q_ref, k_ref, v_ref, o_ref, *, head_dim, valid):
  images, q, lanes = q_ref.shape
  n, factor = k_ref.shape[1], _exponent(head_dim)
  whole = _count_whole(n, valid)

  def one(i, _):
    outs = [jnp.zeros((q, LANES), jnp.float32)] * (lanes // LANES)
    rows, last = (i, slice(whole)), (i, pl.ds(whole, 1))

    def start(head):
      query = _load(q_ref, (i, slice(None)), head, head_dim, alone=True)
      s = _scores(query, _load(k_ref, rows, head, head_dim)) * factor
      if whole == n:
        return _mask(s, valid, 1), None
      pairs = zip(query, _load(k_ref, last, head, head_dim), strict=True)
      products = [
        x.astype(s.dtype) * (y.astype(s.dtype) * factor) for x, y in pairs
      ]
      return s, sum(x.sum(1, keepdims=True) for x in products)

    def finish(head, s, s_last):
      largest = s.max(1, keepdims=True)
      if s_last is not None:
        largest = jnp.maximum(largest, s_last)
      e = jnp.exp2(s - largest)
      total = e.sum(1, keepdims=True)
      e = e.astype(v_ref.dtype)
      results = [_dot(e, v, _NN) for v in _load(v_ref, rows, head, head_dim)]
      if s_last is not None:
        e = jnp.exp2(s_last - largest)
        total += e
        value = _load(v_ref, last, head, head_dim)
        results = [
          x + e * v.astype(e.dtype) for x, v in zip(results, value, strict=True)
        ]
      scale = _reciprocal(total)
      _place([x * scale for x in results], outs, head, head_dim)

    _interleave(start, finish, lanes // head_dim)
    for tile, out in enumerate(outs):
      o_ref[i, :, pl.ds(tile * LANES, LANES)] = out.astype(o_ref.dtype)
    return 0

  jax.lax.fori_loop(0, images, one, 0, unroll=min(images, _UNROLL))


def _weigh(s, dp, valid, axis):
  """Returns the weights of the keys along `axis`, and the scores' gradient.

  Args:
    s, dp: scores, times `_exponent`; gradient of the weights.
    valid, axis: how many keys are not padding; where the keys are.
  """
  s = _mask(s, valid, axis)
  e = jnp.exp2(s - s.max(axis, keepdims=True))
  p = e * _reciprocal(e.sum(axis, keepdims=True))
  return p, p * (dp - (p * dp).sum(axis, keepdims=True))


def _backward_one(q, k, v, do, head_dim, valid):
  """Returns a single query's gradient [1 d], and its share of dk and dv [n d].

  The query of each head becomes a row, in which other heads' lanes are zero.
  """
  heads = q.shape[1] // head_dim
  shape = (-(-heads // ROWS) * ROWS, q.shape[1])
  first = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * head_dim
  lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  own = (lane >= first) & (lane < first + head_dim)
  q, do = jnp.where(own, q, 0), jnp.where(own, do, 0)
  s, dp = _dot(q, k, _NT) * _exponent(head_dim), _dot(do, v, _NT)
  p, ds = (x.astype(q.dtype) for x in _weigh(s, dp, valid, 1))
  dq = jnp.where(own, _dot(ds, k, _NN), 0).sum(0, keepdims=True)
  return dq, _dot(ds, q, _TN), _dot(p, do, _TN)


def _backward(
  q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, *, head_dim, valid
):
  """Scores are [keys queries], so that only one matmul needs a transpose."""
  (images, q, lanes), n = q_ref.shape, k_ref.shape[1]
  dtype = q_ref.dtype
  whole = _count_whole(q, valid) if q == n else q

  def one(i, _):
    dq, dk, dv = (
      [jnp.zeros((rows, LANES), jnp.float32)] * (lanes // LANES)
      for rows in (whole, n, n)
    )

    def start(head):
      query, gradient = (
        _load(ref, (i, slice(whole)), head, head_dim, alone=True)
        for ref in (q_ref, do_ref)
      )
      key, value = (
        _load(ref, (i, slice(None)), head, head_dim) for ref in (k_ref, v_ref)
      )
      s = _scores(key, query) * _exponent(head_dim)
      return query, key, gradient, s, _scores(value, gradient)

    def finish(head, query, key, gradient, s, dp):
      p, ds = (x.astype(dtype) for x in _weigh(s, dp, valid, 0))
      _place([_dot(p, x, _NN) for x in gradient], dv, head, head_dim)
      _place([_dot(ds, x, _NN) for x in query], dk, head, head_dim)
      _place([_dot(ds, x, _TN) for x in key], dq, head, head_dim)

    _interleave(start, finish, lanes // head_dim)
    dq, dk, dv = (jnp.concatenate(tiles, 1) for tiles in (dq, dk, dv))
    if whole < q:
      last = (i, pl.ds(whole, 1))
      row, more_dk, more_dv = _backward_one(
        q_ref[last], k_ref[i], v_ref[i], do_ref[last], head_dim, valid
      )
      index = jax.lax.broadcasted_iota(jnp.int32, (q - whole, lanes), 0)
      dq = jnp.concatenate([dq, jnp.where(index == 0, row, 0)])
      dk, dv = dk + more_dk, dv + more_dv
    scale = 1 / math.sqrt(head_dim)
    dq_ref[i] = (dq * scale).astype(dtype)
    dk_ref[i] = (dk * scale).astype(dtype)
    dv_ref[i] = dv.astype(dtype)
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
  cost, cycles = _count_cost(arrays, outputs, head_dim, valid)
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

# Instructions for each register of scores, forward and backward, without and
# with a token apart from the lanes (`_count_whole`). From the compiler's final
# bundles for v5e (libtpu 0.0.52), of eight heads: 2,001 and 4,473 with 200
# tokens, heads of 64; 2,771 and 7,649 with 257, heads of 80. With eight queries
# 436 and 2,381; 677 and 3,228.
_CYCLES = {1: (5.0, 5.2), 3: (11.2, 14.5)}
_CYCLES_OF_FEW = {1: (27.3, 42.3), 3: (11.9, 12.2)}


def _count_cost(arrays, outputs, head_dim, valid):
  """Returns (cost, cycles) of a kernel, which the compiler cannot estimate."""
  (b, q, d), n = arrays[0].shape, arrays[1].shape[1]
  heads = b * (d // head_dim)
  # Lanes hold the keys in the forward pass, the queries in the backward.
  rows, lanes = (q, n) if len(outputs) == 1 else (n, q)
  whole = _count_whole(n, valid)
  registers = heads * (-(-rows // ROWS)) * (-(-min(lanes, whole) // LANES))
  cost = pl.CostEstimate(
    flops={1: 4, 3: 10}[len(outputs)] * heads * q * n * head_dim,
    transcendentals=heads * q * n,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs)),
  )
  cycles = _CYCLES_OF_FEW if q < LANES else _CYCLES
  return cost, round(cycles[len(outputs)][whole < n] * registers)


# Jitted so that a model's layers share one trace.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(which, head_dim, valid, *arrays):
  """Runs a kernel on each device's images; XLA cannot partition the call."""
  call = functools.partial(run_kernel, which, head_dim, valid)
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
  whole = width % math.lcm(LANES, head_dim) == 0
  fits = whole and tokens % ROWS == 0 and tokens <= _MAX_TOKENS
  return attend if fits and device.device_kind not in _OLD_TPUS else None


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
    default=lambda *x: jax.vjp(plain, *x[:3])[1](x[3]),
  )


attend.defvjp(_attend_forward, _attend_backward)


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
