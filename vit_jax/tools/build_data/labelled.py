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
import ctypes
import dataclasses
import fcntl
import hashlib
import io
import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore
from PIL import Image
from tensorflow_datasets.core import example_serializer

from vit_jax import files
from vit_jax.data import preprocess
from vit_jax.data.catalog import get_source
from vit_jax.errors import RunStopped, UserError, one_line
from vit_jax.tools.build_data import near_duplicates
from vit_jax.tools.build_data.own_files import (
  Place,
  list_images,
  open_set,
  read_image,
)

log = logging.getLogger(__name__)

VERSION = "1.0.0"
_PART = 1000  # images
_TOGETHER = 32  # images that are compared with the test images at once
_KEPT = ("JPEG", "MPO", "PNG")  # others are encoded anew as PNG
_ADVICE = "finished parts are kept, the same command goes on"


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a build makes of what; the same plan goes on with a build.

  Attributes:
    name: of the data set.
    images: a folder, or tar or Parquet files.
    class_names: in the order of their ids.
    labels: {image: class ids}; None for a data set's own.
    against: (data set, split) pairs whose images must not be in the result.
    holdout: part of the images that become the split "test".
  """

  name: str
  images: str
  class_names: list[str]
  labels: dict[str, list[int]] | None
  against: list[tuple[str, str]]
  holdout: float


class Part(NamedTuple):
  """One piece of the work: (name, place, labels) of images; where to write."""

  number: int
  images: list[tuple[str, Place, list[int] | None]]
  folder: Path


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
  images = list_images(plan.images, data_dir)
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
  if plan.labels is None:
    return []
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
    line = (name, tuple(place), _find_labels(plan, name))
    digest.update(repr(line).encode())
  file = partial / "plan.sha256"
  if not file.exists():
    files.write_atomically(file, digest.hexdigest())
  elif file.read_text() != digest.hexdigest():
    raise UserError(
      f"{partial} holds a build of other images, labels or options; choose "
      "another name, or delete that folder"
    )


def _make_parts(plan, images, partial):
  return [
    Part(
      number,
      [
        (name, place, _find_labels(plan, name))
        for name, place in images[start : start + _PART]
      ],
      partial,
    )
    for number, start in enumerate(range(0, len(images), _PART))
  ]


def _find_labels(plan, name):
  return None if plan.labels is None else plan.labels.get(name, [])


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
    initargs=(dataclasses.replace(plan, labels={}), data_dir, index, stop),
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


def _start_worker(plan, data_dir, index, stop):
  # Pillow remarks on what can be read all the same.
  warnings.simplefilter("ignore")
  _worker.update(plan=plan, features=make_features(plan))
  _worker.update(data_dir=data_dir, stop=stop)
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
    files.write_json(_report_of(self._part), self.report)


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
    try:
      if labels is None:
        source = open_set(place.path, _worker["data_dir"])
        encoded, labels = source.read_example(place.row)
      else:
        encoded = labels and read_image(place)
      if not labels:
        writer.report["without labels"].append(name)
        continue
      read.append((name, labels, *_decode(encoded)))
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
  """Returns bytes that training decodes to the same image, and a thumbnail.

  Pixels are those that training sees, see `preprocess.decode_image`. CMYK is
  made RGB here, in one way.
  """
  image = preprocess.open_image(encoded, "image")
  kept = image.format in _KEPT and image.mode != "CMYK"
  image = Image.fromarray(preprocess.decode_image(image))
  if not kept:
    out = io.BytesIO()
    image.save(out, "PNG")
    encoded = out.getvalue()
  return encoded, near_duplicates.make_thumbnail(image)


def _draw(name) -> float:
  """Returns a number in [0, 1) that is the name's own."""
  digest = hashlib.sha256(os.fsencode(name)).digest()
  return int.from_bytes(digest[:6], "big") / 2**48


def _finish(plan, parts, unknown, folder):
  """Gives the files their final names, and TFDS what it wants to know."""
  partial = parts[0].folder
  advice = "delete it, and the same command makes its part again"
  reports = [files.read_json(_report_of(part), advice) for part in parts]
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
  files.write_json(partial / "report.json", total)
  shutil.rmtree(partial / "against", ignore_errors=True)
  partial.rename(folder)
  # Whoever is killed here leaves too much, not too little.
  for part in parts:
    (folder / _report_of(part).name).unlink()
  (folder / "plan.sha256").unlink()
