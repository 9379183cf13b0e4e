"""Decoding and resizing with Pillow.

Decoding is for when TensorFlow is missing or does not support an image,
resizing for when pixels must be those of PyTorch's libraries.
"""

import io
import os
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageFilter

from vit_jax.data.sizes import MAX_PIXELS
from vit_jax.errors import UserError


def decode_image(image, name: str = "image") -> np.ndarray:
  """Decodes to uint8[h w 3], as `vit_jax.data.ops.decode` does.

  EXIF orientation is applied, transparency composited on white. 16-bit channels
  keep their high byte, animations their first frame. JPEGs are decoded with the
  accurate integer DCT.

  Raises:
    UserError: not an image, corrupt, or larger than MAX_PIXELS; names it.
  """
  if isinstance(image, np.ndarray):
    return _array_to_rgb(image, name)
  if isinstance(image, str | os.PathLike):
    image = _read_file(image)
  try:
    if not isinstance(image, Image.Image):
      image = open_image(image, name)
    return _turn(_pil_to_rgb(image), read_turn(image))
  except UserError:
    raise
  except Exception as e:  # Pillow's plugins may raise any exception
    raise UserError(
      f"{name}: not a readable image ({type(e).__name__}); give a whole JPEG, "
      "PNG or WebP file"
    ) from e


def _read_file(path) -> bytes:
  try:
    with open(path, "rb") as f:
      return f.read()
  except OSError as e:
    raise UserError(f"{path}: cannot be read: {e.strerror}") from e


def open_image(encoded: bytes, name: str, formats=None) -> Image.Image:
  """Reads an image's header; nothing is decoded yet.

  Raises:
    UserError: more than MAX_PIXELS.
    Exception: whatever Pillow raises for files that are not images.
  """
  try:
    # Above its threshold Pillow warns, above twice that it raises.
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      image = Image.open(io.BytesIO(encoded), formats=formats)
  except Image.DecompressionBombError as e:
    raise UserError(f"{name}: too many pixels, over {MAX_PIXELS:,}") from e
  check_pixels(image.height, image.width, name)
  return image


def check_pixels(height: int, width: int, name: str) -> None:
  """Raises a UserError for more than MAX_PIXELS."""
  if height * width > MAX_PIXELS:
    raise UserError(
      f"{name}: {width}x{height} is too many pixels, the limit is "
      f"{MAX_PIXELS:,}; give a smaller image"
    )


def resize_averaging(pixels: np.ndarray, size, method: str) -> np.ndarray:
  """Resizes with antialiasing: the filter widens as the image shrinks.

  Args:
    pixels: uint8[h w 3].
    size: (height, width) of the result.
    method: "bilinear" or "bicubic" (a = -0.5), which overshoots at edges and is
      clipped there.
  """
  height, width = map(int, size)
  resample = Image.Resampling[method.upper()]
  return np.array(Image.fromarray(pixels).resize((width, height), resample))


def blur(pixels: np.ndarray, sigma) -> np.ndarray:
  """Blurs uint8[h w 3] by a Gaussian; Pillow approximates it by box blurs."""
  gaussian = ImageFilter.GaussianBlur(float(sigma))
  return np.array(Image.fromarray(pixels).filter(gaussian))


def _array_to_rgb(array, name):
  if array.ndim == 2:
    array = array[..., None]
  is_image = array.ndim == 3 and array.shape[2] in (1, 3, 4) and array.size
  if array.dtype != np.uint8 or not is_image:
    raise UserError(
      f"{name}: {array.dtype}{list(array.shape)} is not an image; give "
      "uint8[h w 3]"
    )
  if array.shape[2] == 1:
    return np.repeat(array, 3, axis=2)
  return _composite(array) if array.shape[2] == 4 else array


def _composite(rgba):
  """Composites uint8[h w 4] on white; exact, rounds halves like Pillow."""
  dark = (255 - rgba[..., :3]) * rgba[..., 3:].astype(np.uint16) + 128
  return 255 - ((dark + (dark >> 8)) >> 8).astype(np.uint8)


def _pil_to_rgb(image):
  if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
    values = np.asarray(image).astype(np.int64)
    alpha = np.where(values == image.info.get("transparency"), 0, 255)
    grey = (values >> 8).clip(0, 255)
    rgba = np.stack([grey, grey, grey, alpha], axis=-1)
    return _composite(rgba.astype(np.uint8))
  if image.has_transparency_data:
    return _composite(np.asarray(image.convert("RGBA")))
  return np.array(image.convert("RGB"))


# EXIF orientation -> whether to reverse the rows, to reverse the columns, and
# then to swap both. Source: Exif 2.32, tag 0x0112.
_TURNS = {
  2: (False, True, False),
  3: (True, True, False),
  4: (True, False, False),
  5: (False, False, True),
  6: (True, False, True),
  7: (True, True, True),
  8: (False, True, True),
}


def read_turn(image: Image.Image) -> np.ndarray:
  """Returns bool[3] for the EXIF orientation of an image, see `_TURNS`."""
  exif = Image.Exif()
  try:
    exif.load(image.info.get("exif", b""))
    turn = _TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
  except Exception:  # corrupt EXIF is ignored, as elsewhere
    turn = None
  return np.array(turn or (False, False, False))


def _turn(pixels, turn):
  rows, columns, swap = turn
  pixels = pixels[:: -1 if rows else 1, :: -1 if columns else 1]
  return np.ascontiguousarray(pixels.swapaxes(0, 1) if swap else pixels)
