"""Makes a multi-label data set of one's own images, as JFT is for the paper.

Images come from a folder, from tar files or from Parquet files; labels, several
an image, from a table beside them. The result is a TFDS data set in ArrayRecord
and is read like any other.

The work is cut into parts. A finished part leaves its records and a report; a
build that was killed goes on with the parts that have none. When all are there,
they get their final names and TFDS's description, and the folder its own name.
"""

import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import io
import json
import logging
import multiprocessing
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore
from PIL import Image
from tensorflow_datasets.core import example_serializer

from vit_jax.data import near_duplicates
from vit_jax.data.source import get_source
from vit_jax.errors import UserError, suggest

log = logging.getLogger(__name__)

VERSION = "1.0.0"
_PART = 1000  # images
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_KEPT = ("JPEG", "PNG")  # others are encoded anew as PNG, without loss


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
  """One piece of the work: some images, and the files to write."""

  number: int
  images: list[tuple[str, Place]]
  folder: Path


# --- labels ---


def read_labels(
  file: str | os.PathLike, classes: str | None, min_confidence: float
) -> tuple[list[str], dict[str, list[int]]]:
  """Reads a labels file.

  Args:
    file: CSV with the columns image, label and perhaps confidence, a row a
      label; or JSON lines {"image": "a/1.jpg", "labels": ["cat", "dog"],
      "confidences": [0.9, 0.4]}.
    classes: a file with a class a line; None: those that occur, sorted.
    min_confidence: labels of less are left out.

  Returns:
    The class names, and {image: class ids}.

  Raises:
    UserError: a line that cannot be read, an unknown or a doubled class.
  """
  rows = list(_read_rows(Path(file)))
  if classes is None:
    names = sorted({label for _, _, label, _ in rows})
  else:
    names = _read_lines(Path(classes))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
      raise UserError(f"{classes}: {twice[0]!r} is there twice")
  ids = {name: i for i, name in enumerate(names)}
  labels: dict[str, list[int]] = {}
  for line, image, label, confidence in rows:
    if label not in ids:
      raise UserError(
        f"{file}, line {line}: unknown class {label!r}{suggest(label, names)}; "
        f"the classes are those of {classes}"
      )
    found = labels.setdefault(image, [])
    if confidence >= min_confidence and ids[label] not in found:
      found.append(ids[label])
  if not labels:
    raise UserError(f"{file} has no labels")
  return names, labels


def _read_lines(path):
  try:
    return path.read_text(encoding="utf-8").splitlines()
  except (OSError, ValueError) as e:
    raise UserError(f"{path}: cannot be read: {e}") from e


def _read_rows(path) -> Iterator[tuple[int, str, str, float]]:
  """Yields (line, image, label, confidence)."""
  lines = _read_lines(path)
  if path.suffix in (".jsonl", ".json"):
    for number, line in enumerate(lines, 1):
      yield from _read_json_row(path, number, line)
    return
  reader = csv.DictReader(lines)
  if not {"image", "label"} <= set(reader.fieldnames or ()):
    raise UserError(
      f"{path}: the first line must name the columns image, label and perhaps "
      f"confidence; it names {', '.join(reader.fieldnames or ['nothing'])}"
    )
  for row in reader:
    try:
      confidence = float(row.get("confidence") or 1)
    except ValueError as e:
      raise UserError(
        f"{path}, line {reader.line_num}: confidence "
        f"{row['confidence']!r} is no number"
      ) from e
    if not row["image"] or not row["label"]:
      raise UserError(f"{path}, line {reader.line_num}: a field is empty")
    yield reader.line_num, row["image"], row["label"], confidence


def _read_json_row(path, number, line):
  try:
    row = json.loads(line)
    image, labels = row["image"], row["labels"]
    confidences = row.get("confidences") or [1.0] * len(labels)
    if len(confidences) != len(labels) or not isinstance(image, str):
      raise ValueError("labels and confidences differ in number")
    for label, confidence in zip(labels, confidences, strict=True):
      yield number, image, str(label), float(confidence)
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f"{path}, line {number}: {type(e).__name__}: {e}") from e


# --- images ---


