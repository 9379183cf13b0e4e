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
  """Also mirrored, against NumPy's corrcoef of 16 x 16 means."""
  thumbnails = _stack(smooth(i) for i in range(2))
  (even, other_even), (odd, other_odd) = near_duplicates.make_signatures(
    thumbnails
  )
  one, other = thumbnails.reshape(2, 16, 3, 16, 9).mean((2, 4))
  for sign, seen in ((1, other), (-1, other[:, ::-1])):
    expected = np.corrcoef(one.ravel(), seen.ravel())[0, 1]
    found = even @ other_even + sign * odd @ other_odd
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_saved_index_is_the_same(tmp_path):
  images = [smooth(i) for i in range(5)]
  index = _make_index(images)
  index.save(tmp_path)
  loaded = near_duplicates.Index.load(tmp_path)
  asked = _stack(images[1:3])
  assert loaded.find(asked) == index.find(asked)
  assert [name for name, _ in index.find(asked)] == ["1", "2"]
