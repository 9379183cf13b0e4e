"""Preparation of TFDS data sets as ArrayRecord, for random access."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import requests
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import file_adapters
from tensorflow_datasets.core.download import downloader

from vit_jax.data import folder
from vit_jax.data.benchmarks import BY_HAND
from vit_jax.data.catalog import BY_PATH, get_source
from vit_jax.data.objectnet import OBJECTNET
from vit_jax.data.tfds import find_builder, open_folder, open_prepared
from vit_jax.errors import UserError, one_line
from vit_jax.files import (
  atomic_file,
  is_remote,
  read_json,
  write_atomically,
)

log = logging.getLogger(__name__)

_ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD

# Pauses double from 0.2 s on. TFDS's default, 10, takes 213 s to fail without a
# network.
downloader.MAX_RETRIES = 6


def find_data_dir(data_dir: str | None) -> epath.Path:
  """Returns the folder of TFDS data sets; None: TFDS's default."""
  if data_dir is None:
    data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
  return epath.Path(data_dir).expanduser()


def prepare(name: str, data_dir: str | None = None) -> Path:
  """Downloads or generates a TFDS data set as ArrayRecord, or converts it.

  Both are atomic: TFDS prepares in a temporary folder, and a conversion is
  listed in `dataset_info.json` once all its files are complete.

  Returns:
    The folder of the data set.

  Raises:
    UserError: unknown data set, or preparation failed (with the reason).
  """
  if name.startswith(BY_PATH):
    raise UserError(f"{name!r} needs no preparation; use it as it is")
  builder = find_builder(name, data_dir)
  if builder.is_prepared():
    builder, ready = open_folder(builder)
    if not ready:
      _convert(builder)
    return Path(builder.data_path)
  needs = find_needs(name, data_dir)
  # Some of them may be enough, such as one archive for one split of ImageNet;
  # TFDS checks that.
  if needs.manual_files and not any(needs.manual_files.values()):
    raise UserError(
      f"data set {name!r} has to be fetched by hand; put "
      f"{', '.join(needs.manual_files)} into {needs.manual_folder} and run "
      f"this again; {needs.instructions}"
    )
  builder = find_builder(name, data_dir, _ARRAY_RECORD.value)
  try:
    run_builder(builder)
  except Exception as e:  # the network, the disk, the builder's own code
    advice = ""
    if isinstance(e, (ConnectionError, requests.RequestException)):
      advice = (
        "; check the network and run again, or prepare it on another machine "
        f"and copy the folder to {builder.data_path}"
      )
    raise UserError(
      f"data set {name!r} could not be prepared: {one_line(e, 300)}{advice}"
    ) from e
  return Path(builder.data_path)


def run_builder(builder: tfds.core.DatasetBuilder, **beam) -> None:
  """Downloads or generates a data set as ArrayRecord.

  Args:
    builder: of the data set.
    beam: `beam_runner` and `beam_options`, for a builder with a pipeline.

  Raises:
    UserError: another process is preparing it.
  """
  # Google's bucket has data sets as TFRecord only, so it is not searched.
  config = tfds.download.DownloadConfig(try_download_gcs=False, **beam)
  if not sys.stderr.isatty():  # no progress bars in logs
    tfds.disable_progress_bar()
  with _hold(builder.data_path.parent):
    builder.download_and_prepare(
      download_config=config, file_format=_ARRAY_RECORD.value
    )


@contextlib.contextmanager
def _hold(folder):
  """Locks a folder against other builds, and removes the files of killed ones.

  Does neither in a bucket or on a disk without locks.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if is_remote(folder):
    yield
    return
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        raise UserError(
          f"another process writes to {folder}; wait for it"
        ) from e
      for left in folder.glob("incomplete.*"):
        left.rmtree()
    yield
  finally:  # releases the lock
    os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a TFDS data set lacks before it can be used.

  Attributes:
    state: "ready", "to convert" (prepared in another format), or "missing".
    folder: where it is, or would be.
    manual_folder: where files that are fetched by hand go; None if none are.
    manual_files: {name: whether it exists}; a name may be "a or b".
    instructions: TFDS's instructions for getting them, in one line.
  """

  state: str
  folder: Path
  manual_folder: Path | None
  manual_files: dict[str, bool]
  instructions: str


def find_needs(name: str, data_dir: str | None = None) -> Needs:
  """Returns the `Needs` of a TFDS data set or a task, without downloading.

  Raises:
    UserError: unknown data set.
  """
  builder = find_builder(name, data_dir)
  state = "missing"
  if builder.is_prepared():
    _, ready = open_folder(builder)
    state = "ready" if ready else "to convert"
  instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
  manual_folder = None
  if instructions:
    manual_folder = Path(builder.data_dir_root) / "downloads" / "manual"
  files = BY_HAND.get(builder.name, ()) if instructions else ()
  return Needs(
    state=state,
    folder=Path(builder.data_path),
    manual_folder=manual_folder,
    manual_files={
      f: any((manual_folder / name).exists() for name in f.split(" or "))
      for f in files
    },
    instructions=" ".join((instructions or "").split()),
  )


def _convert(builder):
  """Writes ArrayRecord files beside a data set's files of another format.

  It uses TFDS's format adapters. TFDS's converter imports Apache Beam and
  ignores missing examples and, by default, unreadable shards.
  """
  read = file_adapters.ADAPTER_FOR_FORMAT[builder.info.file_format]
  write = file_adapters.ADAPTER_FOR_FORMAT[_ARRAY_RECORD]
  for split, info in builder.info.splits.items():
    log.info("converting %s: %s examples", split, f"{info.num_examples:,}")
    template = info.filename_template
    new = template.replace(filetype_suffix=_ARRAY_RECORD.file_suffix)
    for i, length in enumerate(info.shard_lengths):
      shard = {"shard_index": i, "num_shards": info.num_shards}
      source = template.sharded_filepath(**shard)
      try:
        records: Any = read.make_tf_data(source).as_numpy_iterator()
        with atomic_file(Path(new.sharded_filepath(**shard))) as partial:
          write.write_examples(partial, enumerate(records))
          count = write.num_examples(partial)
          if count != length:
            raise UserError(
              f"{source} has {count} examples, its data set declares {length}; "
              "delete the data set and prepare it again"
            )
      except (tf.errors.OpError, ImportError) as e:
        raise UserError(
          f"{source} cannot be read: {one_line(e)}; delete the data set and "
          "prepare it again"
        ) from e
  file = Path(builder.data_path) / "dataset_info.json"
  about = read_json(file)
  about.setdefault("alternativeFileFormats", []).append(_ARRAY_RECORD.value)
  write_atomically(file, json.dumps(about, indent=2, sort_keys=True))


def list_splits(dataset: str, data_dir: str | None = None) -> dict[str, int]:
  """Returns {split: number of examples} of a prepared data set or a folder.

  Raises:
    UserError: as `catalog.get_source`.
  """
  if dataset.startswith(folder.FOLDER):
    return folder.list_splits(dataset)
  if dataset.startswith(BY_PATH):  # has one split
    only = "test" if dataset.startswith(OBJECTNET) else "train"
    source = get_source(dataset, only, data_dir)
    return {source.split: source.num_examples}
  splits = open_prepared(dataset, data_dir).info.splits
  return {name: info.num_examples for name, info in splits.items()}
