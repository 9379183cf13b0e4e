"""Attention on one v5e chip: our kernel beside JAX's and tokamax's.

  # needs a TPU compiler: pip install -e '.[plan]'; tokamax is optional
  python benchmarks/attention.py [--case=L/16,1024] [--code=splash]

Compiles each for v5e from queries, keys and values bfloat16[b n d], as the
projections give them, to the result [b n d]; then with the gradients too. No
TPU is needed and nothing is timed. "norm" is LayerNorm's backward pass instead,
of x and two gradients. Prints thousands of cycles an image:

  kernel: instructions (bundles) that the compiler schedules for Pallas kernels,
    each as often as it is executed. A branch without a matmul is taken once
    for all blocks of an inner loop. Waits for memory are not included.
  xla: the compiler's estimates for all else: XLA's attention, transposes,
    padding and reductions.

Padding of tokens is masked by segment ids, or as the library does it.
"""

import argparse
import dataclasses
import functools
import glob
import importlib
import importlib.util
import math
import os
import re
import tempfile

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask,
)

from vit_jax.models import attention, attention_kernels, norm_kernel
from vit_jax.tools.plan import hlo
from vit_jax.tools.plan.compiling import find_slice

CASES = {  # images, tokens with padding and without, width, heads
  "B/16,224": (16, 200, 197, 768, 12),
  "L/16,224": (16, 200, 197, 1024, 16),
  "H/14,224": (16, 264, 257, 1280, 16),
  "B/16,384": (16, 584, 577, 768, 12),
  "H/14,384": (8, 736, 730, 1280, 16),
  "L/14,518": (4, 1376, 1374, 1024, 16),
  "L/16,1024": (2, 4104, 4097, 1024, 16),
}
BLOCKS = {  # padded tokens: block sizes that are tried
  256: (256,),
  384: (384,),
  640: (128, 640),
  1408: (1408,),
  1536: (512, 768),
  4224: (1408,),
  4608: (768, 1536),
}
DUMP = (
  "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true "
  "--xla_jf_dump_llo_pass_label_regex=final_bundles"
)
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(\w\w)? *: *>* *\{(.*)$", re.M)


def count_bundles(text, width):
  """Returns how many bundles of a kernel are executed.

  `width`: the number of blocks of the inner loop of the grid.
  """
  rows = _BUNDLE.findall(text)
  steps = dict(re.findall(r"%(s\d+_s\d+) = sadd\.s32 (\d+), %s", text))
  test = r"%(p\w+) = scmp\.ge\.s32\.totalorder %(s\w+), (\d+) /\* loop exit"
  limits = {p: int(n) // int(steps[s]) for p, s, n in re.findall(test, text)}
  ends = {
    region: i
    for i, (_, row) in enumerate(rows)
    for region in re.findall(r"empty region (\d+)", row)
  }
  weights, loops = [1.0] * len(rows), []
  for i, (label, row) in enumerate(rows):
    if label == "LB":
      loops.append(i)
    branch = r"sbr\.rel \(!?%(p\w+)\) target = \$region(\d+)"
    for predicate, region in re.findall(branch, row):
      first, last, factor = i + 1, ends.get(region, 0), 1 / width
      if last <= i:  # backwards
        # The grid's loop is a pipeline, of two more steps. Loops that copy a
        # last block, which is smaller, have no constant limit.
        first, last = loops.pop(), i + 1
        factor = limits.get(predicate, 1) - (0 if loops else 2)
      elif any("vmatmul" in row for _, row in rows[first:last]):
        continue
      for j in range(first, last):
        weights[j] *= factor
  assert not loops
  return sum(weights)


def estimate(function, width, case, folder):
  """Returns (kernel, xla, MiB of temporaries) of an image."""
  images, n, _, d, _ = CASES[case]
  for path in glob.glob(f"{folder}/*"):
    os.remove(path)
  mesh = jax.sharding.Mesh(find_slice("v5e:2x2").devices[:1], "data")
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  x = jax.ShapeDtypeStruct((images, n, d), jnp.bfloat16, sharding=one)
  inputs = [x] * function.__code__.co_argcount
  # tokamax takes the chip's generation from the mesh.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(function).lower(*inputs).compile()
  kernel = xla = 0
  for times, _, _, line, _ in hlo._list_instructions(compiled.as_text()):
    cycles = re.search(r'"estimated_cycles":"([1-9]\d*)"', line)
    if '="tpu_custom_call"' in line:
      name = re.match(r"\s*(?:ROOT )?%([\w.-]+) =", line)[1]  # pyright: ignore[reportOptionalSubscript]
      [path] = glob.glob(f"{folder}/*-{name}-[0-9]*-final_bundles.txt")
      with open(path) as f:
        kernel += times * count_bundles(f.read(), width)
    elif cycles:
      xla += times * int(cycles[1])
  memory = compiled.memory_analysis().temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]
  return kernel / images, xla / images, memory / 2**20 / images


def call_in_heads(call, case, n):
  """Returns a function of [b n d] for one of [b a n h], of `n` tokens."""
  _, old, _, d, a = CASES[case]

  def split(x):
    x = attention.split_heads(x, a).swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, n - old), (0, 0)))

  def function(q, k, v):
    q = q * jnp.asarray((d // a) ** -0.5, q.dtype)
    out = call(split(q), split(k), split(v))[:, :, :old]
    return out.swapaxes(1, 2).reshape(q.shape)

  return function


def list_ours(case):
  """Yields (options, function, width), as the other `list_...`."""
  _, n, valid, d, a = CASES[case]
  fused = attention.find_fused(n, d, a)
  long = n > attention_kernels.MAX_TOKENS
  width = math.ceil(n / attention_kernels.QUERIES) if long else 1
  if fused:
    yield "", lambda q, k, v: fused(q, k, v, a, valid), width


def list_xla(case):
  b, _, valid, _, a = CASES[case]

  def function(q, k, v):
    arrays = (attention.split_heads(x, a) for x in (q, k, v))
    lengths = jnp.full(b, valid, jnp.int32)
    return jax.nn.dot_product_attention(
      *arrays, key_value_seq_lengths=lengths, implementation="xla"
    ).reshape(q.shape)

  yield "", function, 1


def list_sizes(case):
  """Yields (padded tokens, block size, segment ids [n])."""
  _, tokens, valid, _, _ = CASES[case]
  least = min(n for n in BLOCKS if n >= tokens)
  for n, sizes in BLOCKS.items():
    if least <= n <= least * 1.1:
      for size in sizes:
        yield n, size, (jnp.arange(n) >= valid).astype(jnp.int32)


def list_splash(case):
  for n, size, ids in list_sizes(case):
    for fused in (False, True):
      names = ["block_q", "block_kv", "block_q_dkv", "block_kv_dkv"]
      names += [] if fused else ["block_q_dq", "block_kv_dq"]
      blocks: dict = dict.fromkeys(names, size)
      sizes = splash.BlockSizes(use_fused_bwd_kernel=fused, **blocks)
      mask = splash_attention_mask.FullMask((n, n))
      mask = splash_attention_mask.MultiHeadMask([mask] * CASES[case][4])
      kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
      segments = splash.SegmentIds(ids, ids)
      call = jax.vmap(functools.partial(kernel, segment_ids=segments))
      name = f"{n} {size}{' fused' * fused}"
      yield name, call_in_heads(call, case, n), n // size


def list_flash(case):
  for n, size, ids in list_sizes(case):
    names = [x.name for x in dataclasses.fields(flash.BlockSizes)]
    sizes: dict = dict.fromkeys(names, size) | {"block_b": 1}
    ids = jnp.broadcast_to(ids, (CASES[case][0], n))
    call = functools.partial(
      flash.flash_attention,
      segment_ids=flash.SegmentIds(ids, ids),
      block_sizes=flash.BlockSizes(**sizes),
    )
    yield f"{n} {size}", call_in_heads(call, case, n), n // size


def list_tokamax(case):
  """Its own splash attention, whose backward pass is always the fused one."""
  if not importlib.util.find_spec("tokamax"):
    return
  parent = "tokamax._src.ops.experimental.tpu.splash_attention"
  kernels = importlib.import_module(f"{parent}.splash_attention_kernel")
  masks = importlib.import_module(f"{parent}.splash_attention_mask")
  base = importlib.import_module(f"{parent}.base")
  for n, size, ids in list_sizes(case):
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")
    config = kernels.SplashConfig(**dict.fromkeys(names, size))
    kernel = kernels.make_splash_mha_single_device(
      masks.FullMask((n, n)), config=config
    )
    segments = base.SegmentIds(ids, ids)
    call = jax.vmap(functools.partial(kernel, segment_ids=segments))
    yield f"{n} {size}", call_in_heads(call, case, n), n // size


def list_norm(case):
  """LayerNorm's backward pass, of x, its result's gradient and another one."""
  del case

  def function(x, dy, beside):
    rows = (y.reshape(-1, y.shape[-1]) for y in (x, dy, beside))
    return norm_kernel.run(1e-6, *rows)

  yield "", function, 1


CODES = {
  "ours": list_ours,
  "norm": list_norm,
  "xla": list_xla,
  "splash": list_splash,
  "flash": list_flash,
  "tokamax": list_tokamax,
}


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--case", choices=CASES)
  parser.add_argument("--code", choices=CODES)
  args = parser.parse_args()
  print("case       code     options          pass     kernel     xla  MiB")
  with tempfile.TemporaryDirectory() as folder:
    os.environ["LIBTPU_INIT_ARGS"] = DUMP.format(folder)
    find_slice("v5e:2x2")  # which says that there is no TPU here
    for case in [args.case] if args.case else CASES:
      for code in [args.code] if args.code else CODES:
        compare(case, code, folder)


def compare(case, code, folder):
  for options, function, width in CODES[code](case):
    for name in ("backward",) if code == "norm" else ("forward", "both"):
      program = differentiate(function) if name == "both" else function
      try:
        kernel, xla, mib = estimate(program, width, case, folder)
        found = f"{kernel / 1e3:9.1f} {xla / 1e3:7.1f} {mib:4.0f}"
      except jax.errors.JaxRuntimeError as e:
        found = repr(str(e)[:60])
      print(f"{case:10} {code:8} {options:16} {name:7} {found}", flush=True)


def differentiate(function):
  def both(q, k, v, gradient):
    out, backward = jax.vjp(function, q, k, v)
    return out, backward(gradient)

  return both


if __name__ == "__main__":
  main()
