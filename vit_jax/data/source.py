"""Sources: index -> bytes -> (encoded image, labels).

A source is one split of one data set, read at random: a TFDS data set in
ArrayRecord, or a folder of images. `get_source` finds it by name.
"""

# What TFDS says to return is a union of everything that it might.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false

import abc
import concurrent.futures
import functools
import hashlib
import json
import logging
import math
import os
import re
import resource
import shlex
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from PIL import Image

from vit_jax.data import builders, ops, preprocess
from vit_jax.data.benchmarks import TASKS, find_task, resolve_dataset
from vit_jax.errors import UserError, suggest

log = logging.getLogger(__name__)

FOLDER = "folder:"
OBJECTNET = "objectnet:"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# What TensorFlow decodes, as Pillow calls it.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Folder, in any case -> split.
_SPLITS = {"train": "train", "training": "train"}
_SPLITS |= {"test": "test", "testing": "test", "dev": "dev"}
_SPLITS |= {name: name for name in ("val", "valid", "validation", "eval")}
_HOLD_OUT = 0.1  # of each class, where a folder has no test images of its own
_NUM_THREADS = 16  # reading files is waiting
_SPARE_FILES = 128  # open files that a run needs beside those of its data
_CHUNK = 4096  # records that are looked at together, while counting


class Source(abc.ABC):
  """One split of one data set.

  Attributes:
    dataset, split: the strings that it was opened with.
    num_examples, num_classes: counts.
    class_names: a name for each class.
    multilabel: whether an image may have several labels, or none.
    max_labels: the most labels of one image; 1 for single-label sets.
  """

  dataset: str
  split: str
  num_examples: int
  num_classes: int
  class_names: list[str]
  multilabel: bool
  max_labels: int

  @abc.abstractmethod
  def read(self, indices: np.ndarray) -> list[bytes]:
    """Returns the records of `indices`, int64[b], in one call. Thread-safe."""

  @abc.abstractmethod
  def parse_labels(self, record: tf.Tensor | bytes) -> tf.Tensor:
    """Returns the class ids of a record, int32[any number], unchecked."""

  @abc.abstractmethod
  def parse_image(self, record: tf.Tensor | bytes) -> tf.Tensor:
    """Returns the encoded image of a record, a scalar string."""

  def identity(self) -> str:
    """Returns text that changes when the examples of the split do.

    Cheap: of files, their names and sizes. Where they lie does not matter.
    """
    return f"{self.num_examples:,} examples"

  def locate(self) -> list[tuple[str, int, int]]:
    """Returns (file, first, end) of the examples, for `count_shared`."""
    return []

  def parse(self, record: tf.Tensor | bytes) -> tuple[tf.Tensor, tf.Tensor]:
    """Parses one record, in a graph or out of it.

    Args:
      record: scalar string, one of those that `read` returns.

    Returns:
      (encoded image: scalar string, labels: int32[max_labels]). Missing labels
      are -1. A label list that cannot be used is marked by a first label of
      `BAD_LABEL`; raising is left to who knows which example it is.
    """
    labels = self.parse_labels(record)
    usable = tf.reduce_all((labels >= 0) & (labels < self.num_classes))
    usable &= tf.size(labels) <= self.max_labels
    if not self.multilabel:
      usable &= tf.size(labels) == 1
    labels = labels[: self.max_labels]
    padding = [[0, self.max_labels - tf.size(labels)]]
    padded = tf.pad(labels, padding, constant_values=-1)
    bad = tf.fill([self.max_labels], BAD_LABEL)
    labels = tf.ensure_shape(tf.where(usable, padded, bad), [self.max_labels])
    return self.parse_image(record), labels

  def describe(self, index: int) -> str:
    """Names an example, for people."""
    return f"example {index} of {self.dataset} {self.split}"

  @functools.cached_property
  def _parse_unchecked(self):
    # Traced once: outside a graph, TFDS takes milliseconds for a record.
    return tf.function(
      lambda record: (self.parse_image(record), self.parse_labels(record)),
      input_signature=[tf.TensorSpec([], tf.string)],
    ).get_concrete_function()

  def check_labels(self) -> None:
    """Looks at the labels of all examples, or of many in a large set.

    Raises:
      UserError: an example's labels cannot be used; names it.
    """
    count = min(_CHECKED_LABELS, self.num_examples)
    indices = np.arange(count) * self.num_examples // count
    records = tf.data.Dataset.from_tensor_slices(self.read(indices))
    labels = records.map(lambda record: self.parse(record)[1]).batch(count)
    bad = (labels.get_single_element() == BAD_LABEL).numpy().any(axis=1)
    if bad.any():
      self.check_example(int(indices[bad.argmax()]))

  def read_example(self, index: int) -> tuple[bytes, list[int]]:
    """Returns an example's encoded image and its labels, unchecked."""
    record = tf.constant(self.read(np.array([index]))[0])
    encoded, labels = self._parse_unchecked(record)
    return encoded.numpy(), labels.numpy().tolist()

  def check_example(
    self, index: int
  ) -> tuple[list[int], tuple[int, int], list[str]]:
    """Returns the labels of an example, its (height, width) in pixels, traits.

    Raises:
      UserError: it cannot be used; names the example.
    """
    what = self.describe(index)
    try:
      encoded, labels = self.read_example(index)
    except OSError as e:
      raise UserError(f"{what}: cannot be read: {e.strerror or e}") from e
    allowed = f"0 to {self.num_classes - 1}"
    for label in labels:
      if not 0 <= label < self.num_classes:
        hint = "; the split has no labels" if label == -1 else ""
        raise UserError(
          f"{what}: label {label} is out of range, {self.num_classes} classes "
          f"have labels {allowed}{hint}; choose another split or repair the set"
        )
    if len(labels) > self.max_labels:
      raise UserError(
        f"{what}: {len(labels)} labels, but the data set declares at most "
        f"{self.max_labels}; prepare it again"
      )
    try:
      image = ops.decode(encoded, precise=False)
    except tf.errors.OpError as e:
      raise UserError(
        f"{what}: not a readable image; repair or remove it"
      ) from e
    pixels = image.numpy()
    return labels, pixels.shape[:2], _find_traits(encoded, pixels)


