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
import io
import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from PIL import Image

from vit_jax import preprocess
from vit_jax.data import builders
from vit_jax.data.tasks import TASKS, find_task, resolve_dataset
from vit_jax.errors import UserError, suggest

FOLDER = "folder:"
OBJECTNET = "objectnet:"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# What TensorFlow decodes, as Pillow calls it.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_HOLD_OUT = 0.1  # of each class, where a folder has no test images of its own
_NUM_THREADS = 16  # reading files is waiting
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

  def check_example(self, index: int) -> tuple[list[int], tuple[int, int]]:
    """Returns the labels of an example and its (height, width) in pixels.

    Raises:
      UserError: it cannot be used; names the example.
    """
    encoded, labels = self.read_example(index)
    what = self.describe(index)
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
      image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    except tf.errors.OpError as e:
      raise UserError(
        f"{what}: not a readable image; repair or remove it"
      ) from e
    return labels, tuple(image.shape[:2])


BAD_LABEL = -2
_CHECKED_LABELS = 1000  # before a run starts; the rest is checked as it is read


def get_source(dataset: str, split: str, data_dir: str | None = None) -> Source:
  """Opens a split of a data set.

  Args:
    dataset: a TFDS name, `name/config:version`, a task of `tasks.py`
      (`vtab:clevr_count`), `folder:PATH` or `objectnet:PATH`.
    split: `train`, or a part or sum: `train[:98%]`, `train[:800]+test[:200]`;
      of a task also its names: `train800`.
    data_dir: where TFDS data sets are; None for TFDS's own choice.

  Raises:
    UserError: unknown or unprepared data set, bad split, no image and label in
      it, a file that is no image.
  """
  if dataset.startswith(FOLDER):
    return FolderSource(dataset, split)
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
  if text.startswith(FOLDER) and not _ends_with_weight(text):
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
    return float(text.rpartition("=")[2]) > 0
  except ValueError:
    return False


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


def list_splits(dataset: str, data_dir: str | None = None) -> dict[str, int]:
  """Returns {split: number of examples} of a prepared data set or a folder.

  Raises:
    UserError: as `get_source`.
  """
  if dataset.startswith(FOLDER):
    _, splits = _find_splits(find_folder(dataset))
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
  return os.path.expanduser(data_dir) if data_dir else None


