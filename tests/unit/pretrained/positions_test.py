"""Position embeddings at another resolution, against SciPy and JAX.

`interop_test.py` compares all but the paper's way with PyTorch itself.
"""

import jax
import numpy as np
import pytest
import scipy.ndimage

from vit_jax.pretrained import positions


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
  resized = positions.resize_grid(grid, new)
  assert resized.shape == (*new, 5)
  assert resized.dtype == np.float32
  np.testing.assert_allclose(resized, _zoom(grid, new), rtol=0, atol=1e-6)


@pytest.mark.parametrize("extra", [0, 1, 6])
@_each_case
def test_resized_tokens_keep_those_before_the_patches(old, new, extra):
  grid, token = _grid(old), _grid((1, extra), seed=1)
  tokens = np.concatenate([token, grid.reshape(1, -1, 5)], axis=1)
  resized = positions.resize_tokens(tokens, old, new)
  assert resized.shape == (1, extra + new[0] * new[1], 5)
  np.testing.assert_array_equal(resized[:, :extra], token)
  expected = _zoom(grid, new).reshape(1, -1, 5)
  np.testing.assert_allclose(resized[:, extra:], expected, rtol=0, atol=1e-6)


# --- every method ---


@pytest.mark.parametrize(
  ("method", "theirs", "antialias"),
  [
    ("timm", "cubic", True),
    ("bilinear", "linear", False),
    ("bilinear_antialiased", "linear", True),
    ("cpe", "linear", False),
  ],
)
@_each_case
def test_resized_grid_equals_jax(old, new, method, theirs, antialias):
  grid = _grid(old)
  resized = positions.resize_grid(grid, new, method)
  assert resized.shape == (*new, 5)
  whole = (max(new), max(new)) if method == "cpe" else new
  expected = jax.image.resize(grid, (*whole, 5), theirs, antialias=antialias)
  expected = np.asarray(expected)[: new[0], : new[1]]
  np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", positions.METHODS)
@pytest.mark.parametrize("extra", [0, 1, 6])
def test_same_grid_returns_the_same_bits(extra, method):
  tokens = _grid((1, extra + 14 * 14))
  resized = positions.resize_tokens(tokens, (14, 14), (14, 14), method)
  np.testing.assert_array_equal(resized, tokens)


def test_a_gap_grid_of_196_is_not_a_token_and_195():
  # 196 tokens that all differ: the first must be a corner of the grid, not be
  # carried over as a class token.
  tokens = np.arange(196, dtype=np.float32).reshape(1, 196, 1)
  resized = positions.resize_tokens(tokens, (14, 14), (24, 24))
  assert resized.shape == (1, 576, 1)
  corners = resized.reshape(24, 24)[[0, 0, -1, -1], [0, -1, 0, -1]]
  np.testing.assert_array_equal(corners, [0, 13, 182, 195])