def _find_traits(encoded, pixels):
  """Returns what `data check` counts: what users may not expect of an image."""
  traits = []
  if (pixels == pixels[0, 0]).all():
    traits.append("of one colour")
  try:
    image = preprocess.open_image(encoded, "image")
    if image.has_transparency_data:
      traits.append("with transparency, put on white")
    if preprocess.read_turn(image).any():
      traits.append("turned upright as their EXIF says")
    if image.mode.startswith("I") and np.asarray(image).max() < 4096:
      traits.append("16-bit with values below 4,096, so nearly black")
  except Exception:  # Pillow may not read what TensorFlow does
    return traits
  return traits


BAD_LABEL = -2
_CHECKED_LABELS = 1000  # before a run starts; the rest is checked as it is read


def get_source(
  dataset: str,
  split: str,
  data_dir: str | None = None,
  faults: list[str] | None = None,
) -> Source:
  """Opens a split of a data set.

  Args:
    dataset: a TFDS name, `name/config:version`, a task of `tasks.py`
      (`vtab:clevr_count`), `folder:PATH` or `objectnet:PATH`.
    split: `train`, or a part or sum: `train[:98%]`, `train[:800]+test[:200]`;
      of a task also its names: `train800`.
    data_dir: where TFDS data sets are; None for TFDS's own choice.
    faults: of a folder, takes a line for each file that is no whole image, and
      the file is left out; None: such files are an error.

  Raises:
    UserError: unknown or unprepared data set, bad split, no image and label in
      it, a file that is no image.
  """
  if dataset.startswith(FOLDER):
    return FolderSource(dataset, split, faults)
  if dataset.startswith(OBJECTNET):
    from vit_jax.data.objectnet import ObjectNetSource  # which imports this

    return ObjectNetSource(dataset, split)
  return TfdsSource(dataset, split, data_dir)


def parse_mixture(text: str) -> list[tuple[str, float]]:
  """Splits `a=0.7,b=0.3` into [(data set, weight)]; one name alone weighs 1.

  Weights are relative: `a=7,b=3` is the same mixture.

  Raises:
    UserError: a weight is missing, not a number or not positive.
  """
  text = text.strip()
  if not text:
    raise UserError("the data set's name is empty; see `vit-jax data list`")
  # A folder's path may hold commas and equal signs.
  if text.startswith((FOLDER, OBJECTNET)) and not _ends_with_weight(text):
    return [(text, 1.0)]
  if "=" not in text and "," not in text:
    return [(text, 1.0)]
  mixture = []
  for part in text.split(","):
    name, _, weight = part.strip().rpartition("=")
    try:
      weight = float(weight)
    except ValueError:
      weight = math.nan
    if not name or not 0 < weight < math.inf:
      raise UserError(
        f"mixture {text!r}: {part.strip()!r} needs a name and a positive "
        "weight, as in 'a=0.7,b=0.3'"
      )
    mixture.append((name, weight))
  return mixture