def _open_prepared(dataset, data_dir):
  builder = find_builder(dataset, data_dir)
  where = f" --data_dir={data_dir}" if data_dir else ""
  if not builder.is_prepared():
    raise UserError(
      f"data set {dataset!r} is not in {builder.data_path}; run `vit-jax data "
      f"prepare {dataset}{where}`"
    )
  # The folder knows of formats added since; the builder's code does not.
  builder = tfds.builder_from_directory(builder.data_path)
  array_record = tfds.core.FileFormat.ARRAY_RECORD
  if array_record not in builder.info.available_file_formats():
    raise UserError(
      f"data set {dataset!r} in {builder.data_path} is prepared as "
      f"{_format_name(builder.info)}, training reads array_record; run "
      f"`vit-jax data prepare {dataset}{where}` to convert it"
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
  try:
    info = splits[task.resolve_split(split) if task else split]
  except (KeyError, ValueError, AssertionError) as e:
    raise _bad_split(splits, dataset, split, e) from e
  if not info.num_examples:
    raise _bad_split(splits, dataset, split, "it has no examples")
  return info


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

  With `train/` and one of `test/`, `val/`, `validation/` inside, these are the
  splits. Otherwise a tenth of each class is held out: those whose relative
  file names have the smallest hashes are `test`, the others `train`. Within a
  split the order is that of the hashes too, so that `train[:10%]` is a random
  tenth, the same everywhere.

  A record is the label, four bytes little endian, and the file.
  """

  multilabel = False
  max_labels = 1

  def __init__(self, dataset: str, split: str):
    self.dataset, self.split = dataset, split
    self.class_names, splits = _find_splits(find_folder(dataset))
    self.num_classes = len(self.class_names)
    self._files = take_split(splits, dataset, split)
    self.num_examples = len(self._files)
    Image.init()  # Pillow's list of formats; not thread-safe
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      transcode = list(pool.map(_verify, [path for path, _ in self._files]))
    self._transcode = np.array(transcode)

  def read(self, indices):
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      return list(pool.map(self._read_one, np.asarray(indices).tolist()))

  def check_labels(self):
    """They are the folders' and cannot be wrong."""

  def identity(self):
    names = [f"{path.parent.name}/{path.name}" for path, _ in self._files]
    sizes = [path.stat().st_size for path, _ in self._files]
    return _digest([*zip(names, sizes, strict=True)])

  def _read_one(self, index):
    path, label = self._files[index]
    data = path.read_bytes()
    if self._transcode[index]:
      data = _to_png(data, path)
    return struct.pack("<i", label) + data

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


def _find_splits(root):
  """Returns (class names, {split: [(path, label)] in the order of hashes})."""
  names = ("test", "val", "validation")
  tests = [name for name in names if (root / name).is_dir()]
  if not tests or not (root / "train").is_dir():
    classes, files = _find_files(root)
    return classes, _hold_out(files, len(classes))
  found = {name: _find_files(root / name) for name in ("train", *tests)}
  classes = found["train"][0]
  for name in tests:
    if found[name][0] != classes:
      odd = sorted(set(classes) ^ set(found[name][0]))
      raise UserError(
        f"{root}: {name}/ and train/ must have the same classes, they differ "
        f"in {', '.join(odd[:5])}"
      )
  return classes, {name: files for name, (_, files) in found.items()}


def _find_files(root):
  """Returns (class names, [(path, label)]) of a folder of class folders."""
  classes = sorted(
    d.name for d in root.iterdir() if d.is_dir() and d.name[0] != "."
  )
  files = find_images(root, classes)
  if len(classes) < 2:
    found = f"1 class, {classes[0]!r}" if classes else "no folder of images"
    raise UserError(
      f"{root}: found {found}; it needs a sub-folder of images for each of at "
      "least 2 classes"
    )
  return classes, sorted(files, key=lambda file: _hash(file[0], root))


def find_images(root: Path, classes: list[str]) -> list[tuple[Path, int]]:
  """Returns [(path, which of the classes)] of a folder of class folders.

  Raises:
    UserError: a class has no images.
  """
  files = []
  for label, name in enumerate(classes):
    images = [
      path
      for path in (root / name).rglob("*")
      if path.suffix.lower() in _SUFFIXES
      and path.name[0] != "."
      and path.is_file()
    ]
    if not images:
      raise UserError(
        f"{root / name}: class {name!r} has no images ({', '.join(_SUFFIXES)});"
        " add some or remove the folder"
      )
    files += [(path, label) for path in images]
  return files


def _hash(path, root):
  return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()


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
  taken = [f for p in parts for f in splits[p.splitname][p.from_ : p.to]]
  if not taken:
    raise _bad_split(infos, dataset, split, "it has no examples")
  return taken


def _verify(path):
  """Raises if `path` is no whole image; returns whether to transcode it.

  Cheap: headers, PNG's check sums, and whether the end is there. Only what
  looks odd is decoded.
  """
  data = path.read_bytes()
  try:
    image = preprocess.open_image(data, str(path), _FORMATS)
    kind = image.format
    # TensorFlow decodes no WebP with alpha to RGB, nor moving ones.
    transcode = kind == "WEBP" and (
      image.mode != "RGB" or getattr(image, "is_animated", False)
    )
    image.verify()
    if not transcode and not _has_end(data, kind):
      tf.io.decode_image(data, channels=3, expand_animations=False)
  except UserError:
    raise
  except Exception as e:  # Pillow's plugins raise what they like.
    raise UserError(
      f"{path}: not a readable image ({type(e).__name__}); repair or remove it"
    ) from e
  return transcode


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


def _to_png(data, path):
  pixels = preprocess.decode_image(data, str(path))
  png = io.BytesIO()
  Image.fromarray(pixels).save(png, "PNG", compress_level=1)
  return png.getvalue()
