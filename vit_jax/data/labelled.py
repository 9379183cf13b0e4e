"""Makes a multi-label data set of one's own images, as JFT is for the paper.

Images come from a folder, from tar files or from Parquet files; labels, several
an image, from a table beside them. The result is a TFDS data set in ArrayRecord
and is read like any other.

The work is cut into parts. A finished part leaves its records and a report; a
build that was killed goes on with the parts that have none. When all are there,
they get their final names and TFDS's description, and the folder its own name.
"""

import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore
from PIL import Image
from tensorflow_datasets.core import example_serializer

from vit_jax import preprocess
from vit_jax.data import near_duplicates
from vit_jax.data.source import get_source, one_line
from vit_jax.errors import RunStopped, UserError, suggest

log = logging.getLogger(__name__)

VERSION = "1.0.0"
_PART = 1000  # images
_TOGETHER = 32  # images that are compared with the test images at once
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_KEPT = ("JPEG", "MPO", "PNG")  # others are encoded anew as PNG
_COLUMNS = ("confidence", "weight")  # of labels; two names of one thing
_ADVICE = "finished parts are kept, the same command goes on"


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a build makes of what; the same plan goes on with a build.

  Attributes:
    name: of the data set.
    images: a folder, or tar or Parquet files.
    class_names: in the order of their ids.
    labels: {image: class ids}.
    against: (data set, split) pairs whose images must not be in the result.
    holdout: part of the images that become the split "test".
  """

  name: str
  images: str
  class_names: list[str]
  labels: dict[str, list[int]]
  against: list[tuple[str, str]]
  holdout: float


class Place(NamedTuple):
  """Where an image's bytes are: all of a file, a piece of one, or a row."""

  path: str
  offset: int = 0
  size: int = -1
  row: int = -1


class Part(NamedTuple):
  """One piece of the work: (name, place, labels) of images; where to write."""

  number: int
  images: list[tuple[str, Place, list[int]]]
  folder: Path


# --- labels ---


def read_labels(
  file: str | os.PathLike, classes: str | None, min_confidence: float
) -> tuple[list[str], dict[str, list[int]]]:
  """Reads a labels file.

  Args:
    file: CSV with the columns image, label and perhaps confidence, a row a
      label; or JSON lines {"image": "a/1.jpg", "labels": ["cat", "dog"],
      "confidences": [0.9, 0.4]}. Weights are taken as confidences.
    classes: a file with a class a line; None: those that occur, sorted.
    min_confidence: labels of less are left out.

  Returns:
    The class names, and {image: class ids}.

  Raises:
    UserError: a line that cannot be read, an unknown class, the same label of
      the same image twice, no label left.
  """
  path = Path(file)
  known = None if classes is None else _read_classes(Path(classes))
  ids = {name: i for i, name in enumerate(known or ())}
  seen: dict[str, dict[int, bool]] = {}  # {image: {class: sure enough}}
  for line, image, label, confidence in _read_rows(path):
    if known is not None and label not in ids:
      raise UserError(
        f"{path}, line {line}: unknown class {label!r}{suggest(label, known)}; "
        f"the classes are those of {classes}"
      )
    of_image = seen.setdefault(image, {})
    number = ids.setdefault(label, len(ids))
    if number in of_image:
      raise UserError(
        f"{path}, line {line}: {image!r} has the label {label!r} already; "
        "remove one of the two"
      )
    of_image[number] = confidence >= min_confidence
  names = known or sorted(ids)
  order = {ids[name]: i for i, name in enumerate(names)}
  labels = {
    image: [order[number] for number, sure in of_image.items() if sure]
    for image, of_image in seen.items()
  }
  if not any(labels.values()):
    least = f" of a confidence of {min_confidence} or more" if labels else ""
    raise UserError(f"{path} has no labels{least}")
  return names, labels


def _read_classes(path):
  names = [line.rstrip("\r\n") for line in _read_lines(path)]
  for line, name in enumerate(names, 1):
    if not name.strip():
      raise UserError(f"{path}, line {line}: no class; remove the line")
  twice = [name for name, count in Counter(names).items() if count > 1]
  if twice:
    first = names.index(twice[0])
    second = names.index(twice[0], first + 1)
    raise UserError(
      f"{path}: {twice[0]!r} is there twice, in the lines {first + 1} and "
      f"{second + 1}"
    )
  if not names:
    raise UserError(f"{path} has no classes")
  return names


