"""The fused attention is the plain one, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models
from vit_jax.models import attention, vit

# Heads of half a register's lanes, of a whole, and across two of them.
_HEADS = ((128, 2, 64), (128, 1, 128), (640, 8, 80))


def _draw(b, n, d, valid):
  """Returns queries, keys, values and a gradient; the latter none of padding.

  Padding is large, so that it would show.
  """
  keys = jax.random.split(jax.random.key(0), 4)
  arrays = [jax.random.normal(key, (b, n, d)) for key in keys]
  is_padding = (jnp.arange(n) >= valid)[:, None]
  q, k, v = (jnp.where(is_padding, 100.0, x) for x in arrays[:3])
  return q, k, v, jnp.where(is_padding, 0, arrays[3])


def _compute_in_float64(q, k, v, num_heads, valid):
  """softmax(q k^T / sqrt(d/a)) v, one image and head after the other."""
  b, n, d = q.shape
  out = np.zeros((b, n, d))
  for i in range(b):
    for h in range(num_heads):
      at = slice(h * d // num_heads, (h + 1) * d // num_heads)
      scores = np.float64(q[i, :, at]) @ np.float64(k[i, :valid, at]).T
      scores /= np.sqrt(d / num_heads)
      e = np.exp(scores - scores.max(1, keepdims=True))
      out[i, :, at] = e / e.sum(1, keepdims=True) @ v[i, :valid, at]
  return out


@pytest.mark.parametrize(("width", "num_heads", "head_dim"), _HEADS)
def test_kernel_is_the_formula(width, num_heads, head_dim):
  q, k, v, _ = _draw(2, 24, width, valid=21)
  fused = attention.run_kernel("forward", head_dim, 21, q, k, v, interpret=True)
  expected = _compute_in_float64(*map(np.asarray, (q, k, v)), num_heads, 21)
  np.testing.assert_allclose(
    fused[0][:, :21], expected[:, :21], rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(("width", "num_heads", "head_dim"), _HEADS)
def test_kernel_has_the_plain_gradients(width, num_heads, head_dim):
  q, k, v, gradient = _draw(2, 24, width, valid=21)
  fused = attention.run_kernel(
    "backward", head_dim, 21, q, k, v, gradient, interpret=True
  )
  _, backward = jax.vjp(
    lambda *x: attention.attend_plainly(*x, num_heads, 21)[0], q, k, v
  )
  for x, y in zip(fused, backward(gradient), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    assert not np.any(x[:, 21:])  # nothing flows into padding


def test_attend_has_its_own_gradients():
  # On this machine both are the plain one, by way of the rule for the kernel.
  q, k, v, gradient = _draw(2, 8, 128, valid=7)

  def loss(q, k, v):
    return (attention.attend(q, k, v, 2, 7) * gradient).sum()

  def plain_loss(q, k, v):
    return (attention.attend_plainly(q, k, v, 2, 7)[0] * gradient).sum()

  found = jax.grad(loss, (0, 1, 2))(q, k, v)
  expected = jax.grad(plain_loss, (0, 1, 2))(q, k, v)
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_what_does_not_fill_registers_is_computed_plainly():
  assert attention.can_fuse(200, 768, 12)
  assert attention.can_fuse(264, 1280, 16)
  assert not attention.can_fuse(200, 192, 3)  # Ti: 1.5 registers
  assert not attention.can_fuse(1032, 768, 12)  # 512 pixels


def test_a_bias_has_the_gradient_of_a_sum():
  # bfloat16's own sum of 4,096 ones ends at 256, where adding 1 rounds away.

  x = jnp.zeros((4096, 3), jnp.bfloat16)
  bias = jnp.zeros(3, jnp.bfloat16)
  _, backward = jax.vjp(vit.add_bias, x, bias)
  assert backward(jnp.ones_like(x))[1].tolist() == [4096] * 3


def test_where_padding_is_worth_it():
  assert [vit.count_rows(n) for n in (197, 257, 577, 9, 10, 16)] == [
    *(200, 264, 584, 9, 10, 16),
  ]


@pytest.mark.parametrize(
  "options", [{"classifier": "map"}, {"pos_embedding": "relative"}]
)
def test_padding_changes_nothing(options, monkeypatch):
  """The same logits, gradients and intermediates with it and without."""
  model = models.create(
    variant="ViT-w32d2m48h2_8",
    num_classes=5,
    image_size=32,
    dtype="float32",
    stochastic_depth_rate=0.2,
    **options,
  )
  params = model.init(jax.random.key(0))
  params["head"]["kernel"] += jax.random.normal(jax.random.key(2), (32, 5))
  images = jax.random.uniform(jax.random.key(1), (3, 32, 32, 3))

  def loss(params):
    logits = model.apply(params, images, train=True, key=jax.random.key(3))
    return (logits**2).sum()

  found = []
  for most in (0, 1):  # 17 tokens stay 17, or become 24
    monkeypatch.setattr(vit, "_MOST_PADDING", most)
    logits, out = model.apply(params, images, intermediates=True)
    together = model.apply(params, images)
    np.testing.assert_allclose(together, logits, rtol=1e-5, atol=1e-5)
    found.append((logits, out, jax.grad(loss)(params)))

  def compare(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())

  jax.tree.map(compare, *found)
