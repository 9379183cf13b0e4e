"""Decoding, cropping and augmentation in TensorFlow.

Images are uint8[h w 3] between operations. Resizes compute in float32 and
round: within half a level of a pipeline that stays in float, where truncating
would be up to one off. Random operations take a stateless seed, so that an
image's augmentation depends on (seed, step, row) and nothing else.
"""

# TensorFlow's annotations do not know tf.random.experimental.
# pyright: reportAttributeAccessIssue=false

import contextlib
import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from vit_jax.data import preprocess
from vit_jax.data.pillow import resize_averaging
from vit_jax.data.randaug import draw_integer, height_width, randaug

# The accelerators are JAX's. TensorFlow refuses once it has started, which
# happens where the caller has already given it its devices.
for _kind in ("GPU", "TPU"):
  with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], _kind)

# Pixels, as a multiple of those of the result; from three on it does not pay.
_CAST_UP_TO = 2
_HEAD = 2**14  # bytes of a file in which its EXIF or palette begins


def make_preprocess(
  text: str, image_size: int | tuple[int, int], *, evaluation: bool
) -> Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor]:
  """Builds the function of a preprocessing string.

  Args:
    text: see `vit_jax.data.preprocess`.
    image_size: height and width, pixels.
    evaluation: decode with the accurate DCT, allow no random operation.

  Returns:
    (encoded image: string, seed: int[2]) -> uint8[h w 3].

  Raises:
    UserError: as `preprocess.parse`.
  """
  steps = preprocess.parse(text, image_size, evaluation=evaluation)
  height, width = preprocess.as_pair(image_size)

  def run(encoded, seed):
    image = None
    for i, (name, arguments) in enumerate(steps):
      if name in preprocess.TRAINING_OPS:
        op_seed = tf.random.experimental.stateless_fold_in(seed, i)
        arguments = {**arguments, "seed": op_seed}
      if image is None and name == "inception_crop":
        image = decode_and_inception_crop(encoded, **arguments)
        continue
      if image is None:
        image = decode(encoded, precise=evaluation)
      image = _OPS[name](image, **arguments)
    return tf.ensure_shape(image, (height, width, 3))

  return run


# --- decoding ---


def decode(encoded: tf.Tensor, *, precise: bool) -> tf.Tensor:
  """Decodes JPEG, PNG, WebP, GIF or BMP to uint8[h w 3].

  As `preprocess.decode_image`: EXIF orientation is obeyed, transparency
  composited on white. TensorFlow can do neither, so files with transparency go
  through Pillow.

  Args:
    encoded: scalar string.
    precise: take the accurate integer DCT, which is also Pillow's, rather than
      the fast one (up to 3 levels apart).
  """
  dct = "INTEGER_ACCURATE" if precise else "INTEGER_FAST"

  def decode_jpeg():
    image = tf.io.decode_jpeg(encoded, channels=3, dct_method=dct)
    return tf.cond(
      _has_exif(encoded),
      lambda: _turn(image, _read_turn(encoded)),
      lambda: image,
    )

  image = tf.cond(
    tf.io.is_jpeg(encoded), decode_jpeg, lambda: _decode_other(encoded)
  )
  return tf.ensure_shape(image, (None, None, 3))


def decode_and_inception_crop(
  encoded, size, area_min=5, area_max=100, *, seed
) -> tf.Tensor:
  """As `decode` and `inception_crop`, but decodes only the crop of a JPEG."""

  def crop_jpeg():
    shape = tf.io.extract_jpeg_shape(encoded)
    decode_window = functools.partial(
      tf.io.decode_and_crop_jpeg, channels=3, dct_method="INTEGER_FAST"
    )

    def crop():
      window = sample_window(shape, area_min, area_max, seed)
      return decode_window(encoded, window)

    def crop_and_turn():
      turn = _read_turn(encoded)
      upright = tf.where(turn[2], tf.gather(shape, [1, 0, 2]), shape)
      window = sample_window(upright, area_min, area_max, seed)
      return _turn(
        decode_window(encoded, _turn_back(window, shape, turn)), turn
      )

    return tf.cond(_has_exif(encoded), crop_and_turn, crop)

  def crop_other():
    image = _decode_other(encoded)
    return _crop_randomly(image, area_min, area_max, seed)

  image = tf.cond(tf.io.is_jpeg(encoded), crop_jpeg, crop_other)
  return resize(tf.ensure_shape(image, (None, None, 3)), size)


