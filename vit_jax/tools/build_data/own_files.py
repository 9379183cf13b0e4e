"""Readers of your images and their labels.

Images are files in a folder, members of tar files, rows of Parquet files, or
examples of an existing data set, on a disk or in a bucket. Each has a name, and
a table has labels by name. `examine` runs in worker processes, which start
without TensorFlow, or in an Apache Beam pipeline.
"""

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import re
import signal
import tarfile
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from etils import epath
from PIL import Image
from pyarrow import csv, json, parquet

from vit_jax.data import preprocess
from vit_jax.errors import UserError, one_line
from vit_jax.files import walk
from vit_jax.tools.build_data.near_duplicates import Index, make_thumbnail

TFDS = "tfds:"  # prefix of a data set of images
FOLDERS = "folders"  # instead of a labels file
_KEPT = ("JPEG", "MPO", "PNG")  # others are re-encoded as PNG
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_TEXT, _NUMBER = pyarrow.string(), pyarrow.float64()
# {"image": "a.jpg", "labels": ["cat", "pet"], "confidences": [0.9, 0.8]}
_JSON_COLUMNS = {
  "image": _TEXT,
  "labels": pyarrow.list_(_TEXT),
  "confidences": pyarrow.list_(_NUMBER),
}
_CSV_COLUMNS = {"image": _TEXT, "label": _TEXT, "confidence": _NUMBER}


class Place(NamedTuple):
  """Location of an image: a file, a part or a row of it, or an example."""

  path: str
  start: int = 0  # the first byte, the row group, or the example
  size: int = -1  # in bytes, or the row within its group


@contextlib.contextmanager
def _user_errors(path):
  """Converts the errors of reading a file to a UserError that names it."""
  errors = (OSError, ValueError, LookupError, AttributeError, tarfile.TarError)
  try:
    yield
  except errors as e:
    raise UserError(f"{path} cannot be read: {one_line(e)}") from e


# --- labels ---


def read_labels(
  file: str | os.PathLike, classes: str | None, min_confidence: float, found=()
) -> tuple[list[str], dict[str, list[int]]]:
  """Returns the class names, and {image: class ids}.

  Args:
    file: CSV with the columns image, label and optionally confidence, one row
      per label; or JSON lines, see `_JSON_COLUMNS`. FOLDERS: an image's label
      is the name of its folder or tar file.
    classes: a file with one class per line; None: those that occur, sorted.
    min_confidence: labels with less are left out.
    found: the result of `list_images`, for FOLDERS.

  Raises:
    UserError: a file that cannot be read, or an unknown class.
  """
  with _user_errors(file):
    if file == FOLDERS:
      rows = list(_read_folders(found))
    else:
      rows = list(_read_table(file, min_confidence))
  names = sorted({label for _, label, _ in rows})
  if classes is not None:
    with _user_errors(classes):
      lines = Path(classes).read_text(encoding="utf-8-sig").splitlines()
    names = [line.strip() for line in lines]
    if len({*names, ""}) <= len(names):
      raise UserError(f"{classes}: give one class per line, each of them once")
  ids = {name: i for i, name in enumerate(names)}
  labels: dict[str, list[int]] = {}
  for image, label, confidence in rows:
    if label not in ids:
      raise UserError(
        f"{file}: class {label!r} of {image!r} is not one of those in {classes}"
      )
    of_image = labels.setdefault(image, [])
    if confidence >= min_confidence and ids[label] not in of_image:
      of_image.append(ids[label])
  return names, labels


def _read_folders(found):
  """Yields (image, label, 1); a file outside the folders has none."""
  for name, place in found:
    path = Path(place.path)
    inside = path.stem if path.suffix.lower() == ".tar" else ""
    if label := Path(name).parent.name or inside:
      yield name, label, 1.0


def _read_table(file, min_confidence):
  """Yields (image, label, confidence)."""
  if Path(file).suffix in (".json", ".jsonl"):
    schema = pyarrow.schema(_JSON_COLUMNS)
    options = json.ParseOptions(schema, unexpected_field_behavior="ignore")
    table = json.read_json(file, parse_options=options)
  else:
    options = csv.ConvertOptions(column_types=_CSV_COLUMNS)
    table = csv.read_csv(file, convert_options=options)
    if min_confidence and "confidence" not in table.column_names:
      raise ValueError("--min_confidence needs a column confidence")
  for batch in table.to_batches():
    for row in batch.to_pylist():
      labels = row.get("labels", [row.get("label")]) or []
      one = row.get("confidence", 1.0)
      confidences = row.get("confidences") or [one] * len(labels)
      for label, confidence in zip(labels, confidences, strict=True):
        if not row.get("image") or not label or confidence is None:
          raise ValueError(f"image, label or confidence is missing in {row}")
        yield row["image"].removeprefix("./"), label.strip(), confidence


# --- images ---


@functools.cache
def open_set(images: str, data_dir: str | None):
  """Returns the `data.Source` of "tfds:DATASET:SPLIT".

  Raises:
    UserError: as `get_source`, or no such SPLIT.
  """
  from vit_jax.data.catalog import get_source  # seconds, only needed here

  text = images.removeprefix(TFDS)
  # Data sets and slices of splits may have colons of their own.
  match = re.fullmatch(r"(.+):([a-zA-Z].*)", text)
  if not match:
    raise UserError(f"{text!r}: give DATASET:SPLIT, as cifar10:test")
  return get_source(match[1], match[2], data_dir)


