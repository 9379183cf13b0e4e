"""Position embeddings that are computed, wholly or in part."""

import jax.numpy as jnp
import numpy as np


def join_axes(rows, columns):
  """[h d/2] and [w d/2] -> [h*w d]: the column's half first, then the row's."""
  tiled = jnp.tile(columns, (rows.shape[0], 1))
  repeated = jnp.repeat(rows, columns.shape[0], axis=0)
  return jnp.concatenate([tiled, repeated], axis=1)


def sincos_2d(grid: tuple[int, int], width: int) -> np.ndarray:
  """Returns fixed embeddings f32[h*w d]: sin and cos of x, sin and cos of y.

  Wave i turns by 10000**(-i / (d/4 - 1)) radians a patch, as in MoCo v3
  (arXiv 2104.02057) and big_vision.
  """
  omega = 10_000.0 ** -np.linspace(0, 1, width // 4)
  y, x = np.mgrid[: grid[0], : grid[1]].reshape(2, -1, 1) * omega
  waves = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
  return waves.astype(np.float32)
