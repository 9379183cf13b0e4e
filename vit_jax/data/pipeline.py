"""Batches: the tf.data that reads, decodes and augments the rows of a step.

The pipeline is stateless given the step number: `order.py` says which example
row r of batch k is, and the augmentation is keyed by the step and the row.
"""

# TensorFlow's annotations do not know tf.random.experimental.
# pyright: reportAttributeAccessIssue=false

import atexit
import contextlib
import copy
import functools
import logging
import os
import traceback
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from vit_jax.data import ops
from vit_jax.data.order import ALL, Shuffle, make_order
from vit_jax.data.reading import make_fetcher
from vit_jax.data.source import BAD_LABEL, BadExample, Source, replace_examples
from vit_jax.errors import one_line

log = logging.getLogger(__name__)


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
  on_bad_example: str = "stop",
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
  reader = _Reader(
    *(sources, order, batch_size, rows, process, seed, memory),
    replaces=on_bad_example == "replace",
  )
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
    replaces=False,
    num_positions=None,
  ):
    self.process, self.seed, self.replaces = process, seed, replaces
    self.rows = np.asarray(rows, np.int64)
    self._others: list[dict[int, int]] = [{} for _ in sources]
    self.sources = sources
    if replaces:
      self.sources = [*map(replace_examples, sources, self._others)]
    self._order, self._memory = order, memory
    self.fetcher = make_fetcher(self.sources, order, memory)
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
    for i, example, seed in self._list(step):
      self._check(i, example, seed)

  def replace(self, step) -> bool:
    """Has others shown where examples of a step are at fault, if any are.

    That is the next one which is not, whenever it is found out.

    Raises:
      UserError: an example that cannot be read, or all are at fault.
    """
    before = sum(map(len, self._others))
    for i, example, seed in self._list(step) if self.replaces else ():
      self._replace(i, example, seed)
    return sum(map(len, self._others)) > before

  def renew(self) -> "_Reader":
    """Returns the same without what it holds: that may be what is at fault."""
    renewed = copy.copy(self)
    renewed.fetcher = make_fetcher(self.sources, self._order, self._memory)
    return renewed

  def _replace(self, i, example, seed):
    size, others = self.sources[i].num_examples, self._others[i]
    fault = None
    for other in range(example, example + size):
      try:
        self._check(i, other % size, seed)
      except BadExample as e:
        fault = e
        if other % size not in others:
          log.warning("%s; shown in its place: the next example", e)
      else:
        if other != example:
          others[example] = other % size
        return
    assert fault
    raise fault

  def find_replaced(self, step) -> np.ndarray:
    """int32[b]: 1 for rows with another example than the order says."""
    found = np.zeros(len(self.rows), np.int32)
    if any(self._others):
      which, examples = self._order(self._locate(step)[0])
      for row, (i, example) in enumerate(zip(which, examples, strict=True)):
        found[row] = example in self._others[i]
    return found

  def _list(self, step):
    """Yields (data set, example, seed of its augmentation) of a step."""
    positions, rows = self._locate(step)
    which, examples = self._order(positions)
    seeds = _fold(self.seed, tf.constant(step, tf.int64), tf.constant(rows))
    for i, example, seed in zip(which, examples, seeds, strict=True):
      if example not in self._others[i]:
        yield int(i), int(example), seed

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
      while (batch := _next(reader, batches, step)) is None:
        del batches
        reader.fetcher.close()
        reader = reader.renew()
        rest = _make_dataset(reader, range(step, steps.stop))
        batches = rest.as_numpy_iterator()
      if reader.replaces:
        batch["replaced"] = reader.find_replaced(step)
      yield batch
  finally:
    del batches
    reader.fetcher.close()


def _next(reader, batches, step):
  """Returns the next batch; None if others have to be shown in it."""
  try:
    batch = next(batches)
    if not (batch["labels"] == BAD_LABEL).any():
      return batch
    if not reader.replace(step):
      reader.explain(step)
  except BaseException as e:
    del batches  # no frame may keep the iterator
    traceback.clear_frames(e.__traceback__)
    if not isinstance(e, tf.errors.OpError):
      raise
    if not reader.replace(step):
      reader.explain(step)
      raise
  return None


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
