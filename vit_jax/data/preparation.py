"""Prepares TFDS data sets in ArrayRecord, the format with random access."""

import dataclasses
import importlib.util
import json
import logging
import sys
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore
from tensorflow_datasets.core.download import downloader

from vit_jax.data.benchmarks import BY_HAND, PACKAGES
from vit_jax.data.catalog import FOLDER, OBJECTNET
from vit_jax.data.tfds import find_builder, open_folder
from vit_jax.errors import UserError, one_line
from vit_jax.files import atomic_file, read_json, write_atomically

log = logging.getLogger(__name__)

# Pauses double from 0.2 s on: TFDS's own number, 10, takes 213 s to find out
# that there is no network.
downloader.MAX_RETRIES = 6


def prepare(name: str, data_dir: str | None = None) -> Path:
  """Downloads or generates a TFDS data set as ArrayRecord, or converts it.

  Nothing is left half done: TFDS prepares in a temporary folder, a conversion
  is announced in `dataset_info.json` when all its files are there.

  Returns:
    The folder of the data set.

  Raises:
    UserError: unknown data set, or it could not be had (why).
  """
  if name.startswith((FOLDER, OBJECTNET)):
    raise UserError(f"{name!r} needs no preparation; use it as it is")
  builder = find_builder(name, data_dir)
  folder = Path(builder.data_path)
  if not builder.is_prepared():
    _check_needs(find_needs(name, data_dir), name)
    builder = find_builder(name, data_dir, "array_record")
    _download(builder, name)
  else:
    builder, ready = open_folder(builder)
    if not ready:
      _convert(builder)
  return folder


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a TFDS data set lacks before it can be used.

  Attributes:
    state: "ready", "to convert" (there, in another format), or "missing".
    folder: where it is, or would be.
    manual_folder: where files that are fetched by hand go; None for no such.
    manual_files: {name: whether it is there}; a name may be "a or b".
    instructions: what TFDS says on how to get them, in one line.
    packages: Python packages that are not installed and that making it takes.
  """

  state: str
  folder: Path
  manual_folder: Path | None
  manual_files: dict[str, bool]
  instructions: str
  packages: list[str]


def find_needs(name: str, data_dir: str | None = None) -> Needs:
  """Returns what a TFDS data set or a task lacks; nothing is downloaded.

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
    packages=[
      package
      for package in PACKAGES.get(builder.name, ())
      if importlib.util.find_spec(package) is None
    ],
  )


def _check_needs(needs, name):
  """Raises a UserError for what only a person can fetch."""
  files = needs.manual_files
  # Some of them may do: for one split of ImageNet its archive. TFDS knows.
  if files and not any(files.values()):
    raise UserError(
      f"data set {name!r} is fetched by hand: put {', '.join(files)} into "
      f"{needs.manual_folder} and run this again; {needs.instructions}"
    )
  if needs.packages:
    raise UserError(
      f"data set {name!r} takes the Python package "
      f"{' and '.join(needs.packages)} to make; install it and run this again"
    )


def _download(builder, name):
  # What Google's bucket holds ready-made is TFRecord: not looked for.
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  if not sys.stderr.isatty():  # a log has no use for bars
    tfds.disable_progress_bar()
  try:
    builder.download_and_prepare(
      download_config=config, file_format="array_record"
    )
  except Exception as e:  # the network, the disk, the builder's own code
    raise UserError(
      f"data set {name!r} could not be prepared: {one_line(e, 300)}"
    ) from e


def _convert(builder):
  """Writes ArrayRecord files beside the TFRecord files of a data set."""
  if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
    raise UserError(
      f"{builder.data_path} is {builder.info.file_format.value}, only tfrecord "
      "can be converted; delete it and prepare it again"
    )
  for split, info in builder.info.splits.items():
    log.info("converting %s: %s examples", split, f"{info.num_examples:,}")
    template = info.filename_template
    new_template = template.replace(filetype_suffix="array_record")
    for i, length in enumerate(info.shard_lengths):
      shard = {"shard_index": i, "num_shards": info.num_shards}
      _convert_shard(
        template.sharded_filepath(**shard),
        Path(new_template.sharded_filepath(**shard)),
        length,
      )
  _announce_array_record(Path(builder.data_path) / "dataset_info.json")


def _convert_shard(source, target, num_examples):
  # One record a group: random access decompresses nothing else.
  options, count = "group_size:1", 0
  try:
    with atomic_file(target) as partial:
      writer = array_record_module.ArrayRecordWriter(str(partial), options)
      for record in tf.data.TFRecordDataset(str(source)).as_numpy_iterator():
        writer.write(record)
        count += 1
      writer.close()
      if count != num_examples:
        raise UserError(
          f"{source} has {count} examples, its data set declares "
          f"{num_examples}; delete the data set and prepare it again"
        )
  except tf.errors.OpError as e:
    raise UserError(
      f"{source} cannot be read: {one_line(e)}; delete the data set and "
      "prepare it again"
    ) from e


def _announce_array_record(file):
  info = read_json(file)
  info.setdefault("alternativeFileFormats", []).append("array_record")
  write_atomically(file, json.dumps(info, indent=2, sort_keys=True))