def _decode_other(encoded):
  """Decodes other than JPEG; with Pillow what may be transparent or turned."""
  image = tf.cond(
    _is_plain(encoded),
    lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    lambda: _call(preprocess.decode_image, encoded, tf.uint8),
  )
  return tf.ensure_shape(image, (None, None, 3))


def _is_plain(encoded):
  """Returns whether a file is an opaque PNG without EXIF, or a lossy WebP."""
  is_png = tf.strings.substr(encoded, 0, 4) == b"\x89PNG"
  colour_type = tf.strings.substr(encoded, 25, 1)
  has_alpha = (colour_type == b"\4") | (colour_type == b"\6")
  # The simplest kind of WebP, which has neither.
  is_lossy_webp = tf.strings.substr(encoded, 12, 4) == b"VP8 "
  opaque = is_png & ~has_alpha & ~_contains(encoded, "tRNS|eXIf")
  return opaque | is_lossy_webp


def _has_exif(encoded):
  return _contains(encoded, r"Exif\x00\x00")


def _contains(encoded, pattern):
  """Returns whether a pattern is in the head of a file, in microseconds."""
  head = tf.strings.substr(encoded, 0, _HEAD)
  # Searching takes a twentieth of what matching ".*pattern.*" does.
  rest = tf.strings.regex_replace(head, pattern, "", replace_global=False)
  return tf.strings.length(rest) < tf.strings.length(head)


def _read_turn(encoded):
  """Returns the bool[3] of `preprocess.read_turn`."""

  def read(encoded):
    return preprocess.read_turn(preprocess.open_image(encoded, "image"))

  return tf.ensure_shape(_call(read, encoded, tf.bool), [3])


def _call(function, encoded, dtype):
  """Runs a Python function of bytes in a graph."""

  def run(encoded):  # bytes in a graph, object[] out of it
    return function(np.asarray(encoded, object).item())

  return tf.numpy_function(run, [encoded], dtype, stateful=False)


def _turn(image, turn):
  image = tf.reverse(image, tf.reshape(tf.where(turn[:2]), [-1]))
  return tf.cond(turn[2], lambda: tf.transpose(image, (1, 0, 2)), lambda: image)


def _turn_back(window, shape, turn):
  """Maps a window of the upright image to one of the file, of that shape."""
  top_left, size = window[:2], window[2:]
  top_left = tf.where(turn[2], top_left[::-1], top_left)
  size = tf.where(turn[2], size[::-1], size)
  top_left = tf.where(turn[:2], shape[:2] - top_left - size, top_left)
  return tf.concat([top_left, size], axis=0)


# --- sizes ---


def resize(image, size, method="bilinear", antialias=False):
  """Resizes to `size`, aspect ignored; half-pixel centres.

  With `antialias` as Pillow, else without averaging, but for "area".
  """
  pair = preprocess.as_pair(size)
  if antialias:
    return _resize_averaging(image, pair, method)
  run = functools.partial(tf.image.resize, size=pair, method=method)
  if method != "bilinear":
    return tf.cast(tf.round(run(image)), tf.uint8)
  # TensorFlow's kernel gives the same for floats, and faster; but casting takes
  # time for each pixel, also for those that are skipped when shrinking.
  height, width = height_width(image, tf.int64)
  few = height * width <= _CAST_UP_TO * pair[0] * pair[1]
  resized = tf.cond(
    few, lambda: run(tf.cast(image, tf.float32)), lambda: run(image)
  )
  return tf.cast(tf.round(resized), tf.uint8)


