"""DeiT III's augmentations in TensorFlow (arXiv 2204.07118).

Its training string is

    inception_crop(size, 8)|flip_lr|three_augment|color_jitter(0.3)

with `simple_crop(size)` in place of the first on ImageNet-21k.
"""

# TensorFlow's annotations lack tf.random.experimental.
# pyright: reportAttributeAccessIssue=false

import functools

import tensorflow as tf

from vit_jax.data.pillow import blur
from vit_jax.data.randaug import draw_integer

_SIGMA = 0.1, 2.0  # standard deviation of the blur, pixels: from, to


def three_augment(image, *, seed):
  """Applies one of three operations with equal probability: 3-Augment.

  They are greyscale, solarization (inverts levels from 128 on) and a Gaussian
  blur, as in Pillow, with a uniform standard deviation.
  """
  which, sigma = tf.unstack(tf.random.stateless_uniform([2], seed))
  sigma = _SIGMA[0] + (_SIGMA[1] - _SIGMA[0]) * sigma
  operations = (
    lambda: _greyscale(image),
    lambda: tf.where(image < 128, image, 255 - image),
    lambda: tf.numpy_function(blur, [image, sigma], tf.uint8, stateful=False),
  )
  augmented = tf.switch_case(draw_integer(which, 2), operations)
  return tf.ensure_shape(augmented, image.shape)


def color_jitter(image, strength=0.3, *, seed):
  """Changes brightness, contrast and saturation, in a random order.

  Each is multiplied by a factor that is uniform in [max(0, 1 - strength), 1 +
  strength], as torchvision's ColorJitter does without hue.
  """
  operations = (_brightness, _contrast, _saturation)
  draws = tf.random.stateless_uniform([2, len(operations)], seed)
  order = tf.argsort(draws[0])
  least = max(0.0, 1 - strength)
  factors = least + (1 + strength - least) * draws[1]
  for i in range(len(operations)):
    which = order[i]
    branches = [
      functools.partial(op, image, factors[which]) for op in operations
    ]
    jittered = tf.switch_case(which, branches)
    image = tf.ensure_shape(jittered, image.shape)
  return image


def _brightness(image, factor):
  return _blend(0.0, image, factor)


def _contrast(image, factor):
  mean = tf.reduce_mean(tf.cast(_greyscale(image), tf.float32))
  return _blend(tf.floor(mean + 0.5), image, factor)


def _saturation(image, factor):
  return _blend(tf.cast(_greyscale(image), tf.float32), image, factor)


def _blend(degenerate, image, factor):
  """Returns `degenerate` at factor 0, the image at 1; truncates like Pillow.

  RandAugment's blend rounds.
  """
  pixels = tf.cast(image, tf.float32)
  blended = degenerate + factor * (pixels - degenerate)
  return tf.cast(tf.clip_by_value(blended, 0, 255), tf.uint8)


def _greyscale(image):
  """Returns ITU-R 601-2 luma, three times, in Pillow's integer arithmetic."""
  weights = tf.constant([19595, 38470, 7471])  # of 2^16
  luma = tf.reduce_sum(tf.cast(image, tf.int32) * weights, -1, keepdims=True)
  luma = tf.bitwise.right_shift(luma + 2**15, 16)
  return tf.repeat(tf.cast(luma, tf.uint8), 3, axis=-1)
