"""Shuffling: position p of the endless stream -> (data set, example).

Batch k has the positions k * batch_size onwards. Nothing here has a state: a
position is mapped by arithmetic and by permutations that are keyed by the seed,
so that batch k is the same on any number of hosts and after any restart, and an
epoch shows every example exactly once.

There are two orders. `Order` permutes all examples of an epoch: right where an
example can be read by itself. `BlockOrder` is for storage that is slow to
answer and quick to deliver, such as a bucket: it permutes blocks of
neighbouring examples, each of which is read at once.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vit_jax.errors import UserError

# A mixture repeats a random pattern of this many slots, each of which belongs
# to one data set; the granularity of weights.
PATTERN_SLOTS = 10_000


class Shuffle(NamedTuple):
  """How a run's examples are shuffled; config.json has it.

  Attributes:
    rounds: of the cipher behind a permutation. TensorFlow's 4, which runs from
      before had, are too few: see docs/pods.md.
    blocks: examples of a block, for each data set; (): no blocks.
    window: blocks among whose examples a stream chooses.
    streams: how many there are, each for a share of the rows of all batches.
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
) -> "Order | BlockOrder":
  """Returns the order of a mixture.

  Args:
    shuffle: how.
    seed: decides it.
    sizes: examples of each data set.
    weights: of each data set, relative.
    batch_size: of the global batch.
  """
  if shuffle.blocks:
    return BlockOrder(shuffle, seed, sizes, weights, batch_size)
  return Order(seed, sizes, weights, shuffle.rounds)


