"""Sizes of images, in pixels."""

# More pixels than this, before or after a resize, is a decompression bomb or a
# mistake. It is Pillow's own threshold: 268 MB of RGB.
MAX_PIXELS = 89_478_485


def as_pair(size) -> tuple[int, int]:
  """Returns (height, width) of an integer or a pair."""
  height, width = size if hasattr(size, "__len__") else (size, size)
  return int(height), int(width)


def scale_side(side, short, smaller_size):
  """Returns `side` in pixels once `short` has become `smaller_size`.

  Integers throughout, halves rounded up, so that NumPy and TensorFlow agree;
  takes Python integers and integer tensors alike.
  """
  return (2 * side * smaller_size + short) // (2 * short)
