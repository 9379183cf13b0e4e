"""Training operations: crops against their definitions, RandAugment's
operations against Pillow's."""

import collections
import functools
import io

import numpy as np
import pictures
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from vit_jax.data import augment, ops, pillow, randaug


def _image(shape=(24, 40), seed=0):
  rng = np.random.RandomState(seed)
  coarse = rng.randint(20, 220, (4, 5, 3)).astype(np.uint8)
  return np.array(Image.fromarray(coarse).resize(shape[::-1]))


_png = functools.partial(pictures.encode, kind="PNG")
_jpeg = functools.partial(pictures.encode, kind="JPEG", quality=95)


def _seed(i):
  return tf.constant([7, i], tf.int64)


def _distance(a, b):
  return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


@pytest.mark.parametrize(
  "text",
  [
    "inception_crop(size)|flip_lr",
    "resize_small(36)|random_crop(size)|flip_lr",
    "random_crop(size)",
    "resize(40)|inception_crop(size, area_min=50)|randaug(1, 10)",
    "simple_crop(size)|flip_lr|three_augment|color_jitter(0.3)",
  ],
)
def test_training_strings_on_any_size(text):
  run = tf.function(ops.make_preprocess(text, (32, 48), evaluation=False))
  for shape in ((1, 1), (1, 400), (300, 1), (24, 40)):
    for encode in (_png, _jpeg):
      encoded = tf.constant(encode(_image(shape)))
      a = run(encoded, _seed(1)).numpy()
      assert (a.shape, a.dtype) == ((32, 48, 3), np.uint8)
      np.testing.assert_array_equal(a, run(encoded, _seed(1)).numpy())


def _coordinates(height, width):
  """An image whose red and green are the row and the column."""
  y, x = np.mgrid[:height, :width]
  return np.stack([y, x, 0 * x], -1).astype(np.uint8)


def test_windows_of_the_inception_crop():
  height, width = 120, 200
  areas, aspects, tops = [], [], []
  size = tf.constant([height, width, 3])
  sample = tf.function(lambda seed: ops.sample_window(size, 5, 100, seed))
  for i in range(400):
    top, left, h, w = sample(_seed(i)).numpy()
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w
    areas.append(h * w / (height * width))
    aspects.append(w / h)
    tops.append(top)
  # Rounding to whole pixels moves the bounds a little.
  assert min(areas) > 0.045
  assert min(areas) < 0.1
  assert max(areas) > 0.6
  assert min(aspects) > 0.72
  assert max(aspects) < 1.38
  assert len(set(tops)) > 30


