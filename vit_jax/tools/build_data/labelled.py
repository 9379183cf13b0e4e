"""A builder of multi-label data sets of your images, like the paper's JFT.

Images come from a folder, tar files, Parquet files or another data set, and
labels, several per image, from a table. Worker processes or an Apache Beam
runner read and decode the images, and drop near-duplicates of test images. A
TFDS builder shuffles the others and writes them as ArrayRecord. The data set
appears when it is complete; an interrupted build starts over.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
from collections.abc import Iterable
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from vit_jax import files
from vit_jax.data import preprocess
from vit_jax.data.builders.imagenet21k import map_ahead
from vit_jax.data.preparation import find_data_dir, run_builder
from vit_jax.errors import RunStopped, UserError, one_line
from vit_jax.tools.build_data import examining, near_duplicates, own_files
from vit_jax.tools.build_data.examining import TWINS, UNLABELLED, UNREADABLE

log = logging.getLogger(__name__)

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
    raise UserError(
      f"{name!r} is not a valid data set name; use lower-case letters, digits "
      "and _"
    )
  if not 0 <= holdout < 1:
    raise UserError(f"--holdout is {holdout}; it must be in [0, 1)")
  if workers is not None and workers < 1:
    raise UserError(f"--workers is {workers}; at least one is needed")
  beam = _open_beam(beam_runner, beam_options, workers)
  root = str(find_data_dir(data_dir))
  test_sets = [own_files.open_set(text, root) for text in against]
  work = _list_work(images, labels, classes, min_confidence, root)
  workers = None if beam else workers or os.cpu_count() or 1
  builder = LabelledImages(name, root, work, holdout, test_sets, workers)
  folder = builder.data_path
  if folder.exists():
    raise UserError(f"{folder} exists; nothing is overwritten, choose another")
  # A full disk or a dead worker; a Beam runner's failures have any type.
  failures = Exception if beam else (OSError, RuntimeError, tf.errors.OpError)
  try:
    run_builder(builder, **beam)
  except UserError:
    raise
  except failures as e:
    why, again = one_line(e), "again"
    if isinstance(e, concurrent.futures.BrokenExecutor):
      why = "a worker died; it was killed or ran out of memory"
      again = "with fewer --workers"
    raise RunStopped(
      f"{why}; nothing is kept, run the same command {again}"
    ) from e
  return folder, builder.report


def _open_beam(runner, options, workers):
  """Returns `run_builder`'s arguments for Apache Beam; {} without a runner."""
  if options and not runner:
    raise UserError("--beam_options needs a --beam_runner like DirectRunner")
  if not runner:
    return {}
  if workers:
    raise UserError("--workers are local processes, which Beam does not use")
  import apache_beam as beam  # pyright: ignore[reportMissingImports]

  given = [f"--{option}" for option in (options or "").split(",") if option]
  words = io.StringIO()
  try:
    with contextlib.redirect_stderr(words):
      parsed = beam.options.pipeline_options.PipelineOptions(given)
      parsed.get_all_options()  # parses all of them
    opened = beam.runners.create_runner(runner)
  except SystemExit as e:
    why = words.getvalue().splitlines()[-1]
    raise UserError(f"--beam_options={options}: {why}") from e
  except (ValueError, ImportError, AttributeError) as e:
    raise UserError(f"--beam_runner={runner}: {one_line(e)}") from e
  return {"beam_runner": opened, "beam_options": parsed}


def _list_work(images, labels, classes, min_confidence, data_dir):
  """Returns class names, most labels per image, images, and unused names.

  An image is (name, place, labels); labels are None for a data set's own. Names
  in the labels file without an image are unused.
  """
  if images.startswith(own_files.TFDS):
    if labels or classes or min_confidence:
      raise UserError(f"--images {images} has labels of its own; omit others")
    source = own_files.open_set(images, data_dir)
    found = own_files.list_images(images, data_dir)
    work = [(name, place, None) for name, place in found]
    return source.class_names, source.max_labels, work, []
  if not labels:
    raise UserError(
      "--labels is missing: a CSV or JSON-lines file, or the word "
      f"{own_files.FOLDERS}"
    )
  found = own_files.list_images(images)
  names, by_name = own_files.read_labels(labels, classes, min_confidence, found)
  unknown = sorted(by_name.keys() - {name for name, _ in found})
  if len(unknown) == len(by_name):
    raise UserError(
      f"none of the {len(unknown):,} names in the labels file, such as "
      f"{unknown[0]!r}, matches one of the {len(found):,} images, such as "
      f"{found[0][0]!r}; names are paths below --images"
    )
  if unknown:
    log.warning(
      "%d of %d names in the labels file match no image, such as %r",
      *(len(unknown), len(by_name), unknown[0]),
    )
  work = [(name, place, by_name.get(name, [])) for name, place in found]
  return names, max(map(len, by_name.values())), work, unknown


class LabelledImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The TFDS builder of a data set of your images.

  Attributes:
    report: the content of report.json; complete when the set is.
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, name, data_dir, work, holdout, test_sets, workers):
    """`work` is from `_list_work`; `workers` is None for a Beam pipeline."""
    self.name = name  # pyright: ignore[reportAttributeAccessIssue]
    self._class_names, self._max_labels, images, unknown = work
    self._test_sets, self._workers = test_sets, workers
    self._images = collections.defaultdict(list)
    for image in images:
      # The hash of a name is a number from 0 to 1.
      digest = hashlib.sha256(os.fsencode(image[0])).hexdigest()
      is_test = int(digest, 16) / 2**256 < holdout
      self._images["test" if is_test else "train"].append(image)
    self.report: dict[str, Any] = {
      **{"images": len(images), "train": 0, "test": 0},
      **{UNREADABLE: [], UNLABELLED: [], TWINS: []},
      "labels of no image": unknown,
    }
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    image = tfds.features.Image(shape=(None, None, 3))
    label = tfds.features.ClassLabel(names=self._class_names)
    labels = tfds.features.Sequence(label)
    return tfds.core.DatasetInfo(
      builder=self,
      description="Made by vit-jax data build.",
      features=tfds.features.FeaturesDict({"image": image, "labels": labels}),
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
    for file in self._work.glob("problems*"):
      for _, kind, found in map(json.loads, file.read_text().splitlines()):
        self.report[kind].append(found)
    for kind in (UNREADABLE, UNLABELLED, TWINS):
      self.report[kind].sort()
    for split, info in self.info.splits.items():
      self.report[split] = info.num_examples
    files.write_json(self.data_path / "report.json", self.report)
    self._work.rmtree()

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    examine = functools.partial(
      examining.run, index=str(self._work), data_dir=str(self.data_dir_root)
    )
    generators = {}
    for split, images in self._images.items():
      starts = range(0, len(images), _TOGETHER)
      chunks = [images[start : start + _TOGETHER] for start in starts]
      outcomes = itertools.chain.from_iterable(map(examine, chunks))
      bad = [*itertools.takewhile(lambda outcome: outcome[1], outcomes)]
      if len(bad) == len(images):  # else it stopped at the first good image
        count = collections.Counter(why for _, why, _ in bad)
        words = ", ".join(f"{n:,} {why}" for why, n in count.items())
        raise UserError(
          f"no image can be used for {split}: {words}; the first is {bad[0][0]}"
        )
      if self._workers:
        outcomes = map_ahead(self._pool, examine, chunks)
        generators[split] = self._generate_examples(outcomes)
      else:
        file = self._work / f"{split}.jsonl"
        file.write_text("".join(f"{json.dumps(chunk)}\n" for chunk in chunks))
        places = str(file), str(self._work / f"problems-{split}")
        generators[split] = examining.make_pipeline(*places, examine)
    return generators

  def _generate_examples(self, outcomes):
    for _, why, found in itertools.chain.from_iterable(outcomes):
      if why:
        self.report[why].append(found)
      else:
        yield found


def _make_index(sources) -> near_duplicates.Index:
  """Returns the index of all images of test sets."""
  examples = [(x, i) for x in sources for i in range(x.num_examples)]

  def read(example):
    source, i = example
    encoded, _ = source.read_example(i)
    pixels = preprocess.decode_image(encoded, source.describe(i))
    return near_duplicates.make_thumbnail(Image.fromarray(pixels))

  # Threads suffice, because Pillow releases the GIL while it decodes.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
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
    workers, context, examining.start_worker
  )
