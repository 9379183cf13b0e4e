"""Batches: which example is row r of batch k, and the tf.data that makes it.

The pipeline is stateless given the step number. Position p = k * batch_size + r
of the infinite stream determines a data set of the mixture and an example of it
by arithmetic, so batch k is the same on any number of hosts and after any
restart, and the shuffle is over the whole data set without a buffer.
"""

# TensorFlow's annotations do not know tf.random.experimental.
# pyright: reportAttributeAccessIssue=false

import atexit
import contextlib
import functools
import os
import traceback
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from vit_jax.data import ops
from vit_jax.data.source import BAD_LABEL, Source
from vit_jax.errors import UserError, one_line

# A mixture repeats a random pattern of this many slots, each of which belongs
# to one data set; the granularity of weights.
PATTERN_SLOTS = 10_000


class Order:
  """Position in the infinite stream -> (data set, example).

  Each data set passes through a new permutation of its examples every epoch of
  its own. Proportions are exact over every PATTERN_SLOTS positions.
  """

  def __init__(self, seed: int, sizes: Sequence[int], weights: Sequence[float]):
    """Args: seed; the number of examples and the weight of each data set."""
    self._seed = seed
    self._sizes = sizes
    self._slots, self._counts = _make_pattern(seed, weights)
    # How many earlier slots of the pattern belong to the same data set.
    self._ranks = np.zeros(PATTERN_SLOTS, np.int64)
    for i, count in enumerate(self._counts):
      self._ranks[self._slots == i] = np.arange(count)

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
      examples[now] = shuffle_indices(
        offsets[now], size, (self._seed, int(i), int(epoch))
      )
    return examples


def shuffle_indices(
  indices: np.ndarray, size: int, key: tuple[int, ...]
) -> np.ndarray:
  """Applies the permutation of range(size) that belongs to `key`.

  Args:
    indices: int64[b] in [0, size).
    size: how many there are.
    key: non-negative integers; each gives another permutation.
  """
  seed = np.random.SeedSequence(key).generate_state(2, np.uint32)
  with tf.device("CPU"):
    return tf.random.experimental.index_shuffle(
      tf.constant(indices, tf.int64),
      tf.constant(seed, tf.uint32),
      tf.constant(size - 1, tf.int64),
    ).numpy()


def _make_pattern(seed, weights):
  """Returns (data set of each slot, slots of each data set)."""
  quotas = np.array(weights, float) / np.sum(weights) * PATTERN_SLOTS
  counts = np.floor(quotas).astype(np.int64)
  missing = PATTERN_SLOTS - counts.sum()
  counts[np.argsort(counts - quotas, kind="stable")[:missing]] += 1
  if not counts.all():
    raise UserError(
      f"weight {weights[int(np.argmin(counts))]} is too small a part of the "
      f"mixture; the least is 1 in {PATTERN_SLOTS:,}"
    )
  slots = np.repeat(np.arange(len(weights)), counts)
  key = (seed, len(weights), PATTERN_SLOTS, 1)  # no (seed, data set, epoch)
  order = shuffle_indices(np.arange(PATTERN_SLOTS), PATTERN_SLOTS, key)
  return slots[order], counts