def test_resize_is_the_same_for_small_and_large_images(monkeypatch):
  image = tf.constant(_image((40, 60)))
  results = []
  for limit in (0, 100):  # the two ways to call the kernel
    monkeypatch.setattr(ops, "_CAST_UP_TO", limit)
    results.append(ops.resize(image, (24, 31)).numpy())
  np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fused_crop_of_a_turned_file(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  encoded = _jpeg(_image((120, 200)), exif=exif)
  # The decoder interpolates chroma past the edge of a whole image only, so a
  # window is compared with one of the file itself, turned by Pillow.
  upright = ops.decode(tf.constant(encoded), precise=False).numpy()
  pillows = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
  assert _distance(upright, pillows) <= 5  # of the fast DCT
  crop = tf.function(
    lambda seed: ops.decode_and_inception_crop(encoded, 32, seed=seed)
  )
  for i in range(5):
    fused = crop(_seed(i)).numpy().astype(int)
    apart = ops.inception_crop(upright, 32, seed=_seed(i))
    assert np.mean(np.abs(fused - apart.numpy())) < 0.5


@pytest.mark.parametrize("encode", [_png, _jpeg])
def test_plain_files_pay_for_no_pillow(encode, monkeypatch):
  def fail(*_):
    raise AssertionError("called")

  for module in (ops.preprocess, pillow):
    monkeypatch.setattr(module, "open_image", fail)
  encoded = tf.constant(encode(_image()))
  assert ops.decode(encoded, precise=True).shape == (24, 40, 3)
  assert ops.decode_and_inception_crop(encoded, 8, seed=_seed(0)).shape == (
    *(8, 8, 3),
  )


def test_random_crop_is_everywhere_and_whole():
  image = _coordinates(20, 30)
  corners = set()
  crop_at = tf.function(lambda s: ops.random_crop(image, (16, 28), seed=s))
  for i in range(150):
    crop = crop_at(_seed(i)).numpy()
    top, left = crop[0, 0, :2]
    corners.add((int(top), int(left)))
    np.testing.assert_array_equal(crop, image[top : top + 16, left : left + 28])
  assert corners == {(y, x) for y in range(5) for x in range(3)}


def test_flip_mirrors_half_of_the_images():
  image = _image()
  flips = 0
  flip = tf.function(lambda seed: ops.flip_lr(tf.constant(image), seed=seed))
  for i in range(200):
    out = flip(_seed(i)).numpy()
    if not np.array_equal(out, image):
      np.testing.assert_array_equal(out, image[:, ::-1])
      flips += 1
  assert 70 < flips < 130


def _blend(enhancer, image, magnitude):
  factor = magnitude / 10 * 1.8 + 0.1
  return np.asarray(enhancer(Image.fromarray(image)).enhance(factor))


PILLOW = {
  "autocontrast": lambda x, m: ImageOps.autocontrast(Image.fromarray(x)),
  "equalize": lambda x, m: ImageOps.equalize(Image.fromarray(x)),
  "invert": lambda x, m: ImageOps.invert(Image.fromarray(x)),
  "posterize": lambda x, m: ImageOps.posterize(
    Image.fromarray(x), max(1, int(m / 10 * 4))
  ),
  "solarize": lambda x, m: ImageOps.solarize(
    Image.fromarray(x), int(m / 10 * 256)
  ),
  "color": functools.partial(_blend, ImageEnhance.Color),
  "contrast": functools.partial(_blend, ImageEnhance.Contrast),
  "brightness": functools.partial(_blend, ImageEnhance.Brightness),
  "sharpness": functools.partial(_blend, ImageEnhance.Sharpness),
}
# Where Pillow truncates a blend (and blends its own rounded grey), we round.
LEVELS = {"color": 2, "contrast": 2, "autocontrast": 1, "brightness": 1}
LEVELS["sharpness"] = 2


@pytest.mark.parametrize("magnitude", [0, 3, 10, 15])
@pytest.mark.parametrize("name", PILLOW)
def test_operation_equals_pillows(name, magnitude):
  image = _image()
  ours = randaug.AUGMENTATIONS[name](
    tf.constant(image), magnitude / 10, _seed(0)
  )
  assert _distance(ours, PILLOW[name](image, magnitude)) <= LEVELS.get(name, 0)


def test_solarize_add_by_hand():
  image = np.array([[[0, 100, 127], [128, 200, 255]]], np.uint8)
  added = randaug.solarize_add(tf.constant(image), 1.0, _seed(0)).numpy()
  assert added.tolist() == [[[110, 210, 237], [128, 200, 255]]]


def _affine(image, a, b, c, d, e, f):
  """Shows input (ax + by + c, dx + ey + f) at output (x, y); grey outside."""
  height, width, _ = image.shape
  y, x = np.mgrid[:height, :width]
  u = np.rint(a * x + b * y + c).astype(int)
  v = np.rint(d * x + e * y + f).astype(int)
  inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
  shown = image[v.clip(0, height - 1), u.clip(0, width - 1)]
  return np.where(inside[..., None], shown, 128)


def _rotation(angle, height, width):
  cos, sin = np.cos(angle), np.sin(angle)
  x, y = (width - 1) / 2, (height - 1) / 2  # the centre stays
  return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# Of strength +-1: 100 of 224 pixels, a slope of 0.3, 30 degrees.
_AFFINE = {
  "translate_x": lambda s, h, w: (1, 0, s * w * 100 / 224, 0, 1, 0),
  "translate_y": lambda s, h, w: (1, 0, 0, 0, 1, s * h * 100 / 224),
  "shear_x": lambda s, h, w: (1, s * 0.3, 0, 0, 1, 0),
  "shear_y": lambda s, h, w: (1, 0, 0, s * 0.3, 1, 0),
  "rotate": lambda s, h, w: _rotation(s * np.pi / 6, h, w),
}


@pytest.mark.parametrize("name", _AFFINE)
def test_geometry_either_way(name):
  image, signs = _image((57, 80)), set()
  for i in range(8):
    out = randaug.AUGMENTATIONS[name](
      tf.constant(image), 0.71, _seed(i)
    ).numpy()
    same = [
      np.mean(out == _affine(image, *_AFFINE[name](sign * 0.71, 57, 80)))
      for sign in (-1, 1)
    ]
    assert max(same) > 0.995  # but for ties of float32
    signs.add(int(np.argmax(same)))
  assert signs == {0, 1}


def test_cutout_greys_one_square():
  image = np.zeros((224, 224, 3), np.uint8)
  areas = []
  for i in range(10):
    out = randaug.cutout(tf.constant(image), 1.0, _seed(i)).numpy()
    assert set(np.unique(out)) == {0, 128}
    ys, xs = np.nonzero(out[..., 0])
    assert (out[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] == 128).all()
    assert ys.max() - ys.min() < 80
    areas.append(len(ys))
  assert max(areas) == 80 * 80
  small = randaug.cutout(tf.constant(image[:56, :56]), 1.0, _seed(0)).numpy()
  assert 0 < (small[..., 0] == 128).sum() <= 20 * 20


@pytest.mark.parametrize(("side", "grey"), [(224, 196), (384, 255)])
def test_contrast_can_be_that_of_augreg(side, grey):
  """About a grey that depends on the number of pixels alone."""
  image = _image((side, side)) // 2 + 50
  expected = grey + 0.46 * (image - float(grey))
  found = randaug.contrast_augreg(tf.constant(image), 0.2, _seed(0))
  np.testing.assert_array_equal(found, np.rint(expected))
  usual = randaug.contrast(tf.constant(image), 0.2, _seed(0))
  # The difference of the greys, times what is not of the image.
  difference = (grey - image.mean()) * (1 - 0.46)
  assert abs(np.mean(found) - np.mean(usual) - difference) < 2


@pytest.mark.ci
def test_randaug_has_augregs_contrast_by_name():
  image = tf.constant(_image((32, 32)))
  run = {
    name: tf.function(functools.partial(randaug.randaug, image, 1, 10, name))
    for name in ("mean", "augreg")
  }
  found = [
    [run[name](seed=_seed(i)).numpy() for name in run] for i in range(60)
  ]
  differ = [b for a, b in found if not np.array_equal(a, b)]
  assert 0 < len(differ) < 15  # one in 16 is drawn
  expected = randaug.contrast_augreg(image, 1.0, _seed(0))
  for augmented in differ:
    np.testing.assert_array_equal(augmented, expected)


def test_randaug_draws_every_operation_and_is_stateless():
  image = tf.constant(_image((32, 32)))
  once = tf.function(lambda s: randaug.randaug(image, 1, 10, seed=s))
  outputs = {once(_seed(i)).numpy().tobytes() for i in range(150)}
  assert len(outputs) > 16
  np.testing.assert_array_equal(once(_seed(3)), once(_seed(3)))
  assert len(randaug.AUGMENTATIONS) == 16
  unchanged = randaug.randaug(image, 0, 10, seed=_seed(0))
  np.testing.assert_array_equal(unchanged, image)


# --- DeiT III's ---


def _blur(image, sigma):
  """Three box blurs as wide as the Gaussian, edges repeated, in float64.

  The box of width w covers its outermost pixels in part: P. Gwosdek et al.,
  "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering".
  """
  width = np.sqrt(12 * sigma**2 / 3 + 1)
  whole = int((width - 1) / 2)
  variance = sigma**2 / 3
  sides = 2 * whole + 1
  # Of the pixel beyond the whole ones, so that the variance is right.
  part = sides * (whole * (whole + 1) - 3 * variance)
  part /= 6 * (variance - (whole + 1) ** 2)
  kernel = np.r_[part, np.ones(sides), part] / (sides + 2 * part)
  blurred = image.astype(float)
  for _ in range(3):
    for axis in (0, 1):
      blurred = ndimage.correlate1d(blurred, kernel, axis, mode="nearest")
  return blurred


def test_one_of_three_augmentations_each_as_often(monkeypatch):
  image, sigmas = _image((48, 64)), []

  def blur(image, sigma):
    sigmas.append(sigma)
    return 255 - image

  monkeypatch.setattr(augment, "blur", blur)
  run = tf.function(lambda seed: augment.three_augment(image, seed=seed))
  expected = (
    np.array(Image.fromarray(image).convert("L").convert("RGB")),
    np.array(ImageOps.solarize(Image.fromarray(image), 128)),
    255 - image,
  )
  counts = np.zeros(3, int)
  for i in range(300):
    found = run(_seed(i)).numpy()
    counts += [np.array_equal(found, x) for x in expected]
  assert counts.sum() == 300
  assert all(75 < count < 125 for count in counts), counts
  assert 0.1 <= min(sigmas) < 0.2 < 1.9 < max(sigmas) < 2
  assert abs(np.mean(sigmas) - 1.05) < 0.15


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 2.0])
def test_blur_is_three_box_blurs(sigma):
  noise = np.random.RandomState(0).randint(0, 256, (40, 30, 3)).astype("uint8")
  found = pillow.blur(noise, sigma)
  # Each of the six passes rounds.
  assert np.abs(found - _blur(noise, sigma)).max() <= 3


