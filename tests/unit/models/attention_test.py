"""The fused attention is the plain one, forward and backward."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from random_models import random_images, random_params

from vit_jax import models, sharding
from vit_jax.models import attention, attention_kernels, layers
from vit_jax.models.config import ViTConfig
from vit_jax.tools.paper.flops import count_in_jaxpr

# Heads of half a register's lanes, of a whole, of one and a half, across two;
# then one token more than whole registers.
_each_head = pytest.mark.parametrize(
  ("width", "num_heads", "tokens", "valid", "queries"),
  [
    (128, 2, 24, 21, 24),
    (128, 1, 24, 21, 8),
    (640, 8, 24, 21, 24),
    (128, 2, 136, 129, 136),
    *(
      pytest.param(*values, marks=pytest.mark.ci)
      for values in (
        (384, 2, 24, 21, 24),
        (1152, 16, 24, 21, 24),
        (640, 8, 264, 257, 264),
        (640, 8, 264, 257, 8),
      )
    ),
  ],
)


def _draw(b, n, d, valid):
  """Returns queries, keys, values and a gradient; the latter none of padding.

  Padding is large, so that it would show.
  """
  arrays = np.random.default_rng(0).normal(size=(4, b, n, d))
  arrays[:3, :, valid:] = 100
  arrays[3, :, valid:] = 0
  return tuple(jnp.float32(arrays))


def _compute_in_float64(q, k, v, num_heads, valid):
  """softmax(q k^T / sqrt(d/a)) v, one image and head after the other."""
  b, n, d = q.shape
  out = np.zeros((b, n, d))
  for i in range(b):
    for h in range(num_heads):
      at = slice(h * d // num_heads, (h + 1) * d // num_heads)
      scores = np.float64(q[i, :, at]) @ np.float64(k[i, :valid, at]).T  # pyright: ignore[reportOperatorIssue]
      scores /= np.sqrt(d / num_heads)
      e = np.exp(scores - scores.max(1, keepdims=True))
      out[i, :, at] = e / e.sum(1, keepdims=True) @ v[i, :valid, at]
  return out


@_each_head
def test_kernel_is_the_formula(width, num_heads, tokens, valid, queries):
  q, k, v, _ = _draw(2, tokens, width, valid)
  expected = _compute_in_float64(*map(np.asarray, (q, k, v)), num_heads, valid)  # pyright: ignore[reportCallIssue]
  what = ("forward", width // num_heads, valid, q[:, :queries], k, v)
  fused = attention_kernels.run_kernel(*what, interpret=True)
  real = min(queries, valid)
  np.testing.assert_allclose(
    fused[0][:, :real], expected[:, :real], rtol=1e-4, atol=1e-5
  )


def _differentiate(q, k, v, gradient, num_heads, valid):
  """Returns the gradients of `attend_plainly`."""

  def plain(q, k, v):
    return attention.attend_plainly(q, k, v, num_heads, valid)[0]

  return jax.jit(lambda *x: jax.vjp(plain, *x)[1](gradient))(q, k, v)


@_each_head
def test_kernel_has_the_plain_gradients(
  width, num_heads, tokens, valid, queries
):
  q, k, v, gradient = _draw(2, tokens, width, valid)
  arrays = q[:, :queries], k, v, gradient[:, :queries]
  what = ("backward", width // num_heads, valid, *arrays)
  fused = attention_kernels.run_kernel(*what, interpret=True)
  expected = _differentiate(*arrays, num_heads, valid)
  for x, y in zip(fused, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    assert not np.any(x[:, valid:])  # nothing flows into padding


@pytest.mark.parametrize(
  ("width", "num_heads", "tokens", "valid"),
  [
    (128, 2, 24, 21),
    pytest.param(640, 8, 136, 129, marks=pytest.mark.ci),
  ],
)
def test_kernel_in_bfloat16_is_near(width, num_heads, tokens, valid):
  rounded = [x.astype(jnp.bfloat16) for x in _draw(2, tokens, width, valid)]
  q, k, v, gradient = (x.astype(jnp.float32) for x in rounded)
  expected, _ = attention.attend_plainly(q, k, v, num_heads, valid)
  gradients = _differentiate(q, k, v, gradient, num_heads, valid)
  run = functools.partial(attention_kernels.run_kernel, interpret=True)
  head_dim = width // num_heads
  found = run("forward", head_dim, valid, *rounded[:3])
  found += run("backward", head_dim, valid, *rounded)
  for x, y in zip(found, (expected, *gradients), strict=True):
    difference = x.astype(jnp.float32)[:, :valid] - y[:, :valid]
    assert jnp.abs(difference).max() < 0.01 * jnp.abs(y[:, :valid]).max()


@pytest.mark.parametrize(
  ("width", "num_heads", "dtype", "close"),
  [
    (128, 2, "float32", 1e-5),
    pytest.param(128, 2, "bfloat16", 0.02, marks=pytest.mark.ci),
    pytest.param(640, 8, "float32", 1e-5, marks=pytest.mark.ci),
  ],
)
def test_some_queries_at_a_time(monkeypatch, width, num_heads, dtype, close):
  # 21 tokens, padded to 24: 16 queries, then 8; and as many keys.
  monkeypatch.setattr(attention_kernels, "_KEYS", 16)
  arrays = _draw(2, 24, width, valid=21)
  q, k, v, gradient = (x.astype(dtype) for x in arrays)
  head_dim = width // num_heads

  def run(which, *arrays):
    return attention_kernels.run_long_kernel(
      which, head_dim, 21, *arrays, queries=16, interpret=True
    )

  def plain(q, k, v):
    return attention.attend_plainly(q, k, v, num_heads, 21)[0]

  in_float32 = [x.astype(jnp.float32) for x in (q, k, v, gradient)]
  out, backward = jax.vjp(plain, *in_float32[:3])
  x, sums = run("forward", q, k, v)
  gradients = run("backward", q, k, v, x, sums, gradient)
  assert {x.dtype, *(y.dtype for y in gradients)} == {q.dtype}
  expected = out[:, :21], *backward(in_float32[3])
  for a, b in zip((x[:, :21], *gradients), expected, strict=True):
    atol = close * np.abs(b).max()
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=atol)
  assert not any(np.any(x[:, 21:]) for x in gradients)


@pytest.mark.parametrize(
  ("queries", "tokens", "programs"),
  [(640, 640, 1), (1376, 1376, 6), (8, 1376, 1)],
)
def test_long_sequences_are_split(queries, tokens, programs):
  attend = attention.find_fused(tokens, 128, 2)
  assert (attend is attention.attend_long) == (tokens > 640)
  q = jax.ShapeDtypeStruct((2, queries, 128), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((2, tokens, 128), jnp.bfloat16)

  def loss(q, k, v):
    return attend(q, k, v, 2, tokens).sum()  # pyright: ignore[reportOptionalCall]

  step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  text = str(step.trace(q, k, k).jaxpr)
  assert set(re.findall(r"grid=\(.*?(\d+),?\)", text)) == {str(programs)}
  lowered = step.trace(q, k, k).lower(lowering_platforms=("tpu",))
  assert lowered.as_text().count("tpu_custom_call") == 2


def test_attend_has_its_own_gradients():
  # On this machine both are the plain one, by way of the rule for the kernel.
  q, k, v, gradient = _draw(2, 8, 128, valid=7)

  def loss(q, k, v):
    return (attention.attend(q, k, v, 2, 7) * gradient).sum()  # pyright: ignore[reportOperatorIssue]

  def plain_loss(q, k, v):
    return (attention.attend_plainly(q, k, v, 2, 7)[0] * gradient).sum()

  found = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
  expected = jax.jit(jax.grad(plain_loss, (0, 1, 2)))(q, k, v)
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def _pretend(monkeypatch, **device):
  """Has programs traced as if for a device with these attributes."""
  found = types.SimpleNamespace(**device)
  monkeypatch.setattr(jax, "devices", lambda: [found])


def test_what_does_not_fill_registers_is_computed_plainly(monkeypatch):
  find = attention.find_fused
  _pretend(monkeypatch, platform="tpu", device_kind="TPU v5 lite")
  assert find(200, 768, 12) is attention.attend
  assert find(264, 1280, 16) is attention.attend
  assert find(200, 192, 3) is None  # Ti: 1.5 registers
  assert find(4104, 1024, 16) is attention.attend_long  # 1,024 pixels
  assert find(1376, 1280, 16) is attention.attend_long
  assert find(4104, 1280, 16) is None  # keys of eight heads, 5.2 MB
  _pretend(monkeypatch, platform="tpu", device_kind="TPU v4")
  assert find(200, 768, 12) is attention.attend
  assert find(1376, 768, 12) is None
  _pretend(monkeypatch, platform="tpu", device_kind="TPU v3")
  assert find(200, 768, 12) is None


def test_gpus_take_cudnn_where_it_can(monkeypatch):
  find = attention.find_fused
  _pretend(monkeypatch, platform="gpu", compute_capability="9.0")
  assert find(200, 768, 12) is attention.attend_by_cudnn
  assert find(1032, 192, 3) is attention.attend_by_cudnn
  assert find(200, 768, 4) is None  # heads of 192
  _pretend(monkeypatch, platform="gpu", compute_capability="7.5")
  assert find(200, 768, 12) is None
  _pretend(monkeypatch, platform="gpu", compute_capability="gfx942")  # AMD
  assert find(200, 768, 12) is None


@pytest.mark.parametrize(
  "implementation",
  [None, pytest.param("cudnn", marks=pytest.mark.gpu)],
)
def test_cudnn_is_told_what_to_do(monkeypatch, implementation):
  # Without a GPU its arguments are given to the same function of XLA.
  given = jax.nn.dot_product_attention

  def fused(*args, **kwargs):
    assert kwargs["implementation"] == "cudnn"
    return given(*args, **kwargs | {"implementation": implementation})

  monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
  arrays = [x.astype(jnp.bfloat16) for x in _draw(2, 24, 128, 17)]

  def run(function):
    function = functools.partial(function, num_heads=2, valid=17)

    def differentiate(q, k, v, gradient):
      out, backward = jax.vjp(function, q, k, v)
      return out, backward(gradient)

    return jax.jit(differentiate)(*arrays)

  def plainly(*args, **kwargs):
    return attention.attend_plainly(*args, **kwargs)[0]

  out, gradients = run(attention.attend_by_cudnn)
  expected, plain_gradients = run(plainly)
  np.testing.assert_allclose(_rows(out), _rows(expected), rtol=0, atol=0.03)
  for x, y in zip(gradients, plain_gradients, strict=True):
    np.testing.assert_allclose(_rows(x), _rows(y), rtol=0, atol=0.03)


def _rows(x):
  """The tokens that are no padding, float32."""
  return x[:, :17].astype(jnp.float32)


def test_a_bias_has_the_gradient_of_a_sum():
  # bfloat16's own sum of 4,096 ones ends at 256, where adding 1 rounds away.
  x = jnp.zeros((4096, 3), jnp.bfloat16)
  bias = jnp.zeros(3, jnp.bfloat16)
  _, backward = jax.vjp(layers.add_bias, x, bias)
  assert backward(jnp.ones_like(x))[1].tolist() == [4096] * 3


@pytest.mark.parametrize(
  ("dtype", "close"), [("float32", 1e-5), ("bfloat16", 0.1)]
)
@pytest.mark.parametrize(("axis", "out"), [(0, 8), (1, 8), (1, 512)])
def test_the_gradient_of_a_sharded_kernel_is_scattered(dtype, close, axis, out):
  rng = np.random.default_rng(0)
  x, kernel, w = map(rng.standard_normal, [(16, 12), (12, out), (16, out)])
  expected = [(x @ kernel * w).sum(), w @ kernel.T, x.T @ w]

  def loss(x, kernel):
    return (layers.matmul(x, kernel, axis) * w).sum()

  mesh = sharding.make_mesh(4)  # 2 x 4 devices
  split = NamedSharding(mesh, P(*[None] * axis, "fsdp"))
  step = jax.jit(sharding.on_mesh(mesh, jax.value_and_grad(loss, (0, 1))))
  placed = (
    jax.device_put(x.astype(dtype), sharding.batch_sharding(mesh)),
    jax.device_put(kernel.astype(dtype), split),
  )
  assert step.lower(*placed).as_text().count("stablehlo.reduce_scatter") == 1
  value, (of_x, of_kernel) = step(*placed)
  assert of_kernel.sharding.is_equivalent_to(split, 2)
  for found, wanted in zip((value, of_x, of_kernel), expected, strict=True):
    error = np.abs(np.asarray(found, np.float64) - wanted).max()
    assert error <= close * np.abs(wanted).max()


def test_rows_that_devices_cannot_share_are_multiplied_as_they_are():
  mesh = sharding.make_mesh(4)
  x, kernel = np.ones((3, 4), np.float32), np.ones((4, 8), np.float32)
  multiply = sharding.on_mesh(mesh, lambda *a: layers.matmul(*a, 0))
  np.testing.assert_array_equal(jax.jit(multiply)(x, kernel), 4)


def _create(dtype, variant="ViT-w128d1m256h2_8", **options):
  """A model of 17 or 16 tokens, parameters without zeros, and images."""
  options |= {"num_classes": 5, "image_size": 32, "dtype": dtype}
  model = models.create(variant=variant, **options)
  return model, random_params(model), random_images(model)


@pytest.mark.ci
@pytest.mark.parametrize("classifier", ["token", "map"])
def test_the_fast_way_is_the_plain_one(monkeypatch, classifier):
  # Both in float32, which is else always the plain one: so they may differ by
  # rounding alone. 17 tokens are padded to 24.
  model, params, images = _create("float32", classifier=classifier)

  def loss(params):
    logits = model.apply(params, images)
    return jnp.sum(logits * jnp.arange(5.0)), logits

  expected = jax.jit(jax.grad(loss, has_aux=True))(params)
  monkeypatch.setattr(ViTConfig, "use_tpu_layout", True)
  found = jax.jit(jax.grad(loss, has_aux=True))(params)
  compare_trees(found, expected)


def compare_trees(found, expected):
  """Asserts that arrays differ by rounding alone.

  That of what is zero but for rounding, as keys' biases have no gradient, is
  as large as the largest arrays' is.
  """
  least = 1e-3 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))

  def compare(path, x, y):
    scale = max(float(jnp.abs(y).max()), least)
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * scale, err_msg=path)

  jax.tree_util.tree_map_with_path(compare, found, expected)


def test_padding_is_not_seen():
  model, params, images = _create("bfloat16")
  logits = jax.jit(model.apply)(params, images)
  plain, out = jax.jit(functools.partial(model.apply, intermediates=True))(
    params, images
  )
  np.testing.assert_allclose(logits, plain, rtol=0.1, atol=0.1)
  weights = out["block00/attention_weights"]
  assert weights.shape == (3, 2, 17, 17)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
  assert out["block00/out"].shape == (3, 17, 128)


@pytest.mark.ci
@pytest.mark.parametrize(
  ("pos_embedding", "fast"),
  [("learned", True), ("relative", False)],
)
def test_tokens_that_nobody_reads_change_nothing(
  monkeypatch, pos_embedding, fast
):
  monkeypatch.setattr(ViTConfig, "use_tpu_layout", fast)
  model, params, images = _create(
    "float32", "ViT-w128d2m512h2_8", pos_embedding=pos_embedding
  )

  def loss(params, intermediates):
    found = model.apply(params, images, intermediates=intermediates)
    logits = found[0] if intermediates else found
    return jnp.sum(logits * jnp.arange(5.0)), logits

  trained = jax.grad(loss, has_aux=True)
  expected = jax.jit(functools.partial(trained, intermediates=True))(params)
  found = jax.jit(functools.partial(trained, intermediates=False))(params)
  compare_trees(found, expected)

  if fast:
    return  # the kernel's products, and those in its place, are both traced

  # Of the last block's products with kernels half of the attention's are left.
  def count(intermediates):
    traced = functools.partial(model.apply, intermediates=intermediates)
    return count_in_jaxpr(jax.make_jaxpr(traced)(params, images).jaxpr)

  saved = 3 * 16 * (2 * 128 * 128 + 2 * 128 * 512)
  assert count(True) - count(False) > saved