def _read_lines(path) -> Iterator[str]:
  try:
    # Spreadsheets begin their CSV files with a byte order mark.
    with open(path, encoding="utf-8-sig", newline="") as f:
      yield from f
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f"{path}: cannot be read: {one_line(e)}") from e


def _read_rows(path) -> Iterator[tuple[int, str, str, float]]:
  """Yields (line, image, label, confidence)."""
  as_json = path.suffix.lower() in (".jsonl", ".json")
  read = _read_json if as_json else _read_csv
  for line, image, label, confidence in read(path):
    if not image or not label:
      raise UserError(f"{path}, line {line}: a field is empty")
    try:
      number = float(1 if confidence in (None, "") else confidence)
    except (ValueError, TypeError):
      number = math.nan
    if not math.isfinite(number):
      raise UserError(
        f"{path}, line {line}: confidence {confidence!r} is no number"
      )
    yield line, _tidy(image), label, number


def _read_csv(path):
  reader = csv.DictReader(_read_lines(path), strict=True)
  try:
    columns = reader.fieldnames or ["nothing"]
    if not {"image", "label"} <= set(columns):
      raise UserError(
        f"{path}: the first line must name the columns image, label and "
        f"perhaps confidence; it names {', '.join(columns)}"
      )
    weight = next((name for name in _COLUMNS if name in columns), "")
    for row in reader:
      if None in row:
        raise UserError(
          f"{path}, line {reader.line_num}: more fields than columns; a name "
          "with a comma needs quotation marks"
        )
      yield reader.line_num, row["image"], row["label"], row.get(weight)
  except csv.Error as e:
    raise UserError(f"{path}, line {reader.line_num}: {e}") from e


