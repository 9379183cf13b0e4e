"""Pixels after whole recipes, against arithmetic that is written here again.

In float64, by the definitions: half-pixel centres, bilinear interpolation
without antialiasing, areas as integrals, crops by whole pixels. What a recipe
draws at random (a window, a mirror image) is found again, not taken from it.
Within half a level of 255, which is what rounding costs.
"""

import functools
import io

import numpy as np
import pictures
import pytest
import tensorflow as tf
from PIL import Image

from vit_jax import data
from vit_jax.data import ops, preprocess

_SHAPES = ((40, 60), (90, 50), (33, 33))
_photo = functools.partial(pictures.photo, noise=20)


# --- the reference ---


def _weights_bilinear(size_in, size_out):
  """f64[out in]: which input pixels an output pixel is made of."""
  weights = np.zeros((size_out, size_in))
  for i in range(size_out):
    # Pixel i covers [i, i + 1]; its middle, in the input's coordinates.
    middle = (i + 0.5) * size_in / size_out - 0.5
    low = int(np.floor(middle))
    for pixel, weight in ((low, 1 - (middle - low)), (low + 1, middle - low)):
      weights[i, min(max(pixel, 0), size_in - 1)] += weight
  return weights


def _weights_area(size_in, size_out):
  weights = np.zeros((size_out, size_in))
  for i in range(size_out):
    start, end = i * size_in / size_out, (i + 1) * size_in / size_out
    for pixel in range(size_in):
      covered = min(end, pixel + 1) - max(start, pixel)
      weights[i, pixel] = max(covered, 0) / (end - start)
  return weights


def _resize(pixels, size, weights=_weights_bilinear):
  rows = weights(pixels.shape[0], size[0])
  columns = weights(pixels.shape[1], size[1])
  return np.einsum("yh,xw,hwc->yxc", rows, columns, pixels.astype(float))


def _resize_small(pixels, smaller):
  height, width = pixels.shape[:2]
  short = min(height, width)
  # Halves up.
  size = [int(np.floor(s * smaller / short + 0.5)) for s in (height, width)]
  return _resize(pixels, size, _weights_area)


def _weights_averaging(method, size_in, size_out):
  """Of a filter that is as much wider as the output is smaller."""
  scale = size_in / size_out
  weights = np.zeros((size_out, size_in))
  for i in range(size_out):
    for pixel in range(size_in):
      x = abs((i + 0.5) * scale - (pixel + 0.5)) / max(scale, 1)
      if method == "bilinear":
        weights[i, pixel] = max(1 - x, 0)
      elif x < 1:  # Keys, a = -0.5
        weights[i, pixel] = 1.5 * x**3 - 2.5 * x**2 + 1
      elif x < 2:
        weights[i, pixel] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights[i] /= weights[i].sum()
  return weights


def _resize_averaging(pixels, size, method):
  """Width, then height; rounded and cut off after each, as by Pillow."""
  for axis, new in ((1, size[1]), (0, size[0])):
    weights = _weights_averaging(method, pixels.shape[axis], new)
    moved = np.tensordot(weights, pixels.astype(float), (1, axis))
    pixels = np.moveaxis(moved, 0, axis).round().clip(0, 255)
  return pixels


def _central_crop(pixels, size):
  top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
  return pixels[top : top + size, left : left + size]


def _crops(pixels, size):
  for top in range(pixels.shape[0] - size + 1):
    for left in range(pixels.shape[1] - size + 1):
      yield pixels[top : top + size, left : left + size]


def _mirror(images):
  for image in images:
    yield image
    yield image[:, ::-1]


def _distance(a, b):
  """In levels of 255; rounding alone is up to 0.5 a resize."""
  return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()


# --- evaluation ---

