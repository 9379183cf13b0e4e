"""Shuffling: position p of the endless stream -> (data set, example).

Batch k has the positions from k * batch_size. The order is stateless, because
positions are mapped by arithmetic and by permutations keyed by the seed. Batch
k is therefore the same on any number of hosts and after any restart, and an
epoch shows every example exactly once.

`Order` permutes all examples of an epoch, for storage with fast random access.
`BlockOrder` is for storage with high latency and high throughput, such as a
bucket. It permutes blocks of neighbouring examples, each read in one request.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vit_jax.errors import UserError

# A mixture repeats a random pattern of this many slots, each of which belongs
# to one data set. This is the granularity of weights.
PATTERN_SLOTS = 10_000


class Shuffle(NamedTuple):
  """How a run's examples are shuffled; saved in config.json.

  Attributes:
    rounds: of the permutations' cipher. TensorFlow's 4, which older runs used,
      are too few; see docs/pods.md.
    blocks: examples per block, for each data set; (): no blocks.
    window: blocks whose examples a stream permutes together.
    streams: number of streams; each feeds a share of the rows of all batches.
  """

  rounds: int = 12
  blocks: Sequence[int] = ()
  window: int = 1
  streams: int = 1


ALL = Shuffle()  # no blocks


def make_order(
  shuffle: Shuffle,
  seed: int,
  sizes: Sequence[int],
  weights: Sequence[float],
  batch_size: int,
) -> "Order":
  """Returns the order of a mixture.

  Args:
    shuffle: the settings.
    seed: of all permutations.
    sizes: number of examples of each data set.
    weights: of each data set, relative.
    batch_size: of the global batch.
  """
  if shuffle.blocks:
    return BlockOrder(shuffle, seed, sizes, weights, batch_size)
  return Order(seed, sizes, weights, shuffle.rounds)


class Order:
  """Position in the infinite stream -> (data set, example).

  Each data set has its own epochs, with a new permutation of its examples in
  each. Proportions are exact over every PATTERN_SLOTS positions.
  """

  def __init__(
    self,
    seed: int,
    sizes: Sequence[int],
    weights: Sequence[float],
    rounds: int = ALL.rounds,
    length: int = PATTERN_SLOTS,
  ):
    """See `make_order` and `Shuffle`; `length` is that of the pattern."""
    self._seed, self._sizes, self._rounds = seed, np.array(sizes), rounds
    self._slots, self._counts = _make_pattern(seed, weights, length, rounds)
    self._ranks = _rank(self._slots)

  def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps positions int64[b] to (data set int64[b], example int64[b])."""
    _, _, which, epochs, examples = self._locate(positions)
    for i, epoch in np.unique([which, epochs], axis=1).T.tolist():
      mine = (which == i) & (epochs == epoch)
      examples[mine] = self._shuffle(examples[mine], self._sizes[i], i, epoch)
    return which, examples

  def _locate(self, positions):
    """Returns int64[b] each: the pattern's repeat and slot; data set, epoch and
    place in that epoch.
    """
    repeats, slots = np.divmod(positions, len(self._slots))
    which = self._slots[slots]
    within = repeats * self._counts[which] + self._ranks[slots]
    return repeats, slots, which, *np.divmod(within, self._sizes[which])

  def _shuffle(self, indices, size, *key):
    """Applies the permutation of range(size) keyed by `key`."""
    return shuffle_indices(indices, size, (self._seed, *key), self._rounds)


class Window(NamedTuple):
  """A window: some blocks of one stream of one data set in one epoch.

  Attributes:
    dataset, stream, epoch: their numbers.
    number: of the window in the stream's epoch, from 0.
  """

  dataset: int
  stream: int
  epoch: int
  number: int