def _ends_with_weight(text):
  try:
    weighs = float(text.rpartition("=")[2]) > 0
  except ValueError:
    return False
  return weighs and not Path(text.partition(":")[2]).expanduser().is_dir()


def check_mixture(sources: Sequence[Source]) -> None:
  """Raises a UserError unless all sources have the same classes, in order."""
  first = sources[0]
  for source in sources[1:]:
    if source.class_names == first.class_names:
      continue
    pairs = zip(first.class_names, source.class_names, strict=False)
    differ = [
      f"; class {i} is {one!r} and {other!r}"
      for i, (one, other) in enumerate(pairs)
      if one != other
    ]
    raise UserError(
      f"mixture: {first.dataset!r} has {first.num_classes:,} classes and "
      f"{source.dataset!r} {source.num_classes:,}; they must be the same, in "
      f"the same order{''.join(differ[:3])}"
    )


def count_shared(source: Source, other: Source) -> int:
  """Returns how many examples of `other` are examples of `source` as well."""
  ranges: dict[str, list[tuple[int, int]]] = {}
  for file, first, end in source.locate():
    ranges.setdefault(file, []).append((first, end))
  return sum(
    max(0, min(end, other_end) - max(first, other_first))
    for file, other_first, other_end in other.locate()
    for first, end in ranges.get(file, ())
  )


# --- TFDS ---


class TfdsSource(Source):
  """A split of a TFDS data set in ArrayRecord files."""

  def __init__(self, dataset: str, split: str, data_dir: str | None):
    builder = _open_prepared(dataset, data_dir)
    self.dataset, self.split = dataset, split
    self._task = find_task(dataset)
    info = _select_split(builder.info.splits, dataset, split, self._task)
    self.num_examples = info.num_examples
    shards = [
      [Path(i.filename).name, i.skip, i.take, i.examples_in_shard]
      for i in info.file_instructions
    ]
    self._identity = f"{builder.info.full_name} {_digest(shards)}"
    self._locations = [
      (str(i.filename), i.skip, i.skip + i.take) for i in info.file_instructions
    ]
    _allow_open_files(len(shards), dataset)
    self._files = array_record_data_source.ArrayRecordDataSource(
      _existing_files(info.file_instructions, dataset)
    )
    image, key, label = _select_features(
      builder.info.features, dataset, self._task
    )
    # Only these two are parsed: others, masks say, would cost decoding time.
    self._image = tfds.features.FeaturesDict({"image": image})
    self._labels = tfds.features.FeaturesDict({key: label})
    self._labels_key = key
    self.class_names = _name_classes(label, dataset, self._task)
    self.num_classes = len(self.class_names)
    derived = self._task and self._task.derive
    self.multilabel = hasattr(label, "feature") and not derived
    self.max_labels = 1
    if self.multilabel:
      declared = self._task and self._task.max_labels
      declared = declared or _read_max_labels(builder)
      self.max_labels = declared or self._count_max_labels()

  def identity(self):
    return self._identity

  def locate(self):
    return self._locations

  def read(self, indices):
    return self._files.__getitems__(np.asarray(indices).tolist())

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

  def _count_max_labels(self):
    """Reads the whole split; sets that declare `max_labels` are spared it."""
    most = 1
    for start in range(0, self.num_examples, _CHUNK):
      stop = min(start + _CHUNK, self.num_examples)
      counts = (
        tf.data.Dataset.from_tensor_slices(self.read(np.arange(start, stop)))
        .map(lambda record: tf.size(self.parse_labels(record)))
        .batch(_CHUNK)
      )
      most = max(most, *(int(c.max()) for c in counts.as_numpy_iterator()))
    return most