def list_images(
  source: str, data_dir: str | None = None
) -> list[tuple[str, Place]]:
  """Returns [(name, place)] of all images, sorted by name.

  Args:
    source: a folder of images or of tar or Parquet files, or one such file. A
      name is the path in the folder or in the tar file; Parquet files have the
      columns "name" and "image". Links are followed. Or "tfds:DATASET:SPLIT",
      whose names are numbers.
    data_dir: where that data set is.

  Raises:
    UserError: no image, or two with the same name.
  """
  if source.startswith(TFDS):
    count = open_set(source, data_dir).num_examples
    return [(f"{i:08d}", Place(source, i)) for i in range(count)]
  root = epath.Path(source).expanduser()
  found = []
  for path in walk(str(root)) if root.is_dir() else [str(root)]:
    with _user_errors(path):
      found += _list_file(os.path.relpath(path, root), path)
  if not found:
    raise UserError(
      f"--images {source} does not exist or has no images: files that end in "
      f"{', '.join(_SUFFIXES)}, or .tar or .parquet files of them"
    )
  found.sort()
  for (name, one), (other_name, other) in itertools.pairwise(found):
    if name == other_name:
      raise UserError(
        f"two images have the name {name!r}, one in {one.path} and one in "
        f"{other.path}; rename or remove one"
      )
  return found


def _list_file(name, path):
  """Yields (name, place) of the images in a file."""
  suffix = os.path.splitext(path)[1].lower()
  if suffix in _SUFFIXES:
    yield name, Place(path)
  elif suffix == ".tar":
    with epath.Path(path).open("rb") as file, tarfile.open(fileobj=file) as tar:
      for member in tar:
        if member.isfile() and member.name.lower().endswith(_SUFFIXES):
          place = Place(path, member.offset_data, member.size)
          yield member.name.removeprefix("./"), place
  elif suffix == ".parquet":
    with epath.Path(path).open("rb") as file:
      num_groups = parquet.read_metadata(file).num_row_groups
    for group in range(num_groups):
      for row, name in enumerate(_read_group(path, group, "name").to_pylist()):
        yield name.removeprefix("./"), Place(path, group, row)


@functools.lru_cache(maxsize=2)
def _read_group(path, group, column):  # a whole file would be gigabytes
  with epath.Path(path).open("rb") as file:
    return parquet.ParquetFile(file).read_row_group(group, [column])[column]


def read(place: Place, data_dir: str | None) -> tuple[bytes, list[int]]:
  """Returns the bytes of an image file, and its labels in a data set."""
  path, start, size = place
  if path.startswith(TFDS):
    return open_set(path, data_dir).read_example(start)
  if path.lower().endswith(".parquet"):
    value = _read_group(path, start, "image")[size].as_py()
    return value["bytes"] if isinstance(value, dict) else value, []
  with epath.Path(path).open("rb") as f:
    f.seek(start)
    return f.read(size), []


# --- one image ---


def examine(
  images: list[tuple[str, Place, list[int] | None]], index: str, data_dir: str
) -> tuple[list[tuple], dict[str, list]]:
  """Reads images and finds their near-duplicates among the test images.

  Args:
    images: (name, place, labels); labels are None for a data set's own.
    index: the folder of the saved index of test images.
    data_dir: that of TFDS.

  Returns:
    (key, example) for TFDS of each image that is kept, and those left out:
    [(name, reason)] "unreadable", [name] "without labels", [(name, test image,
    similarity)] "twins".
  """
  found, kept, unreadable, unlabelled, twins = [], [], [], [], []
  for name, place, labels in images:
    try:
      encoded, own = read(place, data_dir)
      if labels := labels or own:
        found.append((name, labels, *decode(encoded)))
      else:
        unlabelled.append(name)
    except Exception as e:  # whatever a file system or a data set raises
      unreadable.append([name, one_line(e)])
  thumbnails = np.array([thumbnail for *_, thumbnail in found])
  similar = Index.load(index).find(thumbnails)
  for (name, labels, encoded, _), twin in zip(found, similar, strict=True):
    if twin:
      twins.append([name, *twin])
    else:
      example = {"image": encoded, "labels": labels}
      kept.append((os.fsencode(name), example))
  left_out = {"unreadable": unreadable, "without labels": unlabelled}
  return kept, left_out | {"twins": twins}


def decode(encoded: bytes, name: str = "image") -> tuple[bytes, np.ndarray]:
  """Returns bytes that training decodes to the same image, and a thumbnail.

  Raises:
    UserError: as `preprocess.decode_image`, which decodes as for training.
  """
  with warnings.catch_warnings():  # about images that Pillow can still read
    warnings.simplefilter("ignore")
    image = Image.fromarray(preprocess.decode_image(encoded, name))
    header = preprocess.open_image(encoded, name)
  if header.format not in _KEPT or header.mode == "CMYK":
    out = io.BytesIO()
    image.save(out, "PNG")
    encoded = out.getvalue()
  return encoded, make_thumbnail(image)


def start_worker() -> None:
  """Initialises a worker process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the build handles Ctrl-C
  parent: Any = multiprocessing.parent_process()

  def end_with_build():  # even if the build is killed
    parent.join()
    os._exit(1)

  threading.Thread(target=end_with_build, daemon=True).start()
