"""Decoding, cropping and augmentation in TensorFlow.

Images are uint8[h w 3] between operations. Resizes compute in float32 and
round: within half a level of a pipeline that stays in float, where truncating
would be up to one off. Whatever is random takes a stateless seed, so that an
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

# The accelerators are JAX's. TensorFlow refuses once it has started, which
# happens where the caller has already given it its devices.
for _kind in ("GPU", "TPU"):
  with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], _kind)

# RandAugment's pixel distances are stated for images of this size.
_REFERENCE_SIZE = 224
# Pixels, as a multiple of those of the result; from three on it does not pay.
_CAST_UP_TO = 2
_HEAD = 2**14  # bytes of a file in which its EXIF or palette begins
_GREY = 128  # what fills the pixels that an operation leaves empty


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
    for i, (name, args, kwargs) in enumerate(steps):
      if name in preprocess.TRAINING_OPS:
        op_seed = tf.random.experimental.stateless_fold_in(seed, i)
        kwargs = {**kwargs, "seed": op_seed}
      if image is None and name == "inception_crop":
        image = decode_and_inception_crop(encoded, *args, **kwargs)
        continue
      if image is None:
        image = decode(encoded, precise=evaluation)
      image = _OPS[name](image, *args, **kwargs)
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
  image.set_shape((None, None, 3))
  return image


def decode_and_inception_crop(
  encoded, size, area_min=5, area_max=100, *, seed
) -> tf.Tensor:
  """As `decode` and `inception_crop`, but decodes only the crop of a JPEG."""

  def crop_jpeg():
    shape = tf.io.extract_jpeg_shape(encoded)

    def crop():
      window = sample_window(shape, area_min, area_max, seed)
      return _decode_window(encoded, window)

    def crop_and_turn():
      turn = _read_turn(encoded)
      upright = tf.where(turn[2], tf.gather(shape, [1, 0, 2]), shape)
      window = sample_window(upright, area_min, area_max, seed)
      window = _turn_back(window, shape, turn)
      return _turn(_decode_window(encoded, window), turn)

    return tf.cond(_has_exif(encoded), crop_and_turn, crop)

  def crop_other():
    image = _decode_other(encoded)
    window = sample_window(tf.shape(image), area_min, area_max, seed)
    return tf.image.crop_to_bounding_box(image, *tf.unstack(window))

  image = tf.cond(tf.io.is_jpeg(encoded), crop_jpeg, crop_other)
  image.set_shape((None, None, 3))
  return resize(image, size)


def _decode_window(encoded, window):
  return tf.io.decode_and_crop_jpeg(
    encoded, window, channels=3, dct_method="INTEGER_FAST"
  )


def _decode_other(encoded):
  """Decodes what is no JPEG; Pillow what may be transparent or turned."""
  image = tf.cond(
    _is_plain(encoded),
    lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    lambda: _call(preprocess.decode_image, encoded, tf.uint8),
  )
  image.set_shape((None, None, 3))
  return image


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


def resize(image, size, method="bilinear"):
  """Resizes to `size`, aspect ignored; half-pixel centres, no antialiasing."""
  pair = preprocess.as_pair(size)
  run = functools.partial(tf.image.resize, size=pair, method=method)
  if method != "bilinear":
    return tf.cast(tf.round(run(image)), tf.uint8)
  # TensorFlow's kernel gives the same for floats, and faster; but casting takes
  # time for each pixel, also for those that are skipped when shrinking.
  height, width = _height_width(image, tf.int64)
  few = height * width <= _CAST_UP_TO * pair[0] * pair[1]
  resized = tf.cond(
    few, lambda: run(tf.cast(image, tf.float32)), lambda: run(image)
  )
  return tf.cast(tf.round(resized), tf.uint8)


def resize_small(image, smaller_size, method="area"):
  """Resizes the shorter side to `smaller_size` pixels, keeping the aspect."""
  height, width = _height_width(image, tf.int64)  # products may pass 2**31
  short = tf.minimum(height, width)
  size = tf.stack(
    [preprocess.scale_side(s, short, smaller_size) for s in (height, width)]
  )
  resized = tf.image.resize(image, _check_size(size), method=method)
  return tf.cast(tf.round(resized), tf.uint8)


def central_crop(image, size):
  """Crops `size` from the middle; enlarges smaller images until it fits."""
  crop = preprocess.as_pair(size)
  image = _enlarge_to_fit(image, crop)
  height, width = _height_width(image)
  top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
  return tf.image.crop_to_bounding_box(image, top, left, *crop)


def random_crop(image, size, *, seed):
  """Crops `size` anywhere; enlarges smaller images until it fits."""
  crop = preprocess.as_pair(size)
  image = _enlarge_to_fit(image, crop)
  height, width = _height_width(image)
  top, left = tf.unstack(tf.random.stateless_uniform([2], seed))
  top = _scale_to_integer(top, height - crop[0])
  left = _scale_to_integer(left, width - crop[1])
  return tf.image.crop_to_bounding_box(image, top, left, *crop)


def inception_crop(image, size, area_min=5, area_max=100, *, seed):
  """Resizes a random window, area in percent, aspect 0.75 to 1.33, to `size`.

  Source: Szegedy et al., "Going Deeper with Convolutions", 2015.
  """
  window = sample_window(tf.shape(image), area_min, area_max, seed)
  image = tf.image.crop_to_bounding_box(image, *tf.unstack(window))
  return resize(image, size)


def flip_lr(image, *, seed):
  """Mirrors left to right, every second image on average."""
  flip = tf.random.stateless_uniform([], seed) < 0.5
  return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


def _height_width(image, dtype=tf.int32):
  return tf.unstack(tf.shape(image, dtype)[:2])


def _scale_to_integer(uniform, largest):
  """[0, 1) -> {0 .. largest}; the minimum guards against rounding up."""
  scaled = uniform * tf.cast(largest + 1, tf.float32)
  return tf.minimum(tf.cast(scaled, tf.int32), largest)


def _check_size(size):
  """Returns a size as int32[2]; fails if it would fill the memory."""
  fits = size[0] * size[1] <= preprocess.MAX_PIXELS
  words = "resized it has too many pixels:"
  with tf.control_dependencies([tf.debugging.Assert(fits, [words, size])]):
    return tf.cast(size, tf.int32)


def _enlarge_to_fit(image, crop):
  height, width = _height_width(image, tf.int64)  # products may pass 2**31

  def enlarge():
    # At least one of the two sides ends up equal to the crop's.
    new_height = tf.maximum(-(-height * crop[1] // width), crop[0])
    new_width = tf.maximum(-(-width * crop[0] // height), crop[1])
    size = _check_size(tf.stack([new_height, new_width]))
    resized = tf.image.resize(image, size)
    return tf.cast(tf.round(resized), tf.uint8)

  too_small = (height < crop[0]) | (width < crop[1])
  image = tf.cond(too_small, enlarge, lambda: image)
  image.set_shape((None, None, 3))
  return image


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


# --- RandAugment ---


def randaug(image, num_ops=2, magnitude=10, contrast="mean", *, seed):
  """Applies `num_ops` operations drawn from `AUGMENTATIONS` one by one.

  Args:
    image: uint8[h w 3].
    num_ops: how many; the same one may be drawn again.
    magnitude: strength, 0 to 10 in the paper, larger is used too. 0 is not
      nothing: solarize inverts everything, then.
    contrast: "mean", Pillow's contrast, or "augreg", see `contrast_augreg`.
    seed: int[2].

  Source: Cubuk et al., "RandAugment", 2020, arXiv 1909.13719, with the
  constants of AugReg: distances of 100 and 40 pixels at 224, grey filling.
  """
  shape = image.shape
  operations = AUGMENTATIONS
  if contrast == "augreg":
    operations = AUGMENTATIONS | {"contrast": contrast_augreg}
  for i in range(num_ops):
    seeds = tf.random.split(
      tf.random.experimental.stateless_fold_in(seed, i), num=2
    )
    which = _scale_to_integer(
      tf.random.stateless_uniform([], seeds[0]), len(AUGMENTATIONS) - 1
    )
    branches = [
      functools.partial(op, image, magnitude / 10, seeds[1])
      for op in operations.values()
    ]
    image = tf.switch_case(which, branches)
    image.set_shape(shape)
  return image


# Each takes (image, strength = magnitude / 10, seed).


def autocontrast(image, strength, seed):
  """Stretches each channel to 0..255."""
  del strength, seed
  image = tf.cast(image, tf.float32)
  low = tf.reduce_min(image, (0, 1))
  high = tf.reduce_max(image, (0, 1))
  stretched = (image - low) * (255.0 / tf.maximum(high - low, 1.0))
  return _to_uint8(tf.where(high > low, stretched, image))


def equalize(image, strength, seed):
  """Flattens the histogram of each channel, in Pillow's integers."""
  del strength, seed
  return tf.stack([_equalize_channel(image[..., c]) for c in range(3)], axis=-1)


