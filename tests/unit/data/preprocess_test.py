"""Preprocessing strings, and that NumPy gives TensorFlow's numbers."""

import io
import itertools

import numpy as np
import pytest
import tensorflow as tf
from pictures import encode as _encode
from pictures import photo as _photo
from PIL import Image, ImageOps

from vit_jax.data import ops, preprocess
from vit_jax.errors import UserError
from vit_jax.pretrained import rescale

STRINGS = (
  "resize(size)",
  "resize(size, method='area')",
  "resize_small(40)|central_crop(size)",
  "resize_small(200, method='bilinear')|central_crop(size)",
  "resize(size, method='bicubic', antialias=True)",
  "resize_small(40, 'bilinear', antialias=True)|central_crop(size)",
  "central_crop(size)",
)
SHAPES = ((8, 8), (32, 32), (61, 90), (257, 130), (5, 200), (300, 400))


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("resize((32, 48))", {"resize": {"size": (32, 48)}}),
    (
      "resize_small(size * 8 / 7)|central_crop(size)",
      {
        "resize_small": {"smaller_size": 55},
        "central_crop": {"size": (32, 48)},
      },
    ),
    (
      "resize(1.5 * size)| random_crop(size=size) |randaug(2, 15)|flip_lr",
      {
        "resize": {"size": (48, 72)},
        "random_crop": {"size": (32, 48)},
        "randaug": {"num_ops": 2, "magnitude": 15},
        "flip_lr": {},
      },
    ),
    (
      "inception_crop(size, area_min=8.5)",
      {"inception_crop": {"size": (32, 48), "area_min": 8.5}},
    ),
  ],
)
def test_parse(text, expected):
  assert preprocess.parse(text, (32, 48)) == list(expected.items())


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", "does not parse"),
    ("rezise(size)", "did you mean 'resize'?"),
    ("resize(x)", "neither a number nor `size`"),
    ("resize(1 + size)", "not a literal"),
    ("resize(size / 0)", "size / 0"),
    ("resize(size, foo=3)", "it takes resize(size, method, antialias)"),
    ("resize()", "a size is missing"),
    ("resize(0)", "positive integer"),
    ("resize(size, method='cubic')", "'bilinear', 'bicubic' or 'area'"),
    ("resize(size, antialias=1)", "antialias must be True or False, not 1"),
    ("resize(size, method='bicubic')", "'bicubic' needs antialias=True"),
    ("resize_small(256, antialias=True)", "antialias=True needs method="),
    ("inception_crop(size, area_min=0)", "percentage"),
    ("resize(size)|randaug(2, 99)", "between 0 and 30"),
    ("resize(size)|randaug(contrast='pil')", "'mean' or 'augreg', not 'pil'"),
    ("resize(size)|color_jitter(-0.3)", "strength must be a number, 0 or more"),
    ("simple_crop()", "a size is missing"),
    ("resize(size)|resize_small(256)", "differing sizes"),
    ("flip_lr", "differing sizes"),
    ("os.system('x')", "not an operation"),
  ],
)
def test_wrong_string_is_explained_in_one_line(text, words):
  with pytest.raises(UserError) as e:
    preprocess.parse(text, 224)
  assert words in str(e.value)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("text", "size", "words"),
  [
    ("resize_small(256)|central_crop(size)", 384, ("256", "384x384", "439")),
    ("resize((400, 300))|central_crop(size)", (384, 448), ("300", "384x448")),
    ("resize(300)|random_crop(size)", 384, ("300", "384x384", "439")),
    ("resize(448)|random_crop(size)", 384, ()),
    ("resize_small(256)|central_crop(size)", 256, ()),
    ("resize_small(256)|central_crop(size)", (224, 448), ()),  # fits wide ones
    ("resize_small(size * 8 / 7)|central_crop(size)", 384, ()),
    ("inception_crop(size)|flip_lr", 384, ()),
  ],
)
def test_crop_that_enlarges_what_was_shrunk(text, size, words):
  if not words:
    preprocess.check_crops(text, size)
    return
  with pytest.raises(UserError) as e:
    preprocess.check_crops(text, size)
  assert all(word in str(e.value) for word in words)