def _read_json(path):
  first: dict[str, int] = {}
  for number, line in enumerate(_read_lines(path), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      image, labels = row["image"], row["labels"]
      confidences = next(
        (row[f"{name}s"] for name in _COLUMNS if row.get(f"{name}s")), None
      )
      if not isinstance(image, str) or not isinstance(labels, list):
        raise ValueError("the image must be a text, the labels a list")
      if len(confidences or labels) != len(labels):
        raise ValueError("labels and confidences differ in number")
    except (ValueError, KeyError, TypeError) as e:
      words = f"{e} is missing" if isinstance(e, KeyError) else one_line(e)
      raise UserError(
        f"{path}, line {number}: {words}; a line is "
        '{"image": "a.jpg", "labels": ["cat"], "confidences": [0.9]}'
      ) from e
    if image in first:
      raise UserError(
        f"{path}: {image!r} is in the lines {first[image]} and {number}; give "
        "each image one line"
      )
    first[image] = number
    pairs = zip(labels, confidences or [1] * len(labels), strict=True)
    for label, confidence in pairs:
      yield number, image, str(label), confidence


def _tidy(name):
  """Takes the "./" away that tar and find put before names."""
  return name.removeprefix("./")


# --- images ---


def list_images(source: str) -> list[tuple[str, Place]]:
  """Returns [(name, where)] of all images, sorted by name.

  Args:
    source: a folder of images or of tar or Parquet files, or one such file. A
      name is the path below the folder, or in the tar file; in Parquet files
      it is the column "name", and the bytes are the column "image". Links to
      folders are not followed.

  Raises:
    UserError: no image, or two of one name: labels are given by name.
  """
  root = os.path.expanduser(source)
  if not os.path.exists(root):
    raise UserError(f"--images {source} does not exist")
  found = []
  for path in _walk(root) if os.path.isdir(root) else [root]:
    lower = path.lower()
    if lower.endswith(".tar"):
      found += _list_tar(path)
    elif lower.endswith(".parquet"):
      found += _list_parquet(path)
    elif lower.endswith(_SUFFIXES):
      name = os.path.basename(path)
      if path != root:
        name = path[len(root) :].lstrip(os.sep).replace(os.sep, "/")
      found.append((name, Place(path)))
  if not found:
    raise UserError(
      f"--images {source} has no images; {', '.join(_SUFFIXES)} files, .tar or "
      ".parquet files of them are read"
    )
  found.sort()
  for (name, one), (other_name, other) in itertools.pairwise(found):
    if name == other_name:
      raise UserError(
        f"two images have the name {name!r}, one in {_describe(one)} and one "
        f"in {_describe(other)}; rename or remove one"
      )
  return found


def _walk(root) -> Iterator[str]:
  """Yields the paths of files; of a million in seconds, with no stat of any."""

  def fail(error):
    raise UserError(f"--images {root}: {one_line(error)}")

  for folder, _, files in os.walk(root, onerror=fail):
    for name in files:
      yield os.path.join(folder, name)


def _describe(place):
  if place.row >= 0:
    return f"{place.path} (row {place.row})"
  return f"{place.path} (byte {place.offset})" if place.offset else place.path


def _list_tar(path):
  try:
    with tarfile.open(path) as archive:
      return [
        (_tidy(member.name), Place(path, member.offset_data, member.size))
        for member in archive
        if member.isfile() and member.name.lower().endswith(_SUFFIXES)
      ]
  except (tarfile.TarError, OSError) as e:
    raise UserError(f"{path}: no readable tar file ({e})") from e


def _list_parquet(path):
  try:
    table = _open_parquet(path).read(columns=["name"])
  except OSError as e:
    raise UserError(f"{path}: a damaged Parquet file ({one_line(e)})") from e
  names = table.column("name").to_pylist()
  for row, name in enumerate(names):
    if not isinstance(name, str) or not name:
      raise UserError(f"{path}, row {row}: {name!r} is no name of an image")
  return [(_tidy(name), Place(path, row=i)) for i, name in enumerate(names)]


@functools.lru_cache(maxsize=2)
def _open_parquet(path):
  try:
    from pyarrow import parquet
  except ImportError as e:
    raise UserError("Parquet files need pyarrow: pip install pyarrow") from e
  problem = None
  try:
    file = parquet.ParquetFile(path)
    if {"name", "image"} <= set(file.schema_arrow.names):
      return file
    problem = f"its columns are {', '.join(file.schema_arrow.names)}"
  except (OSError, ValueError) as e:
    problem = one_line(e)
  raise UserError(
    f"{path}: no readable Parquet file with the columns name and image "
    f"({problem})"
  )


@functools.lru_cache(maxsize=2)
def _read_row_group(path, group):
  return _open_parquet(path).read_row_group(group, ["image"]).column("image")


def read_image(place: Place) -> bytes:
  """Returns the bytes of an image file."""
  if place.row >= 0:
    # A whole file would be gigabytes in each worker.
    metadata = _open_parquet(place.path).metadata
    group, row = 0, place.row
    while row >= metadata.row_group(group).num_rows:
      row -= metadata.row_group(group).num_rows
      group += 1
    value = _read_row_group(place.path, group)[row].as_py()
    return value["bytes"] if isinstance(value, dict) else value
  with open(place.path, "rb") as f:
    f.seek(place.offset)
    return f.read(place.size)


# --- building ---


def build(plan: Plan, data_dir: str, workers: int | None = None) -> Path:
  """Writes the data set, or goes on writing it.

  Returns:
    Its folder. report.json in it counts what was written, and lists what was
    not: unreadable images and why, images without labels, twins of test images,
    and names of the labels that no image has.

  Raises:
    UserError: a data set of that name is there, a build of another plan, or
      one that is at work; no image has labels.
    RunStopped: the disk is full, or a worker died. What is finished is kept,
      the same call goes on.
  """
  if workers is not None and workers < 1:
    raise UserError(f"--workers is {workers}; at least one is needed")
  root = Path(data_dir).expanduser() / plan.name
  folder, partial = root / VERSION, root / f"{VERSION}.building"
  if folder.exists():
    raise UserError(f"{folder} exists; nothing is overwritten, choose a name")
  images = list_images(plan.images)
  unknown = _find_unknown(plan, images)
  try:
    partial.mkdir(parents=True, exist_ok=True)
    with _lock(partial):
      _check_same_plan(plan, images, partial)
      parts = _make_parts(plan, images, partial)
      todo = [part for part in parts if not _report_of(part).exists()]
      if len(todo) < len(parts):
        there = len(parts) - len(todo)
        log.info("going on: %d of %d parts are there", there, len(parts))
      if todo:
        _run_parts(plan, data_dir, todo, workers)
      _finish(plan, parts, unknown, folder)
  except OSError as e:
    raise RunStopped(f"{one_line(e)}; {_ADVICE}") from e
  except KeyboardInterrupt:
    log.warning("stopped; %s", _ADVICE)
    raise
  return folder


def _find_unknown(plan, images):
  """Returns the names in the labels file that no image has; says how many."""
  names = {name for name, _ in images}
  unknown = sorted(plan.labels.keys() - names)
  if len(unknown) == len(plan.labels):
    raise UserError(
      f"none of the {len(unknown):,} names in the labels file, such as "
      f"{unknown[0]!r}, is that of one of the {len(images):,} images, such as "
      f"{images[0][0]!r}; names are paths below --images"
    )
  if unknown:
    log.warning(
      "%d of %d names in the labels file are those of no image, such as %r",
      len(unknown),
      len(plan.labels),
      unknown[0],
    )
  return unknown


@contextlib.contextmanager
def _lock(folder):
  """Keeps a second build away from a folder; ends with this process."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  except BlockingIOError as e:
    raise UserError(f"{folder}: another build is at work in it; wait") from e
  finally:
    os.close(descriptor)


def _check_same_plan(plan, images, partial):
  """Raises if the folder is another plan's.

  Contents of files are not looked at, which would cost reading them all: who
  changes an image between two calls gets one or the other version of it.
  """
  options = (plan.name, plan.images, plan.class_names, plan.against)
  digest = hashlib.sha256(repr((*options, plan.holdout)).encode())
  for name, place in images:
    line = (name, tuple(place), plan.labels.get(name))
    digest.update(repr(line).encode())
  file = partial / "plan.sha256"
  if not file.exists():
    _write_text(file, digest.hexdigest())
  elif file.read_text() != digest.hexdigest():
    raise UserError(
      f"{partial} holds a build of other images, labels or options; choose "
      "another name, or delete that folder"
    )


def _write_text(file, text):
  """Writes all of a file or nothing."""
  temporary = file.with_suffix(".tmp")
  temporary.write_text(text)
  temporary.replace(file)


def _make_parts(plan, images, partial):
  return [
    Part(
      number,
      [
        (name, place, plan.labels.get(name, []))
        for name, place in images[start : start + _PART]
      ],
      partial,
    )
    for number, start in enumerate(range(0, len(images), _PART))
  ]


def _report_of(part) -> Path:
  return part.folder / f"part-{part.number:05d}.json"


# --- the workers ---


def _run_parts(plan, data_dir, parts, workers):
  index = parts[0].folder / "against"
  if not (index / "names.json").exists():
    make_index(plan.against, data_dir).save(index)
  # Not forked: TensorFlow's threads do not survive that.
  context = multiprocessing.get_context("spawn")
  stop = context.RawValue(ctypes.c_bool, False)  # no lock to die with
  pool = concurrent.futures.ProcessPoolExecutor(
    min(workers or os.cpu_count() or 1, len(parts)),
    mp_context=context,
    initializer=_start_worker,
    initargs=(dataclasses.replace(plan, labels={}), index, stop),
  )
  try:
    with _for_workers():
      futures = [pool.submit(_write_part, part) for part in parts]
    finished = concurrent.futures.as_completed(futures)
    for done, future in enumerate(finished, 1):
      future.result()
      log.info("%d of %d parts", done, len(parts))
  except concurrent.futures.process.BrokenProcessPool as e:
    raise RunStopped(
      "a worker died, as they do when memory runs out or somebody kills them; "
      f"{_ADVICE}, perhaps with fewer --workers"
    ) from e
  finally:
    stop.value = True
    pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _for_workers():
  """What processes that are started meanwhile inherit.

  Ctrl-C reaches all processes of a terminal; one of them is to answer it. And
  there is a worker a core already, without more threads for matrix products.
  """
  threads = "OPENBLAS_NUM_THREADS"
  given = os.environ.get(threads)
  in_main = threading.current_thread() is threading.main_thread()
  handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
  os.environ[threads] = "1"
  try:
    yield
  finally:
    os.environ.pop(threads)
    if given is not None:
      os.environ[threads] = given
    if in_main:
      signal.signal(signal.SIGINT, handler)


def make_index(
  against: list[tuple[str, str]], data_dir: str
) -> near_duplicates.Index:
  """Returns the index of all images of [(data set, split)].

  Raises:
    UserError: a data set that is not there, or an image that is none.
  """
  sources = [get_source(*pair, data_dir) for pair in against]
  names = [
    f"{source.dataset}:{source.split}:{i}"
    for source in sources
    for i in range(source.num_examples)
  ]
  side = near_duplicates.THUMBNAIL
  thumbnails = np.empty((len(names), side, side, 3), np.uint8)
  found = itertools.chain.from_iterable(map(_make_thumbnails, sources))
  for i, thumbnail in enumerate(found):
    thumbnails[i] = thumbnail
  return near_duplicates.Index(names, thumbnails)


def _make_thumbnails(source) -> Iterator[np.ndarray]:
  """Yields those of all images of a source, in its order."""
  # Traced once: outside a graph, TFDS takes milliseconds for a record.
  string = tf.TensorSpec([], tf.string)  # pyright: ignore
  parse = tf.function(source.parse_image, input_signature=[string])

  def make(index, encoded):
    pixels = preprocess.decode_image(encoded, source.describe(index))
    return near_duplicates.make_thumbnail(Image.fromarray(pixels))

  # Threads: Pillow lets others run while it decodes.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, source.num_examples, _PART):
      stop = min(start + _PART, source.num_examples)
      records = source.read(np.arange(start, stop))
      encoded = [parse(record).numpy() for record in records]
      yield from pool.map(make, range(start, stop), encoded)


# What each worker process is given once.
_worker: dict[str, Any] = {}


def _start_worker(plan, index, stop):
  # Pillow remarks on what can be read all the same.
  warnings.simplefilter("ignore")
  _worker.update(plan=plan, features=make_features(plan), stop=stop)
  _worker.update(index=near_duplicates.Index.load(index))
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
  """Lets no worker of a killed build write into the next one's files."""
  parent = multiprocessing.parent_process()
  if parent:
    parent.join()
    os._exit(1)


def make_features(plan) -> tfds.features.FeaturesDict:
  """Returns what an example has: an image and any number of labels."""
  label = tfds.features.ClassLabel(names=plan.class_names)
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "labels": tfds.features.Sequence(label),
    }
  )