def _equalize_channel(channel):
  values = tf.cast(channel, tf.int32)
  histogram = tf.math.bincount(
    tf.reshape(values, [-1]), minlength=256, maxlength=256
  )
  last = tf.gather(histogram, tf.reduce_max(values))
  step = (tf.reduce_sum(histogram) - last) // 255
  below = tf.cumsum(histogram, exclusive=True)
  table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
  equalized = tf.cast(tf.gather(table, values), tf.uint8)
  return tf.cond(step > 0, lambda: equalized, lambda: channel)


def invert(image, strength, seed):
  del strength, seed
  return 255 - image


def posterize(image, strength, seed):
  """Keeps the highest bits, 4 of them at magnitude 10, and never none."""
  del seed
  bits = min(max(int(strength * 4), 1), 8)
  return image & (256 - 2 ** (8 - bits))


def solarize(image, strength, seed):
  """Inverts what is at or above a threshold: 256 at magnitude 10."""
  del seed
  below = tf.cast(image, tf.int32) < int(strength * 256)
  return tf.where(below, image, 255 - image)


def solarize_add(image, strength, seed):
  """Brightens the darker half by 110 levels at magnitude 10."""
  del seed
  brighter = tf.cast(image, tf.int32) + int(strength * 110)
  brighter = tf.cast(tf.minimum(brighter, 255), tf.uint8)
  return tf.where(image < 128, brighter, image)


