"""Near-duplicates of test images in a pre-training set.

The paper de-duplicates its pre-training sets with respect to the test sets of
the downstream tasks, as BiT did (arXiv 1912.11370). Here that takes two steps.
The first finds the most similar test image by its signature, a small grey image
of unit norm. The second compares the two in colour, mirrored and with a few per
cent cropped from either; they are near-duplicates if their similarity reaches a
threshold. Scale, re-encoding, brightness and contrast hardly affect either.
"""

import functools
import io
import itertools
from typing import NamedTuple, Self

import numpy as np
from etils import epath
from PIL import Image

from vit_jax.files import is_remote

SIDE = 16  # pixels of a signature's side
THUMBNAIL = 48  # pixels of a thumbnail's side
_FIT = 24  # pixels of a side when two thumbnails are compared
CANDIDATE = 0.75  # similarity of signatures that is enough for the second step
THRESHOLD = 0.98  # of the colour images; error rates: docs/your_images.md
_MOST = 5  # pixels that may be cropped from a side of a thumbnail, a tenth


def make_thumbnail(image: Image.Image) -> np.ndarray:
  """Returns u8[THUMBNAIL THUMBNAIL 3]."""
  size, bicubic = (THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC
  # Large images are first reduced by an integer factor, to halve the time.
  return np.asarray(image.convert("RGB").resize(size, bicubic, reducing_gap=2))


def make_signatures(thumbnails: np.ndarray) -> np.ndarray:
  """Returns f32[n SIDE²] of u8[n THUMBNAIL THUMBNAIL 3]: grey, see `_unit`."""
  side = THUMBNAIL // SIDE
  cells = thumbnails.reshape(-1, SIDE, side, SIDE, side * 3)
  return np.array([_unit(x) for x in cells.mean((2, 4))], np.float32)


def _unit(x):
  x = x.astype(np.float32).ravel()
  x -= x.mean()
  length = np.linalg.norm(x)
  # On a flat image, noise of one grey level is not content.
  return x / length if length > np.sqrt(x.size) else np.zeros_like(x)


class Index(NamedTuple):
  """The test images, for finding near-duplicates of others."""

  names: np.ndarray  # str[n]
  thumbnails: np.ndarray  # u8[n THUMBNAIL THUMBNAIL 3]
  signatures: np.ndarray  # f32[n SIDE²]

  @classmethod
  def make(cls, names, thumbnails) -> Self:
    """Returns the index of named thumbnails, 8 kB per image."""
    thumbnails = np.array(thumbnails, np.uint8)
    thumbnails = thumbnails.reshape(-1, THUMBNAIL, THUMBNAIL, 3)
    return cls(np.asarray(names, str), thumbnails, make_signatures(thumbnails))

  def save(self, folder) -> None:
    """Writes the files that `load` reads to `folder`, an epath.Path."""
    for name, array in self._asdict().items():
      with (folder / f"{name}.npy").open("wb") as f:
        np.save(f, array)

  @classmethod
  @functools.cache
  def load(cls, folder: str) -> Self:
    """Opens saved files, memory-mapped so that processes share one copy."""
    files = [epath.Path(folder) / f"{name}.npy" for name in cls._fields]
    if is_remote(folder):
      return cls(*(np.load(io.BytesIO(f.read_bytes())) for f in files))
    return cls(*(np.load(file, mmap_mode="r") for file in files))

  def find(self, thumbnails: np.ndarray) -> list[tuple[str, float] | None]:
    """Returns (name, similarity) of each image's near-duplicate, or None.

    Args:
      thumbnails: u8[b THUMBNAIL THUMBNAIL 3]. A batch is an order of magnitude
        faster, because it reads the signatures from memory once.
    """
    if not self.names.size or not thumbnails.size:
      return [None] * len(thumbnails)
    seen = np.stack([thumbnails, thumbnails[:, :, ::-1]], 1)  # and mirrored
    similarity = make_signatures(seen) @ self.signatures.T
    found = []
    for views, row in zip(seen, np.split(similarity, len(seen)), strict=True):
      mirrored, i = divmod(int(row.argmax()), len(self.names))
      view, other = views[mirrored], self.thumbnails[i]
      fit = 0.0
      if row[mirrored, i] >= CANDIDATE:
        fit = max(_fit(view, other), _fit(other, view))
      twin = (str(self.names[i]), round(fit, 4)) if fit >= THRESHOLD else None
      found.append(twin)
    return found


def _fit(whole, part) -> float:
  """Returns the similarity of `part` and the best crop of `whole`, at most 1.

  All crops are tried at once. Cropping and shrinking is V @ whole @ H.T, so the
  inner products with `part` and the norms for all pairs (V, H) are matmuls.
  """
  cut, gram, total = _make_cuts()
  shrunk = Image.fromarray(part).resize((_FIT, _FIT), Image.Resampling.BILINEAR)
  target = _unit(np.asarray(shrunk)).reshape(_FIT, _FIT, 3)
  image = whole.astype(np.float32) - whole.mean(dtype=np.float32)
  # Axes: v and h index V and H, y and x the pixels of `part`, i and j those of
  # `whole`. k is another j, and c the colour.
  seen = np.tensordot(cut, target, (1, 0))  # v i x c
  seen = np.tensordot(seen, image, ((1, 3), (0, 2)))  # v x j
  product = np.tensordot(seen, cut, ((1, 2), (1, 2)))  # v h
  columns = np.tensordot(image, gram, (1, 1))  # i c h k
  rows = np.tensordot(columns, image, ((1, 3), (2, 1)))  # i h j
  square = np.tensordot(gram, rows, ((1, 2), (0, 2)))  # v h
  mean = total @ image.sum(2) @ total.T / target.size
  square -= target.size * mean**2
  # As in _unit, a nearly flat crop matches nothing.
  fit = product / np.sqrt(np.maximum(square, target.size))
  return float(fit.max())


@functools.cache
def _make_cuts():
  """Returns matrices f32[36 _FIT THUMBNAIL] that crop and shrink one axis.

  Also their Gram matrices f32[36 THUMBNAIL THUMBNAIL] and column sums
  f32[36 THUMBNAIL].
  """
  eye = Image.fromarray(np.eye(THUMBNAIL, dtype=np.float32))
  size = (_FIT, THUMBNAIL)
  cuts = []
  for before, after in itertools.product(range(_MOST + 1), repeat=2):
    box = (before, 0, THUMBNAIL - after, THUMBNAIL)
    shrunk = eye.resize(size, Image.Resampling.BILINEAR, box=box)
    cuts.append(np.asarray(shrunk).T)
  cut = np.stack(cuts)
  return cut, cut.transpose(0, 2, 1) @ cut, cut.sum(1)
