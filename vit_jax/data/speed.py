"""How many images a second this host prepares, beside two other ways to do it.

All read the same JPEG files, crop and resize them as Inception did, and give
batches. They take turns, so that a noisy machine is noisy for all of them.

  pipeline: what training uses: random access, the same batches on every run.
  plain: a tf.data pipeline as it is usually written: TFRecord files read in
    order, a shuffle buffer, float32 pixels; not the same batches twice.
  decoding: TFRecord files, and only the crops decoded: what no pipeline around
    the same decoder can exceed.
"""

# TensorFlow's annotations do not know what `iter` of a data set gives.
# pyright: reportAttributeAccessIssue=false

import io
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from vit_jax.data import labelled
from vit_jax.data.pipeline import count_cpus, train_batches
from vit_jax.data.source import Source, get_source

_RECIPE = "inception_crop(size)|flip_lr"
_SHUFFLE_BUFFER = 2000  # of the plain pipeline: as many as there are images
_PHOTO = (375, 500)  # height and width; ImageNet's median
_CANVAS = (1200, 1600)
_QUALITY = 90


def measure(
  source: Source,
  folder: Path,
  *,
  image_size: int = 224,
  batch_size: int = 64,
  batches: int = 16,
  rounds: int = 5,
) -> dict[str, Any]:
  """Measures the three, `rounds` times `batches` batches each, in turns.

  Args:
    source: what to read; of its images those that are JPEG.
    folder: gets a TFRecord file of the same images.
    image_size: pixels.
    batch_size: images.
    batches: of a round.
    rounds: the median of them counts.

  Returns:
    {"images_per_second": {"pipeline", "plain", "decoding"}, "per_core",
    "of_decoding": the median ratio of a round, "of_plain", "cores",
    "image_bytes": the mean, "image_size", "batch_size"}.
  """
  file, mean_bytes = _write_records(source, folder)
  turns = {
    "pipeline": _pipeline(source, image_size, batch_size),
    "plain": _plain(file, image_size, batch_size),
    "decoding": _decoding(file, batch_size),
  }
  for batch in turns.values():  # fills buffers, traces graphs
    for _ in range(4):
      next(batch)
  seen: dict[str, list[float]] = {name: [] for name in turns}
  for _ in range(rounds):
    for name, batch in turns.items():
      start = time.perf_counter()
      for _ in range(batches):
        next(batch)
      seconds = time.perf_counter() - start
      seen[name].append(batches * batch_size / seconds)

  def ratio(name):
    pairs = zip(seen["pipeline"], seen[name], strict=True)
    return statistics.median(ours / other for ours, other in pairs)

  medians = {name: statistics.median(x) for name, x in seen.items()}
  return {
    "images_per_second": medians,
    "per_core": medians["pipeline"] / count_cpus(),
    "of_decoding": ratio("decoding"),
    "of_plain": ratio("plain"),
    "cores": count_cpus(),
    "image_bytes": mean_bytes,
    "image_size": image_size,
    "batch_size": batch_size,
  }


def make_photos(folder: Path, count: int) -> Source:
  """Makes JPEGs that are as large as photographs, as an ArrayRecord data set.

  Blotches of many sizes, whose spectrum falls as that of photographs does.
  """
  images = folder / "images"
  images.mkdir(parents=True)
  rng = np.random.default_rng(0)
  canvas = _draw_canvas(rng)
  room = np.subtract(canvas.shape[:2], _PHOTO)
  for i in range(count):
    top, left = rng.integers(0, room)
    pixels = canvas[top : top + _PHOTO[0], left : left + _PHOTO[1]]
    file = images / f"{i:05d}.jpg"
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
  labels = {f"{i:05d}.jpg": [i % 2] for i in range(count)}
  plan = labelled.Plan("photos", str(images), ["even", "odd"], labels, [], 0.0)
  labelled.build(plan, str(folder), workers=1)
  return get_source("photos", "train", str(folder))


def _draw_canvas(rng):
  """Draws u8[h w 3], which photographs are cut out of: drawing each is slow."""
  total = np.zeros((*_CANVAS, 3), np.float32)
  for level in range(8):
    scale = 2**level
    shape = [-(-side // scale) + 1 for side in _CANVAS]
    noise = rng.integers(0, 256, (*shape, 3), np.uint8)
    size = (shape[1] * scale, shape[0] * scale)
    layer = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    crop = np.asarray(layer)[: _CANVAS[0], : _CANVAS[1]]
    total += crop.astype(np.float32) * (0.35 * 1.35**level)
  low, high = np.percentile(total[::7, ::7], (1, 99))
  return (np.clip((total - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _write_records(source, folder):
  """Writes the images as TFRecord; returns the file and their mean size."""
  folder.mkdir(parents=True, exist_ok=True)
  file, sizes = str(folder / "images.tfrecord"), []
  count = min(_SHUFFLE_BUFFER, source.num_examples)
  with tf.io.TFRecordWriter(file) as writer:
    for record in source.read(np.arange(count)):
      encoded = source.parse_image(record).numpy()
      sizes.append(len(encoded))
      writer.write(encoded)
  return file, statistics.fmean(sizes)


# --- the three ---


def _pipeline(source, image_size, batch_size) -> Iterator:
  return train_batches(
    [(source, 1.0)],
    seed=0,
    batch_size=batch_size,
    rows=np.arange(batch_size),
    preprocess=_RECIPE,
    image_size=image_size,
    start_step=0,
    num_steps=2**40,
  )


def _plain(file, image_size, batch_size) -> Iterator:
  def process(encoded):
    image = _crop(encoded)
    image = tf.image.resize(image, (image_size, image_size))
    image = tf.image.random_flip_left_right(image)
    return image / 127.5 - 1

  return iter(
    tf.data.TFRecordDataset(file)
    .repeat()
    .shuffle(_SHUFFLE_BUFFER)
    .map(process, num_parallel_calls=tf.data.AUTOTUNE)
    .batch(batch_size)
    .prefetch(tf.data.AUTOTUNE)
    .as_numpy_iterator()
  )


def _decoding(file, batch_size) -> Iterator:
  return iter(
    tf.data.TFRecordDataset(file)
    .repeat()
    .map(
      lambda encoded: tf.reduce_max(tf.shape(_crop(encoded))),
      num_parallel_calls=tf.data.AUTOTUNE,
    )
    .batch(batch_size)
    .prefetch(tf.data.AUTOTUNE)
    .as_numpy_iterator()
  )


def _crop(encoded):
  begin, extent, _ = tf.image.sample_distorted_bounding_box(
    tf.io.extract_jpeg_shape(encoded),
    tf.zeros([0, 0, 4]),
    min_object_covered=0.0,
    aspect_ratio_range=(0.75, 1.33),
    area_range=(0.05, 1.0),
    max_attempts=100,
    use_image_if_no_bounding_boxes=True,
  )
  window = tf.concat([begin[:2], extent[:2]], axis=0)
  return tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
