"""Position embeddings at another resolution, against SciPy and the formulas.

`interop_test.py` has the same comparison with PyTorch itself.
"""

import math

import numpy as np
import pytest
import scipy.ndimage

from vit_jax.models import posemb


def _grid(shape, seed=0):
  return np.random.default_rng(seed).normal(size=(*shape, 5)).astype(np.float32)


def _zoom(grid, shape):
  """What the published fine-tuned models used."""
  factors = (shape[0] / grid.shape[0], shape[1] / grid.shape[1], 1)
  return scipy.ndimage.zoom(grid.astype(np.float64), factors, order=1)


_CASES = {
  "B/16 224->384": ((14, 14), (24, 24)),
  "B/32 224->384": ((7, 7), (12, 12)),
  "L/16 224->512": ((14, 14), (32, 32)),
  "H/14 224->518": ((16, 16), (37, 37)),
  "R50+B/16 224->384": ((14, 14), (24, 24)),
  "R50+L/32 224->384": ((7, 7), (12, 12)),
  "384->224": ((24, 24), (14, 14)),
  "224->224x448": ((14, 14), (14, 28)),
  "448x224->320x384": ((28, 14), (20, 24)),
  "quickstart": ((4, 4), (8, 8)),
  "to one row": ((3, 5), (1, 9)),
  "to one patch": ((3, 5), (1, 1)),
  "from one row": ((1, 7), (1, 3)),
  "one column shorter": ((9, 1), (4, 1)),
  "more rows from one": ((1, 3), (4, 3)),
}
_each_case = pytest.mark.parametrize(
  ("old", "new"), _CASES.values(), ids=_CASES.keys()
)


@_each_case
def test_resized_grid_equals_scipy(old, new):
  grid = _grid(old)
  resized = posemb.resize_grid(grid, new)
  assert resized.shape == (*new, 5)
  assert resized.dtype == np.float32
  np.testing.assert_allclose(resized, _zoom(grid, new), rtol=0, atol=1e-6)


@pytest.mark.parametrize("extra", [0, 1], ids=["gap", "token"])
@_each_case
def test_resized_tokens_keep_the_class_token(old, new, extra):
  grid, token = _grid(old), _grid((1, extra), seed=1)
  tokens = np.concatenate([token, grid.reshape(1, -1, 5)], axis=1)
  resized = posemb.resize_tokens(tokens, old, new)
  assert resized.shape == (1, extra + new[0] * new[1], 5)
  np.testing.assert_array_equal(resized[:, :extra], token)
  expected = _zoom(grid, new).reshape(1, -1, 5)
  np.testing.assert_allclose(resized[:, extra:], expected, rtol=0, atol=1e-6)


# --- the ports' bicubic interpolation ---


def _kernel(x, a):
  """Keys (1981): the cubic pieces of |x| < 1 and of |x| < 2."""
  x = abs(x)
  if x < 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  if x < 2:
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
  return 0.0


def _resample(values, length, a, antialias):
  """[n d] -> [length d]; pixel i covers [i, i + 1]."""
  n = len(values)
  scale = n / length
  width = max(scale, 1.0) if antialias else 1.0
  out = np.zeros((length, values.shape[1]))
  for o in range(length):
    centre = (o + 0.5) * scale
    total = 0.0
    first = math.floor(centre - 2 * width) - 1
    for i in range(first, math.ceil(centre + 2 * width) + 2):
      if antialias and not 0 <= i < n:
        continue  # outside there is nothing
      weight = _kernel((i + 0.5 - centre) / width, a)
      out[o] += weight * values[min(max(i, 0), n - 1)]
      total += weight
    if antialias:
      out[o] /= total
  return out


def _resample_grid(grid, shape, a, antialias):
  out = np.stack(
    [
      _resample(grid[:, column].astype(np.float64), shape[0], a, antialias)
      for column in range(grid.shape[1])
    ],
    axis=1,
  )
  return np.stack([_resample(row, shape[1], a, antialias) for row in out])


@pytest.mark.parametrize(
  ("method", "a", "antialias"),
  [("timm", -0.5, True), ("huggingface", -0.75, False)],
)
@_each_case
def test_bicubic_grids_equal_the_formula(old, new, method, a, antialias):
  grid = _grid(old)
  resized = posemb.resize_grid(grid, new, method)
  assert resized.shape == (*new, 5)
  assert resized.dtype == np.float32
  expected = _resample_grid(grid, new, a, antialias)
  np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-6)
  tokens = grid.reshape(1, -1, 5)
  np.testing.assert_array_equal(
    posemb.resize_tokens(tokens, old, new, method), resized.reshape(1, -1, 5)
  )


@pytest.mark.parametrize("method", posemb.METHODS)
def test_a_constant_stays_constant(method):
  for old, new in _CASES.values():
    resized = posemb.resize_grid(np.ones((*old, 1)), new, method)
    np.testing.assert_allclose(resized, 1, rtol=0, atol=1e-12)


# --- every method ---


@pytest.mark.parametrize("method", posemb.METHODS)
@pytest.mark.parametrize("extra", [0, 1])
def test_same_grid_returns_the_same_bits(extra, method):
  tokens = _grid((1, extra + 14 * 14))
  resized = posemb.resize_tokens(tokens, (14, 14), (14, 14), method)
  np.testing.assert_array_equal(resized, tokens)


def test_a_gap_grid_of_196_is_not_a_token_and_195():
  # 196 tokens that all differ: the first must be a corner of the grid, not be
  # carried over as a class token.
  tokens = np.arange(196, dtype=np.float32).reshape(1, 196, 1)
  resized = posemb.resize_tokens(tokens, (14, 14), (24, 24))
  assert resized.shape == (1, 576, 1)
  corners = resized.reshape(24, 24)[[0, 0, -1, -1], [0, -1, 0, -1]]
  np.testing.assert_array_equal(corners, [0, 13, 182, 195])


def test_corners_stay_where_they_are():
  grid = _grid((5, 6))
  resized = posemb.resize_grid(grid, (9, 17))
  for i in (0, -1):
    for j in (0, -1):
      np.testing.assert_array_equal(resized[i, j], grid[i, j])


def test_a_count_that_is_no_grid_is_our_own_mistake():
  with pytest.raises(AssertionError):
    posemb.resize_tokens(_grid((1, 198)), (14, 14), (24, 24))