def color(image, strength, seed):
  """Saturation: from nearly grey (0) to 1.9 times (10)."""
  del seed
  return _blend(_grey(image), image, strength)


def contrast(image, strength, seed):
  del seed
  mean = tf.round(tf.reduce_mean(tf.round(_grey(image))))
  return _blend(mean, image, strength)


def contrast_augreg(image, strength, seed):
  """As AugReg's code: about a grey of the image's pixels / 256, 255 at most.

  Its mean is that of the histogram's counts, where Pillow's is of the levels.
  """
  del seed
  height, width = _height_width(image)
  grey = tf.minimum(height * width // 256, 255)
  return _blend(tf.cast(grey, tf.float32), image, strength)


def brightness(image, strength, seed):
  del seed
  return _blend(0.0, image, strength)


def sharpness(image, strength, seed):
  """Away from a 3x3 smoothing; the outermost pixels stay."""
  del seed
  kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32) / 13
  pixels = tf.cast(image, tf.float32)
  smooth = tf.nn.depthwise_conv2d(
    pixels[None],
    tf.tile(kernel[:, :, None, None], [1, 1, 3, 1]),
    strides=[1, 1, 1, 1],
    padding="SAME",
  )[0]
  height, width = _height_width(image)
  y, x = tf.range(height)[:, None, None], tf.range(width)[None, :, None]
  inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
  return _blend(tf.where(inside, smooth, pixels), image, strength)