def _allow_open_files(count, dataset):
  """Raises the limit of open files, since ArrayRecord keeps its files open.

  Raises:
    UserError: the system allows no more.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  limit = 2**20 if hard == resource.RLIM_INFINITY else hard
  if count + _SPARE_FILES > limit:
    raise UserError(
      f"data set {dataset!r} has {count:,} files, all of them open at once; "
      f"this process may open {limit:,}: allow more, `ulimit -n {2 * count}`"
    )
  if soft != resource.RLIM_INFINITY:
    new = max(soft, min(soft + count, limit))
    resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))


def list_splits(dataset: str, data_dir: str | None = None) -> dict[str, int]:
  """Returns {split: number of examples} of a prepared data set or a folder.

  Raises:
    UserError: as `get_source`.
  """
  if dataset.startswith(FOLDER):
    _, splits, _ = _find_splits(find_folder(dataset))
    return {name: len(files) for name, files in splits.items()}
  if dataset.startswith(OBJECTNET):
    return {"test": get_source(dataset, "test").num_examples}
  splits = _open_prepared(dataset, data_dir).info.splits
  return {name: info.num_examples for name, info in splits.items()}


def find_builder(
  dataset: str, data_dir: str | None = None, file_format: str | None = None
) -> tfds.core.DatasetBuilder:
  """Returns the TFDS builder of a name, prepared or not.

  Args:
    dataset, data_dir: as `get_source`.
    file_format: what to prepare it as; None for what it is already.

  Raises:
    UserError: unknown name (did you mean), configuration or version.
  """
  resolved = resolve_dataset(dataset)
  name = resolved.partition("/")[0].partition(":")[0]
  if name in builders.names():
    builders.load(name)  # registers it
  try:
    return tfds.builder(
      resolved, data_dir=_expand(data_dir), file_format=file_format
    )
  except tfds.core.DatasetNotFoundError as e:
    known = sorted({*tfds.list_builders(), *builders.names(), *TASKS})
    raise UserError(
      f"unknown data set {dataset!r}{suggest(name, known)}; built in: "
      f"{', '.join(builders.names())}; folders: folder:PATH; `vit-jax data "
      "list` lists all"
    ) from e
  except (ValueError, AssertionError, TypeError, ImportError) as e:
    raise UserError(f"data set {dataset!r}: {one_line(e)}") from e


def one_line(error: Exception, limit: int = 200) -> str:
  """Returns an exception's words in one line of at most `limit` characters.

  A long one loses its middle: what went wrong stands at its ends, and long
  paths between.
  """
  words = " ".join(str(error).split()) or type(error).__name__
  if len(words) <= limit:
    return words
  half = (limit - 5) // 2
  return f"{words[:half]} ... {words[-half:]}"


def _expand(data_dir):
  if not data_dir:
    return None
  if set("[]*?") & set(os.path.abspath(data_dir)):
    raise UserError(
      f"data_dir {data_dir!r}: TFDS finds nothing below a folder with one of "
      "[ ] * ? in its path; rename it"
    )
  return os.path.expanduser(data_dir)


def _open_prepared(dataset, data_dir):
  builder = find_builder(dataset, data_dir)
  command = f"vit-jax data prepare {shlex.quote(dataset)}"
  if data_dir:
    command += f" --data_dir={shlex.quote(data_dir)}"
  if not builder.is_prepared():
    raise UserError(
      f"data set {dataset!r} is not in {builder.data_path}; run `{command}`"
    )
  # The folder knows of formats added since; the builder's code does not.
  builder = tfds.builder_from_directory(builder.data_path)
  array_record = tfds.core.FileFormat.ARRAY_RECORD
  if array_record not in builder.info.available_file_formats():
    raise UserError(
      f"data set {dataset!r} in {builder.data_path} is prepared as "
      f"{_format_name(builder.info)}, training reads array_record; run "
      f"`{command}` to convert it"
    )
  builder.info.set_file_format(
    array_record, override=True, override_if_initialized=True
  )
  return builder


def _format_name(info):
  return info.file_format.value if info.file_format else "an unknown format"


def _read_max_labels(builder):
  """What the builder declared in `tfds.core.MetadataDict`, or None."""
  file = os.path.join(builder.data_path, "metadata.json")
  if not tf.io.gfile.exists(file):
    return None
  with tf.io.gfile.GFile(file) as f:
    return json.load(f).get("max_labels")


def _select_split(splits, dataset, split, task):
  """Returns the TFDS split info of e.g. `train[:800]+test[:200]`."""
  spec = task.resolve_split(split) if task else split
  try:
    info = splits[spec]
  except (KeyError, ValueError, AssertionError) as e:
    raise _bad_split(splits, dataset, split, e) from e
  _check_percentages(spec, splits, dataset)
  if not info.num_examples:
    raise _bad_split(splits, dataset, split, "it has no examples")
  return info


def _check_percentages(split, infos, dataset):
  """Raises a UserError for a percentage of few examples that is none or all."""
  for part in split.split("+"):
    name, _, bounds = part.strip().partition("[")
    if "%" not in bounds or name not in infos:
      continue
    count = infos[name].num_examples
    for text in re.findall(r"[\d.]+", bounds):
      rounded = round(float(text) * count / 100)
      if 0 < float(text) < 100 and rounded in (0, count):
        raise _bad_split(
          infos,
          dataset,
          split,
          f"{text}% of {count:,} examples rounds to {rounded:,}, give a number "
          f"of examples, as in {name}[:{max(1, count - 1)}]",
        )


def _bad_split(splits, dataset, split, problem):
  """Returns the UserError; `problem` is words or TFDS's exception."""
  if isinstance(problem, Exception):
    problem = one_line(problem, 100).partition(". ")[0].rstrip(".")
  existing = ", ".join(
    f"{name} ({info.num_examples:,})" for name, info in splits.items()
  )
  task = find_task(dataset)
  if task and task.splits:
    existing = f"{', '.join(task.splits)}; {existing}"
  return UserError(
    f"split {split!r} of {dataset!r}: {problem}; there are {existing}, and "
    "parts and sums such as train[:90%], train[:800]+test[:200]"
  )


