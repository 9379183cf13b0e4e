"""TFDS data sets in ArrayRecord files, which have random access."""

# TFDS's annotated return type is a union of all possible types.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import os
import re
import shlex
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax.data import builders
from vit_jax.data.benchmarks import TASKS, find_task
from vit_jax.data.max_labels import find_max_labels
from vit_jax.data.shards import Shards
from vit_jax.data.source import Source, digest
from vit_jax.errors import UserError, one_line, suggest


class TfdsSource(Source):
  """A split of a TFDS data set in ArrayRecord files."""

  def __init__(self, dataset: str, split: str, data_dir: str | None):
    builder = open_prepared(dataset, data_dir)
    self.dataset, self.split = dataset, split
    self._task = task = find_task(dataset)
    splits = builder.info.splits
    info = splits[resolve_split(splits, dataset, split)[0]]
    self.num_examples, self.num_bytes = info.num_examples, info.num_bytes
    self._shards, self._name = info.file_instructions, builder.info.full_name
    self._files = Shards(dataset, self._shards)
    self.remote = self._files.remote
    image, key, label = _select_features(builder.info.features, dataset, task)
    # Only these two are parsed, because others, such as masks, take time.
    self._image = tfds.features.FeaturesDict({"image": image})
    self._labels = tfds.features.FeaturesDict({key: label})
    self._labels_key = key
    self.class_names = _name_classes(label, dataset, task)
    self.num_classes = len(self.class_names)
    self.multilabel = hasattr(label, "feature") and not (task and task.derive)
    self.max_labels = 1
    if self.multilabel:
      command = _command("check", dataset, data_dir)
      self.max_labels = (
        (task and task.max_labels)
        or (builder.info.metadata or {}).get("max_labels")
        or find_max_labels(self, builder.data_path, command)
      )

  def identity(self):
    shards = [
      [Path(f.filename).name, f.skip, f.take, f.examples_in_shard]
      for f in self._shards
    ]
    return f"{self._name} {digest(shards)}"

  def locate(self):
    return [(str(f.filename), f.skip, f.skip + f.take) for f in self._shards]

  def read(self, indices):
    return self._files.read(indices)

  def parse_image(self, record):
    skip = {"image": tfds.decode.SkipDecoding()}
    image = self._image.deserialize_example(record, decoders=skip)["image"]
    if self._task and self._task.scale_pixels != 1:
      pixels = tf.io.decode_png(image) * self._task.scale_pixels
      image = tf.io.encode_png(pixels, compression=0)
    return image

  def parse_labels(self, record):
    labels = self._labels.deserialize_example(record)[self._labels_key]
    if self._task and self._task.derive:
      labels = self._task.derive(labels)
    return tf.reshape(tf.cast(labels, tf.int32), [-1])


def find_builder(
  dataset: str, data_dir: str | None = None, file_format: str | None = None
) -> tfds.core.DatasetBuilder:
  """Returns the TFDS builder of a name, prepared or not.

  Args:
    dataset, data_dir: as `catalog.get_source`.
    file_format: to prepare it in; None for its present one.

  Raises:
    UserError: unknown name (with a suggestion), configuration or version.
  """
  if data_dir and set("[]*?") & set(os.path.abspath(data_dir)):
    raise UserError(
      f"data_dir {data_dir!r}: TFDS finds nothing below a folder with one of "
      "[ ] * ? in its path; rename it"
    )
  data_dir = os.path.expanduser(data_dir) if data_dir else None
  task = find_task(dataset)
  resolved = task.dataset if task else dataset
  name = resolved.partition("/")[0].partition(":")[0]
  if name in builders.names():
    builders.load(name)
  try:
    return tfds.builder(resolved, data_dir=data_dir, file_format=file_format)
  except tfds.core.DatasetNotFoundError as e:
    known = sorted({*tfds.list_builders(), *builders.names(), *TASKS})
    raise UserError(
      f"unknown data set {dataset!r}{suggest(name, known)}; built in: "
      f"{', '.join(builders.names())}; folders: folder:PATH; `vit-jax data "
      "list` lists all"
    ) from e
  except (ValueError, AssertionError, TypeError, ImportError) as e:
    raise UserError(f"data set {dataset!r}: {one_line(e)}") from e


