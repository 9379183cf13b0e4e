"""Decoding, cropping and augmentation in TensorFlow.

Images are uint8[h w 3] between operations. Resizes compute in float32 and
round, which is within half a level of a float pipeline; truncating would be up
to one level off. Random operations take a stateless seed, so that an image's
augmentation depends on (seed, step, row) and nothing else.
"""

# TensorFlow's annotations lack tf.random.experimental.
# pyright: reportAttributeAccessIssue=false

import contextlib
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from vit_jax.data import preprocess
from vit_jax.data.augment import color_jitter, three_augment
from vit_jax.data.pillow import resize_averaging
from vit_jax.data.randaug import draw_integer, height_width, randaug

# Accelerators are for JAX. TensorFlow raises if the caller has initialised its
# devices before.
for _kind in ("GPU", "TPU"):
  with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], _kind)

# Pixels, as a multiple of the output's; at three, casting is no longer faster.
_CAST_UP_TO = 2
_HEAD = 2**14  # bytes of a file in which its EXIF or palette begins


def make_preprocess(
  text: str, image_size: int | tuple[int, int], *, evaluation: bool
) -> Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor]:
  """Returns the function of a preprocessing string.

  Args:
    text: see `vit_jax.data.preprocess`.
    image_size: height and width, pixels.
    evaluation: use the accurate DCT and allow no random operations.

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
      if i:
        image = _OPS[name](image, **arguments)
      elif name == "inception_crop":
        image = decode_and_inception_crop(encoded, **arguments)
      else:
        image = _OPS[name](decode(encoded, precise=evaluation), **arguments)
    return tf.ensure_shape(image, (height, width, 3))

  return run


# --- decoding ---


def decode(encoded: tf.Tensor, *, precise: bool) -> tf.Tensor:
  """Decodes JPEG, PNG, WebP, GIF or BMP to uint8[h w 3].

  Like `preprocess.decode_image`, applies EXIF orientation and composites
  transparency on white. TensorFlow supports neither, so Pillow decodes files
  that may have transparency.

  Args:
    encoded: scalar string.
    precise: use the accurate integer DCT, as Pillow does, instead of the fast
      one (up to 3 levels different).
  """
  dct = "INTEGER_ACCURATE" if precise else "INTEGER_FAST"

  def decode_jpeg():
    image = tf.io.decode_jpeg(encoded, channels=3, dct_method=dct)
    return _turn(image, _read_turn(encoded))

  image = tf.cond(
    tf.io.is_jpeg(encoded), decode_jpeg, lambda: _decode_other(encoded)
  )
  return tf.ensure_shape(image, (None, None, 3))


def decode_and_inception_crop(
  encoded, size, area_min=5, area_max=100, *, seed
) -> tf.Tensor:
  """Runs `decode` and `inception_crop`; of a JPEG, decodes only the crop."""

  def crop_jpeg():
    shape, turn = tf.io.extract_jpeg_shape(encoded), _read_turn(encoded)
    upright = tf.where(turn[2], tf.gather(shape, [1, 0, 2]), shape)
    window = sample_window(upright, area_min, area_max, seed)
    window = _turn_back(window, shape, turn)
    image = tf.io.decode_and_crop_jpeg(
      encoded, window, channels=3, dct_method="INTEGER_FAST"
    )
    return resize(_turn(image, turn), size)

  def crop_other():
    image = _decode_other(encoded)
    return inception_crop(image, size, area_min, area_max, seed=seed)

  return tf.cond(tf.io.is_jpeg(encoded), crop_jpeg, crop_other)


def _decode_other(encoded):
  """Decodes other formats than JPEG; with Pillow unless `_is_plain`."""
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
  # The simplest kind of WebP has neither transparency nor EXIF.
  is_lossy_webp = tf.strings.substr(encoded, 12, 4) == b"VP8 "
  opaque = is_png & ~has_alpha & ~_contains(encoded, "tRNS|eXIf")
  return opaque | is_lossy_webp


def _contains(encoded, pattern):
  """Returns whether a pattern is in the head of a file, in microseconds."""
  head = tf.strings.substr(encoded, 0, _HEAD)
  # Searching takes a twentieth of the time of matching ".*pattern.*".
  rest = tf.strings.regex_replace(head, pattern, "", replace_global=False)
  return tf.strings.length(rest) < tf.strings.length(head)


def _read_turn(encoded):
  """Returns the bool[3] of `preprocess.read_turn` of a JPEG."""

  def read(encoded):
    return preprocess.read_turn(preprocess.open_image(encoded, "image"))

  turn = tf.cond(
    _contains(encoded, r"Exif\x00\x00"),
    lambda: _call(read, encoded, tf.bool),
    lambda: tf.zeros([3], tf.bool),
  )
  return tf.ensure_shape(turn, [3])


def _call(function, encoded, dtype):
  """Runs a Python function of bytes in a graph."""

  def run(encoded):  # bytes in a graph, object[] in eager mode
    return function(np.asarray(encoded, object).item())

  return tf.numpy_function(run, [encoded], dtype, stateful=False)


def _turn(image, turn):
  def run():
    flipped = tf.reverse(image, tf.reshape(tf.where(turn[:2]), [-1]))
    return tf.cond(
      turn[2], lambda: tf.transpose(flipped, (1, 0, 2)), lambda: flipped
    )

  return tf.cond(tf.reduce_any(turn), run, lambda: image)


def _turn_back(window, shape, turn):
  """Maps a window of the upright image to the stored image of that shape."""
  top_left, size = window[:2], window[2:]
  top_left = tf.where(turn[2], top_left[::-1], top_left)
  size = tf.where(turn[2], size[::-1], size)
  top_left = tf.where(turn[:2], shape[:2] - top_left - size, top_left)
  return tf.concat([top_left, size], axis=0)


# --- sizes ---


def resize(image, size, method="bilinear", antialias=False):
  """Resizes to `size`, aspect ignored; half-pixel centres.

  With `antialias` as in Pillow; otherwise only "area" averages.
  """
  size = preprocess.as_pair(size)
  if antialias or method != "bilinear":
    return _resize(image, size, method, antialias)
  # TensorFlow's kernel gives the same for floats, and faster. But casting takes
  # time for each pixel, including those that are skipped when shrinking.
  height, width = height_width(image, tf.int64)
  return tf.cond(
    height * width <= _CAST_UP_TO * size[0] * size[1],
    lambda: _resize(tf.cast(image, tf.float32), size),
    lambda: _resize(image, size),
  )


def _resize(image, size, method="bilinear", antialias=False):
  # The size may depend on the image; one too large would exhaust memory.
  pixels = tf.reduce_prod(tf.cast(size, tf.int64))
  words = "after resizing it has too many pixels:"
  tf.debugging.Assert(pixels <= preprocess.MAX_PIXELS, [words, size])
  size = tf.cast(size, tf.int32)
  if antialias:
    return _resize_averaging(image, size, method)
  return tf.cast(tf.round(tf.image.resize(image, size, method)), tf.uint8)


def resize_small(image, smaller_size, method="area", antialias=False):
  """Resizes the shorter side to `smaller_size` pixels, keeping the aspect."""
  sides = tf.shape(image, tf.int64)[:2]  # int32 may overflow
  short = tf.reduce_min(sides)
  size = preprocess.scale_side(sides, short, smaller_size)
  return _resize(image, size, method, antialias)


def _resize_averaging(image, size, method):
  """Runs `resize_averaging`, because TensorFlow's own takes twice the time.

  That also differs by up to two levels, as it does not round between both axes.
  """

  def run(image, size):
    return resize_averaging(image, size, method)

  resized = tf.numpy_function(run, [image, size], tf.uint8, stateful=False)
  return tf.ensure_shape(resized, (None, None, 3))


def central_crop(image, size):
  """Crops `size` from the middle; enlarges smaller images until it fits."""
  return _crop(image, size, lambda largest: largest // 2)


def random_crop(image, size, *, seed):
  """Crops `size` anywhere; enlarges smaller images until it fits."""
  place = tf.random.stateless_uniform([2], seed)
  return _crop(image, size, lambda largest: draw_integer(place, largest))


def simple_crop(image, size, *, seed):
  """Crops `size` anywhere after resizing to about that size, as in DeiT III.

  The shorter side is resized to it (bicubic, as in Pillow), and each border is
  padded with 4 pixels by reflection.
  """
  side = max(preprocess.as_pair(size))
  image = resize_small(image, side, method="bicubic", antialias=True)
  image = tf.pad(image, [[4, 4], [4, 4], [0, 0]], "REFLECT")
  return random_crop(image, size, seed=seed)


def _crop(image, size, choose):
  """Crops `size`; `choose` maps the largest (top, left) to the one used."""
  size = preprocess.as_pair(size)
  height, width = height_width(image, tf.int64)  # int32 may overflow

  def enlarge():
    # At least one of the two sides ends up equal to the crop's.
    new_height = tf.maximum(-(-height * size[1] // width), size[0])
    new_width = tf.maximum(-(-width * size[0] // height), size[1])
    return _resize(image, tf.stack([new_height, new_width]))

  too_small = (height < size[0]) | (width < size[1])
  image = tf.cond(too_small, enlarge, lambda: image)
  corner = choose(tf.shape(image)[:2] - size)
  return tf.image.crop_to_bounding_box(image, *tf.unstack(corner), *size)


def inception_crop(image, size, area_min=5, area_max=100, *, seed):
  """Resizes a random window, area in percent, aspect 0.75 to 1.33, to `size`.

  Source: Szegedy et al., "Going Deeper with Convolutions", 2015.
  """
  window = sample_window(tf.shape(image), area_min, area_max, seed)
  window = tf.unstack(window)
  return resize(tf.image.crop_to_bounding_box(image, *window), size)


def flip_lr(image, *, seed):
  """Mirrors left to right with probability 1/2."""
  flip = tf.random.stateless_uniform([], seed) < 0.5
  return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


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
    *(random_crop, simple_crop, inception_crop, flip_lr, randaug),
    *(three_augment, color_jitter),
  )
}
