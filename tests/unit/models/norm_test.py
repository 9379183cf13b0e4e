"""The kernel of LayerNorm's backward pass."""

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import norm_kernel

_EPSILON = 1e-3


def _draw(rows, width):
  """Returns rows with a mean, a gradient, and that of other uses."""
  x, dy, beside = np.random.default_rng(0).normal(size=(3, rows, width))
  x = 2 * x + np.linspace(-3, 3, rows)[:, None]
  return [jnp.float32(array) for array in (x, dy, beside)]


def _differentiate_in_float64(x, dy, beside):
  """Each row's gradient, by the matrix of all derivatives."""
  out = np.zeros(x.shape)
  arrays = (np.float64(array) for array in (x, dy, beside))
  for i, (row, gradient, more) in enumerate(zip(*arrays, strict=True)):
    deviation = np.sqrt(row.var() + _EPSILON)
    y = (row - row.mean()) / deviation
    derivatives = np.eye(len(row)) - (1 + np.outer(y, y)) / len(row)
    out[i] = gradient @ derivatives / deviation + more
  return out


@pytest.mark.parametrize(
  ("rows", "width"),
  # Less than a block, lanes that are not full, and two blocks, of which the
  # second is smaller.
  [(16, 128), (40, 192), (136, 128)],
)
def test_kernel_is_the_formula(monkeypatch, rows, width):
  monkeypatch.setattr(norm_kernel, "_BLOCK", 2**16)
  arrays = _draw(rows, width)
  expected = _differentiate_in_float64(*arrays)
  for found in (
    norm_kernel.run_kernel(_EPSILON, *arrays, interpret=True),
    norm_kernel.run(_EPSILON, *arrays),
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_kernel_in_bfloat16_rounds_once():
  rounded = [x.astype(jnp.bfloat16) for x in _draw(24, 256)]
  expected = _differentiate_in_float64(
    *(x.astype(jnp.float32) for x in rounded)
  )
  found = norm_kernel.run_kernel(_EPSILON, *rounded, interpret=True)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5
  )