class _Writer:
  """The records of one part, a file a split, and the report on them."""

  def __init__(self, part, plan, features):
    self._part, self._plan, self._features = part, plan, features
    self._serializer = example_serializer.ExampleSerializer(
      features.get_serialized_info()
    )
    self._files = {}
    self.report = {"counts": {}, "bytes": {}, "most": 1}
    self.report |= {"unreadable": [], "without labels": [], "twins": []}

  def write(self, name, encoded, labels):
    split = "test" if _draw(name) < self._plan.holdout else "train"
    if split not in self._files:
      self._files[split] = array_record_module.ArrayRecordWriter(
        str(_records_of(self._part, split)), "group_size:1"
      )
    example = {"image": io.BytesIO(encoded), "labels": labels}
    record = self._serializer.serialize_example(
      self._features.encode_example(example)
    )
    # Else a map's order, and so the bytes, differ from process to process.
    record = tf.train.Example.FromString(record).SerializeToString(
      deterministic=True
    )
    self._files[split].write(record)
    for key, more in (("counts", 1), ("bytes", len(record))):
      self.report[key][split] = self.report[key].get(split, 0) + more
    self.report["most"] = max(self.report["most"], len(labels))

  def close(self):
    """Makes the part a finished one."""
    for file in self._files.values():
      file.close()
    _write_text(_report_of(self._part), json.dumps(self.report))


