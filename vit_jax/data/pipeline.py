"""Batches: the tf.data that reads, decodes and augments the rows of a step.

The pipeline is stateless given the step number: `order.py` says which example
row r of batch k is, and the augmentation is keyed by the step and the row.
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
from vit_jax.data.order import ALL, Shuffle, make_order
from vit_jax.data.reading import make_fetcher
from vit_jax.data.source import BAD_LABEL, Source
from vit_jax.errors import UserError, one_line


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
  shuffle: Shuffle = ALL,
  memory: int = 0,
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
  sizes = [source.num_examples for source in sources]
  order = make_order(shuffle, seed, sizes, weights, batch_size)
  process = ops.make_preprocess(preprocess, image_size, evaluation=False)
  reader = _Reader(sources, order, batch_size, rows, process, seed, memory)
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
    self,
    sources,
    order,
    batch_size,
    rows,
    process,
    seed=0,
    memory=0,
    num_positions=None,
  ):
    self.sources, self.process, self.seed = sources, process, seed
    self.rows = np.asarray(rows, np.int64)
    self.fetcher = make_fetcher(sources, order, memory)
    self._order = order
    self._batch_size = batch_size
    self._num_positions = num_positions

  def mask(self, step) -> np.ndarray:
    """bool[b]: which rows exist; all, while training."""
    if self._num_positions is None:
      return np.ones(len(self.rows), bool)
    return step * self._batch_size + self.rows < self._num_positions

  def _locate(self, step):
    """Returns int64[b'] each: positions in the stream, rows that exist."""
    rows = self.rows[self.mask(step)]
    return step * self._batch_size + rows, rows

  def read(self, step):
    """Returns (record object[b'], data set int64[b'], row int64[b'])."""
    positions, rows = self._locate(int(step))
    return *self.fetcher.fetch(positions), rows

  def explain(self, step) -> None:
    """Raises a UserError for the first example of a step that is at fault."""
    positions, rows = self._locate(step)
    which, examples = self._order(positions)
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
    .map(read, num_parallel_calls=reader.fetcher.parallel)
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
    reader.fetcher.close()


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
