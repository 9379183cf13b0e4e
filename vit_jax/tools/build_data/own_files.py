"""Readers of your images and their labels.

Images are files in a folder, members of tar files, rows of Parquet files, or
examples of an existing data set, on a disk or in a bucket. Each has a name, and
a table has labels by name.
"""

import csv
import functools
import itertools
import json
import math
import os
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from etils import epath

from vit_jax.errors import UserError, one_line, suggest
from vit_jax.files import walk

TFDS = "tfds:"  # prefix of a data set of images
FOLDERS = "folders"  # instead of a labels file
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_COLUMNS = ("confidence", "weight")  # of labels; synonyms
_LINE = '{"image": "a.jpg", "labels": ["cat"], "confidences": [0.9]}'


class Place(NamedTuple):
  """Location of an image: a file, a part or a row of it, or an example."""

  path: str
  start: int = 0  # the first byte, the row group, or the example
  size: int = -1  # in bytes, or the row within its group


# --- labels ---


def read_labels(
  file: str | os.PathLike, classes: str | None, min_confidence: float, found=()
) -> tuple[list[str], dict[str, list[int]]]:
  """Returns the class names, and {image: class ids}.

  Args:
    file: CSV with the columns image, label and optionally confidence or weight,
      one row per label; or JSON lines, see `_LINE`. FOLDERS: an image's label
      is the name of its folder or tar file.
    classes: a file with one class per line; None: those that occur, sorted.
    min_confidence: labels with less are left out.
    found: the result of `list_images`, for FOLDERS.

  Raises:
    UserError: a line that cannot be read, an unknown class, no label left.
  """
  rows = list(_read_folders(found) if file == FOLDERS else _read_rows(file))
  names = sorted({label for _, _, label, _ in rows})
  if classes is not None:
    names = [line.strip() for line in _read_lines(classes)]
    if "" in names or len({*names}) < max(len(names), 1):
      raise UserError(f"{classes}: give one class per line, each of them once")
  ids = {name: i for i, name in enumerate(names)}
  labels: dict[str, list[int]] = {}
  for where, image, label, confidence in rows:
    if classes is None and "|" in label:
      raise UserError(
        f"{where}: {label!r} is several labels; give each a line of its own, "
        "or list it in --classes if it is one label"
      )
    if label not in ids:
      raise UserError(
        f"{where}: unknown class {label!r}{suggest(label, names)}; the classes "
        f"are listed in {classes}"
      )
    of_image = labels.setdefault(image, [])
    if confidence >= min_confidence and ids[label] not in of_image:
      of_image.append(ids[label])
  if not any(labels.values()):
    least = f" with a confidence of {min_confidence} or more" if labels else ""
    raise UserError(f"{file} has no labels{least}")
  return names, labels


def _read_folders(found):
  """Yields (image, image, label, 1); a file outside the folders has none."""
  for name, place in found:
    path = Path(place.path)
    inside = path.stem if path.suffix.lower() == ".tar" else ""
    if label := Path(name).parent.name or inside:
      yield name, name, label, 1.0


def _read_lines(path):
  try:
    with open(path, encoding="utf-8-sig", newline="") as f:
      yield from f
  except (OSError, UnicodeDecodeError) as e:
    words = getattr(e, "strerror", None) or e
    raise UserError(f"{path} cannot be read: {words}") from e


def _read_rows(file):
  """Yields (file and line, image, label, confidence)."""
  at = [1]
  is_json = Path(file).suffix in (".json", ".jsonl")

  def lines():
    for at[0], text in enumerate(_read_lines(file), 1):
      yield text

  try:
    for *row, weight in (_read_json if is_json else _read_csv)(lines()):
      image, label = (str(field or "").strip() for field in row)
      if not image or not label:
        raise ValueError("a field is empty")
      try:
        confidence = float(weight)
      except (ValueError, TypeError):
        confidence = math.nan
      if not math.isfinite(confidence):
        raise ValueError(f"confidence {weight!r} is not a number")
      yield f"{file}, line {at[0]}", _tidy(image), label, confidence
  except UserError:
    raise
  except (ValueError, KeyError, TypeError, csv.Error) as e:
    words = one_line(e) + f"; a line is {_LINE}" * is_json
    raise UserError(f"{file}, line {at[0]}: {words}") from e