def _records_of(part, split) -> Path:
  return part.folder / f"part-{part.number:05d}-{split}.array_record"


def _write_part(part):
  """Writes the records of one part, then its report."""
  writer = _Writer(part, _worker["plan"], _worker["features"])
  try:
    for start in range(0, len(part.images), _TOGETHER):
      if _worker["stop"].value:
        return
      _write_images(part.images[start : start + _TOGETHER], writer)
    writer.close()
  except RuntimeError as e:  # ArrayRecord's; a full disk is one
    raise OSError(one_line(e)) from e


def _write_images(images, writer):
  """Writes those that can be read and are no twins."""
  read = []
  for name, place, labels in images:
    if not labels:
      writer.report["without labels"].append(name)
      continue
    try:
      read.append((name, labels, *_decode(read_image(place))))
    except Exception as e:  # Pillow's plugins raise what they like
      why = one_line(e) if isinstance(e, UserError) else type(e).__name__
      writer.report["unreadable"].append([name, why])
  if not read:
    return
  twins = _worker["index"].find(np.stack([thumbnail for *_, thumbnail in read]))
  for (name, labels, encoded, _), twin in zip(read, twins, strict=True):
    if twin:
      found = [name, twin.name, round(twin.similarity, 4)]
      writer.report["twins"].append(found)
    else:
      writer.write(name, encoded, labels)