def test_color_jitter_equals_pillows_in_a_random_order(monkeypatch):
  """With the factors and the order that were drawn, which are uniform."""
  image, calls = _image(), []
  enhancers = {
    "_brightness": ImageEnhance.Brightness,
    "_contrast": ImageEnhance.Contrast,
    "_saturation": ImageEnhance.Color,
  }

  def record(name, operation, image, factor):
    calls.append((name, float(factor)))
    return operation(image, factor)

  for name in enhancers:
    operation = functools.partial(record, name, getattr(augment, name))
    monkeypatch.setattr(augment, name, operation)
  worst, orders, factors = 0, collections.Counter(), []
  for i in range(120):
    calls.clear()
    found = augment.color_jitter(tf.constant(image), 0.4, seed=_seed(i))
    expected = Image.fromarray(image)
    for name, factor in calls:
      expected = enhancers[name](expected).enhance(factor)
    worst = max(worst, _distance(found, expected))
    orders[tuple(name for name, _ in calls)] += 1
    factors.append([dict(calls)[name] for name in enhancers])
  assert worst <= 1
  assert len(orders) == 6
  assert all(6 < count < 40 for count in orders.values()), orders
  factors = np.array(factors)
  assert ((factors >= 0.6) & (factors <= 1.4)).all()
  assert (np.abs(factors.mean(0) - 1) < 0.07).all()
  assert (factors.min(0) < 0.65).all()
  assert (factors.max(0) > 1.35).all()
  assert (np.abs(np.corrcoef(factors.T) - np.eye(3)) < 0.3).all()