def _read_csv(lines):
  """Yields (image, label, confidence)."""
  reader = csv.DictReader(lines, strict=True)
  names = reader.fieldnames = [x.strip() for x in reader.fieldnames or ()]
  if not {"image", "label"} <= {*names}:
    raise ValueError(
      "it must have the columns image, label and optionally confidence; it has "
      f"{', '.join(names)}"
    )
  weight = next((x for x in _COLUMNS if x in names), "")
  for row in reader:
    if None in row:
      raise ValueError(
        "more fields than columns; a name with a comma needs quotation marks"
      )
    yield row["image"], row["label"], row.get(weight) or 1


def _read_json(lines):
  """Yields (image, label, confidence)."""
  for row in map(json.loads, filter(str.strip, lines)):
    image, labels = row["image"], row["labels"]
    if not isinstance(labels, list):
      raise TypeError("the labels must be a list")
    found = next((row[f"{x}s"] for x in _COLUMNS if row.get(f"{x}s")), None)
    for pair in zip(labels, found or [1] * len(labels), strict=True):
      yield image, *pair


def _tidy(name):
  """Removes the "./" that tar and find put before names."""
  return name.removeprefix("./")


# --- images ---


@functools.cache
def open_set(images: str, data_dir: str | None):
  """Returns the `data.Source` of "tfds:DATASET:SPLIT".

  Raises:
    UserError: as `get_source`, or no such SPLIT.
  """
  from vit_jax.data.catalog import get_source  # seconds, only needed here

  text = images.removeprefix(TFDS)
  # Data sets and splits may have colons of their own.
  match = re.fullmatch(r"(.+):((\w+(\[[^\]]*\])?\+?)+)", text)
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
  if not root.exists():
    raise UserError(f"--images {source} does not exist")
  base = root if root.is_dir() else root.parent
  found = []
  for path in walk(str(root)) if root.is_dir() else [str(root)]:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _SUFFIXES:
      found.append((os.path.relpath(path, base), Place(path)))
    elif suffix in (".tar", ".parquet"):
      found += _list_tar(path) if suffix == ".tar" else _list_parquet(path)
  if not found:
    raise UserError(
      f"--images {source} has no images; give {', '.join(_SUFFIXES)} files, or "
      ".tar or .parquet files of them"
    )
  found.sort()
  for (name, one), (other_name, other) in itertools.pairwise(found):
    if name == other_name:
      raise UserError(
        f"two images have the name {name!r}, one in {one.path} and one in "
        f"{other.path}; rename or remove one"
      )
  return found


def _list_tar(path):
  try:
    with _open(path) as file, tarfile.open(fileobj=file) as archive:
      return [
        (_tidy(member.name), Place(path, member.offset_data, member.size))
        for member in archive
        if member.isfile() and member.name.lower().endswith(_SUFFIXES)
      ]
  except (tarfile.TarError, OSError) as e:
    raise UserError(f"{path} is not a readable tar file ({e})") from e


def _list_parquet(path):
  try:
    return [
      (_tidy(name), Place(path, group, row))
      for group in range(_open_parquet(path).num_row_groups)
      for row, name in enumerate(_read_group(path, group, "name").to_pylist())
    ]
  except (OSError, ValueError, KeyError, AttributeError, ImportError) as e:
    raise UserError(
      f"{path} is not a readable Parquet file with a name and an image in each "
      f"row ({one_line(e)})"
    ) from e


def _open(path):
  return epath.Path(path).open("rb")


@functools.lru_cache(maxsize=2)
def _open_parquet(path):
  from pyarrow import parquet

  return parquet.ParquetFile(_open(path))


@functools.lru_cache(maxsize=2)
def _read_group(path, group, column):  # a whole file would be gigabytes
  return _open_parquet(path).read_row_group(group, [column])[column]


def read(place: Place, data_dir: str | None) -> tuple[bytes, list[int]]:
  """Returns the bytes of an image file, and its labels in a data set."""
  path, start, size = place
  if path.startswith(TFDS):
    return open_set(path, data_dir).read_example(start)
  if path.lower().endswith(".parquet"):
    value = _read_group(path, start, "image")[size].as_py()
    return value["bytes"] if isinstance(value, dict) else value, []
  with _open(path) as f:
    f.seek(start)
    return f.read(size), []
