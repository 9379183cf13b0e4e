"""Position embeddings at another resolution, in each origin's way."""

import numpy as np


def corner_aligned(length_in: int, length_out: int) -> np.ndarray:
  """Returns the matrix f64[out in] of corner-aligned linear interpolation.

  Output o samples the input at o * (in - 1) / (out - 1), as
  `scipy.ndimage.zoom(order=1)` does and as the published fine-tuned weights
  were made; `jax.image.resize` aligns pixel centres instead. A single output
  takes the first input, as in scipy.
  """
  position = np.linspace(0, length_in - 1, length_out)
  pixels = np.arange(length_in)
  columns = [np.interp(position, pixels, one) for one in np.eye(length_in)]
  return np.stack(columns, axis=1)


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