class Order:
  """Position in the infinite stream -> (data set, example).

  Each data set passes through a new permutation of its examples every epoch of
  its own. Proportions are exact over every PATTERN_SLOTS positions.
  """

  def __init__(
    self,
    seed: int,
    sizes: Sequence[int],
    weights: Sequence[float],
    rounds: int = ALL.rounds,
  ):
    """Args: seed; examples and weight of each data set; see `Shuffle`."""
    self._seed, self._rounds = seed, rounds
    self._sizes = sizes
    self._slots, self._counts = _make_pattern(
      seed, weights, PATTERN_SLOTS, rounds
    )
    self._ranks = _rank(self._slots)

  def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps positions int64[b] to (data set int64[b], example int64[b])."""
    rounds, slot = np.divmod(np.asarray(positions, np.int64), PATTERN_SLOTS)
    which = self._slots[slot]
    within = rounds * self._counts[which] + self._ranks[slot]
    examples = np.empty_like(within)
    for i in np.unique(which):
      mine = which == i
      examples[mine] = self._shuffle(i, within[mine])
    return which, examples

  def _shuffle(self, i, within):
    """Positions within data set i -> its examples, shuffled by epoch."""
    size = self._sizes[i]
    epochs, offsets = np.divmod(within, size)
    examples = np.empty_like(offsets)
    for epoch in np.unique(epochs):  # one or two, unless the set is tiny
      now = epochs == epoch
      key = (self._seed, int(i), int(epoch))
      examples[now] = shuffle_indices(offsets[now], size, key, self._rounds)
    return examples


class Window(NamedTuple):
  """A window: some blocks of one stream of one data set in one epoch.

  Attributes:
    dataset, stream, epoch: which ones.
    number: of the window in the stream's epoch, from 0.
  """

  dataset: int
  stream: int
  epoch: int
  number: int


class BlockOrder:
  """As `Order`, but a stream of rows has its examples from few blocks at once.

  In every epoch of a data set its blocks are permuted, and what they hold, one
  after the other, is cut into streams. Stream v feeds rows v * b / streams
  onwards of every batch of b, so that a host reads the streams of its own rows
  alone. A stream's examples are permuted window by window.

  A stream's part of an epoch has as many examples as its rows have positions in
  it: these are counted, as the epochs begin and end within batches.
  """

  def __init__(self, shuffle, seed, sizes, weights, batch_size):
    """Args: see `make_order`."""
    assert batch_size % shuffle.streams == 0, "streams are of whole rows"
    self._seed, self._sizes, self._shuffle = seed, sizes, shuffle
    # Whole batches, so that a slot of the pattern is of the same row always.
    repeats = -(-PATTERN_SLOTS // batch_size) if len(sizes) > 1 else 1
    length = batch_size * repeats
    self._which, self._counts = _make_pattern(
      seed, weights, length, shuffle.rounds
    )
    self._streams = (
      np.arange(length) % batch_size * shuffle.streams // batch_size
    )
    self._ranks = _rank(self._which)
    chains = self._which * shuffle.streams + self._streams
    self._ranks_in_stream = _rank(chains)
    # [data set][slots of it so far, stream]: how many of them are the stream's.
    self._before = []
    for i in range(len(sizes)):
      mine = self._streams[self._which == i]
      hits = mine[:, None] == np.arange(shuffle.streams)
      self._before.append(
        np.concatenate([np.zeros_like(hits[:1], int), np.cumsum(hits, axis=0)])
      )

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
    """Returns where the examples of positions int64[b] are to be found.

    Returns:
      [(window, indices int64[c] into the positions, offsets int64[c] into the
      examples of `find_ranges`, one after the other)].
    """
    repeats, slots = np.divmod(
      np.asarray(positions, np.int64), len(self._which)
    )
    which, streams = self._which[slots], self._streams[slots]
    within = repeats * self._counts[which] + self._ranks[slots]
    epochs = within // np.asarray(self._sizes)[which]
    places = self._ranks_in_stream[slots]
    sizes = np.empty_like(places)  # of windows
    for i, epoch in np.unique([which, epochs], axis=1).T.tolist():
      now = (which == i) & (epochs == epoch)
      before = repeats[now, None] * self._before[i][-1]
      before = before - self._count_before(i, epoch)
      places[now] += np.take_along_axis(before, streams[now, None], 1)[:, 0]
      sizes[now] = self._window_size(i)
    numbers, offsets = np.divmod(places, sizes)
    windows, owners = np.unique(
      [which, streams, epochs, numbers], axis=1, return_inverse=True
    )
    order = np.argsort(owners, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(owners))[:-1])
    found = []
    for values, mine in zip(windows.T.tolist(), groups, strict=True):
      window = Window(*values)
      found.append((window, mine, self._permute(window)[offsets[mine]]))
    return found

  def find_ranges(self, window: Window) -> list[tuple[int, int]]:
    """Returns [(first example, end)] of a window, block by block."""
    i, _, epoch, _ = window
    blocks, ends = self._permute_blocks(i, epoch)
    first, end = self._bounds(window)
    size = self._shuffle.blocks[i]
    ranges = []
    j = int(np.searchsorted(ends, first, side="right"))
    while first < end:
      start = int(blocks[j]) * size + first - int(ends[j - 1] if j else 0)
      count = int(min(ends[j], end)) - first
      ranges.append((start, start + count))
      first, j = first + count, j + 1
    return ranges

  def next_window(self, window: Window) -> Window:
    """Returns the window that its stream goes on with."""
    i, v, epoch, number = window
    start, end = self._stream_bounds(i, epoch)[v : v + 2]
    if (number + 1) * self._window_size(i) < end - start:
      return window._replace(number=number + 1)
    return Window(i, v, epoch + 1, 0)

  def _window_size(self, i):
    return self._shuffle.blocks[i] * self._shuffle.window

  def _count_before(self, i, epoch):
    """int[streams]: a data set's positions of each stream before its epoch."""
    repeats, slots = divmod(epoch * self._sizes[i], int(self._counts[i]))
    before = self._before[i]
    return repeats * before[-1] + before[slots]

  def _stream_bounds(self, i, epoch):
    """int[streams + 1]: where the streams begin and end in the epoch."""
    counts = self._count_before(i, epoch + 1) - self._count_before(i, epoch)
    return np.concatenate([[0], np.cumsum(counts)])

  def _bounds(self, window):
    """Where a window begins and ends in its epoch's sequence of examples."""
    i, v, epoch, number = window
    start, end = self._stream_bounds(i, epoch)[v : v + 2]
    first = start + number * self._window_size(i)
    return int(first), int(min(end, first + self._window_size(i)))

  @functools.lru_cache(maxsize=1024)  # noqa: B019  (as long-lived as a run)
  def _permute(self, window):
    """int[n]: the order in which a window's examples are shown."""
    first, end = self._bounds(window)
    i, v, epoch, number = window
    key = (self._seed, i, epoch, v, number)
    size = end - first
    return shuffle_indices(np.arange(size), size, key, self._shuffle.rounds)

  @functools.lru_cache(maxsize=4)  # noqa: B019
  def _permute_blocks(self, i, epoch):
    """The blocks of a data set in the order of its epoch, and their ends."""
    size = self._shuffle.blocks[i]
    count = -(-self._sizes[i] // size)
    key = (self._seed, i, epoch)
    blocks = shuffle_indices(np.arange(count), count, key, self._shuffle.rounds)
    lengths = np.full(count, size)
    lengths[blocks == count - 1] = self._sizes[i] - (count - 1) * size
    return blocks, np.cumsum(lengths)


def shuffle_indices(
  indices: np.ndarray, size: int, key: tuple[int, ...], rounds: int
) -> np.ndarray:
  """Applies the permutation of range(size) that belongs to `key`.

  Args:
    indices: int64[b] in [0, size).
    size: how many there are.
    key: non-negative integers; each gives another permutation.
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
  """int64[n]: how many earlier entries have the same value."""
  order = np.argsort(values, kind="stable")
  counts = np.bincount(values)
  starts = np.repeat(np.cumsum(counts) - counts, counts)
  ranks = np.empty(len(values), np.int64)
  ranks[order] = np.arange(len(values)) - starts
  return ranks
