"""One's own images and their labels: which there are, and how they are read.

Images are files of a folder, members of tar files, rows of Parquet files, or
the examples of a data set that is there already. A name belongs to each, and by
name a table says what it shows.
"""

import csv
import functools
import itertools
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vit_jax.data.catalog import get_source
from vit_jax.data.folder import walk
from vit_jax.data.source import Source
from vit_jax.errors import UserError, one_line, suggest

TFDS = "tfds:"  # before images that are a data set's
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_COLUMNS = ("confidence", "weight")  # of labels; two names of one thing


class Place(NamedTuple):
  """Where an image is: all of a file, a piece or a row of one, an example."""

  path: str
  offset: int = 0
  size: int = -1
  row: int = -1


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
    if label not in ids and "|" in label:
      raise UserError(
        f"{path}, line {line}: {label!r} is several labels; give each a line "
        "of its own, or list it in --classes if it is one"
      )
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
  names = [line.strip() for line in _read_lines(path)]
  for line, name in enumerate(names, 1):
    if not name:
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
    label = (label or "").strip()
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
    columns = [name.strip() for name in reader.fieldnames or ["nothing"]]
    reader.fieldnames = columns
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
      image = (row["image"] or "").strip()
      yield reader.line_num, image, row["label"], row.get(weight)
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


def parse_pair(text: str, option: str) -> tuple[str, str]:
  """Reads "DATASET:SPLIT", as in cifar10:test.

  Raises:
    UserError: it is none; names the option.
  """
  # Data sets and splits may have colons of their own.
  part = r"\w+(\[[^\]]*\])?"
  match = re.fullmatch(rf"(.+):({part}(\+{part})*)", text)
  if not match:
    raise UserError(f"{option} {text!r}: give DATASET:SPLIT, as cifar10:test")
  return match[1], match[2]


@functools.cache
def open_set(images: str, data_dir: str | None) -> Source:
  """Opens the data set of "tfds:DATASET:SPLIT".

  Raises:
    UserError: as `get_source`.
  """
  pair = parse_pair(images.removeprefix(TFDS), f"--images {TFDS}")
  return get_source(*pair, data_dir)


def list_images(
  source: str, data_dir: str | None = None
) -> list[tuple[str, Place]]:
  """Returns [(name, where)] of all images, sorted by name.

  Args:
    source: a folder of images or of tar or Parquet files, or one such file. A
      name is the path below the folder, or in the tar file; in Parquet files
      it is the column "name", and the bytes are the column "image". Links are
      followed. "tfds:DATASET:SPLIT" is a data set that is there already; names
      are numbers.
    data_dir: where that data set is.

  Raises:
    UserError: no image, or two of one name: labels are given by name.
  """
  if source.startswith(TFDS):
    count = open_set(source, data_dir).num_examples
    return [(f"{i:08d}", Place(source, row=i)) for i in range(count)]
  root = os.path.expanduser(source)
  if not os.path.exists(root):
    raise UserError(f"--images {source} does not exist")
  found = []
  for path in walk(root) if os.path.isdir(root) else [root]:
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
