"""The `bench input` command: images per second that this host prepares.

Four variants of the pipeline or a part of it take turns, so that other load on
the machine affects all of them.

  pipeline: as in training, with random access and reproducible batches.
  plain: usual tf.data: TFRecord files in their order, a shuffle buffer, pixels
    as float32, batches after the map. Batches are not reproducible.
  resizing: TFRecord files, their crops decoded and resized, no batch.
  decoding: TFRecord files and their crops decoded. All four decode windows of
    the same distribution with the same decoder, so this is an upper bound.
"""

# TensorFlow's annotations lack the type of `iter` of a data set.
# pyright: reportAttributeAccessIssue=false

import functools
import io
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data import ops
from vit_jax.data.catalog import get_source
from vit_jax.data.pipeline import count_cpus, train_batches
from vit_jax.data.preparation import run_builder
from vit_jax.data.sizes import as_pair
from vit_jax.data.source import Source
from vit_jax.errors import UserError
from vit_jax.tools.text import format_columns

_RECIPE = "inception_crop(size)|flip_lr"
_AREA = (5, 100)  # percent, of `inception_crop`
_SHUFFLE_BUFFER = 2000  # of the plain pipeline
_RECORDS = 2000  # at most, read by all but the pipeline
_PHOTOS = 512  # generated
_PHOTO = (375, 500)  # height and width; ImageNet's median
_CANVAS = (1200, 1600)
_QUALITY = 90
_WARM_UP = 3  # batches
_TURN = 2048  # images


def bench(
  dataset: str | None = None,
  split: str = "train",
  data_dir: str | None = None,
  *,
  image_size: int | tuple[int, int] = 224,
  batch_size: int = 256,
  rounds: int = 5,
  needs: float | None = None,
) -> dict[str, Any]:
  """Measures the input pipeline of this host, beside the other variants.

  Args:
    dataset, split, data_dir: as `get_source`; None for generated JPEGs.
    image_size: pixels, or (h, w).
    batch_size: images of a batch of this host.
    rounds: number of turns of each variant.
    needs: images per second that the accelerators take.

  Returns:
    Of each variant "images_per_second", the median, and "cpu_ms" of an image,
    the least. "ratio" and "cpu_ratio" are the pipeline's speed relative to each
    other variant, by time and by CPU time. "per_core" is of the pipeline;
    "cores", "image_bytes", the mean, "image_size", "batch_size"; with "needs"
    also "hosts", the number of such hosts for that rate.

  Raises:
    UserError: no such data set, images that are not JPEGs, a number that is not
      positive.
  """
  sizes = {"image_size": min(as_pair(image_size)), "batch_size": batch_size}
  for name, value in {**sizes, "needs": needs}.items():
    if value is not None and not value > 0:
      raise UserError(f"--{name}={value}; it must be more than 0")
  with tempfile.TemporaryDirectory() as folder:
    if dataset is None:
      source = make_photos(Path(folder), _PHOTOS)
    else:
      source = get_source(dataset, split, data_dir)
    file = Path(folder) / "images.tfrecord"
    image_bytes = _write_records(source, file)
    turns = _make_turns(source, str(file), image_size, batch_size)
    times = {name: [] for name in turns}
    for _ in range(rounds):
      for name, start in turns.items():
        times[name].append(_take_turn(start(), batch_size))
  ratios = _compare(times)
  rates = {
    name: 1 / statistics.median(wall for wall, _ in x)
    for name, x in times.items()
  }
  found = {
    "dataset": dataset,
    "split": split,
    "images_per_second": rates,
    "cpu_ms": {
      name: 1e3 * min(cpu for _, cpu in x) for name, x in times.items()
    },
    "per_core": rates["pipeline"] / count_cpus(),
    "ratio": {name: wall for name, (wall, _) in ratios.items()},
    "cpu_ratio": {name: cpu for name, (_, cpu) in ratios.items()},
    "cores": count_cpus(),
    "image_bytes": image_bytes,
    "image_size": image_size,
    "batch_size": batch_size,
  }
  if needs is not None:
    found |= {"needs": needs, "hosts": math.ceil(needs / rates["pipeline"])}
  return found


def time_batches(batches: Iterator, batch_size: int) -> float:
  """Returns the images per second of a pipeline that is not yet in use.

  `batches` yields batches of `batch_size` images.
  """
  return 1 / _take_turn(batches, batch_size)[0]


