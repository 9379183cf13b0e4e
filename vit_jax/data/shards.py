"""Random access to records in ArrayRecord files, on disks and in buckets."""

# A compiled module, and gfile, without annotations.
# pyright: reportAttributeAccessIssue=false

import os
import resource
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from array_record.python import array_record_module

from vit_jax.errors import UserError
from vit_jax.files import is_remote

_NUM_THREADS = 64  # concurrent reads
_SPARE_FILES = 128  # open files that a run needs besides those of its data
# ArrayRecord's options for random access, and for a bucket, where ranges of
# records are read in requests of 16 MiB.
_LOCAL, _REMOTE = "readahead_buffer_size:0", "readahead_buffer_size:16777216"
# Reading a list of records costs ArrayRecord 3 ns and 24 bytes for each record
# of the file. If fewer than one in this many are read, each has its own call.
_LIST_COST = 2000
_alive = weakref.WeakSet()  # all instances


class Shards:
  """The records of several files as one sequence. Thread-safe.

  A file is opened at its first read, and stays open if it is on a disk. The
  offsets of its records stay in memory, 8 bytes each, because ArrayRecord would
  otherwise decode the index at each read (5 ms for 100,000 records).

  Attributes:
    remote: whether the files are in a bucket.
    num_open: files that are open, or will be.
  """

  def __init__(self, dataset: str, instructions: Sequence):
    """Checks that all files exist and can be open at the same time.

    Args:
      dataset: the name, for messages.
      instructions: TFDS's file instructions, with the range read of each file.

    Raises:
      UserError: a file is missing, or the limit of open files is too low.
    """
    self._files = [str(f.filename) for f in instructions]
    _check_there(self._files, dataset)
    self.remote = is_remote(self._files[0])
    self.num_open = 0 if self.remote else len(self._files)
    if self.num_open:
      _allow_open(self.num_open, sum(x.num_open for x in _alive), dataset)
    _alive.add(self)
    self._ends = np.cumsum([f.take for f in instructions])
    # From a record's index in the sequence to its index in the file.
    self._shifts = [f.skip + f.take for f in instructions] - self._ends
    self._readers = [None] * len(self._files)
    # Each thread that reads an index takes as much memory again. A bucket needs
    # many concurrent requests, a disk does not.
    locks = len(self._files) if self.remote else 1
    self._locks = [threading.Lock() for _ in range(locks)]
    self._threads = ThreadPoolExecutor(_NUM_THREADS)

  def read(self, indices: np.ndarray) -> list[bytes]:
    """Returns the records of `indices`, int64[b].

    From a bucket, neighbours in ascending order are read in one request.
    """
    indices = np.asarray(indices, np.int64)
    shards = np.searchsorted(self._ends, indices, side="right")
    inner = indices + self._shifts[shards]
    order = np.arange(len(indices)) if self.remote else np.argsort(shards)
    new = np.diff(shards[order]) != 0
    if self.remote:
      new |= np.diff(inner) != 1
    parts = np.split(order, np.flatnonzero(new) + 1)

    def read_part(part):
      reader, wanted = self._open(shards[part[0]]), inner[part].tolist()
      if self.remote:
        return reader.read(wanted[0], wanted[-1] + 1)
      if len(wanted) * _LIST_COST < reader.num_records():
        return [reader.read(i, i + 1)[0] for i in wanted]
      return reader.read(wanted)

    run = map if len(parts) == 1 else self._threads.map
    records = [b""] * len(indices)
    for part, found in zip(parts, run(read_part, parts), strict=True):
      for i, record in zip(part.tolist(), found, strict=True):
        records[i] = record
    return records

  def _open(self, shard):
    if self._readers[shard] is None:
      with self._locks[shard % len(self._locks)]:
        if self._readers[shard] is None:
          self._readers[shard] = array_record_module.ArrayRecordReader(
            self._files[shard],
            options=_REMOTE if self.remote else _LOCAL,
            file_reader_buffer_size=2**15,
          )
    return self._readers[shard]


def _check_there(files, dataset):
  """Raises a UserError unless the files exist; lists each folder once."""
  there = set()
  for folder in {os.path.dirname(file) for file in files}:
    if is_remote(folder):
      names = tf.io.gfile.listdir(folder)
    else:
      with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    there |= {os.path.join(folder, name) for name in names}
  missing = [file for file in files if file not in there]
  if missing:
    raise UserError(
      f"data set {dataset!r}: {len(missing)} of its files are missing, the "
      f"first is {missing[0]}; delete the folder and prepare it again"
    )


def _allow_open(count, others, dataset):
  """Raises the limit of open files by `count`, if the system allows it.

  `others` counts the files of data sets that this process opened before.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  limit = 2**20 if hard == resource.RLIM_INFINITY else hard
  wanted = count + others + _SPARE_FILES
  if wanted > limit:
    raise UserError(
      f"data set {dataset!r} has {count:,} files"
      f"{f' and those before it {others:,}' if others else ''}, all of them "
      f"open at once; this process may open {limit:,}, its hard limit: raise "
      f"it, as root with `ulimit -n {2 * wanted}`, in Docker with `--ulimit "
      f"nofile={2 * wanted}`, in limits.conf with `* hard nofile {2 * wanted}`"
    )
  if soft != resource.RLIM_INFINITY:
    new = max(soft, min(soft + count, limit))
    resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