def rotate(image, strength, seed):
  """By 30 degrees at magnitude 10, either way, about the centre."""
  angle = _random_sign(seed) * (strength * 30 * 3.14159265358979 / 180)
  cos, sin = tf.cos(angle), tf.sin(angle)
  height, width = _height_width(image)
  y = tf.cast(height - 1, tf.float32) / 2
  x = tf.cast(width - 1, tf.float32) / 2
  offset_x = x - cos * x + sin * y
  offset_y = y - sin * x - cos * y
  return _transform(image, [cos, -sin, offset_x, sin, cos, offset_y])


def shear_x(image, strength, seed):
  return _transform(image, [1, _random_sign(seed) * strength * 0.3, 0, 0, 1, 0])


def shear_y(image, strength, seed):
  return _transform(image, [1, 0, 0, _random_sign(seed) * strength * 0.3, 1, 0])


def translate_x(image, strength, seed):
  """By 100 pixels of 224 at magnitude 10, either way."""
  _, width = _height_width(image)
  shift = _scale_distance(strength * 100, width)
  return _transform(image, [1, 0, _random_sign(seed) * shift, 0, 1, 0])


def translate_y(image, strength, seed):
  height, _ = _height_width(image)
  shift = _scale_distance(strength * 100, height)
  return _transform(image, [1, 0, 0, 0, 1, _random_sign(seed) * shift])


def cutout(image, strength, seed):
  """Greys out a square: its half side is 40 pixels of 224 at magnitude 10."""
  height, width = _height_width(image)
  reach = _scale_distance(strength * 40, tf.minimum(height, width))
  reach = tf.cast(reach, tf.int32)
  y, x = tf.unstack(tf.random.stateless_uniform([2], seed))
  y = tf.range(height) - _scale_to_integer(y, height - 1)
  x = tf.range(width) - _scale_to_integer(x, width - 1)
  near_y = (y >= -reach) & (y < reach)
  near_x = (x >= -reach) & (x < reach)
  hole = near_y[:, None, None] & near_x[None, :, None]
  return tf.where(hole, tf.constant(_GREY, tf.uint8), image)


AUGMENTATIONS = {
  f.__name__: f
  for f in (
    autocontrast,
    equalize,
    invert,
    rotate,
    posterize,
    solarize,
    solarize_add,
    color,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    cutout,
  )
}


def _to_uint8(image):
  return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def _blend(degenerate, image, strength):
  """Moves away from `degenerate`: 0.1 of the image to 1.9 at magnitude 10."""
  factor = strength * 1.8 + 0.1
  pixels = tf.cast(image, tf.float32)
  return _to_uint8(degenerate + factor * (pixels - degenerate))


def _grey(image):
  """ITU-R 601-2 luma, float32[h w 1]."""
  weights = tf.constant([0.299, 0.587, 0.114])
  return tf.reduce_sum(
    tf.cast(image, tf.float32) * weights, axis=-1, keepdims=True
  )


def _scale_distance(pixels, side):
  """Pixels at the reference size -> pixels, float32, at this size."""
  return pixels / _REFERENCE_SIZE * tf.cast(side, tf.float32)


def _random_sign(seed):
  return tf.where(tf.random.stateless_uniform([], seed) < 0.5, -1.0, 1.0)


def _transform(image, matrix):
  """Affine, nearest neighbour; matrix maps output (x, y, 1) to input (x, y)."""
  matrix = tf.stack([tf.cast(m, tf.float32) for m in (*matrix, 0, 0)])
  return tf.raw_ops.ImageProjectiveTransformV3(
    images=image[None],
    transforms=matrix[None],
    output_shape=tf.shape(image)[:2],
    interpolation="NEAREST",
    fill_mode="CONSTANT",
    fill_value=float(_GREY),
  )[0]


_OPS = {
  f.__name__: f
  for f in (
    resize,
    resize_small,
    central_crop,
    random_crop,
    inception_crop,
    flip_lr,
    randaug,
  )
}
