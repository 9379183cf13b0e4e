"""RandAugment in TensorFlow (Cubuk et al. 2020, arXiv 1909.13719).

The constants are those of AugReg: distances of 100 and 40 pixels at 224, and a
grey fill.
"""

# TensorFlow's annotations lack tf.random.experimental.
# pyright: reportAttributeAccessIssue=false

import functools

import tensorflow as tf

_REFERENCE_SIZE = 224  # image size for which pixel distances are given
_GREY = 128  # fills the pixels that an operation leaves empty


def randaug(image, num_ops=2, magnitude=10, contrast="mean", *, seed):
  """Applies `num_ops` operations drawn from `AUGMENTATIONS` with replacement.

  Args:
    image: uint8[h w 3].
    num_ops: number of operations.
    magnitude: 0 to 10 in the paper, or larger; at 0 solarize still inverts.
    contrast: "mean", Pillow's contrast, or "augreg", see `contrast_augreg`.
    seed: int[2].
  """
  shape = image.shape
  operations = AUGMENTATIONS
  if contrast == "augreg":
    operations = AUGMENTATIONS | {"contrast": contrast_augreg}
  for i in range(num_ops):
    seeds = tf.random.split(
      tf.random.experimental.stateless_fold_in(seed, i), num=2
    )
    which = draw_integer(
      tf.random.stateless_uniform([], seeds[0]), len(AUGMENTATIONS) - 1
    )
    branches = [
      functools.partial(op, image, magnitude / 10, seeds[1])
      for op in operations.values()
    ]
    image = tf.switch_case(which, branches)
    image.set_shape(shape)
  return image


# All take (image, strength = magnitude / 10, seed), but few use the seed.


def autocontrast(image, strength, seed):
  """Stretches each channel to 0..255."""
  image = tf.cast(image, tf.float32)
  low = tf.reduce_min(image, (0, 1))
  high = tf.reduce_max(image, (0, 1))
  stretched = (image - low) * (255.0 / tf.maximum(high - low, 1.0))
  return _to_uint8(tf.where(high > low, stretched, image))


def equalize(image, strength, seed):
  """Flattens the histogram of each channel, in Pillow's integer arithmetic."""
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
  return 255 - image


def posterize(image, strength, seed):
  """Keeps the highest bits: 4 of them at magnitude 10, at least 1."""
  bits = min(max(int(strength * 4), 1), 8)
  return image & (256 - 2 ** (8 - bits))


def solarize(image, strength, seed):
  """Inverts what is at or above a threshold: 256 at magnitude 10."""
  below = tf.cast(image, tf.int32) < int(strength * 256)
  return tf.where(below, image, 255 - image)


def solarize_add(image, strength, seed):
  """Brightens the darker half by 110 levels at magnitude 10."""
  brighter = tf.cast(image, tf.int32) + int(strength * 110)
  brighter = tf.cast(tf.minimum(brighter, 255), tf.uint8)
  return tf.where(image < 128, brighter, image)


def color(image, strength, seed):
  """Scales saturation: nearly grey at magnitude 0, 1.9 times at 10."""
  return _blend(_grey(image), image, strength)


def contrast(image, strength, seed):
  mean = tf.round(tf.reduce_mean(tf.round(_grey(image))))
  return _blend(mean, image, strength)


def contrast_augreg(image, strength, seed):
  """Changes contrast as AugReg's code, around grey level h * w / 256, <= 255.

  That code averages the histogram's counts, where Pillow averages the levels.
  """
  height, width = height_width(image)
  grey = tf.minimum(height * width // 256, 255)
  return _blend(tf.cast(grey, tf.float32), image, strength)


def brightness(image, strength, seed):
  return _blend(0.0, image, strength)


def sharpness(image, strength, seed):
  """Blends with a 3x3 smoothing, except for the outermost pixels."""
  kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32) / 13
  pixels = tf.cast(image, tf.float32)
  smooth = tf.nn.depthwise_conv2d(
    pixels[None],
    tf.tile(kernel[:, :, None, None], [1, 1, 3, 1]),
    strides=[1, 1, 1, 1],
    padding="SAME",
  )[0]
  height, width = height_width(image)
  y, x = tf.range(height)[:, None, None], tf.range(width)[None, :, None]
  inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
  return _blend(tf.where(inside, smooth, pixels), image, strength)