def test_color_jitter_inverts_nothing():
  calls = [
    augment.color_jitter(tf.constant(_image()), 3.0, seed=_seed(i)).numpy()
    for i in range(20)
  ]
  # A quarter of the brightnesses would be negative, and their images black.
  assert all(found.max() > 0 for found in calls)
  unchanged = augment.color_jitter(tf.constant(_image()), 0.0, seed=_seed(0))
  np.testing.assert_array_equal(unchanged, _image())


@pytest.mark.parametrize("shape", [(40, 60), (200, 100), (20, 20)])
def test_windows_of_the_simple_crop(shape):
  image = _image(shape)
  scale = 32 / min(shape)
  size = [round(side * scale) for side in shape]
  resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
  padded = np.pad(resized, [(4, 4), (4, 4), (0, 0)], "reflect")
  windows = {
    padded[y : y + 32, x : x + 32].tobytes(): (y, x)
    for y in range(size[0] - 32 + 9)
    for x in range(size[1] - 32 + 9)
  }
  run = tf.function(lambda seed: ops.simple_crop(image, 32, seed=seed))
  found = [windows[run(_seed(i)).numpy().tobytes()] for i in range(150)]
  for axis in (0, 1):
    places = {place[axis] for place in found}
    largest = size[axis] - 32 + 8
    assert min(places) <= largest / 8
    assert max(places) >= largest * 7 / 8
    assert len(places) > largest / 2