def _decode(encoded):
  """Returns bytes that TensorFlow decodes to the same image, and a thumbnail.

  Pixels are those that training sees, see `preprocess.decode_image`: turned by
  no EXIF, the first of several. CMYK is made RGB here, in one way.
  """
  image = preprocess.open_image(encoded, "image")
  kept = image.format in _KEPT and image.mode != "CMYK"
  if image.mode == "RGB":
    image.load()  # all of it, and so finds damage
  else:
    image = Image.fromarray(preprocess.decode_image(image))
  if not kept:
    out = io.BytesIO()
    image.save(out, "PNG")
    encoded = out.getvalue()
  return encoded, near_duplicates.make_thumbnail(image)


def _draw(name) -> float:
  """Returns a number in [0, 1) that is the name's own."""
  digest = hashlib.sha256(name.encode()).digest()
  return int.from_bytes(digest[:6], "big") / 2**48


def _finish(plan, parts, unknown, folder):
  """Gives the files their final names, and TFDS what it wants to know."""
  partial = parts[0].folder
  reports = [json.loads(_report_of(part).read_text()) for part in parts]
  total: dict[str, Any] = {"images": sum(len(part.images) for part in parts)}
  for name in ("unreadable", "without labels", "twins"):
    total[name] = [x for report in reports for x in report[name]]
  total["labels of no image"] = unknown
  splits = []
  for split in ("train", "test"):
    lengths = []
    found = [i for i, r in enumerate(reports) if r["counts"].get(split)]
    template = tfds.core.ShardedFileTemplate(
      data_dir=partial,
      dataset_name=plan.name,
      split=split,
      filetype_suffix="array_record",
    )
    for shard, i in enumerate(found):
      source = _records_of(parts[i], split)
      target = Path(
        template.sharded_filepath(shard_index=shard, num_shards=len(found))
      )
      if not target.exists():  # else a finish was interrupted here
        source.rename(target)
      lengths.append(reports[i]["counts"][split])
    total[split] = sum(lengths)
    if lengths:
      splits.append(
        tfds.core.SplitInfo(
          name=split,
          shard_lengths=lengths,
          num_bytes=sum(reports[i]["bytes"][split] for i in found),
          filename_template=template,
        )
      )
  if not total["train"]:
    raise UserError(
      f"no image of {plan.images} can be used: "
      f"{len(total['without labels'])} have no labels, "
      f"{len(total['unreadable'])} cannot be read, {len(total['twins'])} are "
      f"in a test set; see {_report_of(parts[0])}"
    )
  tfds.folder_dataset.write_metadata(
    data_dir=str(partial),
    features=make_features(plan),
    split_infos=splits,
    version=VERSION,
    check_data=False,  # by reading it in order, which ArrayRecord is not for
    description=f"Made of {plan.images} by vit-jax data build.",
    metadata=tfds.core.MetadataDict(max_labels=max(r["most"] for r in reports)),
  )
  (partial / "report.json").write_text(json.dumps(total, indent=1))
  shutil.rmtree(partial / "against", ignore_errors=True)
  partial.rename(folder)
  # Whoever is killed here leaves too much, not too little.
  for part in parts:
    (folder / _report_of(part).name).unlink()
  (folder / "plan.sha256").unlink()
