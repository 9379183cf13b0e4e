"""Which example is shown when: permutations of examples and of blocks."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from vit_jax.data.order import BlockOrder, Order, Shuffle, shuffle_indices
from vit_jax.errors import UserError

# --- permutations ---


@pytest.mark.parametrize("rounds", [4, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_shuffle_is_a_permutation(size, rounds):
  for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (2**40, 0, 0)):
    order = shuffle_indices(np.arange(size), size, key, rounds)
    assert sorted(order.tolist()) == list(range(size))


def test_shuffles_of_other_epochs_sets_and_seeds_are_unrelated():
  keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
  orders = [shuffle_indices(np.arange(5000), 5000, k, 12) for k in keys]
  for i, a in enumerate(orders):
    assert abs(np.corrcoef(a, np.arange(5000))[0, 1]) < 0.06
    for b in orders[:i]:
      assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


def test_shuffle_is_pinned():
  # A run is resumed years later with the order that it began with.
  order = shuffle_indices(np.arange(10), 10, (0, 0, 0), rounds=4)
  assert order.tolist() == [5, 4, 8, 2, 0, 7, 3, 6, 1, 9]
  far = np.array([0, 10**6])
  far = shuffle_indices(far, 1_281_167, (42, 0, 299), rounds=4)
  assert far.tolist() == [228100, 1177317]
  which, examples = Order(3, [100, 50], [0.7, 0.3], 4)(np.arange(8))
  assert which.tolist() == [0, 0, 0, 0, 1, 0, 1, 1]
  assert examples.tolist() == [27, 69, 55, 43, 21, 24, 10, 4]


def test_four_rounds_are_those_of_tensorflow():
  seed = np.random.SeedSequence((1, 2, 3)).generate_state(2, np.uint32)
  expected = tf.random.experimental.index_shuffle(
    tf.range(100, dtype=tf.int64), tf.constant(seed), tf.constant(99, tf.int64)
  )
  found = shuffle_indices(np.arange(100), 100, (1, 2, 3), rounds=4)
  assert found.tolist() == expected.numpy().tolist()


def _spread(positions, size, parts=64):
  """chi2 / df of examples over equal parts of a set; 1: as if drawn."""
  counts = np.bincount(positions * parts // size, minlength=parts)
  expected = len(positions) / parts
  return ((counts - expected) ** 2 / expected).sum() / (parts - 1)


def test_batches_are_spread_over_the_set():
  # 100 batches of 4,096 of ImageNet-21k's 14.2 M: the mean's deviation is
  # 0.018, and that of the rows of neighbouring batches 0.0016.
  size, batch = 14_197_122, 4096
  order = Order(0, [size], [1.0])
  _, examples = order(np.arange(100 * batch))
  spreads = [_spread(x, size) for x in examples.reshape(100, batch)]
  assert 0.92 < np.mean(spreads) < 1.08
  for lag in (1, 2, 64, batch, 50_000):
    correlation = np.corrcoef(examples[lag:], examples[:-lag])[0, 1]
    assert abs(correlation) < 0.01, lag


# --- the order of all examples ---


def test_each_epoch_has_every_example_once():
  order = Order(1, [37], [1.0])
  _, examples = order(np.arange(37 * 3))
  epochs = examples.reshape(3, 37)
  assert (np.sort(epochs, axis=1) == np.arange(37)).all()
  assert len({tuple(e) for e in epochs.tolist()}) == 3
  # Not even the pattern's period, 10,000, shows.
  _, late = order(np.arange(37 * 1000, 37 * 1001))
  assert sorted(late.tolist()) == list(range(37))


def test_weight_too_small():
  with pytest.raises(UserError, match="1e-05 is too small"):
    Order(0, [5, 5], [1, 1e-5])


# --- blocks ---


def _blocks(sizes, batch_size, streams, *, blocks=7, window=3, weights=None):
  shuffle = Shuffle(
    blocks=[blocks] * len(sizes), window=window, streams=streams
  )
  return BlockOrder(
    shuffle, 5, sizes, weights or [1.0] * len(sizes), batch_size
  )


def _orders(sizes, weights):
  yield Order(9, sizes, weights)
  yield _blocks(sizes, 8, 2, blocks=20, weights=weights)


@pytest.mark.ci
def test_mixture_has_exact_proportions_and_passes_through_each_set():
  sizes, weights = [500, 90, 70], [0.5, 0.3, 0.2]
  for order in _orders(sizes, weights):
    which, examples = order(np.arange(30_000))
    for period in which.reshape(3, 10_000):
      assert np.bincount(period).tolist() == [5000, 3000, 2000]
    # In short stretches too they are about that.
    assert 420 < np.bincount(which[:1000])[0] < 580
    for i, size in enumerate(sizes):
      stream = examples[which == i]
      for epoch in stream[: len(stream) // size * size].reshape(-1, size):
        assert sorted(epoch.tolist()) == list(range(size))


@pytest.mark.parametrize(
  ("size", "batch_size", "streams"),
  [(1000, 8, 4), (1001, 12, 3), (64, 16, 16), (5, 8, 4), (1, 8, 8), (40, 8, 1)],
)
def test_each_epoch_of_blocks_has_every_example_once(size, batch_size, streams):
  order = _blocks([size], batch_size, streams)
  _, examples = order(np.arange(size * 4))
  epochs = examples.reshape(4, size)
  assert (np.sort(epochs, axis=1) == np.arange(size)).all()
  if size > 5:
    assert len({tuple(e) for e in epochs.tolist()}) == 4


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 12])
def test_a_host_reads_the_streams_of_its_rows(hosts):
  size, batch, steps = 5000, 24, 60
  order = _blocks([size], batch, 12)
  _, whole = order(np.arange(batch * steps))
  whole = whole.reshape(steps, batch)
  for rows in np.arange(batch).reshape(hosts, -1):
    windows = set()
    for step in range(20, steps):  # from the middle of a window on
      positions = step * batch + rows
      _, examples = order(positions)
      assert (examples == whole[step, rows]).all()
      windows |= {window for window, _, _ in order.find_windows(positions)}
    assert {w.stream for w in windows} == {row * 12 // batch for row in rows}


def test_windows_are_few_whole_blocks():
  size, batch, streams = 9_990, 16, 4
  order = _blocks([size], batch, streams, blocks=10, window=5)
  requests, seen = 0, collections.Counter()
  window, epochs = order.find_windows(np.arange(1))[0][0], 0
  while epochs < 2:
    ranges = order.find_ranges(window)
    assert len(ranges) <= 5 + 1
    assert sum(end - first for first, end in ranges) <= 5 * 10
    requests += len(ranges)
    seen.update(i for first, end in ranges for i in range(first, end))
    window = order.next_window(window)
    epochs = window.epoch
  # A stream's part of two epochs, and about a request a block.
  assert sum(seen.values()) == pytest.approx(2 * size / streams, abs=batch)
  assert requests < 1.25 * 2 * size / streams / 10


@pytest.mark.parametrize("is_sorted", [False, True])
def test_batches_of_blocks_are_spread_over_the_set(is_sorted):
  # As in ImageNet: 1,281,167 images of 110 kB, blocks of 8 MB, 1,000 classes.
  size, batch = 1_281_167, 4096
  shuffle = Shuffle(blocks=[76], window=4, streams=64)
  order = BlockOrder(shuffle, 0, [size], [1.0], batch)
  _, examples = order(np.arange(20 * batch))
  if not is_sorted:
    examples = np.random.default_rng(0).permutation(size)[examples]
  classes = examples * 1000 // size
  found = [len(np.unique(x)) for x in classes.reshape(20, batch)]
  # Of 4,096 drawn by themselves: 983 classes.
  assert np.mean(found) > (220 if is_sorted else 980)