def rotate(image, strength, seed):
  """Rotates by 30 degrees at magnitude 10, either way, about the centre."""
  angle = _random_sign(seed) * (strength * 30 * 3.14159265358979 / 180)
  cos, sin = tf.cos(angle), tf.sin(angle)
  height, width = height_width(image)
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
  """Translates by 100 pixels of 224 at magnitude 10, either way."""
  _, width = height_width(image)
  shift = _scale_distance(strength * 100, width)
  return _transform(image, [1, 0, _random_sign(seed) * shift, 0, 1, 0])


def translate_y(image, strength, seed):
  height, _ = height_width(image)
  shift = _scale_distance(strength * 100, height)
  return _transform(image, [1, 0, 0, 0, 1, _random_sign(seed) * shift])


def cutout(image, strength, seed):
  """Greys out a square with a half side of 40 pixels of 224 at magnitude 10."""
  height, width = height_width(image)
  reach = _scale_distance(strength * 40, tf.minimum(height, width))
  reach = tf.cast(reach, tf.int32)
  y, x = tf.unstack(tf.random.stateless_uniform([2], seed))
  y = tf.range(height) - draw_integer(y, height - 1)
  x = tf.range(width) - draw_integer(x, width - 1)
  near_y = (y >= -reach) & (y < reach)
  near_x = (x >= -reach) & (x < reach)
  hole = near_y[:, None, None] & near_x[None, :, None]
  return tf.where(hole, tf.constant(_GREY, tf.uint8), image)


AUGMENTATIONS = {
  f.__name__: f
  for f in (
    *(autocontrast, equalize, invert, rotate, posterize, solarize),
    *(solarize_add, color, contrast, brightness, sharpness, shear_x, shear_y),
    *(translate_x, translate_y, cutout),
  )
}


def _to_uint8(image):
  return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def _blend(degenerate, image, strength):
  """Blends the image, with weight 0.1 at magnitude 0 and 1.9 at 10."""
  factor = strength * 1.8 + 0.1
  pixels = tf.cast(image, tf.float32)
  return _to_uint8(degenerate + factor * (pixels - degenerate))


def _grey(image):
  """Returns ITU-R 601-2 luma, float32[h w 1]."""
  weights = tf.constant([0.299, 0.587, 0.114])
  return tf.reduce_sum(
    tf.cast(image, tf.float32) * weights, axis=-1, keepdims=True
  )


def _scale_distance(pixels, side):
  """Converts pixels at the reference size to pixels at this size, float32."""
  return pixels / _REFERENCE_SIZE * tf.cast(side, tf.float32)


def _random_sign(seed):
  return tf.where(tf.random.stateless_uniform([], seed) < 0.5, -1.0, 1.0)


def _transform(image, matrix):
  """Warps, nearest neighbour; matrix maps output (x, y, 1) to input (x, y)."""
  matrix = tf.stack([tf.cast(m, tf.float32) for m in (*matrix, 0, 0)])
  return tf.raw_ops.ImageProjectiveTransformV3(
    images=image[None],
    transforms=matrix[None],
    output_shape=tf.shape(image)[:2],
    interpolation="NEAREST",
    fill_mode="CONSTANT",
    fill_value=float(_GREY),
  )[0]


def height_width(image, dtype=tf.int32):
  return tf.unstack(tf.shape(image, dtype)[:2])


def draw_integer(uniform, largest):
  """Maps [0, 1) to {0 .. largest}; the minimum guards against rounding up."""
  scaled = uniform * tf.cast(largest + 1, tf.float32)
  return tf.minimum(tf.cast(scaled, tf.int32), largest)
