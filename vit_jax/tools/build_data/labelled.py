"""Makes a multi-label data set of your own images, as JFT is for the paper.

Images come from a folder, from tar files, from Parquet files or from another
data set; labels, several an image, from a table beside them. Processes read and
decode the images and compare them with those of test sets; a TFDS builder
shuffles what is left and writes it as ArrayRecord. The data set is there when
all of it is: a build that was interrupted starts anew.
"""

import concurrent.futures
import hashlib
import io
import itertools
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax import files
from vit_jax.data import preprocess
from vit_jax.data.builders.imagenet21k import map_ahead
from vit_jax.data.catalog import get_source
from vit_jax.data.preparation import find_data_dir, run_builder
from vit_jax.errors import RunStopped, UserError, one_line
from vit_jax.tools.build_data import examining, near_duplicates, own_files
from vit_jax.tools.build_data.examining import TWINS, UNLABELLED, UNREADABLE

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
) -> tuple[Path, dict[str, Any]]:
  """Makes a multi-label data set of your images.

  Args:
    name: of the new data set.
    images: a folder, tar or Parquet files, or "tfds:DATASET:SPLIT"; see
      `own_files.list_images`.
    labels: a CSV or JSON-lines file; None for a data set's own.
    classes: a file with a class a line; None: those that occur.
    min_confidence: labels of less are left out.
    against: "DATASET:SPLIT", test sets whose images must not be in it.
    holdout: part of the images that become the split "test".
    workers: processes; None: one a core, 1: a thread of this one.
    data_dir: where TFDS data sets are.

  Returns:
    Its folder, and the content of report.json: how many images each split has,
    and what was left out: unreadable images and why, images without labels,
    near-duplicates of test images, and names of the labels that no image has.

  Raises:
    UserError: nothing to read, bad labels, or a name that is taken.
    RunStopped: the disk is full, or a worker died.
  """
  _check(name, holdout, workers)
  root = str(find_data_dir(data_dir))
  pairs = [own_files.parse_pair(text, "--against") for text in against]
  if images.startswith(own_files.TFDS):
    if labels or classes or min_confidence:
      raise UserError(f"--images {images} has labels of its own; leave others")
    source = own_files.open_set(images, root)
    class_names, by_name, most = source.class_names, None, source.max_labels
  elif labels:
    class_names, by_name = own_files.read_labels(
      labels, classes, min_confidence
    )
    most = max(map(len, by_name.values()))
  else:
    raise UserError("--labels is missing: a CSV or JSON-lines file")
  found = own_files.list_images(images, root)
  unknown = own_files.find_unknown(by_name, [name for name, _ in found])
  work = [
    (name, place, None if by_name is None else by_name.get(name, []))
    for name, place in found
  ]
  builder = LabelledImages(name, class_names, most, work, holdout, root)
  folder = Path(builder.data_path)
  if folder.exists():
    raise UserError(f"{folder} exists; nothing is overwritten, choose a name")
  _run(builder, pairs, root, workers or os.cpu_count() or 1)
  report = builder.report | {"labels of no image": unknown}
  files.write_json(folder / "report.json", report)
  return folder, report


def _check(name, holdout, workers):
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise UserError(
      f"{name!r} is not a name of a data set; use lower-case letters, digits "
      "and _"
    )
  if not 0 <= holdout < 1:
    raise UserError(f"--holdout is {holdout}; it must be in [0, 1)")
  if workers is not None and workers < 1:
    raise UserError(f"--workers is {workers}; at least one is needed")


def _run(builder, pairs, data_dir, workers):
  """Runs the builder with a pool of workers, which share one index."""
  os.makedirs(data_dir, exist_ok=True)
  try:
    with tempfile.TemporaryDirectory(dir=data_dir) as folder:
      make_index(pairs, data_dir).save(Path(folder))
      builder.pool = _open_pool(workers, folder, data_dir)
      try:
        run_builder(builder)
      finally:  # before the folder goes, which a worker may be about to read
        builder.pool.shutdown(cancel_futures=True)
  except concurrent.futures.process.BrokenProcessPool as e:
    raise RunStopped(
      "a worker died, as they do when memory runs out or somebody kills them; "
      "nothing is kept, run the same command with fewer --workers"
    ) from e
  except (OSError, RuntimeError, tf.errors.OpError) as e:  # a full disk
    raise RunStopped(
      f"{one_line(e)}; nothing is kept, run the same command again"
    ) from e


class LabelledImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The TFDS builder of a data set of one's own images.

  Attributes:
    pool: the executor that runs `examining.run`.
    report: counts and what was left out, as far as the build has come.
  """

  VERSION = tfds.core.Version("1.0.0")
  pool: concurrent.futures.Executor

  def __init__(self, name, class_names, max_labels, images, holdout, data_dir):
    """Takes [(name, place, labels)] of the images."""
    self.name = name  # pyright: ignore[reportAttributeAccessIssue]
    self._class_names, self._max_labels = class_names, max_labels
    self._images = {"train": images}
    if holdout:
      held_out = [image for image in images if _draw(image[0]) < holdout]
      names = {name for name, *_ in held_out}
      train = [image for image in images if image[0] not in names]
      self._images = {"train": train, "test": held_out}
    self.report: dict[str, Any] = {
      **{"images": len(images), "train": 0, "test": 0},
      **{UNREADABLE: [], UNLABELLED: [], TWINS: []},
    }
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    label = tfds.features.ClassLabel(names=self._class_names)
    return tfds.core.DatasetInfo(
      builder=self,
      description="Made by vit-jax data build.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "labels": tfds.features.Sequence(label),
        }
      ),
      metadata=tfds.core.MetadataDict(max_labels=self._max_labels),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    return {
      split: self._generate_examples(split, images)
      for split, images in self._images.items()
      if images
    }

  def _generate_examples(self, split, images):
    chunks = [
      images[i : i + _TOGETHER] for i in range(0, len(images), _TOGETHER)
    ]
    outcomes = map_ahead(self.pool, examining.run, chunks)
    for outcome in itertools.chain.from_iterable(outcomes):
      if outcome.problem:
        self.report[outcome.problem].append(outcome.found)
        continue
      self.report[split] += 1
      encoded, labels = outcome.found
      example = {"image": io.BytesIO(encoded), "labels": labels}
      yield os.fsencode(outcome.name), example
    if not self.report[split]:
      counts = [f"{len(self.report[x])} {x}" for x in (UNREADABLE, UNLABELLED)]
      raise UserError(
        f"no image can be used for {split}: {', '.join(counts)}, "
        f"{len(self.report[TWINS])} in a test set; the first is {images[0][0]}"
      )


def _draw(name) -> float:
  """Returns a number in [0, 1) that is the name's own."""
  digest = hashlib.sha256(os.fsencode(name)).digest()
  return int.from_bytes(digest[:6], "big") / 2**48


# --- the index ---


def make_index(
  against: list[tuple[str, str]], data_dir: str
) -> near_duplicates.Index:
  """Returns the index of all images of [(data set, split)].

  Raises:
    UserError: a data set that is not there, or an image that is none.
  """
  sources = [get_source(*pair, data_dir) for pair in against]
  examples = [(x, i) for x in sources for i in range(x.num_examples)]
  side = near_duplicates.THUMBNAIL
  thumbnails = np.empty((len(examples), side, side, 3), np.uint8)

  def fill(row):
    source, i = examples[row]
    encoded, _ = source.read_example(i)
    pixels = preprocess.decode_image(encoded, source.describe(i))
    thumbnails[row] = near_duplicates.make_thumbnail(Image.fromarray(pixels))

  # Threads: Pillow lets others run while it decodes.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(fill, range(len(examples))))
  names = [f"{x.dataset}:{x.split}:{i}" for x, i in examples]
  return near_duplicates.Index(names, thumbnails)


# --- the workers ---


def _open_pool(workers, index, data_dir):
  given = Path(index), data_dir
  if workers == 1:
    return concurrent.futures.ThreadPoolExecutor(1, "", examining.load, given)
  # As many workers as cores need no more threads for matrix products.
  os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
  return concurrent.futures.ProcessPoolExecutor(
    workers,
    # Not forked: TensorFlow's threads do not survive that.
    mp_context=multiprocessing.get_context("spawn"),
    initializer=examining.start_worker,
    initargs=given,
  )