def _take_turn(batches, batch_size):
  """Returns the seconds and the CPU seconds per image.

  Prefetching ends with `batches`, so that it does not slow down the next turn.
  """
  for _ in range(_WARM_UP):
    next(batches)
  count = max(2, _TURN // batch_size)
  start, cpu = time.perf_counter(), time.process_time()
  for _ in range(count):
    next(batches)
  cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
  return seconds / count / batch_size, cpu / count / batch_size


def _compare(times):
  """Returns the pipeline's speed relative to each other variant.

  `times` has [(seconds, CPU seconds)] of each; the result has both ratios.
  """
  times = {name: np.array(x) for name, x in times.items()}
  ours = times.pop("pipeline")
  return {name: np.median(x / ours, 0).tolist() for name, x in times.items()}


def format_report(found: dict[str, Any]) -> str:
  """Returns the results of `bench` as text."""
  rows = [["", "images/s", "CPU ms", "pipeline is, by time", "by CPU"]]
  for name, rate in found["images_per_second"].items():
    ratios = [found[key].get(name) for key in ("ratio", "cpu_ratio")]
    shown = [f"{x:.2f} x" if x else "" for x in ratios]
    rows += [[name, f"{rate:,.0f}", f"{found['cpu_ms'][name]:.2f}", *shown]]
  lines = [
    *format_columns(rows),
    f"{found['per_core']:,.0f} images/s a core of {found['cores']}; JPEGs of "
    f"{found['image_bytes'] / 1000:.0f} kB to {found['image_size']} pixels, "
    f"batches of {found['batch_size']}",
  ]
  if "hosts" in found:
    lines += [
      f"{found['needs']:,.0f} images/s take {found['hosts']} such hosts"
    ]
  return "\n".join(lines)


# --- the images ---


def make_photos(folder: Path, count: int) -> Source:
  """Makes JPEGs that are as large as photographs, as an ArrayRecord data set.

  They show blotches of many sizes, with a spectrum like that of photographs.
  """
  rng = np.random.default_rng(0)
  # They are crops of one canvas, because drawing each would be slow.
  height, width = _CANVAS
  total = np.zeros((height, width, 3), np.float32)
  for level in range(8):
    cells = (-(-height // 2**level), -(-width // 2**level), 3)
    noise = rng.integers(0, 256, cells, np.uint8)
    layer = Image.fromarray(noise).resize((width, height))
    total += np.asarray(layer) * np.float32(0.35 * 1.35**level)
  low, high = np.percentile(total[::7, ::7], (1, 99))
  pixels = np.clip((total - low) / (high - low), 0, 1) * 255
  canvas = Image.fromarray(pixels.astype(np.uint8))

  def draw():
    for i in range(count):
      top, left = rng.integers(0, np.subtract(_CANVAS, _PHOTO))
      box = (left, top, left + _PHOTO[1], top + _PHOTO[0])
      canvas.crop(box).save(file := io.BytesIO(), "JPEG", quality=_QUALITY)
      yield i, {"image": io.BytesIO(file.getvalue()), "label": i % 2}

  features = {
    "image": tfds.features.Image(),
    "label": tfds.features.ClassLabel(names=["even", "odd"]),
  }
  builder = tfds.dataset_builders.AdhocBuilder(
    name="photos",
    version="1.0.0",
    features=tfds.features.FeaturesDict(features),
    split_datasets={"train": draw()},
    data_dir=folder,
  )
  run_builder(builder)
  return get_source("photos", "train", str(folder))


def _write_records(source, file):
  """Writes records of the source; returns the mean size of their images."""
  records = source.read(np.arange(min(_RECORDS, source.num_examples)))
  images = tf.data.Dataset.from_tensor_slices(records).map(source.parse_image)
  sizes = []
  for i, encoded in enumerate(images.as_numpy_iterator()):
    if encoded[:3] != b"\xff\xd8\xff":
      raise UserError(
        f"{source.describe(i)} is not a JPEG; bench input compares the "
        "decoding of JPEGs, so give a data set of those, or none"
      )
    sizes.append(len(encoded))
  with tf.io.TFRecordWriter(str(file)) as writer:
    for record in records:
      writer.write(record)
  return statistics.fmean(sizes)


def _make_turns(source, file, image_size, batch_size):
  """Returns {variant: function that starts it}."""

  def decode(encoded, seed):
    shape = tf.io.extract_jpeg_shape(encoded)
    window = ops.sample_window(shape, *_AREA, seed)
    return tf.io.decode_and_crop_jpeg(
      encoded, window, channels=3, dct_method="INTEGER_FAST"
    )

  def make_plain(record):
    encoded, labels = source.parse(record)
    seed = tf.random.uniform([2], maxval=2**31 - 1, dtype=tf.int32)
    image = tf.image.resize(decode(encoded, seed), as_pair(image_size))
    image = tf.image.random_flip_left_right(image)
    return {"image": image / 127.5 - 1, "labels": labels}

  # They return a pixel of each image, because unused results are not computed.
  def decode_only(number, record):
    return decode(source.parse_image(record), tf.stack([number, 0]))[0, 0]

  def resize(number, record):
    image = decode(source.parse_image(record), tf.stack([number, 0]))
    return ops.resize(image, image_size)[0, 0]

  records = tf.data.TFRecordDataset(file).repeat()
  others = {
    "plain": (records.shuffle(_SHUFFLE_BUFFER), make_plain),
    "resizing": (records.enumerate(), resize),
    "decoding": (records.enumerate(), decode_only),
  }
  pipeline = functools.partial(
    train_batches,
    [(source, 1.0)],
    seed=0,
    batch_size=batch_size,
    rows=np.arange(batch_size),
    preprocess=_RECIPE,
    image_size=image_size,
    start_step=0,
    num_steps=2**40,
  )
  return {"pipeline": pipeline} | {
    name: given.map(process, num_parallel_calls=tf.data.AUTOTUNE)
    .batch(batch_size)
    .prefetch(2)
    .as_numpy_iterator
    for name, (given, process) in others.items()
  }