def list_images(source: str) -> list[tuple[str, Place]]:
  """Returns [(name, where)] of all images, sorted by name.

  Args:
    source: a folder of images or of tar or Parquet files, or one such file. A
      name is the path below the folder, or in the tar file; in Parquet files
      it is the column "name", and the bytes are the column "image".

  Raises:
    UserError: no image.
  """
  root = Path(source).expanduser()
  if not root.exists():
    raise UserError(f"--images {source} does not exist")
  files = sorted(p for p in root.rglob("*") if p.is_file())
  found = []
  for path in files if root.is_dir() else [root]:
    if path.suffix == ".tar":
      found += _list_tar(path)
    elif path.suffix == ".parquet":
      found += _list_parquet(path)
    elif path.suffix.lower() in _SUFFIXES:
      name = path.relative_to(root).as_posix() if root.is_dir() else path.name
      found.append((name, Place(str(path))))
  if not found:
    raise UserError(
      f"--images {source} has no images; {', '.join(_SUFFIXES)} files, .tar or "
      ".parquet files of them are read"
    )
  return sorted(found)


def _list_tar(path):
  try:
    with tarfile.open(path) as archive:
      return [
        (member.name, Place(str(path), member.offset_data, member.size))
        for member in archive
        if member.isfile() and member.name.lower().endswith(_SUFFIXES)
      ]
  except (tarfile.TarError, OSError) as e:
    raise UserError(f"{path}: no readable tar file ({e})") from e


def _list_parquet(path):
  names = _open_parquet(str(path))[0]
  return [(name, Place(str(path), row=i)) for i, name in enumerate(names)]


@functools.lru_cache(maxsize=2)
def _open_parquet(path):
  try:
    from pyarrow import parquet
  except ImportError as e:
    raise UserError("Parquet files need pyarrow: pip install pyarrow") from e
  try:
    table = parquet.read_table(path, columns=["name", "image"])
  except (OSError, ValueError, KeyError) as e:
    raise UserError(
      f"{path}: no readable Parquet file with the columns name and image ({e})"
    ) from e
  return table.column("name").to_pylist(), table.column("image")


def read_image(place: Place) -> bytes:
  """Returns the bytes of an image file."""
  if place.row >= 0:
    value = _open_parquet(place.path)[1][place.row].as_py()
    return value["bytes"] if isinstance(value, dict) else value
  with open(place.path, "rb") as f:
    f.seek(place.offset)
    return f.read(place.size)


# --- building ---


def build(plan: Plan, data_dir: str, workers: int | None = None) -> Path:
  """Writes the data set, or goes on writing it.

  Returns:
    Its folder. report.json in it counts what was written, and lists what was
    not: unreadable images, images without labels, twins of test images.

  Raises:
    UserError: a data set of that name is there, or a build of another plan.
  """
  root = Path(data_dir).expanduser() / plan.name
  folder, partial = root / VERSION, root / f"{VERSION}.building"
  if folder.exists():
    raise UserError(f"{folder} exists; nothing is overwritten, choose a name")
  images = list_images(plan.images)
  _check_same_plan(plan, images, partial)
  parts = [
    Part(i, images[start : start + _PART], partial)
    for i, start in enumerate(range(0, len(images), _PART))
  ]
  todo = [part for part in parts if not _report_of(part).exists()]
  if len(todo) < len(parts):
    log.info(
      "going on: %d of %d parts are there", len(parts) - len(todo), len(parts)
    )
  if todo:
    _run_parts(plan, data_dir, todo, workers)
  _finish(plan, parts, folder)
  return folder


