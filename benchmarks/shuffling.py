"""Quality of shuffling, compared with NumPy's permutation.

  python benchmarks/shuffling.py [--examples=1281167] [--gib=4]

For a set of ImageNet's size and batches of 4,096, over two epochs:

  spread: chi2 / df of a batch over 64 equal parts of the set; 1 if random.
  lag: the largest autocorrelation of examples' positions in the set, over lags
    of up to an eighth of an epoch.
  together: how often two examples of a batch share a batch again in the next
    epoch, relative to chance.
  classes: how many of 1,000 a batch has, if the set is stored by class.
"""

import argparse
import itertools

import numpy as np

from vit_jax.data.order import Shuffle, make_order
from vit_jax.data.reading import choose_shuffle

BATCH = 4096
PARTS = 64
CLASSES = 1000
BYTES = 110_000  # of a record
BUFFER, SHARDS, CYCLE = 250_000, 1024, 16  # of a usual tf.data pipeline


class Bucket:
  """The attributes of a data set that `choose_shuffle` uses."""

  remote = True

  def __init__(self, size):
    self.num_examples, self.num_bytes = size, size * BYTES


def permute(size, rng):
  return rng.permutation(size)


def buffer(size, rng):
  """Returns the order of a shuffle buffer over interleaved shards."""
  shards = np.array_split(np.arange(size), SHARDS)
  shards = [shards[i] for i in rng.permutation(SHARDS)]
  stream = []
  for first in range(0, SHARDS, CYCLE):
    turns = itertools.zip_longest(*shards[first : first + CYCLE])
    stream += [x for turn in turns for x in turn if x is not None]
  held, shown = stream[:BUFFER], []
  choices = rng.integers(0, BUFFER, size)
  for new, i in zip(stream[BUFFER:], choices, strict=False):
    shown.append(held[i])
    held[i] = new
  return np.array(shown + [held[i] for i in rng.permutation(len(held))])


def by_order(shuffle, size):
  order = make_order(shuffle, 0, [size], [1.0], BATCH)
  steps = np.array_split(np.arange(2 * size), 2 * size // BATCH)
  return np.concatenate([order(step)[1] for step in steps]).reshape(2, size)


def measure(epochs):
  """Returns the four metrics of examples int[2 size] of two epochs."""
  size = epochs.shape[1]
  count = size // BATCH
  batches = epochs[0, : count * BATCH].reshape(count, BATCH)
  parts = np.stack(
    [np.bincount(x * PARTS // size, minlength=PARTS) for x in batches]
  )
  expected = BATCH / PARTS
  spread = ((parts - expected) ** 2 / expected).sum(1) / (PARTS - 1)
  classes = np.mean([len(np.unique(x * CLASSES // size)) for x in batches])
  later = np.empty(size, int)
  later[epochs[1]] = np.arange(size) // BATCH
  again = [np.bincount(later[x], minlength=count + 1) for x in batches]
  pairs = sum((x * (x - 1)).sum() for x in again)
  chance = count * BATCH * (BATCH - 1) * (BATCH - 1) / (size - 1)
  return spread.mean(), correlate(epochs[0]), pairs / chance, classes


def correlate(examples):
  """Returns the autocorrelation with the largest magnitude."""
  size = len(examples)
  x = (examples - examples.mean()) / examples.std()
  spectrum = np.fft.rfft(x, 2 * size)
  lagged = np.fft.irfft(np.abs(spectrum) ** 2)[1 : size // 8]
  lagged /= np.arange(size - 1, size - len(lagged) - 1, -1)
  return lagged[np.abs(lagged).argmax()]


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--examples", type=int, default=1_281_167)
  parser.add_argument("--gib", type=float, default=4.0)
  args = parser.parse_args()
  size, rng = args.examples, np.random.default_rng(0)
  blocks = choose_shuffle("blocks", [Bucket(size)], BATCH, args.gib * 2**30)
  print(blocks)
  orders = {
    "NumPy's permutation": lambda: [permute(size, rng) for _ in range(2)],
    "all, 4 rounds (before)": lambda: by_order(Shuffle(rounds=4), size),
    "all, 12 rounds": lambda: by_order(Shuffle(), size),
    "blocks": lambda: by_order(blocks, size),
    "buffer of 250,000": lambda: [buffer(size, rng) for _ in range(2)],
  }
  print(f"{'':24}  spread     lag  together  classes")
  for name, make in orders.items():
    spread, lag, together, classes = measure(np.stack(make()))
    print(
      f"{name:24}  {spread:6.2f}  {lag:6.3f}  {together:8.2f}  {classes:7.0f}"
    )


if __name__ == "__main__":
  main()
