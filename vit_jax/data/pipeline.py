"""The tf.data pipeline that reads, decodes and augments the rows of a step.

It is stateless given the step number: `order.py` maps row r of batch k to an
example, and the augmentation is keyed by the step and the row.
"""

# TensorFlow's annotations lack tf.random.experimental.
# pyright: reportAttributeAccessIssue=false

import atexit
import contextlib
import dataclasses
import functools
import logging
import os
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from vit_jax.data import ops
from vit_jax.data.order import ALL, Shuffle, make_order
from vit_jax.data.reading import Fetcher, make_fetcher
from vit_jax.data.source import BadExample, Source
from vit_jax.errors import one_line

log = logging.getLogger(__name__)


def count_cpus() -> int:
  """Returns the number of cores this process may use, on a Mac of all cores."""
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
  on_bad_example: str = "stop",
  repeats: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this host's rows of the batches of `num_steps` steps.

  Args:
    sources_and_weights: the mixture, of the same classes; weights are relative.
    seed: of the order and, with the step and the row, of all augmentation.
    batch_size: of the global batch.
    rows: int[b], this host's row numbers in the global batch.
    preprocess: the preprocessing string.
    image_size: height and width, pixels.
    start_step: of the first batch; batch k holds the positions
      k * batch_size .. (k + 1) * batch_size - 1 of the stream.
    num_steps: number of batches.
    shuffle, memory, on_bad_example: see `config.train`, `make_order` and
      `make_fetcher`.
    repeats: consecutive copies of each image in a batch, augmented
      independently; divides batch_size. The order is that of batches of
      batch_size / repeats rows.

  Yields:
    {"image": uint8[b h w 3], "labels": int32[b l], padded with -1}; l is the
    largest `max_labels` of the sources. If one of these is soft, also
    "probabilities": f32[b l] of the labels, rows of 0 for hard ones.

  Raises:
    UserError: bad string or weights; while iterating, an example (named) that
      cannot be read, decoded or preprocessed or has labels out of range.
  """
  sources, weights = zip(*sources_and_weights, strict=True)
  seed = int(seed) % 2**63  # the range of SeedSequence and TensorFlow
  sizes = [source.num_examples for source in sources]
  assert batch_size % repeats == 0
  order = make_order(shuffle, seed, sizes, weights, batch_size // repeats)
  process = ops.make_preprocess(preprocess, image_size, evaluation=False)
  fetcher = make_fetcher(sources, order, memory)
  replaces = on_bad_example == "replace"
  reader = _Reader(
    *(sources, order, fetcher, batch_size, rows, process, seed, replaces),
    repeats=repeats,
    soft=any(source.soft for source in sources),
  )
  return _iterate(reader, range(start_step, start_step + num_steps))


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  rows: np.ndarray,
  preprocess: str,
  image_size: int | tuple[int, int],
  start_step: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this host's rows of every example once, in order.

  Every host gets ceil(num_examples / batch_size) batches, less those before
  `start_step`; rows beyond the end are padding: black, labels -1, mask False.
  The label of a soft set is the most probable one.

  Args: as `train_batches`.

  Yields:
    {"image": uint8[b h w 3], "labels": int32[b l], "mask": bool[b]}.

  Raises:
    UserError: as `train_batches`; also a random operation.
  """
  process = ops.make_preprocess(preprocess, image_size, evaluation=True)
  size = source.num_examples

  def order(positions):  # those beyond the end are masked below
    return np.zeros_like(positions), np.minimum(positions, size - 1)

  def mask(step, batch):
    if source.soft:
      batch["labels"] = batch["labels"][:, :1]
    there = step * batch_size + rows < size
    if not there.all():
      images = batch["image"] * there[:, None, None, None]
      labels = np.where(there[:, None], batch["labels"], -1)
      batch = {"image": images, "labels": labels}
    return {**batch, "mask": there}

  fetcher = make_fetcher([source], order)
  reader = _Reader([source], order, fetcher, batch_size, rows, process)
  steps = range(start_step, -(-size // batch_size))
  batches = _iterate(reader, steps)
  pairs = zip(batches, steps, strict=True)
  return (mask(step, batch) for batch, step in pairs)


@dataclasses.dataclass
class _Reader:
  """Reads the records of this host's rows of a step; see `train_batches`."""

  sources: Sequence[Source]
  order: Callable  # maps positions as `Order` does
  fetcher: Fetcher
  batch_size: int
  rows: np.ndarray
  process: Callable
  seed: int = 0
  replaces: bool = False
  repeats: int = 1
  soft: bool = False  # whether batches have probabilities
  # {(data set, example): its replacement}
  _others: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)

  def read(self, step):
    """Returns (record object[b], data set int64[b], replaced int32[b])."""
    positions, copies = np.unique(self._positions(step), return_inverse=True)
    records, which = self.fetcher.fetch(positions)
    records, which = records[copies], which[copies]
    replaced = np.zeros(len(records), np.int32)
    for row, place in enumerate(self._locate(step) if self._others else ()):
      if place in self._others:
        other = np.array([self._others[place]])
        [records[row]] = self.sources[place[0]].read(other)
        replaced[row] = 1
    return records, which, replaced

  def _positions(self, step):
    """Returns int64[b]: of the order, for this host's rows."""
    return (step * self.batch_size + self.rows) // self.repeats

  def _locate(self, step):
    """Returns [(data set, example)] of this host's rows."""
    which, examples = self.order(self._positions(step))
    return [*zip(which.tolist(), examples.tolist(), strict=True)]

  def find_faults(self, step) -> bool:
    """Raises for the first bad example of a step, or replaces all bad ones.

    Returns:
      Whether any was replaced, each by the next usable example.

    Raises:
      UserError: a bad example that is not replaced. Unreadable ones never are,
        nor is any if all are bad.
    """
    before = len(self._others)
    seeds = _fold(self.seed, tf.constant(step, tf.int64), self.rows)
    for place, seed in zip(self._locate(step), seeds, strict=True):
      if place not in self._others:
        other = self._find_sound(*place, seed)
        if other != place[1]:
          self._others[place] = other
    return len(self._others) > before

  def _find_sound(self, i, example, seed):
    """Returns the first usable example from this one on."""
    fault, size = None, self.sources[i].num_examples
    for other in range(example, example + size):
      try:
        self._check(i, other % size, seed)
        return other % size
      except BadExample as e:
        if not self.replaces:
          raise
        log.warning("%s; the next example replaces it", e)
        fault = e
    assert fault
    raise fault

  def _check(self, i, example, seed):
    source = self.sources[i]
    encoded, _, pixels = source.check_example(example)
    try:
      self.process(encoded, seed)
    except tf.errors.OpError as e:
      height, width, _ = pixels.shape
      raise BadExample(
        f"{source.describe(example)}: {width}x{height} pixels cannot be "
        f"preprocessed: {one_line(e)}; remove it or choose another preprocess"
      ) from e


def _fold(seed, step, rows):
  """Returns int64[b 2], the seeds of the augmentations of a step's rows.

  They equal those of folding the step and then the row into the seed. The part
  that is the same for all rows is computed once.
  """
  fold_in = tf.random.experimental.stateless_fold_in
  of_step = fold_in(tf.constant([seed, 0], tf.int64), step)
  key = fold_in(of_step, tf.zeros([], tf.int64))[0]
  return tf.stack([tf.fill(tf.shape(rows), key), rows], axis=1)


def _start(reader, steps):
  """Starts the tf.data graph: steps -> records -> examples -> batches."""
  max_labels = max(source.max_labels for source in reader.sources)

  # AutoGraph is not needed here and would add seconds to every start.
  @tf.autograph.experimental.do_not_convert
  def read(step):
    records, which, replaced = tf.numpy_function(
      reader.read, [step], [tf.string, tf.int64, tf.int32], stateful=False
    )
    for tensor in (records, which, replaced):
      tensor.set_shape(reader.rows.shape)
    seeds = _fold(reader.seed, step, reader.rows)
    return records, tf.cast(which, tf.int32), seeds, replaced

  @tf.autograph.experimental.do_not_convert
  def make_example(record, which, seed, replaced):
    def parse(source):
      parsed = source.parse(record, max_labels)
      if reader.soft:
        parsed += (source.parse_probabilities(record, max_labels),)
      return parsed

    parsers = [functools.partial(parse, source) for source in reader.sources]
    # A `switch_case` of one branch would still be evaluated for each image.
    encoded, labels, *probabilities = (
      tf.switch_case(which, parsers) if len(parsers) > 1 else parsers[0]()
    )
    example = {"image": reader.process(encoded, seed), "labels": labels}
    if reader.soft:
      [example["probabilities"]] = probabilities
    return example | ({"replaced": replaced} if reader.replaces else {})

  cpus = count_cpus()
  options = tf.data.Options()
  options.deterministic = True
  # Nothing is left to tune, and the tuner's thread sleeps longer and longer.
  # Ending an iterator may wait for it, 20 seconds after a minute's run.
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
    .as_numpy_iterator()
  )


# When Python exits, threads of tf.data that call Python hang, and destroying an
# iterator then waits for them. So iterators are closed before.
_open = weakref.WeakSet()


@atexit.register
def _close_all():
  for batches in list(_open):
    with contextlib.suppress(ValueError):  # a thread is using it
      batches.close()


def _iterate(reader, steps):
  batches = _generate(reader, steps)
  _open.add(batches)
  return batches


def _generate(reader, steps) -> Iterator[Any]:
  """Yields NumPy batches; errors name the bad example."""
  batches = _start(reader, steps)
  try:
    for step in steps:
      while (batch := _next(reader, batches, step)) is None:
        del batches
        batches = _start(reader, range(step, steps.stop))
      yield batch
  finally:
    del batches
    reader.fetcher.close()


def _next(reader, batches, step):
  """Returns the next batch, or None if examples in it were replaced."""
  try:
    return next(batches)
  except BaseException as e:
    del batches  # no frame may reference the iterator
    traceback.clear_frames(e.__traceback__)
    if not isinstance(e, tf.errors.OpError) or not reader.find_faults(step):
      raise
  return None
