"""Position embeddings and how they move to another resolution."""

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


def corner_aligned(length_in: int, length_out: int) -> np.ndarray:
  """Returns the matrix f64[out in] of corner-aligned linear interpolation.

  Output o samples the input at o * (in - 1) / (out - 1), as
  `scipy.ndimage.zoom(order=1)` does and as the published fine-tuned weights
  were made; `jax.image.resize` aligns pixel centres instead. A single output
  takes the first input, as in scipy.
  """
  if length_out == 1:
    position = np.zeros(1)
  else:
    position = np.arange(length_out) * ((length_in - 1) / (length_out - 1))
  low = np.clip(np.floor(position).astype(int), 0, max(length_in - 2, 0))
  fraction = position - low
  matrix = np.zeros((length_out, length_in))
  rows = np.arange(length_out)
  matrix[rows, low] += 1 - fraction
  matrix[rows, np.minimum(low + 1, length_in - 1)] += fraction
  return matrix


def bicubic(length_in: int, length_out: int) -> np.ndarray:
  """Returns the matrix f64[out in] of PyTorch's bicubic interpolation.

  Pixel centres are aligned, the four taps of Keys' kernel have a = -0.75, and
  taps beyond an edge take the edge's value. Hugging Face resizes so:
  `interpolate(mode="bicubic", align_corners=False)`.
  """
  scale = length_in / length_out
  position = (np.arange(length_out) + 0.5) * scale - 0.5
  low = np.floor(position).astype(int)
  matrix = np.zeros((length_out, length_in))
  for tap in range(-1, 3):
    column = np.clip(low + tap, 0, length_in - 1)
    weight = _keys_kernel(position - (low + tap), -0.75)
    np.add.at(matrix, (np.arange(length_out), column), weight)
  return matrix


def bicubic_antialiased(length_in: int, length_out: int) -> np.ndarray:
  """Returns the matrix f64[out in] of PyTorch's antialiased interpolation.

  Pixel centres are aligned, Keys' kernel has a = -0.5 and is as much wider as
  the output is smaller; beyond an edge there is nothing, and each row's weights
  are scaled to 1. timm resizes so: `interpolate(mode="bicubic",
  align_corners=False, antialias=True)`.
  """
  scale = length_in / length_out
  stretch = max(scale, 1.0)
  centre = (np.arange(length_out)[:, None] + 0.5) * scale
  pixel = np.arange(length_in)[None, :] + 0.5
  matrix = _keys_kernel((pixel - centre) / stretch, -0.5)
  return matrix / matrix.sum(axis=1, keepdims=True)


def _keys_kernel(x, a):
  """The cubic convolution kernel of Keys (1981), which ends at |x| = 2."""
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0))


# Whose convention it is -> (length in, length out) -> the matrix f64[out in].
METHODS = {
  "corner_aligned": corner_aligned,
  "timm": bicubic_antialiased,
  "huggingface": bicubic,
}


def resize_axis(
  x: np.ndarray, length: int, method: str = "corner_aligned"
) -> np.ndarray:
  """Resizes the last axis but one: f32[... n d] to f32[... length d]."""
  if x.shape[-2] == length:
    return x
  matrix = METHODS[method](x.shape[-2], length)
  return (matrix @ np.asarray(x, np.float64)).astype(x.dtype)


def resize_grid(
  grid: np.ndarray, shape: tuple[int, int], method: str = "corner_aligned"
) -> np.ndarray:
  """Resizes position embeddings f32[h w d] to f32[*shape d], in float64.

  An unchanged shape returns the very same values.
  """
  if grid.shape[:2] == tuple(shape):
    return grid
  interpolate = METHODS[method]
  rows = interpolate(grid.shape[0], shape[0])
  columns = interpolate(grid.shape[1], shape[1])
  out = np.einsum("Hh,Ww,hwd->HWd", rows, columns, np.asarray(grid, np.float64))
  return out.astype(grid.dtype)


def resize_tokens(
  pos_embedding: np.ndarray,
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  method: str = "corner_aligned",
) -> np.ndarray:
  """Resizes f32[1 n d] to a new grid; extra leading tokens are kept as is.

  Args:
    pos_embedding: n is h*w of the old grid, plus one with a class token.
    old_grid: (h, w) in patches. It is given, never guessed from n: 196 tokens
      are a 14x14 grid and not a class token with 195 patches.
    new_grid: (h, w) in patches.
    method: one of `METHODS`.
  """
  num_extra = pos_embedding.shape[1] - old_grid[0] * old_grid[1]
  assert num_extra in (0, 1), (pos_embedding.shape, old_grid)
  extra, tokens = np.split(pos_embedding, [num_extra], axis=1)
  width = tokens.shape[-1]
  grid = resize_grid(tokens.reshape(*old_grid, width), new_grid, method)
  return np.concatenate([extra, grid.reshape(1, -1, width)], axis=1)
