"""Has TFDS data sets ready in ArrayRecord, the format with random access."""

import json
import sys
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore

from vit_jax.data.source import FOLDER, find_builder, one_line
from vit_jax.errors import UserError


def prepare(name: str, data_dir: str | None = None) -> Path:
  """Downloads or generates a TFDS data set as ArrayRecord, or converts it.

  Nothing is left half done: TFDS prepares in a temporary folder, a conversion
  is announced in `dataset_info.json` when all its files are there.

  Returns:
    The folder of the data set.

  Raises:
    UserError: unknown data set, or it could not be had (why).
  """
  if name.startswith(FOLDER):
    raise UserError(f"{name!r} needs no preparation; train on it as it is")
  builder = find_builder(name, data_dir)
  folder = Path(builder.data_path)
  if not builder.is_prepared():
    builder = find_builder(name, data_dir, "array_record")
    _download(builder, name)
  else:
    # The folder knows of formats added since; the builder's code does not.
    builder = tfds.builder_from_directory(builder.data_path)
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    if array_record not in builder.info.available_file_formats():
      _convert(builder)
  return folder


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
    print(f"converting {split}: {info.num_examples:,} examples")
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
  partial = target.with_name(f"{target.name}.incomplete")
  try:
    # One record a group: random access decompresses nothing else.
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
    count = 0
    for record in tf.data.TFRecordDataset(str(source)).as_numpy_iterator():
      writer.write(record)
      count += 1
    writer.close()
    if count != num_examples:
      raise UserError(
        f"{source} has {count} examples, its data set declares {num_examples}; "
        "delete the data set and prepare it again"
      )
    partial.replace(target)
  except tf.errors.OpError as e:
    raise UserError(
      f"{source} cannot be read: {one_line(e)}; delete the data set and "
      "prepare it again"
    ) from e
  finally:
    partial.unlink(missing_ok=True)


def _announce_array_record(file):
  info = json.loads(file.read_text())
  info.setdefault("alternativeFileFormats", []).append("array_record")
  partial = file.with_name(f"{file.name}.incomplete")
  partial.write_text(json.dumps(info, indent=2, sort_keys=True))
  partial.replace(file)