def test_evaluation_takes_no_random_operation():
  with pytest.raises(UserError, match="inception_crop is random"):
    preprocess.preprocess_image(_photo((9, 9)), "inception_crop(size)", 8)
  with pytest.raises(UserError, match="flip_lr is random"):
    ops.make_preprocess("resize(size)|flip_lr", 8, evaluation=True)
  for text in ("three_augment", "color_jitter(0.3)", "simple_crop(size)"):
    with pytest.raises(UserError, match=rf"{text[:8]}.* is random"):
      preprocess.parse(f"resize(size)|{text}", 8, evaluation=True)


@pytest.mark.parametrize("text", STRINGS)
def test_numpy_equals_tensorflow_bit_for_bit(text):
  for size in [(32, 32), (48, 24)]:
    make = ops.make_preprocess(text, size, evaluation=True)
    run = tf.function(lambda encoded, make=make: make(encoded, None))
    for shape, kind in itertools.product(SHAPES, ("JPEG", "PNG")):
      encoded = _encode(_photo(shape), kind)
      ours = preprocess.preprocess_image(encoded, text, size)
      assert (ours.dtype, ours.shape) == (np.uint8, (*size, 3))
      np.testing.assert_array_equal(ours, run(tf.constant(encoded)))


@pytest.mark.parametrize(
  ("text", "size", "expected"),
  [
    ("resize(size)", 64, "resize(64)"),
    (
      "resize(size, method='bicubic', antialias=True)",
      64,
      "resize(64, method='bicubic', antialias=True)",
    ),
    (
      "resize_small(40)|central_crop(32)",
      64,
      "resize_small(80)|central_crop(64)",
    ),
    # The larger factor, or the crop would have to be enlarged.
    (
      "resize_small(40)|central_crop(size)",
      (64, 96),
      "resize_small(120)|central_crop((64, 96))",
    ),
  ],
)
def test_rescaled_string_shows_as_much(text, size, expected):
  scaled = rescale(text, 32, size)
  pixels = _photo((70, 50))
  np.testing.assert_array_equal(
    preprocess.preprocess_image(pixels, scaled, size),
    preprocess.preprocess_image(pixels, expected, size),
  )


@pytest.mark.parametrize(
  ("mode", "kind"),
  [
    ("L", "PNG"),
    ("LA", "PNG"),
    ("RGBA", "PNG"),
    ("P", "PNG"),
    ("1", "PNG"),
    ("I;16", "PNG"),
    ("L", "JPEG"),
    ("CMYK", "JPEG"),
    ("RGB", "BMP"),
    ("P", "GIF"),
    ("RGB", "WEBP"),
    ("RGBA", "WEBP"),
  ],
)
def test_modes_decode_as_in_tensorflow(mode, kind):
  if mode == "I;16":
    image = Image.fromarray((np.arange(99).reshape(9, 11) * 660).astype("u2"))
  else:
    image = Image.fromarray(_photo((9, 11))).convert(mode)
  if mode == "RGBA":
    image.putalpha(image.getchannel(0))
  encoded = _encode(image, kind)
  np.testing.assert_array_equal(
    preprocess.decode_image(encoded),
    ops.decode(tf.constant(encoded), precise=True).numpy(),
  )


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animations_give_their_first_frame(kind):
  first = Image.fromarray(_photo((9, 12))).quantize(64).convert("RGB")
  more = [Image.new("RGB", (12, 9))]
  options = {"save_all": True, "append_images": more, "lossless": True}
  encoded = _encode(first, kind, **options)
  for found in (
    preprocess.decode_image(encoded),
    ops.decode(tf.constant(encoded), precise=True).numpy(),
  ):
    np.testing.assert_array_equal(found, first)


