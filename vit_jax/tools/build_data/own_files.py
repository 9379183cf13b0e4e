"""Your own images and their labels: which there are, and how they are read.

Images are files of a folder, members of tar files, rows of Parquet files, or
the examples of a data set that is there already. A name belongs to each, and by
name a table says what it shows.
"""

import csv
import functools
import itertools
import json
import logging
import math
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vit_jax.errors import UserError, one_line, suggest
from vit_jax.files import walk

if TYPE_CHECKING:
  from vit_jax.data.source import Source

log = logging.getLogger(__name__)

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TFDS = "tfds:"  # before images that are a data set's
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
    UserError: a line that cannot be read, an unknown class, no label left.
  """
  path = Path(file)
  read = _read_json if path.suffix in (".json", ".jsonl") else _read_csv
  rows = list(read(path))
  names = sorted({label for _, _, label, _ in rows})
  if classes is not None:
    names = [line.strip() for line in _read_lines(Path(classes))]
    if "" in names or len({*names}) < max(len(names), 1):
      raise UserError(f"{classes}: give a class a line, each of them once")
  ids = {name: i for i, name in enumerate(names)}
  labels: dict[str, list[int]] = {}
  for line, image, label, confidence in rows:
    if classes is None and "|" in label:
      raise UserError(
        f"{path}, line {line}: {label!r} is several labels; give each a line "
        "of its own, or list it in --classes if it is one"
      )
    if label not in ids:
      raise UserError(
        f"{path}, line {line}: unknown class {label!r}{suggest(label, names)}; "
        f"the classes are those of {classes}"
      )
    of_image = labels.setdefault(image, [])
    if confidence >= min_confidence and ids[label] not in of_image:
      of_image.append(ids[label])
  if not any(labels.values()):
    least = f" of a confidence of {min_confidence} or more" if labels else ""
    raise UserError(f"{path} has no labels{least}")
  return names, labels


def _read_lines(path) -> Iterator[str]:
  try:
    with open(path, encoding="utf-8-sig", newline="") as f:
      yield from f
  except (OSError, UnicodeDecodeError) as e:
    words = getattr(e, "strerror", None) or e
    raise UserError(f"{path} cannot be read: {words}") from e


def _read_csv(path):
  """Yields (line, image, label, confidence)."""
  reader = csv.DictReader(_read_lines(path), strict=True)
  try:
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    if not {"image", "label"} <= set(reader.fieldnames):
      raise UserError(
        f"{path}: the first line must name the columns image, label and "
        f"perhaps confidence; it names {', '.join(reader.fieldnames)}"
      )
    weight = next((x for x in _COLUMNS if x in reader.fieldnames), "")
    for row in reader:
      if None in row:
        raise UserError(
          f"{path}, line {reader.line_num}: more fields than columns; a name "
          "with a comma needs quotation marks"
        )
      values = row["image"], row["label"], row.get(weight) or 1
      yield _make_row(path, reader.line_num, *values)
  except csv.Error as e:
    raise UserError(f"{path}, line {reader.line_num}: {e}") from e


def _read_json(path):
  """Yields (line, image, label, confidence)."""
  for line, text in enumerate(_read_lines(path), 1):
    if not text.strip():
      continue
    try:
      row = json.loads(text)
      image, labels = row["image"], row["labels"]
      found = next((row[f"{x}s"] for x in _COLUMNS if row.get(f"{x}s")), None)
      if not isinstance(labels, list):
        raise TypeError("the labels must be a list")
      pairs = list(zip(labels, found or [1] * len(labels), strict=True))
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(
        f"{path}, line {line}: {one_line(e)}; a line is "
        '{"image": "a.jpg", "labels": ["cat"], "confidences": [0.9]}'
      ) from e
    for label, confidence in pairs:
      yield _make_row(path, line, image, label, confidence)


def _make_row(path, line, image, label, confidence):
  image, label = str(image or "").strip(), str(label or "").strip()
  if not image or not label:
    raise UserError(f"{path}, line {line}: a field is empty")
  try:
    number = float(confidence)
  except (ValueError, TypeError):
    number = math.nan
  if not math.isfinite(number):
    raise UserError(
      f"{path}, line {line}: confidence {confidence!r} is not a number"
    )
  return line, _tidy(image), label, number


def find_unknown(labels: dict | None, images: list[str]) -> list[str]:
  """Returns the names in the labels file that no image has; logs how many.

  Raises:
    UserError: no image has any of them.
  """
  unknown = sorted((labels or {}).keys() - {*images})
  if unknown and len(unknown) == len(labels or ()):
    raise UserError(
      f"none of the {len(unknown):,} names in the labels file, such as "
      f"{unknown[0]!r}, is that of one of the {len(images):,} images, such as "
      f"{images[0]!r}; names are paths below --images"
    )
  if unknown:
    log.warning(
      "%d of %d names in the labels file are those of no image, such as %r",
      *(len(unknown), len(labels or ()), unknown[0]),
    )
  return unknown


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
def open_set(images: str, data_dir: str | None) -> "Source":
  """Opens the data set of "tfds:DATASET:SPLIT".

  Raises:
    UserError: as `get_source`.
  """
  from vit_jax.data.catalog import get_source  # seconds, only needed here

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
      name = os.path.relpath(path, root if path != root else Path(root).parent)
      found.append((Path(name).as_posix(), Place(path)))
  if not found:
    raise UserError(
      f"--images {source} has no images; {', '.join(_SUFFIXES)} files, .tar or "
      ".parquet files of them are read"
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
    with tarfile.open(path) as archive:
      return [
        (_tidy(member.name), Place(path, member.offset_data, member.size))
        for member in archive
        if member.isfile() and member.name.lower().endswith(_SUFFIXES)
      ]
  except (tarfile.TarError, OSError) as e:
    raise UserError(f"{path} is not a readable tar file ({e})") from e


def _list_parquet(path):
  try:
    table = _open_parquet(path).read(columns=["name"])
    names = [_tidy(name) for name in table.column("name").to_pylist()]
  except (OSError, ValueError, KeyError, AttributeError, ImportError) as e:
    raise UserError(
      f"{path} is not a readable Parquet file with a name and an image in each "
      f"row ({one_line(e)})"
    ) from e
  return [(name, Place(path, row=i)) for i, name in enumerate(names)]


@functools.lru_cache(maxsize=2)
def _open_parquet(path):
  from pyarrow import parquet

  return parquet.ParquetFile(path)


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
