"""Resizing of position embeddings, by the methods of several projects."""

import functools
from collections.abc import Callable

import numpy as np


def corner_aligned(length_in: int, length_out: int) -> np.ndarray:
  """Returns the matrix f64[out in] of corner-aligned linear interpolation.

  Output o samples the input at o * (in - 1) / (out - 1), like
  `scipy.ndimage.zoom(order=1)`, with which the published fine-tuned weights
  were made. `jax.image.resize` aligns pixel centres instead. A single output
  takes the first input, as in scipy.
  """
  position = np.linspace(0, length_in - 1, length_out)
  pixels = np.arange(length_in)
  columns = [np.interp(position, pixels, one) for one in np.eye(length_in)]
  return np.stack(columns, axis=1)


def bicubic(length_in: int, length_out: int, offset: float = 0.0) -> np.ndarray:
  """Returns the matrix f64[out in] of PyTorch's bicubic interpolation.

  Pixel centres are aligned, the four taps of Keys' kernel have a = -0.75, and
  taps beyond an edge take the edge's value. Hugging Face uses this:
  `interpolate(mode="bicubic", align_corners=False)`.

  Args:
    length_in, length_out: lengths of the input and the output.
    offset: added to `length_out` when computing the sampling step.
  """
  scale = length_in / (length_out + offset)
  position = (np.arange(length_out) + 0.5) * scale - 0.5
  low = np.floor(position).astype(int)
  matrix = np.zeros((length_out, length_in))
  for tap in range(-1, 3):
    column = np.clip(low + tap, 0, length_in - 1)
    weight = _keys_kernel(position - (low + tap), -0.75)
    np.add.at(matrix, (np.arange(length_out), column), weight)
  return matrix


def _centred(kernel, antialias: bool) -> Callable[[int, int], np.ndarray]:
  """Returns a method that weights inputs by their distance to pixel centres.

  There are no inputs beyond an edge, and each row's weights sum to 1. With
  `antialias`, downsampling widens the kernel by the scale factor. This is
  `jax.image.resize`, and PyTorch's `interpolate(align_corners=False)` if that
  is bilinear or antialiased.
  """

  def make_matrix(length_in, length_out):
    scale = length_in / length_out
    centre = (np.arange(length_out)[:, None] + 0.5) * scale
    pixel = np.arange(length_in)[None, :] + 0.5
    stretch = max(scale, 1.0) if antialias else 1.0
    matrix = kernel((pixel - centre) / stretch)
    return matrix / matrix.sum(axis=1, keepdims=True)

  return make_matrix


def _triangle(x):
  return np.maximum(1 - np.abs(x), 0)


def _keys_kernel(x, a):
  """Returns the cubic convolution kernel of Keys (1981), 0 beyond |x| = 2."""
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0))


# {project or interpolation: (length in, length out) -> matrix f64[out in]}.
METHODS = {
  # The paper's code and big_vision.
  "corner_aligned": corner_aligned,
  # Also Meta's DINOv2 with registers, and OpenCLIP.
  "timm": _centred(lambda x: _keys_kernel(x, -0.5), antialias=True),
  "huggingface": bicubic,
  # Meta's DINOv2 without registers.
  "dinov2": functools.partial(bicubic, offset=0.1),
  "bilinear": _centred(_triangle, antialias=False),
  "bilinear_antialiased": _centred(_triangle, antialias=True),
  # C-RADIO: a square of the longer side, which `make_matrix` crops.
  "cpe": _centred(_triangle, antialias=False),
}


def make_matrix(
  length: int, axis: int, shape: tuple[int, int], method: str
) -> np.ndarray:
  """Returns the matrix f64[shape[axis] length] that resizes one axis.

  Args:
    length: old length of the axis.
    axis: 0 for height, 1 for width.
    shape: (h, w) in patches, of the result.
    method: one of `METHODS`.
  """
  whole = max(shape) if method == "cpe" else shape[axis]
  return METHODS[method](length, whole)[: shape[axis]]


def resize_axis(
  x: np.ndarray, axis: int, shape: tuple[int, int], method: str
) -> np.ndarray:
  """Resizes embeddings of rows or columns, f32[... n d] to f32[... n' d].

  Args:
    x: embeddings of one axis.
    axis, shape, method: see `make_matrix`.
  """
  matrix = make_matrix(x.shape[-2], axis, shape, method)
  return (matrix @ np.asarray(x, np.float64)).astype(x.dtype)


def resize_grid(
  grid: np.ndarray, shape: tuple[int, int], method: str = "corner_aligned"
) -> np.ndarray:
  """Resizes position embeddings f32[h w d] to f32[*shape d], in float64.

  An unchanged shape returns `grid` itself.
  """
  if grid.shape[:2] == tuple(shape):
    return grid
  rows, columns = (
    make_matrix(grid.shape[axis], axis, shape, method) for axis in (0, 1)
  )
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
    pos_embedding: n is h*w of the old grid, plus the class token and others.
    old_grid: (h, w) in patches. It is not inferred from n, because 196 tokens
      may be a 14x14 grid or a class token with 195 patches.
    new_grid: (h, w) in patches.
    method: one of `METHODS`.
  """
  num_extra = pos_embedding.shape[1] - old_grid[0] * old_grid[1]
  assert num_extra >= 0, (pos_embedding.shape, old_grid)
  extra, tokens = np.split(pos_embedding, [num_extra], axis=1)
  width = tokens.shape[-1]
  grid = resize_grid(tokens.reshape(*old_grid, width), new_grid, method)
  return np.concatenate([extra, grid.reshape(1, -1, width)], axis=1)