def _existing_files(instructions, dataset):
  missing = [
    str(i.filename) for i in instructions if not tf.io.gfile.exists(i.filename)
  ]
  if missing:
    raise UserError(
      f"data set {dataset!r}: {len(missing)} of its files are missing, the "
      f"first is {missing[0]}; delete the folder and prepare it again"
    )
  return instructions


def _select_features(features, dataset, task):
  """Returns the image's feature, the labels' key and their feature."""
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
  """Returns the class names, as many as the task has."""
  if task and task.class_names:
    return list(task.class_names)
  names = list(getattr(label, "feature", label).names)
  if task and len(names) != task.num_classes:
    raise UserError(
      f"data set {dataset!r} has {len(names)} classes where it is prepared, "
      f"not the {task.num_classes} of {task.title}; prepare it again"
    )
  return names


# --- folders ---


class FolderSource(Source):
  """A folder of images, a sub-folder a class, or such a folder a split.

  With a folder for training and others for testing inside (`_SPLITS`), these
  are the splits. Otherwise a tenth of each class is held out: those whose
  relative file names have the smallest hashes are `test`, the others `train`.
  Within a split the order is that of the hashes too, so that `train[:10%]` is a
  random tenth, the same everywhere. Links are followed.

  A record is the label, four bytes little endian, and the file.

  Attributes:
    left_out: files that are not read, and folders beside those of splits.
  """

  multilabel = False
  max_labels = 1

  def __init__(self, dataset: str, split: str, faults: list[str] | None = None):
    self.dataset, self.split = dataset, split
    root = find_folder(dataset)
    self.class_names, splits, self.left_out = _find_splits(root)
    self.num_classes = len(self.class_names)
    self._files = take_split(splits, dataset, split)
    self._check_files(faults)
    self.num_examples = len(self._files)
    if self.left_out and faults is None:
      log.warning("%s: %s", dataset, self.describe_left_out())

  def _check_files(self, faults):
    """Leaves out what is no whole image; raises if `faults` is None."""
    Image.init()  # Pillow's list of formats; not thread-safe
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      found = list(pool.map(_find_fault, [path for path, _ in self._files]))
    self._files = [
      file for file, fault in zip(self._files, found, strict=True) if not fault
    ]
    found = [fault for fault in found if fault]
    if faults is not None:
      faults += found
    elif found:
      command = f"vit-jax data check {shlex.quote(self.dataset)}"
      more = f"; `{command}` lists {len(found) - 1} more files at fault"
      raise UserError(found[0] + (more if len(found) > 1 else ""))

  def describe_left_out(self) -> str:
    """Returns how many files of which kinds are not read."""
    kinds = Counter(
      "folder" if path.is_dir() else path.suffix.lower() or "without suffix"
      for path in self.left_out
    )
    counts = ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common())
    return (
      f"left out: {counts}, such as {self.left_out[0]}; what is read are "
      f"{', '.join(_SUFFIXES)} files in the folders of classes"
    )

  def read(self, indices):
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      return list(pool.map(self._read_one, np.asarray(indices).tolist()))

  def check_labels(self):
    """They are the folders' and cannot be wrong."""

  def identity(self):
    return self._identity

  @functools.cached_property
  def _identity(self):  # a stat of each file: once a start
    names = [f"{path.parent.name}/{path.name}" for path, _ in self._files]
    sizes = [path.stat().st_size for path, _ in self._files]
    return _digest([*zip(names, sizes, strict=True)])

  def locate(self):
    return [(str(path), 0, 1) for path, _ in self._files]

  def _read_one(self, index):
    path, label = self._files[index]
    return struct.pack("<i", label) + path.read_bytes()

  def parse_image(self, record):
    return tf.strings.substr(record, 4, -1)

  def parse_labels(self, record):
    return tf.io.decode_raw(tf.strings.substr(record, 0, 4), tf.int32)

  def describe(self, index):
    return str(self._files[index][0])