def resize_small(image, smaller_size, method="area", antialias=False):
  """Resizes the shorter side to `smaller_size` pixels, keeping the aspect."""
  height, width = height_width(image, tf.int64)  # products may pass 2**31
  short = tf.minimum(height, width)
  size = tf.stack(
    [preprocess.scale_side(s, short, smaller_size) for s in (height, width)]
  )
  size = _check_size(size)
  if antialias:
    return _resize_averaging(image, size, method)
  resized = tf.image.resize(image, size, method=method)
  return tf.cast(tf.round(resized), tf.uint8)


def _resize_averaging(image, size, method):
  """As `resize_averaging`: TensorFlow's own takes twice the time.

  It also differs by up to two levels, as it does not round between both axes.
  """

  def run(image, size):
    return resize_averaging(image, size, method)

  resized = tf.numpy_function(run, [image, size], tf.uint8, stateful=False)
  return tf.ensure_shape(resized, (None, None, 3))


def central_crop(image, size):
  """Crops `size` from the middle; enlarges smaller images until it fits."""
  crop = preprocess.as_pair(size)
  image = _enlarge_to_fit(image, crop)
  height, width = height_width(image)
  top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
  return tf.image.crop_to_bounding_box(image, top, left, *crop)


def random_crop(image, size, *, seed):
  """Crops `size` anywhere; enlarges smaller images until it fits."""
  crop = preprocess.as_pair(size)
  image = _enlarge_to_fit(image, crop)
  height, width = height_width(image)
  top, left = tf.unstack(tf.random.stateless_uniform([2], seed))
  top = draw_integer(top, height - crop[0])
  left = draw_integer(left, width - crop[1])
  return tf.image.crop_to_bounding_box(image, top, left, *crop)


def inception_crop(image, size, area_min=5, area_max=100, *, seed):
  """Resizes a random window, area in percent, aspect 0.75 to 1.33, to `size`.

  Source: Szegedy et al., "Going Deeper with Convolutions", 2015.
  """
  return resize(_crop_randomly(image, area_min, area_max, seed), size)


def _crop_randomly(image, area_min, area_max, seed):
  window = sample_window(tf.shape(image), area_min, area_max, seed)
  return tf.image.crop_to_bounding_box(image, *tf.unstack(window))


def flip_lr(image, *, seed):
  """Mirrors left to right, every second image on average."""
  flip = tf.random.stateless_uniform([], seed) < 0.5
  return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


def _check_size(size):
  """Returns a size as int32[2]; fails if it would fill the memory."""
  fits = size[0] * size[1] <= preprocess.MAX_PIXELS
  words = "resized it has too many pixels:"
  with tf.control_dependencies([tf.debugging.Assert(fits, [words, size])]):
    return tf.cast(size, tf.int32)


def _enlarge_to_fit(image, crop):
  height, width = height_width(image, tf.int64)  # products may pass 2**31

  def enlarge():
    # At least one of the two sides ends up equal to the crop's.
    new_height = tf.maximum(-(-height * crop[1] // width), crop[0])
    new_width = tf.maximum(-(-width * crop[0] // height), crop[1])
    size = _check_size(tf.stack([new_height, new_width]))
    resized = tf.image.resize(image, size)
    return tf.cast(tf.round(resized), tf.uint8)

  too_small = (height < crop[0]) | (width < crop[1])
  image = tf.cond(too_small, enlarge, lambda: image)
  return tf.ensure_shape(image, (None, None, 3))


def sample_window(shape, area_min, area_max, seed):
  """Returns int32[4]: top, left, height, width."""
  begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
    shape,
    bounding_boxes=tf.zeros([0, 0, 4]),
    seed=seed,
    min_object_covered=0.0,
    aspect_ratio_range=(0.75, 1.33),
    area_range=(area_min / 100, area_max / 100),
    max_attempts=100,
    use_image_if_no_bounding_boxes=True,
  )
  return tf.concat([begin[:2], extent[:2]], axis=0)


_OPS = {
  f.__name__: f
  for f in (
    *(resize, resize_small, central_crop),
    *(random_crop, inception_crop, flip_lr, randaug),
  )
}
