"""A builder of multi-label data sets of your images, like the paper's JFT.

Images come from a folder, tar files, Parquet files or another data set, and
labels, several per image, from a table. Worker processes or an Apache Beam
runner read and decode the images, and drop near-duplicates of test images. A
TFDS builder shuffles the others and writes them as ArrayRecord. The data set
appears when it is complete; an interrupted build starts over.
"""

import collections
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Iterable
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from vit_jax import files
from vit_jax.data.builders.imagenet21k import map_ahead
from vit_jax.data.preparation import find_data_dir, run_builder
from vit_jax.errors import RunStopped, UserError, check_free, one_line
from vit_jax.tools.build_data import near_duplicates, own_files

# Lists in report.json.
_LISTS = ("unreadable", "without labels", "twins", "labels of no image")
_TOGETHER = 32  # images that are compared with the test images at once


def build(
  name: str,
  *,
  images: str,
  labels: str | None = None,
  classes: str | None = None,
  min_confidence: float = 0.0,
  against: Iterable[str] = (),
  holdout: float = 0.0,
  workers: int | None = None,
  data_dir: str | None = None,
  beam_runner: str | None = None,
  beam_options: str | None = None,
) -> tuple[epath.Path, dict[str, Any]]:
  """Builds a multi-label data set of your images.

  Args:
    name: of the new data set.
    images: see `own_files.list_images`.
    labels, classes, min_confidence: see `own_files.read_labels`; None for
      images of a data set, which have labels.
    against: test sets, "DATASET:SPLIT", whose near-duplicates are left out.
    holdout: fraction of the images for the split "test".
    workers: number of processes; None: one per core, 1: a thread of this one.
    data_dir: where TFDS data sets are.
    beam_runner, beam_options: an Apache Beam runner to use instead of
      processes, and its options "KEY=VALUE,...".

  Returns:
    Its folder, and the content of report.json: the number of images of each
    split, images left out and why, and names of labels without an image.

  Raises:
    UserError: nothing to read, bad labels, or a name that is taken.
    RunStopped: the disk is full, or a worker died.
  """
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise UserError(f"NAME is {name!r}; use lower-case letters, digits and _")
  if not 0 <= holdout < 1:
    raise UserError(f"--holdout is {holdout}; it must be in [0, 1)")
  if workers is not None and (workers < 1 or beam_runner):
    raise UserError(f"--workers is {workers}; give 1 or more, none with Beam")
  beam = _open_beam(beam_runner, beam_options)
  root = str(find_data_dir(data_dir))
  test_sets = [own_files.open_set(text, root) for text in against]
  work = _list_work(images, labels, classes, min_confidence, root)
  workers = None if beam else workers or os.cpu_count() or 1
  builder = LabelledImages(name, root, work, holdout, test_sets, workers)
  check_free(builder.data_path)
  try:
    run_builder(builder, **beam)
  except UserError:
    raise
  except Exception as e:  # a full disk, a dead worker, a Beam runner's error
    why = one_line(e)
    if isinstance(e, concurrent.futures.BrokenExecutor):
      why = "a worker died, killed or out of memory; use fewer --workers"
    if isinstance(e, AssertionError):  # of TFDS: "No examples were yielded."
      counts = {x: len(builder.report[x]) for x in _LISTS}
      why = f"no image of a split can be used: {counts}"
    raise RunStopped(f"{why}; nothing is kept, run the command again") from e
  return builder.data_path, builder.report


def _open_beam(runner, options):
  """Returns `run_builder`'s arguments for Apache Beam; {} without a runner."""
  if not runner:
    if options:
      raise UserError("--beam_options needs a --beam_runner like DirectRunner")
    return {}
  import apache_beam as beam  # pyright: ignore[reportMissingImports]

  given = [f"--{option}" for option in (options or "").split(",") if option]
  parsed = beam.options.pipeline_options.PipelineOptions(given)
  return {"beam_runner": runner, "beam_options": parsed}


def _list_work(images, labels, classes, min_confidence, data_dir):
  """Returns class names, most labels per image, images, and the report.

  An image is (name, place, labels); labels are None for a data set's own.
  """
  found = own_files.list_images(images, data_dir)
  report: dict[str, Any] = {"images": len(found), "train": 0, "test": 0}
  report |= {x: [] for x in _LISTS}
  if images.startswith(own_files.TFDS):
    if labels or classes or min_confidence:
      raise UserError(f"--images {images} has labels of its own; omit others")
    source = own_files.open_set(images, data_dir)
    work = [(name, place, None) for name, place in found]
    return source.class_names, source.max_labels, work, report
  if not labels:
    raise UserError("--labels is missing: CSV, JSON lines or the word folders")
  names, by_name = own_files.read_labels(labels, classes, min_confidence, found)
  work = [(name, place, by_name.get(name, [])) for name, place in found]
  report["without labels"] = [name for name, _, own in work if not own]
  report["labels of no image"] = sorted(by_name.keys() - dict(found).keys())
  most = max(len(own) for *_, own in work)
  if not most:
    raise UserError(
      f"no image has a label of confidence {min_confidence} or more; names in "
      f"{labels} are as {[*by_name][:1]}, below --images as {found[0][0]!r}"
    )
  return names, most, [image for image in work if image[-1]], report


class LabelledImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The TFDS builder of a data set of your images and of its `report`."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, name, data_dir, work, holdout, test_sets, workers):
    """`work` is from `_list_work`; `workers` is None for a Beam pipeline."""
    self.name = name  # pyright: ignore[reportAttributeAccessIssue]
    self._class_names, self._max_labels, images, self.report = work
    self._test_sets, self._workers = test_sets, workers
    self._images = collections.defaultdict(list)
    for image in images:
      # The hash of a name is a number from 0 to 1.
      digest = hashlib.sha256(os.fsencode(image[0])).digest()
      is_test = int.from_bytes(digest) / 2**256 < holdout
      self._images["test" if is_test else "train"].append(image)
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    label = tfds.features.ClassLabel(names=self._class_names)
    features = {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "labels": tfds.features.Sequence(label),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description="Made by vit-jax data build.",
      features=tfds.features.FeaturesDict(features),
      metadata=tfds.core.MetadataDict(max_labels=self._max_labels),
    )

  def _download_and_prepare(self, dl_manager, download_config):
    """Writes the set and report.json to the folder that is then renamed."""
    self._work = self.data_path / "work"
    self._work.mkdir()
    _make_index(self._test_sets).save(self._work)
    # Leaving the pool ends the workers before the folder is removed.
    with _open_pool(self._workers) as self._pool:
      super()._download_and_prepare(dl_manager, download_config)
    for file in self._work.glob("left_out*"):
      for line in file.read_text().splitlines():
        for x, images in json.loads(line).items():
          self.report[x] += images
    for x in _LISTS:
      self.report[x].sort()
    for split, info in self.info.splits.items():
      self.report[split] = info.num_examples
    files.write_json(self.data_path / "report.json", self.report)
    self._work.rmtree()

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    examine = functools.partial(
      own_files.examine,
      index=str(self._work),
      data_dir=str(self.data_dir_root),
    )
    generators = {}
    for split, images in self._images.items():
      starts = range(0, len(images), _TOGETHER)
      chunks = [images[start : start + _TOGETHER] for start in starts]
      if self._workers:
        generators[split] = self._generate_examples(examine, chunks)
      else:
        file = self._work / f"{split}.jsonl"
        file.write_text("".join(f"{json.dumps(chunk)}\n" for chunk in chunks))
        left_out = self._work / f"left_out_{split}"
        generators[split] = _make_pipeline(str(file), str(left_out), examine)
    return generators

  def _generate_examples(self, examine, chunks):
    for kept, left_out in map_ahead(self._pool, examine, chunks):
      yield from kept
      for x, images in left_out.items():
        self.report[x] += images


def _make_pipeline(images, left_out, examine):
  """Returns the Beam transform that makes a split's examples.

  `images` is a file of JSON lines, arguments of `examine`. What it leaves out
  is written as JSON lines to files with the prefix `left_out`.
  """
  import apache_beam as beam  # pyright: ignore[reportMissingImports]

  def transform(pipeline):
    examined = (
      pipeline
      | beam.io.ReadFromText(images)
      | beam.Reshuffle()  # distributes the lines over the workers
      | beam.Map(lambda line: examine(json.loads(line)))
    )
    lines = examined | beam.Map(lambda pair: json.dumps(pair[1]))
    _ = lines | beam.io.WriteToText(left_out)
    return examined | beam.FlatMap(lambda pair: pair[0])

  return beam.ptransform_fn(transform)()


def _make_index(sources) -> near_duplicates.Index:
  """Returns the index of all images of test sets."""
  examples = [(x, i) for x in sources for i in range(x.num_examples)]

  def read(example):
    source, i = example
    encoded, _ = source.read_example(i)
    return own_files.decode(encoded, source.describe(i))[1]

  # Threads suffice, because Pillow releases the GIL while it decodes.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    thumbnails = list(pool.map(read, examples))
  names = [f"{x.dataset}:{x.split}:{i}" for x, i in examples]
  return near_duplicates.Index.make(names, thumbnails)


def _open_pool(workers):
  if workers == 1:
    return concurrent.futures.ThreadPoolExecutor(1)
  # There is a worker for each core, so matmuls need no more threads.
  os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
  # Not forked: TensorFlow's threads do not survive that.
  context = multiprocessing.get_context("spawn")
  return concurrent.futures.ProcessPoolExecutor(
    workers, context, own_files.start_worker
  )