def _turned(image, orientation, kind):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return _encode(image, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
def test_exif_orientation_is_obeyed(orientation, kind):
  encoded = _turned(_photo((16, 24)), orientation, kind)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
  assert upright.size == ((16, 24) if 5 <= orientation <= 8 else (24, 16))
  for found in (
    preprocess.decode_image(encoded),
    preprocess.decode_image(Image.open(io.BytesIO(encoded))),
    preprocess.decode_image(upright),  # once, not twice
    ops.decode(tf.constant(encoded), precise=True).numpy(),
  ):
    np.testing.assert_array_equal(found, np.asarray(upright))


def test_damaged_exif_is_ignored():
  encoded = _turned(_photo((16, 24)), 6, "JPEG")
  for cut in (encoded.find(b"MM\0*"), encoded.find(b"\x01\x12")):
    broken = encoded[:cut] + b"\xff\xff" + encoded[cut + 2 :]
    assert preprocess.decode_image(broken).shape == (16, 24, 3)
    assert ops.decode(tf.constant(broken), precise=True).shape == (16, 24, 3)


def _grey_with_key():
  """16-bit grey, of which one value is transparent."""
  values = (np.arange(99).reshape(9, 11) * 660).astype("u2")
  key = int(values[4, 4])
  high = values >> 8
  rgba = np.stack([high, high, high, 255 * (values != key)], -1)
  return _encode(values, "PNG", transparency=key), rgba.astype(np.uint8)


_TRANSPARENT = {
  "RGBA": lambda x: _encode(x, "PNG"),
  "LA": lambda x: _encode(x.convert("LA"), "PNG"),
  "P": lambda x: _encode(x.quantize(), "PNG"),
  "grey with a key": lambda x: _encode(x.convert("L"), "PNG", transparency=99),
  "16-bit grey with a key": None,  # which Pillow cannot convert
  "WebP": lambda x: _encode(x, "WEBP", lossless=True, exact=True),
}


@pytest.mark.parametrize("name", _TRANSPARENT)
def test_transparency_is_composited_on_white(name):
  # Every alpha with many values; also hidden colours, with an alpha of 0.
  rgba = np.random.RandomState(3).randint(0, 256, (256, 40, 4)).astype(np.uint8)
  rgba[..., 3] = np.arange(256)[:, None]
  if _TRANSPARENT[name]:
    encoded = _TRANSPARENT[name](Image.fromarray(rgba))
    rgba = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGBA"))
  else:
    encoded, rgba = _grey_with_key()
  alpha = rgba[..., 3:] / 255
  expected = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))
  assert len(np.unique(rgba[..., 3])) > 1
  for found in (
    preprocess.decode_image(encoded),
    preprocess.decode_image(rgba),
    ops.decode(tf.constant(encoded), precise=False).numpy(),
  ):
    np.testing.assert_array_equal(found, expected)


def test_what_an_image_may_be(tmp_path):
  array = _photo((20, 30))
  path = tmp_path / "photo.png"
  path.write_bytes(_encode(array, "PNG"))
  grey = array[..., 0]
  for same in (path, str(path), path.read_bytes(), Image.fromarray(array)):
    np.testing.assert_array_equal(preprocess.preprocess_image(
      same, "resize(size)", 8), preprocess.preprocess_image(
      array, "resize(size)", 8))  # fmt: skip
  np.testing.assert_array_equal(
    preprocess.decode_image(grey), np.stack([grey] * 3, -1)
  )


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: b"not an image", "not a readable image"),
    (lambda: b"", "not a readable image"),
    (lambda: _encode(_photo((64, 64)), "JPEG")[:-300], "not a readable image"),
    (lambda: _encode(_photo((64, 64)), "PNG")[:200], "not a readable image"),
    (lambda: np.zeros((3, 4, 5), np.uint8), "give uint8"),
    (lambda: np.zeros((3, 4, 3), np.float32), "float32"),
    (lambda: np.zeros((0, 4, 3), np.uint8), "give uint8"),
  ],
)
def test_unreadable_image_is_named(make, words):
  with pytest.raises(UserError) as e:
    preprocess.preprocess_image(make(), "resize(size)", 8, name="cat.jpg")
  assert str(e.value).startswith("cat.jpg: ")
  assert words in str(e.value)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(
    UserError, match=r"dog\.jpg: cannot be read: No such file"
  ):
    preprocess.preprocess_image(tmp_path / "dog.jpg", "resize(size)", 8)


@pytest.mark.parametrize("side", [9_500, 15_000])
def test_decompression_bomb_is_refused(side, recwarn):
  bomb = _encode(Image.new("1", (side, side)), "PNG")
  assert len(bomb) < 100_000
  with pytest.raises(UserError, match=r"bomb.png: .*too many pixels"):
    preprocess.preprocess_image(bomb, "resize(size)", 8, name="bomb.png")
  assert not recwarn.list
