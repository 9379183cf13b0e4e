"""Pallas kernels of attention for TPUs, with no [n n] array in memory.

Each program takes some images and as many heads as fill the lanes, with all
their tokens. The backward pass recomputes the scores. Of a long sequence, a
program takes one image and some of its queries, and the backward pass reuses
the softmax's normaliser.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vit_jax.models.layers import LANES, ROWS
from vit_jax.models.norm_kernel import run_on_each_device

MAX_TOKENS = 640  # the scores of more do not fit on the chip at once
QUERIES = 256  # of a long sequence, in one program
_KEYS = 512  # whose scores its backward pass computes at once
_MEMORY = 48 * 2**20  # for it on the chip; v5p and tpu7x have 64 MiB
_UNROLL = 4  # images that the compiler may interleave to hide latency
_BLOCK = 2**19  # bytes of each array in one program of the kernel
MINUS = -1e30  # the score of padding
# The kernel compiler has no bfloat16 matmuls for these.
_OLD_TPUS = ("TPU v2", "TPU v3")
_SMALL_TPUS = ("TPU v4",)  # 16 MiB on the chip


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
  return jnp.where(key < valid, s, MINUS)


def _reciprocal(x):
  """Returns 1 / x of sums of exponentials, of which the largest is 1."""
  # Newer versions of JAX have it in another module.
  reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal
  return reciprocal(x, full_range=False)


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


def _forward_long(q_ref, k_ref, v_ref, o_ref, sum_ref, *, head_dim, valid):
  """Returns the result and log2 of the sum of each query's exponentials."""
  (_, queries, lanes), factor = q_ref.shape, _exponent(head_dim)
  outs = [jnp.zeros((queries, LANES), jnp.float32)] * (lanes // LANES)
  rows = (0, slice(None))
  for head in range(lanes // head_dim):
    query = _load(q_ref, rows, head, head_dim, alone=True)
    s = _mask(_scores(query, _load(k_ref, rows, head, head_dim)), valid, 1)
    top = s.max(1, keepdims=True)
    e = jnp.exp2((s - top) * factor)
    total = e.sum(1, keepdims=True)
    log = top * factor + jnp.log(total) * math.log2(math.e)
    log = jnp.broadcast_to(log, (queries, LANES)).T
    sum_ref[0, 0, pl.ds(head, 1)] = log[:1]
    e, scale = e.astype(v_ref.dtype), _reciprocal(total)
    values = _load(v_ref, rows, head, head_dim)
    _place([_dot(e, v, _NN) * scale for v in values], outs, head, head_dim)
  for tile, out in enumerate(outs):
    o_ref[0, :, pl.ds(tile * LANES, LANES)] = out.astype(o_ref.dtype)


def _backward_long(*refs, head_dim: int, valid: int, total: int):
  """Returns the gradients; of queries, those from `total` on are not there."""
  q_ref, k_ref, v_ref, o_ref, sum_ref, do_ref, *refs = refs
  dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs
  _, queries, lanes = q_ref.shape
  n, dtype = k_ref.shape[1], q_ref.dtype
  block = pl.program_id(2)
  left = total - block * queries

  @pl.when(block == 0)
  def clear():
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)

  def read(ref, head):
    found = _load(ref, (0, slice(None)), head, head_dim, alone=True)
    row = jax.lax.broadcasted_iota(jnp.int32, found[0].shape, 0)
    return [jnp.where(row < left, x, 0) for x in found]

  def add(results, ref, keys, head):
    for x, parts in zip(results, _registers(head, head_dim), strict=True):
      for tile, first, last in parts:
        at = (0, keys, pl.ds(tile * LANES, LANES))
        ref[at] += _select(first, last, x, 0)

  outs = [jnp.zeros((queries, LANES), jnp.float32)] * (lanes // LANES)
  for head in range(lanes // head_dim):
    q, do = read(q_ref, head), read(do_ref, head)
    mean: Any = 0.0  # of the gradients of the weights
    for x, y in zip(do, read(o_ref, head), strict=True):
      x = x.astype(jnp.float32) * y.astype(jnp.float32)
      mean += x.T.sum(0, keepdims=True)
    logs = sum_ref[0, 0, pl.ds(head, 1)]
    query = jax.lax.broadcasted_iota(jnp.int32, logs.shape, 1)
    logs = jnp.where(query < left, logs, 0)
    dq: Any = [0.0] * len(q)
    for start in range(0, n, _KEYS):
      size = min(_KEYS, n - start)
      keys = pl.ds(start, size)
      key, value = (
        _load(ref, (0, keys), head, head_dim) for ref in (k_ref, v_ref)
      )
      p = jnp.exp2(_scores(key, q) * _exponent(head_dim) - logs)
      if start + size > valid:
        index = jax.lax.broadcasted_iota(jnp.int32, p.shape, 0) + start
        p = jnp.where(index < valid, p, 0)
      ds = (p * (_scores(value, do) - mean)).astype(dtype)
      p = p.astype(dtype)
      add([_dot(p, x, _NN) for x in do], dv_sum, keys, head)
      add([_dot(ds, x, _NN) for x in q], dk_sum, keys, head)
      dq = [x + _dot(ds, y, _TN) for x, y in zip(dq, key, strict=True)]
    _place(dq, outs, head, head_dim)
  scale = 1 / math.sqrt(head_dim)
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
  queries: int = QUERIES,
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
  cost, cycles = _count_cost(arrays, counted, head_dim, valid)
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
  of_queries = QUERIES * lanes * (4 * 2 * 2 + 2 * 4)
  scores = QUERIES * (12 * n + 20 * _KEYS)
  return (of_keys + of_queries + scores) * 5 // 4


# Instructions for each register of scores, forward and backward, without and
# with a token apart from the lanes (`_count_whole`). From the compiler's final
# bundles for v5e (libtpu 0.0.52), of eight heads: 2,001 and 4,473 with 200
# tokens, heads of 64; 2,771 and 7,649 with 257, heads of 80. With eight queries
# 436 and 2,381; 677 and 3,228.
_CYCLES = {1: (5.0, 5.2), 3: (11.2, 14.5)}
_CYCLES_OF_FEW = {1: (27.3, 42.3), 3: (11.9, 12.2)}
# Of a long sequence, from benchmarks/attention.py.
_CYCLES_OF_LONG = {1: 4.7, 3: 10.7}


def _count_cost(arrays, outputs, head_dim, valid):
  """Returns (cost, cycles) of a kernel, which the compiler cannot estimate."""
  (b, q, d), n = arrays[0].shape, arrays[1].shape[1]
  heads = b * (d // head_dim)
  # Lanes hold the keys in the forward pass, the queries in the backward.
  rows, lanes = (q, n) if len(outputs) == 1 else (n, q)
  whole = _count_whole(n, valid) if n <= MAX_TOKENS else n
  registers = heads * (-(-rows // ROWS)) * (-(-min(lanes, whole) // LANES))
  cost = pl.CostEstimate(
    flops={1: 4, 3: 10}[len(outputs)] * heads * q * n * head_dim,
    transcendentals=heads * q * n,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs)),
  )
  if n > MAX_TOKENS and q >= LANES:
    return cost, round(_CYCLES_OF_LONG[len(outputs)] * registers)
  cycles = _CYCLES_OF_FEW if q < LANES else _CYCLES
  return cost, round(cycles[len(outputs)][whole < n] * registers)


# Jitted so that a model's layers share one trace.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(which, head_dim, valid, *arrays):
  """Runs a kernel for the images of all devices."""
  long = arrays[1].shape[1] > MAX_TOKENS
  kernel = run_long_kernel if long else run_kernel
  call = functools.partial(kernel, which, head_dim, valid)
  return run_on_each_device(call, *arrays)


def takes(tokens: int, width: int, head_dim: int, device_kind: str) -> bool:
  """Returns whether a kernel takes as many padded tokens of this width d."""
  lanes = math.lcm(LANES, head_dim)
  if width % lanes or tokens % ROWS or device_kind in _OLD_TPUS:
    return False
  fits = _count_memory(tokens, lanes) <= _MEMORY
  return tokens <= MAX_TOKENS or (fits and device_kind not in _SMALL_TPUS)