def open_folder(builder):
  """Returns the builder of a prepared folder, and whether it has ArrayRecord.

  Formats added later are in the folder's list, not in the builder's code.
  """
  builder = tfds.builder_from_directory(builder.data_path)
  formats = builder.info.available_file_formats()
  return builder, tfds.core.FileFormat.ARRAY_RECORD in formats


def open_prepared(dataset: str, data_dir: str | None):
  """Returns the builder of a data set that is prepared as ArrayRecord.

  Raises:
    UserError: as `find_builder`; it is not prepared, or in another format.
  """
  builder = find_builder(dataset, data_dir)
  command = _command("prepare", dataset, data_dir)
  if not builder.is_prepared():
    raise UserError(
      f"data set {dataset!r} is not in {builder.data_path}; run `{command}`"
    )
  builder, ready = open_folder(builder)
  info = builder.info
  if not ready:
    kind = info.file_format.value if info.file_format else "an unknown format"
    raise UserError(
      f"data set {dataset!r} in {builder.data_path} is prepared as {kind}, "
      f"training reads array_record; run `{command}` to convert it"
    )
  info.set_file_format(
    "array_record", override=True, override_if_initialized=True
  )
  return builder


def _command(verb, dataset, data_dir):
  command = f"vit-jax data {verb} {shlex.quote(dataset)}"
  return (
    f"{command} --data_dir={shlex.quote(data_dir)}" if data_dir else command
  )


def resolve_split(infos, dataset: str, split: str):
  """Returns a split's string for TFDS, and [(split, first, end)] of its parts.

  Args:
    infos: {name: SplitInfo} of all splits.
    dataset: the data set; for a task, `split` may have the task's names.
    split: such as `train[:800]+test[:200]`.

  Raises:
    UserError: no such split, or a slice of it that has no examples.
  """
  task = find_task(dataset)
  spec = task.resolve_split(split) if task else split
  try:
    found = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    _check_percentages(spec, infos)
    parts = []
    for part in found:
      size = infos[part.splitname].num_examples
      first, end, _ = slice(part.from_, part.to).indices(size)
      parts.append((part.splitname, first, end))
    if all(first >= end for _, first, end in parts):
      raise ValueError("it has no examples")
  except (KeyError, ValueError, AssertionError) as e:
    problem = one_line(e, 120).partition(". ")[0].rstrip(".")
    names = f"{', '.join(task.splits)}; " if task and task.splits else ""
    sizes = [f"{name} ({x.num_examples:,})" for name, x in infos.items()]
    raise UserError(
      f"split {split!r} of {dataset!r}: {problem}; there are {names}"
      f"{', '.join(sizes)}, and parts and sums such as train[:90%], "
      "train[:800]+test[:200]"
    ) from e
  return spec, parts


def _check_percentages(split, infos):
  """Raises a ValueError for a percentage that rounds to none or all."""
  for part in split.split("+"):
    name, _, bounds = part.strip().partition("[")
    if "%" not in bounds:
      continue
    count = infos[name].num_examples
    for text in re.findall(r"[\d.]+", bounds):
      rounded = round(float(text) * count / 100)
      if 0 < float(text) < 100 and rounded in (0, count):
        raise ValueError(
          f"{text}% of {count:,} examples rounds to {rounded:,}, give a number "
          f"of examples, as in {name}[:{max(1, count - 1)}]"
        )


def _select_features(features, dataset, task):
  """Returns the image feature, the label key and the label feature."""
  keys = [task.feature] if task else ["label", "labels"]
  key = next((k for k in keys if k in features), None)
  label = features[key] if key else None
  image = dict(features).get("image")
  usable = (task and task.derive) or isinstance(
    getattr(label, "feature", label), tfds.features.ClassLabel
  )
  if not isinstance(image, tfds.features.Image) or not key or not usable:
    wanted = " or ".join(f"`{k}`" for k in keys)
    raise UserError(
      f"data set {dataset!r} has the features {', '.join(sorted(features))}; "
      f"it needs `image` and {wanted}, of class labels"
    )
  return image, key, label


def _name_classes(label, dataset, task):
  """Returns the class names, after checking their number."""
  if task and task.class_names:
    return list(task.class_names)
  names = list(getattr(label, "feature", label).names)
  if task and len(names) != task.num_classes:
    raise UserError(
      f"data set {dataset!r} has {len(names)} classes where it is prepared, "
      f"not the {task.num_classes} of {task.title}; prepare it again"
    )
  return names