def _check_same_plan(plan, images, partial):
  text = json.dumps([dataclasses.asdict(plan), images], sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  file = partial / "plan.sha256"
  if not file.exists():
    partial.mkdir(parents=True, exist_ok=True)
    file.write_text(digest)
  elif file.read_text() != digest:
    raise UserError(
      f"{partial} holds a build of other images, labels or options; choose "
      "another name, or delete that folder"
    )


def _report_of(part) -> Path:
  return part.folder / f"part-{part.number:05d}.json"


def _run_parts(plan, data_dir, parts, workers):
  index = make_index(plan.against, data_dir)
  done = 0
  # Not forked: TensorFlow's threads do not survive that.
  with concurrent.futures.ProcessPoolExecutor(
    workers or os.cpu_count(),
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start_worker,
    initargs=(plan, index),
  ) as pool:
    for future in concurrent.futures.as_completed(
      pool.submit(_write_part, part) for part in parts
    ):
      future.result()
      done += 1
      log.info("%d of %d parts", done, len(parts))


def make_index(against, data_dir) -> near_duplicates.Index:
  """Returns the index of all images of [(data set, split)]."""

  def read():
    for dataset, split in against:
      source = get_source(dataset, split, data_dir)
      for i in range(source.num_examples):
        record = source.read(np.array([i]))[0]
        encoded: Any = source.parse_image(record).numpy()
        yield f"{dataset}:{split}:{i}", Image.open(io.BytesIO(encoded))

  return near_duplicates.Index(read())


# What each worker process is given once.
_worker: dict[str, Any] = {}


def _start_worker(plan, index):
  _worker.update(plan=plan, index=index, features=make_features(plan))


def make_features(plan) -> tfds.features.FeaturesDict:
  """Returns what an example has: an image and any number of labels."""
  label = tfds.features.ClassLabel(names=plan.class_names)
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "labels": tfds.features.Sequence(label),
    }
  )


def _write_part(part):
  """Writes the records of one part, then its report."""
  plan = _worker["plan"]
  features = _worker["features"]
  serializer = example_serializer.ExampleSerializer(
    features.get_serialized_info()
  )
  report = {"counts": {}, "bytes": {}, "most": 1}
  report |= {"unreadable": [], "without labels": [], "twins": []}
  writers = {}
  for name, place in part.images:
    labels = plan.labels.get(name)
    if not labels:
      report["without labels"].append(name)
      continue
    try:
      image, encoded = _decode(read_image(place))
    except Exception:  # Pillow's plugins raise what they like
      report["unreadable"].append(name)
      continue
    twin = _worker["index"].find(image)
    if twin:
      report["twins"].append([name, twin.name, round(twin.similarity, 4)])
      continue
    split = "test" if _draw(name) < plan.holdout else "train"
    if split not in writers:
      path = part.folder / f"part-{part.number:05d}-{split}.array_record"
      writers[split] = array_record_module.ArrayRecordWriter(
        str(path), "group_size:1"
      )
    example = {"image": io.BytesIO(encoded), "labels": labels}
    record = serializer.serialize_example(features.encode_example(example))
    writers[split].write(record)
    report["counts"][split] = report["counts"].get(split, 0) + 1
    report["bytes"][split] = report["bytes"].get(split, 0) + len(record)
    report["most"] = max(report["most"], len(labels))
  for writer in writers.values():
    writer.close()
  file = _report_of(part)
  temporary = file.with_suffix(".tmp")
  temporary.write_text(json.dumps(report))
  temporary.replace(file)


def _decode(encoded):
  """Returns the image, and bytes that TensorFlow decodes to the same."""
  image = Image.open(io.BytesIO(encoded))
  kept = image.format in _KEPT
  image = image.convert("RGB")  # reads all of it, and so finds damage
  if not kept:
    out = io.BytesIO()
    image.save(out, "PNG")
    encoded = out.getvalue()
  return image, encoded


def _draw(name) -> float:
  """Returns a number in [0, 1) that is the name's own."""
  digest = hashlib.sha256(name.encode()).digest()
  return int.from_bytes(digest[:6], "big") / 2**48


def _finish(plan, parts, folder):
  """Gives the files their final names, and TFDS what it wants to know."""
  partial = parts[0].folder
  reports = [json.loads(_report_of(part).read_text()) for part in parts]
  total: dict[str, Any] = {"images": sum(len(part.images) for part in parts)}
  for name in ("unreadable", "without labels", "twins"):
    total[name] = [x for report in reports for x in report[name]]
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
      source = partial / f"part-{i:05d}-{split}.array_record"
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
  partial.rename(folder)
  # Whoever is killed here leaves too much, not too little.
  for part in parts:
    (folder / _report_of(part).name).unlink()
  (folder / "plan.sha256").unlink()
