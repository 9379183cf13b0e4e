"""Test images are found again in other sizes, encodings, cuts, mirrored."""

import io

import numpy as np
import pytest
from pictures import encode, smooth
from PIL import Image

from vit_jax.tools.build_data import near_duplicates


def _stack(images):
  return np.stack([near_duplicates.make_thumbnail(image) for image in images])


def _make_index(images):
  thumbnails = _stack(images)
  names = [str(i) for i in range(len(thumbnails))]
  return near_duplicates.Index.make(names, thumbnails)


def _encode(image):
  return Image.open(io.BytesIO(encode(image, "JPEG", quality=60)))


_CHANGES = {
  "the same": lambda x: x,
  "smaller": lambda x: x.resize((x.width * 2 // 3, x.height * 2 // 3)),
  "larger": lambda x: x.resize((x.width * 2, x.height * 2)),
  "encoded anew": _encode,
  "mirrored": lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
  "cropped": lambda x: x.crop((3, 2, x.width - 1, x.height - 3)),
  "darker": lambda x: x.point(lambda v: int(0.7 * v)),
  "all of it": lambda x: _encode(
    x.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((2, 0, x.width, x.height))
  ),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_twins_are_found(change):
  images = [smooth(i, (96, 80)) for i in range(20)]
  twins = _make_index(images).find(_stack(map(_CHANGES[change], images)))
  found = [twin and twin[0] == str(i) for i, twin in enumerate(twins)]
  assert sum(map(bool, found)) >= 19


def test_others_are_no_twins():
  index = _make_index(map(smooth, range(100)))
  assert not any(index.find(_stack(map(smooth, range(1000, 1200)))))
  nobody = near_duplicates.Index.make([], [])
  assert nobody.find(_stack([smooth(0)])) == [None]
  flat = Image.new("RGB", (40, 32), (90, 90, 90))
  assert index.find(_stack([flat])) == [None]


def test_signatures_are_correlations_of_grey_images():
  """Against NumPy's corrcoef of 16 x 16 means."""
  thumbnails = _stack(map(smooth, range(3)))
  signatures = near_duplicates.make_signatures(thumbnails)
  grey = thumbnails.reshape(3, 16, 3, 16, 9).mean((2, 4)).reshape(3, -1)
  products = signatures @ signatures.T
  np.testing.assert_allclose(products, np.corrcoef(grey), atol=1e-5)