class BlockOrder(Order):
  """An `Order` whose streams of rows read from few blocks at a time.

  In every epoch of a data set, its blocks are permuted, concatenated and cut
  into streams. Stream v feeds the rows from v * b / streams of every batch of
  b, so that a host reads only the streams of its own rows. A stream's examples
  are permuted window by window.

  A stream's share of an epoch has as many examples as its rows have positions
  in it. These are counted, because epochs begin and end within batches.

  Attributes:
    num_streams: of all data sets.
  """

  def __init__(self, shuffle, seed, sizes, weights, batch_size):
    """See `make_order`."""
    assert batch_size % shuffle.streams == 0, "streams are of whole rows"
    # Whole batches, so that a slot of the pattern always has the same row.
    repeats = -(-PATTERN_SLOTS // batch_size) if len(sizes) > 1 else 1
    length = batch_size * repeats
    super().__init__(seed, sizes, weights, shuffle.rounds, length)
    self.num_streams = shuffle.streams * len(sizes)
    self._blocks = np.array(shuffle.blocks)  # in examples
    self._windows = self._blocks * shuffle.window  # in examples
    rows = np.arange(length) % batch_size
    self._streams = rows * shuffle.streams // batch_size
    self._ranks_in_stream = _rank(self._slots * shuffle.streams + self._streams)
    # [data set][slots of it so far, stream]: how many of them are the stream's.
    hits = np.eye(shuffle.streams, dtype=int)[self._streams]
    self._before = [
      np.cumsum(np.insert(hits[self._slots == i], 0, 0, axis=0), axis=0)
      for i in range(len(sizes))
    ]

  def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps positions int64[b] to (data set int64[b], example int64[b])."""
    which, examples = np.empty((2, len(positions)), np.int64)
    for window, found, offsets in self.find_windows(positions):
      ranges = self.find_ranges(window)
      which[found] = window.dataset
      inside = np.concatenate([np.arange(*r) for r in ranges])
      examples[found] = inside[offsets]
    return which, examples

  def find_windows(self, positions: np.ndarray):
    """Returns the windows that contain the examples of positions int64[b].

    Returns:
      [(window, indices int64[c] into the positions, offsets int64[c] into the
      concatenated examples of `find_ranges`)].
    """
    repeats, slots, which, epochs, _ = self._locate(positions)
    streams, places = self._streams[slots], self._ranks_in_stream[slots]
    for i, epoch in np.unique([which, epochs], axis=1).T.tolist():
      now = (which == i) & (epochs == epoch)
      before = repeats[now, None] * self._before[i][-1]
      before -= self._count_before(i, epoch)
      places[now] += before[np.arange(len(before)), streams[now]]
    numbers, offsets = np.divmod(places, self._windows[which])
    windows, owners = np.unique(
      [which, streams, epochs, numbers], axis=1, return_inverse=True
    )
    found = []
    for k, values in enumerate(windows.T.tolist()):
      window, mine = Window(*values), np.flatnonzero(owners == k)
      found.append((window, mine, self._permute(window)[offsets[mine]]))
    return found

  def find_ranges(self, window: Window) -> list[tuple[int, int]]:
    """Returns [(first example, end)] of a window, block by block."""
    first, end, _ = self._find_bounds(window)
    blocks, ends = self._permute_blocks(window.dataset, window.epoch)
    size, ranges = int(self._blocks[window.dataset]), []
    j = int(np.searchsorted(ends, first, side="right"))
    while first < end:
      start = int(blocks[j]) * size + first - int(ends[j - 1] if j else 0)
      count = int(min(ends[j], end)) - first
      ranges.append((start, start + count))
      first, j = first + count, j + 1
    return ranges

  def next_window(self, window: Window) -> Window:
    """Returns the next window of its stream."""
    _, end, stop = self._find_bounds(window)
    if end < stop:
      return window._replace(number=window.number + 1)
    return window._replace(epoch=window.epoch + 1, number=0)

  def _count_before(self, i, epoch):
    """Returns int[streams]: how many positions precede a data set's epoch."""
    repeats, slots = divmod(epoch * self._sizes[i], self._counts[i])
    return repeats * self._before[i][-1] + self._before[i][slots]

  def _find_bounds(self, window):
    """Returns a window's begin and end in its epoch, and its stream's end."""
    i, v, epoch, number = window
    counts = self._count_before(i, epoch + 1) - self._count_before(i, epoch)
    stop = int(counts[: v + 1].sum())
    first = stop - int(counts[v]) + number * int(self._windows[i])
    return first, min(stop, first + int(self._windows[i])), stop

  @functools.lru_cache(maxsize=1024)  # noqa: B019  (as long-lived as a run)
  def _permute(self, window):
    """Returns int[n], the order of a window's examples."""
    first, end, _ = self._find_bounds(window)
    i, v, epoch, number = window
    size = end - first
    return self._shuffle(np.arange(size), size, i, epoch, v, number)

  @functools.lru_cache(maxsize=4)  # noqa: B019
  def _permute_blocks(self, i, epoch):
    """Returns a data set's blocks in the order of an epoch, and their ends."""
    size = self._blocks[i]
    count = -(-int(self._sizes[i]) // int(size))
    blocks = self._shuffle(np.arange(count), count, i, epoch)
    lengths = np.minimum(size, self._sizes[i] - blocks * size)
    return blocks, np.cumsum(lengths)


def shuffle_indices(
  indices: np.ndarray, size: int, key: tuple[int, ...], rounds: int
) -> np.ndarray:
  """Applies the permutation of range(size) keyed by `key`.

  Args:
    indices: int64[b] in [0, size).
    size: of the range.
    key: non-negative integers.
    rounds: see `Shuffle`.
  """
  seed = np.random.SeedSequence(key).generate_state(2, np.uint32)
  with tf.device("CPU"):
    return tf.raw_ops.RandomIndexShuffle(
      index=tf.constant(indices, tf.int64),
      # The first is what `tf.random.experimental.index_shuffle` adds.
      seed=tf.constant([498247692, *seed], tf.uint32),
      max_index=tf.constant(size - 1, tf.int64),
      rounds=rounds,
    ).numpy()


def _make_pattern(seed, weights, length, rounds):
  """Returns (data set of each slot, slots of each data set)."""
  quotas = np.array(weights, float) / np.sum(weights) * length
  counts = np.floor(quotas).astype(np.int64)
  missing = length - counts.sum()
  counts[np.argsort(counts - quotas, kind="stable")[:missing]] += 1
  if not counts.all():
    raise UserError(
      f"weight {weights[int(np.argmin(counts))]} is too small a part of the "
      f"mixture; the least is 1 in {length:,}"
    )
  slots = np.repeat(np.arange(len(weights)), counts)
  key = (seed, len(weights), PATTERN_SLOTS, 1)  # no (seed, data set, epoch)
  return slots[shuffle_indices(np.arange(length), length, key, rounds)], counts


def _rank(values):
  """Returns int64[n], the number of earlier entries with the same value."""
  order = np.argsort(values, kind="stable")
  counts = np.bincount(values)
  starts = np.repeat(np.cumsum(counts) - counts, counts)
  ranks = np.empty(len(values), np.int64)
  ranks[order] = np.arange(len(values)) - starts
  return ranks