def count_cpus() -> int:
  """Returns the cores of this process, where the system says (not on a Mac)."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def train_batches(
  sources_and_weights: Sequence[tuple[Source, float]],
  *,
  seed: int,
  batch_size: int,
  rows: np.ndarray,
  preprocess: str,
  image_size: int | tuple[int, int],
  start_step: int,
  num_steps: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this host's rows of the batches of `num_steps` steps.

  Args:
    sources_and_weights: the mixture, of the same classes; weights are relative.
    seed: decides the order and all augmentation, with the step and the row.
    batch_size: of the global batch.
    rows: int[b], this host's row numbers in the global batch.
    preprocess: the preprocessing string.
    image_size: height and width, pixels.
    start_step: of the first batch; batch k holds the positions
      k * batch_size .. (k + 1) * batch_size - 1 of the stream.
    num_steps: how many batches.

  Yields:
    {"image": uint8[b h w 3], "labels": int32[b l], padded with -1}; l is the
    largest `max_labels` of the sources.

  Raises:
    UserError: bad string or weights; while iterating, an example that cannot
      be read, decoded or preprocessed or whose labels are out of range, by
      name.
  """
  sources, weights = zip(*sources_and_weights, strict=True)
  seed = int(seed) % 2**63  # SeedSequence and TensorFlow take no others
  order = Order(seed, [source.num_examples for source in sources], weights)
  process = ops.make_preprocess(preprocess, image_size, evaluation=False)
  reader = _Reader(sources, order, batch_size, rows, process, seed)
  steps = range(start_step, start_step + num_steps)
  return _iterate(reader, _make_dataset(reader, steps), steps)


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  rows: np.ndarray,
  preprocess: str,
  image_size: int | tuple[int, int],
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this host's rows of every example once, in order.

  Every host gets ceil(num_examples / batch_size) batches; rows beyond the end
  are padding: black, labels -1, mask False.

  Args: as `train_batches`.

  Yields:
    {"image": uint8[b h w 3], "labels": int32[b l], "mask": bool[b]}.

  Raises:
    UserError: as `train_batches`; also an operation that is random.
  """
  process = ops.make_preprocess(preprocess, image_size, evaluation=True)
  reader = _Reader(
    *([source], _in_order, batch_size, rows, process),
    num_positions=source.num_examples,
  )
  steps = range(-(-source.num_examples // batch_size))
  dataset = _make_dataset(reader, steps)
  batches = _iterate(reader, dataset, steps)
  return _pad(batches, reader, dataset.element_spec, steps)


def _in_order(positions):
  """The evaluation's counterpart of `Order`: one data set, unshuffled."""
  return np.zeros_like(positions), positions


class _Reader:
  """Reads the records of this host's rows of a step."""

  def __init__(
    self, sources, order, batch_size, rows, process, seed=0, num_positions=None
  ):
    self.sources, self.process, self.seed = sources, process, seed
    self.rows = np.asarray(rows, np.int64)
    self._order = order
    self._batch_size = batch_size
    self._num_positions = num_positions

  def mask(self, step) -> np.ndarray:
    """bool[b]: which rows exist; all, while training."""
    if self._num_positions is None:
      return np.ones(len(self.rows), bool)
    return step * self._batch_size + self.rows < self._num_positions

  def locate(self, step):
    """Returns (data set, example, row), int64[b'] each, of existing rows."""
    rows = self.rows[self.mask(step)]
    return *self._order(step * self._batch_size + rows), rows

  def read(self, step):
    """Returns (record object[b'], data set int64[b'], row int64[b'])."""
    which, examples, rows = self.locate(int(step))
    # Filled one by one: NumPy would cut trailing zeros off a list of bytes.
    records = np.empty(len(which), object)
    for i in np.unique(which):
      slots = np.flatnonzero(which == i)
      found = self.sources[i].read(examples[slots])
      for slot, record in zip(slots, found, strict=True):
        records[slot] = record
    return records, which, rows

  def explain(self, step) -> None:
    """Raises a UserError for the first example of a step that is at fault."""
    which, examples, rows = self.locate(step)
    seeds = _fold(self.seed, tf.constant(step, tf.int64), tf.constant(rows))
    for i, example, seed in zip(which, examples, seeds, strict=True):
      source, example = self.sources[i], int(example)
      encoded, _, pixels = source.check_example(example)
      try:
        self.process(encoded, seed)
      except tf.errors.OpError as e:
        height, width, _ = pixels.shape
        raise UserError(
          f"{source.describe(example)}: {width}x{height} pixels cannot be "
          f"preprocessed: {one_line(e)}; remove it or choose another preprocess"
        ) from e


