"""Shared code of synthetic data sets: random numbers, PNG, the builder.

Image i is a pure function of i. Random numbers are an integer hash, and pixels
are computed in integers, or in floats that hold every intermediate result
exactly, so that they are the same on every machine.
"""

import abc
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

SIZE = 32  # height and width of an image, in pixels
_CHUNK = 100  # images that are generated together


class Draws:
  """Random numbers for items `index`: a hash of (stream, item, position)."""

  def __init__(self, stream: int, index: np.ndarray):
    self._base = _mix(np.asarray(stream, np.uint64)) + (
      np.asarray(index, np.uint64) << np.uint64(24)
    )
    self._position = 0

  def bits(self, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Returns uint64[n *shape], new at every call."""
    size = int(np.prod(shape))
    counter = self._base[:, None] + np.arange(
      self._position, self._position + size, dtype=np.uint64
    )
    self._position += size
    return _mix(counter).reshape(len(self._base), *shape)

  def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()):
    """Returns float64[n *shape] in [low, high)."""
    unit = (self.bits(shape) >> np.uint64(11)) * 2.0**-53
    return low + (high - low) * unit

  def integer(self, low: int, high: int, shape: tuple[int, ...] = ()):
    """Returns int64[n *shape] in [low, high)."""
    return np.floor(self.uniform(low, high, shape)).astype(np.int64)

  def zipf(self, size: int, offset: float = 2.0) -> np.ndarray:
    """Returns int64[n] in [0, size): frequency of k ~ 1 / (k + offset)."""
    frequency = 1.0 / (np.arange(size) + offset)
    edges = np.cumsum(frequency)[:-1] / frequency.sum()
    return np.searchsorted(edges, self.uniform(0, 1), side="right")


def _mix(x: np.ndarray) -> np.ndarray:
  """The output function of SplitMix64 (Steele et al. 2014), uint64."""
  with np.errstate(over="ignore"):
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class DrawnBuilder(tfds.core.GeneratorBasedBuilder):
  """A TFDS builder of synthetic images; its docstring describes the data set.

  Attributes:
    SIZES: {split: number of images}; the first split starts at image 0.
    LABELS: {feature: its TFDS feature}.
    METADATA: of the data set, such as `max_labels`.
    SHUFFLED: whether TFDS shuffles the images, whose order is already random.
  """

  VERSION = tfds.core.Version("1.0.0")
  SIZES: ClassVar[dict[str, int]] = {"train": 1000, "test": 1000}
  LABELS: ClassVar[dict[str, Any]]
  METADATA: ClassVar[dict[str, Any]] = {}
  SHUFFLED = False

  @abc.abstractmethod
  def draw(self, index: np.ndarray) -> Iterator[tuple]:
    """Yields (uint8[SIZE SIZE 3], a value for each of LABELS) of each image."""

  def _info(self) -> tfds.core.DatasetInfo:
    image = tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png")
    return tfds.core.DatasetInfo(
      builder=self,
      disable_shuffling=not self.SHUFFLED,
      description=self.__doc__,
      features=tfds.features.FeaturesDict({"image": image, **self.LABELS}),
      metadata=tfds.core.MetadataDict(self.METADATA) if self.METADATA else None,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    start, generators = 0, {}
    for split, size in self.SIZES.items():
      generators[split] = self._generate_examples(start, start + size)
      start += size
    return generators

  def _generate_examples(self, start: int, stop: int):
    for low in range(start, stop, _CHUNK):
      index = np.arange(low, min(low + _CHUNK, stop))
      for i, (image, *values) in zip(index, self.draw(index), strict=True):
        labels = dict(zip(self.LABELS, values, strict=True))
        yield int(i), {"image": _encode_png(image), **labels}


def _encode_png(image):
  """Encodes as uncompressed PNG, because ArrayRecord compresses.

  zlib's compressed output differs between versions; stored blocks do not.
  """
  height, width, _ = image.shape
  rows = np.zeros((height, 1 + 3 * width), np.uint8)  # 0: unfiltered row
  rows[:, 1:] = image.reshape(height, -1)
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  data = zlib.compress(rows.tobytes(), level=0)
  png = b"\x89PNG\r\n\x1a\n"
  for content in (b"IHDR" + header, b"IDAT" + data, b"IEND"):
    length, check = len(content) - 4, zlib.crc32(content)
    png += struct.pack(">I", length) + content + struct.pack(">I", check)
  return io.BytesIO(png)
