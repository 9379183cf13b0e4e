"""Pictures for tests, and their files."""

import io

import numpy as np
from PIL import Image


def photo(shape, seed=0, noise=9):
  """Returns uint8[h w 3]: smooth colours and noise, what JPEG is made for."""
  rng = np.random.RandomState(seed)
  coarse = rng.randint(0, 256, (6, 7, 3)).astype(np.uint8)
  smooth = np.asarray(Image.fromarray(coarse).resize(shape[::-1]))
  noisy = smooth + rng.randint(-noise, noise + 1, (*shape, 3))
  return noisy.clip(0, 255).astype(np.uint8)


def smooth(seed, size=(40, 32)):
  """Returns a Pillow image of (width, height): no two are alike."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 255, (5, 5, 3)).astype(np.uint8)
  return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encode(image, kind, **kwargs):
  """Returns the file of an array or of a Pillow image."""
  file = io.BytesIO()
  if not isinstance(image, Image.Image):
    image = Image.fromarray(image)
  image.save(file, kind, **kwargs)
  return file.getvalue()