def _fold(seed, step, rows):
  """Returns int64[b 2], the seeds of the augmentations of a step's rows.

  They are what folding the step and then the row into the seed gives; all but
  the row is the same for all rows, and computed once.
  """
  fold_in = tf.random.experimental.stateless_fold_in
  of_step = fold_in(tf.constant([seed, 0], tf.int64), step)
  key = fold_in(of_step, tf.zeros([], tf.int64))[0]
  return tf.stack([tf.fill(tf.shape(rows), key), rows], axis=1)


def _make_dataset(reader, steps):
  """The tf.data graph: steps -> records -> examples -> batches."""
  max_labels = max(source.max_labels for source in reader.sources)

  # AutoGraph would cost seconds of every start, and nothing here needs it.
  @tf.autograph.experimental.do_not_convert
  def read(step):
    records, which, rows = tf.numpy_function(
      reader.read, [step], [tf.string, tf.int64, tf.int64], stateful=False
    )
    for tensor in (records, which, rows):
      tensor.set_shape([None])
    return records, tf.cast(which, tf.int32), _fold(reader.seed, step, rows)

  def parse(source, record):
    encoded, labels = source.parse(record)
    padding = [[0, max_labels - source.max_labels]]
    return encoded, tf.pad(labels, padding, constant_values=-1)

  @tf.autograph.experimental.do_not_convert
  def make_example(record, which, seed):
    parsers = [functools.partial(parse, x, record) for x in reader.sources]
    # A `switch_case` of one would be evaluated for each image all the same.
    encoded, labels = (
      tf.switch_case(which, parsers) if len(parsers) > 1 else parsers[0]()
    )
    return {"image": reader.process(encoded, seed), "labels": labels}

  cpus = count_cpus()
  options = tf.data.Options()
  options.deterministic = True
  # Nothing is left to tune, and the tuner's thread sleeps longer and longer:
  # the end of an iterator may wait for it, 20 seconds after a minute's run.
  options.autotune.enabled = False
  options.threading.private_threadpool_size = cpus
  options.threading.max_intra_op_parallelism = 1
  return (
    tf.data.Dataset.range(steps.start, steps.stop)
    .map(read, num_parallel_calls=2)
    .unbatch()
    .map(make_example, num_parallel_calls=cpus)
    .batch(len(reader.rows))
    .prefetch(2)
    .with_options(options)
  )


# When Python ends, threads of tf.data wait for ever to read in Python, and an
# iterator that is destroyed then waits for them: none may live that long.
_open = weakref.WeakSet()


@atexit.register
def _close_all():
  for batches in list(_open):
    with contextlib.suppress(ValueError):  # a thread is in it
      batches.close()


def _iterate(reader, dataset, steps):
  batches = _generate(reader, dataset, steps)
  _open.add(batches)
  return batches


def _generate(reader, dataset, steps):
  """Yields NumPy batches; names the example that is at fault, if one is."""
  batches = dataset.as_numpy_iterator()
  try:
    for step in steps:
      if not reader.mask(step).any():
        return  # only the last step of an evaluation can be all padding
      try:
        batch = next(batches)
      except BaseException as e:
        traceback.clear_frames(e.__traceback__)  # which keep the iterator
        if isinstance(e, tf.errors.OpError):
          reader.explain(step)
        raise
      if (batch["labels"] == BAD_LABEL).any():
        reader.explain(step)
      yield batch
  finally:
    del batches


def _pad(batches, reader, spec, steps):
  """Adds the mask, and padding in the rows that do not exist."""
  for step in steps:
    mask = reader.mask(step)
    batch = next(batches) if mask.any() else {}
    if not mask.all():
      padded = {
        "image": np.zeros((len(mask), *spec["image"].shape[1:]), np.uint8),
        "labels": np.full((len(mask), *spec["labels"].shape[1:]), -1, np.int32),
      }
      for key, value in batch.items():
        padded[key][mask] = value
      batch = padded
    yield {**batch, "mask": mask}