def _digest(values) -> str:
  """Returns sixteen hexadecimal digits that change with any of the values."""
  text = json.dumps(values)
  return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def find_folder(dataset: str, prefix: str = FOLDER) -> Path:
  """Returns the folder of `folder:PATH`, or of another prefix.

  Raises:
    UserError: there is none.
  """
  root = Path(dataset.removeprefix(prefix)).expanduser()
  if not root.is_dir():
    raise UserError(
      f"{dataset!r}: {root} is not a folder; give one with a sub-folder of "
      "images for each class"
    )
  return root


def _list_folders(root):
  return sorted(d for d in root.iterdir() if d.is_dir() and d.name[0] != ".")


def _find_splits(root):
  """Returns class names, {split: [(path, label)]}, and what is left out.

  Files are in the order of their hashes.
  """
  folders: dict[str, Path] = {}
  others = []
  for folder in _list_folders(root):
    split = _SPLITS.get(folder.name.lower())
    if split in folders:
      raise UserError(
        f"{root}: {folders[split].name}/ and {folder.name}/ mean the same "
        "split; remove or rename one"
      )
    if split:
      folders[split] = folder
    else:
      others.append(folder)
  if "train" not in folders or len(folders) == 1:
    classes, files, left_out = _find_files(root)
    return classes, _hold_out(files, len(classes)), left_out
  classes, train, left_out = _find_files(folders.pop("train"))
  splits = {"train": train}
  for split, folder in folders.items():
    _, splits[split], more = _find_files(folder, classes)
    left_out += more
  return classes, splits, left_out + others


def _find_files(root, known=None):
  """Returns class names, [(path, label)] and [path] of what is left out.

  Labels are those of the `known` classes, some of which may have no images.
  """
  classes = [folder.name for folder in _list_folders(root)]
  unknown = [name for name in classes if name not in (known or classes)]
  if unknown:
    raise UserError(
      f"{root}: the training images have no class {unknown[0]!r}"
      f"{suggest(unknown[0], known)}; rename or remove the folder"
    )
  files, left_out = find_images(root, classes)
  if len(classes) < (1 if known else 2):
    found = f"1 class, {classes[0]!r}" if classes else "no folder of images"
    raise UserError(
      f"{root}: found {found}; it needs a sub-folder of images for each of at "
      "least 2 classes"
    )
  _check_classes(root, classes, files)
  left_out += [
    path for path in root.iterdir() if path.is_file() and path.name[0] != "."
  ]
  labels = [(known or classes).index(name) for name in classes]
  files = [(path, labels[label]) for path, label in files]
  return classes, sorted(files, key=lambda f: _hash(f[0], root)), left_out


def _check_classes(root, classes, files):
  """Raises a UserError for class folders that are something else."""
  for name in classes:
    try:
      name.encode()
    except UnicodeEncodeError as e:
      raise UserError(
        f"{root}: the folder {name!r} names a class, not in UTF-8; rename it"
      ) from e
  inner: dict[int, set[str]] = {}
  for path, label in files:
    parts = path.relative_to(root).parts
    if len(parts) == 2:  # an image of its own
      return
    inner.setdefault(label, set()).add(parts[1])
  first = inner[0]
  if len(first) > 1 and all(names == first for names in inner.values()):
    raise UserError(
      f"{root}: {', '.join(classes[:5])} would be the classes, but all have "
      f"the same sub-folders, {', '.join(sorted(first)[:5])}; name splits "
      "train/ and test/, or give a folder whose sub-folders are the classes"
    )


