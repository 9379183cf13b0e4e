"""Reading the records of a step, one by one or many at once.

A local disk reads single records as fast as many. A bucket takes up to 100 ms
per request, whatever its size. Windows of `BlockOrder` are therefore prefetched
whole, or a data set that fits in memory is kept there.
"""

import math
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from vit_jax.data.order import BlockOrder, Shuffle, Window
from vit_jax.data.source import Source

# Size of a block. Larger ones are no faster with this many concurrent requests,
# and mix fewer parts of a set. With less memory, blocks are smaller, down to
# the second size; below that there are fewer streams.
BLOCK_BYTES, _LEAST_BLOCK = 2**21, 2**18
_LEAST_WINDOW = 16  # blocks
_STREAMS = 64  # at most; the number of hosts, or a multiple
_THREADS = 128  # concurrent requests, at most
_RECORD_BYTES = 100_000  # if the size of a data set is unknown


def make_fetcher(
  sources: Sequence[Source], order: Callable, memory: int = 0
) -> "Fetcher":
  """Returns the fetcher for an order and the storage of the data.

  Args:
    sources: of the mixture.
    order: an `Order`, or a function that maps positions likewise.
    memory: bytes; data sets in a bucket that fit are kept in memory.
  """
  if isinstance(order, BlockOrder):
    return _Windows(sources, order)
  size = sum(count_bytes(source) for source in sources)
  remote = any(source.remote for source in sources)
  if remote and size <= memory:
    return _Kept(sources, order)
  return Fetcher(sources, order, parallel=16 if remote else 2)


def choose_shuffle(
  kind: str, sources: Sequence[Source], batch_size: int, memory: int
) -> Shuffle:
  """Returns how a new run shuffles, independent of the number of hosts.

  Args:
    kind: "all", "blocks" or "auto".
    sources: of the mixture.
    batch_size: of the global batch.
    memory: bytes; two windows of all streams fit into it.
  """
  fits = sum(count_bytes(source) for source in sources) <= memory
  remote = any(source.remote for source in sources)
  if kind == "all" or (kind == "auto" and (fits or not remote)):
    return Shuffle()
  streams = math.gcd(batch_size, _STREAMS)
  all_windows = memory / 2 / len(sources)
  least = _LEAST_WINDOW * _LEAST_BLOCK
  while streams > 1 and all_windows / streams < least:
    streams //= 2
  window = all_windows / streams
  block = min(BLOCK_BYTES, window / _LEAST_WINDOW)
  return Shuffle(
    blocks=tuple(count_block(source, block) for source in sources),
    window=max(1, int(window / block)),
    streams=streams,
  )


def count_bytes(source: Source) -> int:
  """Returns the size of a split's records, estimated if it is not known."""
  return source.num_bytes or source.num_examples * _RECORD_BYTES


def count_block(source: Source, size: float) -> int:
  """Returns how many examples of a data set have about `size` bytes."""
  return max(1, int(size * source.num_examples / count_bytes(source)))


class _Block:
  """Consecutive records, in memory of their own that is freed at once.

  On the heap they would leave gaps between other objects, and the process would
  need half as much memory again.
  """

  def __init__(self, records: Sequence[bytes]):
    self._ends = np.cumsum([0, *map(len, records)])
    size = max(1, int(self._ends[-1]))
    self._bytes = mmap.mmap(
      -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    self._bytes.write(b"".join(records))

  def __getitem__(self, i: int) -> bytes:
    return self._bytes[self._ends[i] : self._ends[i + 1]]


class Fetcher:
  """Fetches the records of positions, each by itself.

  Attributes:
    parallel: steps that may be read concurrently; 1: in order only.
  """

  def __init__(self, sources, order, parallel=1):
    self._sources, self._order, self.parallel = sources, order, parallel
    self._pool = ThreadPoolExecutor(_THREADS)  # starts threads on demand

  def fetch(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps positions int64[b] to (records object[b], data set int64[b])."""
    which, examples = self._order(positions)
    records = np.empty(len(which), object)
    for i in np.unique(which):
      mine = which == i
      # A list would become bytes of one length, without trailing zeros.
      records[mine] = np.fromiter(self._read(i, examples[mine]), object)
    return records, which

  def _read(self, i, examples):
    return self._sources[i].read(examples)

  def _read_block(self, i, first, end):
    return _Block(self._sources[i].read(np.arange(first, end)))

  def close(self) -> None:
    """Cancels pending reads."""
    self._pool.shutdown(wait=False, cancel_futures=True)


class _Kept(Fetcher):
  """Reads blocks and keeps them in memory."""

  def __init__(self, sources, order):
    super().__init__(sources, order)
    self._blocks: dict[tuple[int, int], Future] = {}  # of (data set, block)

  def _read(self, i, examples):
    source = self._sources[i]
    size = count_block(source, BLOCK_BYTES)
    blocks, offsets = np.divmod(examples, size)
    for b in np.unique(blocks).tolist():
      if (i, b) not in self._blocks:
        part = b * size, min((b + 1) * size, source.num_examples)
        self._blocks[i, b] = self._pool.submit(self._read_block, i, *part)
    return [
      self._blocks[i, b].result()[offset]
      for b, offset in zip(blocks.tolist(), offsets.tolist(), strict=True)
    ]


class _Windows(Fetcher):
  """Reads windows of a `BlockOrder`: those in use and the next of each stream.

  A host that has to wait for one prefetches more of them, with more concurrent
  requests, until it holds as many as one host for all streams would.
  """

  def __init__(self, sources, order: BlockOrder):
    super().__init__(sources, order)
    # {window: its blocks}; {(data set, stream): its window in use}.
    self._held: dict[Window, list[Future]] = {}
    self._newest: dict[tuple[int, int], Window] = {}
    self._ahead = 1  # prefetched windows of each stream

  def fetch(self, positions):
    found = self._order.find_windows(positions)
    needed = [x for window, _, _ in found for x in self._held.get(window, ())]
    for window, _, _ in found:
      self._load(window)
      self._newest[window.dataset, window.stream] = window
    late = not all(part.done() for part in needed)
    most = 2 * self._order.num_streams // len(self._newest) - 1
    self._ahead = min(self._ahead + late, most)
    windows = latest = [*self._newest.values()]
    for _ in range(self._ahead):
      latest = [self._order.next_window(window) for window in latest]
      windows = windows + latest
    for window in windows:
      self._load(window)
    records = np.empty(len(positions), object)
    which = np.empty(len(positions), np.int64)
    for window, indices, offsets in found:
      sizes = [end - first for first, end in self._order.find_ranges(window)]
      ends = np.cumsum(sizes)
      blocks = np.searchsorted(ends, offsets, side="right")
      inside = offsets - (ends - sizes)[blocks]
      for i, block, k in zip(indices, blocks, inside, strict=True):
        records[i] = self._held[window][block].result()[k]
      which[indices] = window.dataset
    self._held = {window: self._held[window] for window in windows}
    return records, which

  def _load(self, window):
    if window not in self._held:
      self._held[window] = [
        self._pool.submit(self._read_block, window.dataset, first, end)
        for first, end in self._order.find_ranges(window)
      ]
