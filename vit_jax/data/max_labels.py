"""The maximum labels per image of data sets that do not declare it.

All processes of a run count them once, each its share of the examples. The
count is stored with the data set, where all readers find it, or if that is not
writable, in $VIT_JAX_CACHE or ~/.cache/vit_jax.
"""

import logging
import os
import time

import numpy as np
import tensorflow as tf
from etils import epath

from vit_jax.data.source import Source, digest
from vit_jax.errors import UserError, one_line
from vit_jax.files import read_json, write_json

log = logging.getLogger(__name__)

FILE = "max_labels.json"
_CHUNK = 1024  # records read and parsed at once
_REPORT_EVERY = 30  # seconds


def find_max_labels(source: Source, folder, command: str) -> int:
  """Returns the maximum labels per image of a source; counts if necessary.

  All processes of a run must call it and get the same result.

  Args:
    source: the split.
    folder: of the data set; the count is valid for its dataset_info.json.
    command: the command that counts in advance, for messages.
  """
  folder = epath.Path(folder)
  info = (folder / "dataset_info.json").read_text()
  key = f"{source.identity()} {digest(info)}"
  cache = epath.Path(os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax")
  files = [folder / FILE, cache.expanduser() / FILE]
  kept = [most for most in _gather(_read_kept(files, key)) if most]
  if kept:
    return kept[0]
  most = _count(source, folder, command)
  if not _find_process()[0]:
    _keep(files, key, most)
  return most


def _find_process():
  """Returns the index of this process and the number of processes."""
  import jax  # takes seconds, which other data sets do not need

  if not jax.distributed.is_initialized():
    return 0, 1  # without making JAX claim a device
  return jax.process_index(), jax.process_count()


def _gather(value) -> list:
  """Returns the values of all processes."""
  if _find_process()[1] == 1:
    return [value]
  from vit_jax import distributed

  return distributed.gather(value)


def _read_kept(files, key):
  for file in files:
    try:
      most = read_json(file).get(key)
    except UserError:  # missing, or corrupt and counted again
      continue
    if isinstance(most, int) and most > 0:
      return most
  return None


def _keep(files, key, most):
  """Adds the count to the first writable file."""
  for file in files:
    try:
      try:
        kept = read_json(file)
      except UserError:
        kept = {}
      file.parent.mkdir(parents=True, exist_ok=True)
      write_json(file, {**kept, key: most})
    except Exception as e:  # file systems may raise any exception
      log.warning("%s cannot be written: %s", file, one_line(e))
      continue
    if file != files[0]:
      log.warning(
        "the count is in %s: copy that file to %s, or other machines recount",
        *(file, files[0].parent),
      )
    return


def _count(source, folder, command):
  """Counts over the whole split, each process its share of it."""
  index, num_processes = _find_process()
  total, most, began = source.num_examples, 1, time.monotonic()
  log.warning(
    "%s %s: its builder declares no max_labels (in its MetadataDict), so the "
    "labels of all %d examples are counted, once; to count before a run, use "
    "`%s` on a machine that can write to %s",
    *(source.dataset, source.split, total, command, folder),
  )
  find_most = tf.function(
    lambda records: tf.reduce_max(
      tf.map_fn(
        lambda record: tf.size(source.parse_labels(record)),
        records,
        fn_output_signature=tf.int32,
      )
    ),
    input_signature=[tf.TensorSpec([None], tf.string)],
  )
  reported = began
  for start in range(0, total, _CHUNK * num_processes):
    first = min(start + _CHUNK * index, total)
    chunk = np.arange(first, min(first + _CHUNK, total))
    if len(chunk):
      most = max(most, int(find_most(source.read(chunk))))
    # At each chunk, because some networks time out on long waits.
    most = max(_gather(most))
    done, now = min(start + _CHUNK * num_processes, total), time.monotonic()
    if now - reported > _REPORT_EVERY:
      reported = now
      log.info(
        "counted the labels of %d of %d examples, at most %d so far, "
        "%.1f h to go",
        *(done, total, most, (now - began) / done * (total - done) / 3600),
      )
  return most