EVALUATION = {
  "resize(size)": lambda x, size: _resize(x, (size, size)),
  "resize_small(36)|central_crop(size)": lambda x, size: _central_crop(
    _resize_small(x, 36), size
  ),
  "resize_small(64)|central_crop(size)": lambda x, size: _central_crop(
    _resize_small(x, 64), size
  ),
}


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", _SHAPES)
def test_evaluation_that_averages(method, shape):
  """Bit by bit as Pillow; black and white, so that bicubic is cut off."""
  rng = np.random.default_rng(0)
  pixels = 255 * rng.integers(0, 2, (*shape, 3), np.uint8)
  # Two sides that shrink, two that grow, one of each.
  for height, width in ((20, 24), (97, 120), (30, 100)):
    size = (height, width)
    text = f"resize(size, method='{method}', antialias=True)"
    run = ops.make_preprocess(text, size, evaluation=True)
    ours = run(tf.constant(pictures.encode(pixels, "PNG")), None).numpy()
    assert _distance(ours, _resize_averaging(pixels, size, method)) <= 1
    in_numpy = preprocess.preprocess_image(pixels, text, size)
    np.testing.assert_array_equal(in_numpy, ours)
    filters = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
    pillows = Image.fromarray(pixels).resize((width, height), filters[method])
    np.testing.assert_array_equal(pillows, ours)


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("text", EVALUATION)
def test_evaluation(text, shape):
  photo, size = _photo(shape), 32
  expected = EVALUATION[text](photo, size)
  run = ops.make_preprocess(text, size, evaluation=True)
  ours = run(tf.constant(pictures.encode(photo, "PNG")), None).numpy()
  assert _distance(ours, expected) <= 0.502
  in_numpy = preprocess.preprocess_image(photo, text, size)
  np.testing.assert_array_equal(in_numpy, ours)


# --- training ---


def _train(text, photo, size, i):
  run = ops.make_preprocess(text, size, evaluation=False)
  seed = tf.constant([3, i], tf.int64)
  return run(tf.constant(pictures.encode(photo, "PNG")), seed).numpy()


@pytest.mark.parametrize(
  "name", ["caltech101", "smallnorb_azimuth", "clevr_count",
           "dsprites_location"],
)  # fmt: skip
def test_training_on_vtab(name):
  task = data.find_task(f"vtab:{name}")
  size, larger = 24, 28  # 24 * 448 / 384
  text, flips, places = task.train_preprocess(size), set(), set()
  for i, shape in enumerate(_SHAPES * 3):
    photo = _photo(shape, i)
    ours = _train(text, photo, size, i)
    if task.crop:
      candidates = _crops(_resize(photo, (larger, larger)), size)
    else:
      candidates = [_resize(photo, (size, size))]
    distances = [_distance(ours, c) for c in _mirror(candidates)]
    best = int(np.argmin(distances))
    assert distances[best] <= 0.502
    flips.add(best % 2)
    places.add(best // 2)
  assert flips == ({0, 1} if task.flip else {0})
  assert (len(places) > 3) == task.crop


def test_training_on_windows():
  """The window is found among all of its area and aspect."""
  text, area_min = "inception_crop(size, 20)|flip_lr", 20
  shape, size = (18, 22), 8
  for i in range(3):
    photo = _photo(shape, i)
    ours = _train(text, photo, size, i)
    best = np.inf
    for height in range(1, shape[0] + 1):
      for width in range(1, shape[1] + 1):
        share = height * width / (shape[0] * shape[1])
        # Whole pixels move the bounds by up to half a pixel a side.
        slack = (height + width) / (shape[0] * shape[1])
        if share < area_min / 100 - slack:
          continue
        if (width + 0.5) / (height - 0.5) < 0.75:
          continue
        if (width - 0.5) / (height + 0.5) > 1.33:
          continue
        rows = _weights_bilinear(height, size)
        columns = _weights_bilinear(width, size)
        windows = np.lib.stride_tricks.sliding_window_view(
          photo.astype(float), (height, width), (0, 1)
        )
        all_of_them = np.einsum(
          "yh,xw,tlchw->tlyxc", rows, columns, windows, optimize=True
        )
        for flipped in (all_of_them, all_of_them[..., ::-1, :]):
          errors = np.abs(flipped - ours).max((2, 3, 4))
          best = min(best, errors.min())
    assert best <= 0.502


def test_jpegs():
  """Evaluation decodes as Pillow does, training as TensorFlow, fast, does."""
  photo = _photo((64, 64))
  file = pictures.encode(photo, "JPEG", quality=90)
  encoded = tf.constant(file)
  pillows = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
  evaluated = ops.make_preprocess("resize(size)", 48, evaluation=True)
  expected = _resize(pillows, (48, 48))
  assert _distance(evaluated(encoded, None), expected) <= 0.502
  fast = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_FAST")
  trained = ops.make_preprocess("resize(size)", 48, evaluation=False)
  ours = trained(encoded, tf.constant([0, 0], tf.int64))
  assert _distance(ours, _resize(fast.numpy(), (48, 48))) <= 0.502
  # Noise as strong as this photo's is where the two transforms differ most.
  between = np.abs(pillows.astype(int) - fast.numpy())
  assert between.max() <= 5
  assert between.mean() <= 1.2
