"""Position embeddings that are computed, wholly or in part."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.layers import LANES


def join_axes(rows, columns):
  """[h d/2] and [w d/2] -> [h*w d]: the column's half first, then the row's."""
  tiled = jnp.tile(columns, (rows.shape[0], 1))
  repeated = jnp.repeat(rows, columns.shape[0], axis=0)
  return jnp.concatenate([tiled, repeated], axis=1)


def dinov3_angles(
  grid: tuple[int, int], head_dim: int, base: float
) -> np.ndarray:
  """Returns the angles f64[h*w head_dim/2] of DINOv3's rotary embedding.

  Patch centres lie in (-1, 1), along each axis by its own length. The first
  half of the angles is of the row, the second of the column (arXiv 2508.10104,
  and the published code for the frequencies).
  """
  frequencies = 2 * np.pi / base ** (np.arange(0, head_dim, 4) / head_dim)
  rows, columns = ((2 * np.arange(n) + 1) / n - 1 for n in grid)
  rows, columns = np.outer(rows, frequencies), np.outer(columns, frequencies)
  repeated = rows.repeat(grid[1], axis=0)
  return np.concatenate([repeated, np.tile(columns, (grid[0], 1))], axis=1)


def rotate(x, angles: np.ndarray, num_heads: int):
  """Rotates the pairs (j, j + h/2) of each head's h channels, in float32.

  Args:
    x: queries or keys [b n d]; the heads stay side by side in d, so that TPUs
      need no other layout.
    angles: f64[n h/2]; 0 for a token that has no place in the image.
    num_heads: d / h.
  """
  half, width = angles.shape[1], x.shape[-1]
  if x.dtype == jnp.bfloat16 and width % LANES == LANES % (2 * half) == 0:
    rotate = jax.custom_vjp(lambda x: _rotate_registers(x, angles, num_heads))
    # The gradient is rotated by the negative angles.
    rotate.defvjp(
      lambda x: (_rotate_registers(x, angles, num_heads), None),
      lambda _, gradient: (_rotate_registers(gradient, -angles, num_heads),),
    )
    return rotate(x)
  cos, sin = _make_factors(angles, num_heads)
  is_first = np.arange(width) % (2 * half) < half
  other = jnp.where(is_first, jnp.roll(x, -half, -1), jnp.roll(x, half, -1))
  y = x.astype(jnp.float32) * cos + other.astype(jnp.float32) * sin
  return y.astype(x.dtype)


def _make_factors(angles, num_heads):
  """Returns factors f32[n d] of each channel, and of the other of its pair."""
  sin = np.concatenate([-np.sin(angles), np.sin(angles)], axis=1)
  cos = np.tile(np.cos(angles), 2)
  return (np.tile(x, num_heads).astype(np.float32) for x in (cos, sin))


def _rotate_registers(x, angles, num_heads):
  """Computes `rotate` separately for each register's width of channels.

  XLA swaps channels through a TPU's memory. A matmul with a permutation matrix
  is exact in bfloat16, and takes a fifth of the cycles (RESULTS.md).
  """
  cos, sin = _make_factors(angles, num_heads)
  swap = np.eye(LANES, dtype=x.dtype).reshape(-1, 2, angles.shape[1], LANES)
  swap = swap[:, ::-1].reshape(LANES, LANES)
  pieces = []
  for i in range(0, x.shape[-1], LANES):
    at = slice(i, i + LANES)
    piece = x[..., at]
    other = jnp.matmul(piece, swap, preferred_element_type=jnp.float32)
    pieces.append(piece.astype(jnp.float32) * cos[:, at] + other * sin[:, at])
  return jnp.concatenate([y.astype(x.dtype) for y in pieces], axis=-1)


def sincos_2d(grid: tuple[int, int], width: int) -> np.ndarray:
  """Returns fixed embeddings f32[h*w d]: sin and cos of x, sin and cos of y.

  Wave i turns by 10000**(-i / (d/4 - 1)) radians a patch, as in MoCo v3
  (arXiv 2104.02057) and big_vision.
  """
  omega = 10_000.0 ** -np.linspace(0, 1, width // 4)
  y, x = np.mgrid[: grid[0], : grid[1]].reshape(2, -1, 1) * omega
  waves = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
  return waves.astype(np.float32)