def find_images(
  root: Path, classes: list[str]
) -> tuple[list[tuple[Path, int]], list[Path]]:
  """Returns [(path, which of the classes)] of a folder of class folders.

  Second: the files that are not read. Hidden ones are not counted.

  Raises:
    UserError: a class has no images.
  """
  files, left_out = [], []
  for label, name in enumerate(classes):
    paths = [
      Path(path)
      for path in walk(str(root / name))
      if os.path.basename(path)[0] != "."
      # A link to nothing is found when it is read.
      and (os.path.isfile(path) or os.path.islink(path))
    ]
    images = [path for path in paths if path.suffix.lower() in _SUFFIXES]
    left_out += [path for path in paths if path.suffix.lower() not in _SUFFIXES]
    if not images:
      raise UserError(
        f"{root / name}: class {name!r} has no images ({', '.join(_SUFFIXES)});"
        " add some or remove the folder"
      )
    files += [(path, label) for path in images]
  return files, left_out


def walk(root: str) -> Iterator[str]:
  """Yields the paths of files; of a million in seconds, with no stat of any.

  Raises:
    UserError: a folder that cannot be read, or a link to one that it is in.
  """

  def fail(error):
    raise UserError(
      f"{error.filename}: cannot be read: {error.strerror}"
    ) from error

  for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
    for name in folders:
      link = os.path.join(folder, name)
      if os.path.islink(link):
        target = os.path.realpath(link)
        around = [os.path.realpath(x) for x in (folder, *Path(folder).parents)]
        if any(f"{x}/".startswith(f"{target}/") for x in around):
          raise UserError(f"{link}: a link to a folder around it; remove it")
    for name in files:
      yield os.path.join(folder, name)


def _hash(path, root):
  relative = path.relative_to(root).as_posix()
  return hashlib.sha256(os.fsencode(relative)).digest()


def _hold_out(files, num_classes):
  """Splits off the first tenth of each class, at least one where it has two."""
  totals = np.bincount([label for _, label in files], minlength=num_classes)
  quota = np.where(
    totals < 2, 0, np.maximum(1, np.floor(totals * _HOLD_OUT + 0.5))
  )
  splits = {"train": [], "test": []}
  for path, label in files:
    splits["test" if quota[label] > 0 else "train"].append((path, label))
    quota[label] -= 1
  return splits


def take_split(splits: dict[str, list], dataset: str, split: str) -> list:
  """Returns the files of `split`, a part or a sum, as TFDS understands it.

  Raises:
    UserError: it is none, or there are none.
  """
  infos = {
    name: tfds.core.SplitInfo(
      name=name, shard_lengths=[len(files)], num_bytes=0
    )
    for name, files in splits.items()
  }
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
  except (KeyError, ValueError, AssertionError) as e:
    raise _bad_split(infos, dataset, split, e) from e
  _check_percentages(split, infos, dataset)
  taken = [f for p in parts for f in splits[p.splitname][p.from_ : p.to]]
  if not taken:
    raise _bad_split(infos, dataset, split, "it has no examples")
  return taken


def _find_fault(path) -> str | None:
  """Returns what is wrong with a file that is no whole image.

  Cheap: headers, PNG's check sums, and whether the end is there. Only what
  looks odd is decoded.
  """
  try:
    data = path.read_bytes()
    image = preprocess.open_image(data, str(path), _FORMATS)
    kind = image.format
    image.verify()
    if not _has_end(data, kind):
      ops.decode(data, precise=False)
  except UserError as e:
    return str(e)
  except OSError as e:
    if e.strerror:
      return f"{path}: cannot be read: {e.strerror}"
    return _not_readable(path, e)
  except Exception as e:  # Pillow's plugins raise what they like.
    return _not_readable(path, e)


def _not_readable(path, error):
  kind = type(error).__name__
  return f"{path}: not a readable image ({kind}); repair or remove it"


def _has_end(data, kind):
  if kind in (
    "JPEG",
    "MPO",
  ):  # MPO: with a second picture; the end marker cannot occur inside a scan
    return b"\xff\xd9" in data[-4096:]
  if kind == "PNG":
    return b"IEND" in data[-4096:]
  if kind == "WEBP":
    return len(data) >= 8 + int.from_bytes(data[4:8], "little")
  return False
