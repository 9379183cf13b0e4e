"""Sources: index -> bytes -> (encoded image, labels), whatever the format."""

import abc
import copy
import functools
import hashlib
import json

import numpy as np
import tensorflow as tf

from vit_jax.data import ops
from vit_jax.errors import UserError

BAD_LABEL = -2


class BadExample(UserError):
  """An example that no training can use, wherever it is read."""


_CHECKED_LABELS = 1000  # before a run starts; the others as they are read


class Source(abc.ABC):
  """One split of one data set."""

  dataset: str  # as it was opened, like the split
  split: str
  num_examples: int
  num_classes: int
  class_names: list[str]
  multilabel: bool  # whether an image may have several labels, or none
  max_labels: int  # of one image; 1 for single-label sets
  num_bytes: int = 0  # of all records; 0: unknown
  remote: bool = False  # in a bucket: slow to answer, quick to deliver

  @abc.abstractmethod
  def read(self, indices: np.ndarray) -> list[bytes]:
    """Returns the records of `indices`, int64[b], in one call. Thread-safe.

    Neighbours in a bucket, in rising order, cost one request.
    """

  @abc.abstractmethod
  def parse_labels(self, record: tf.Tensor | bytes) -> tf.Tensor:
    """Returns the class ids of a record, int32[any number], unchecked."""

  @abc.abstractmethod
  def parse_image(self, record: tf.Tensor | bytes) -> tf.Tensor:
    """Returns the encoded image of a record, a scalar string."""

  def identity(self) -> str:
    """Returns text that changes when the examples do; not with the folder."""
    return f"{self.num_examples:,} examples"

  def locate(self) -> list[tuple[str, int, int]]:
    """Returns (file, first, end) of the examples, for `count_shared`."""
    return []

  def parse(self, record: tf.Tensor | bytes) -> tuple[tf.Tensor, tf.Tensor]:
    """Parses one record that `read` returns, in a graph or eagerly.

    Returns:
      (encoded image: scalar string, labels: int32[max_labels]), padded with -1.
      Invalid labels are all BAD_LABEL; `check_example` raises their error,
      because it knows which example it is.
    """
    labels = self.parse_labels(record)
    usable = tf.reduce_all((labels >= 0) & (labels < self.num_classes))
    usable &= tf.size(labels) <= self.max_labels
    if not self.multilabel:
      usable &= tf.size(labels) == 1
    labels = labels[: self.max_labels]
    padding = [[0, self.max_labels - tf.size(labels)]]
    padded = tf.pad(labels, padding, constant_values=-1)
    bad = tf.fill([self.max_labels], BAD_LABEL)
    labels = tf.ensure_shape(tf.where(usable, padded, bad), [self.max_labels])
    return self.parse_image(record), labels

  def describe(self, index: int) -> str:
    """Returns the name of an example for messages."""
    return f"example {index} of {self.dataset} {self.split}"

  @functools.cached_property
  def _parse_unchecked(self):
    # Traced once: outside a graph, TFDS takes milliseconds for a record.
    return tf.function(
      lambda record: (self.parse_image(record), self.parse_labels(record)),
      input_signature=[tf.TensorSpec([], tf.string)],
    ).get_concrete_function()

  def check_labels(self) -> None:
    """Checks the labels of all examples, or of many in a large set.

    Raises:
      UserError: an example's labels cannot be used; names it.
    """
    count = min(_CHECKED_LABELS, self.num_examples)
    indices = np.arange(count) * self.num_examples // count
    if self.remote:  # each would be a request, and these are one
      indices = np.arange(count // 10 + 1)
    records = tf.data.Dataset.from_tensor_slices(self.read(indices))
    labels = records.map(lambda record: self.parse(record)[1]).batch(2**10)
    bad = (labels.get_single_element() == BAD_LABEL).numpy().any(axis=1)
    if bad.any():
      self.check_example(int(indices[bad.argmax()]))

  def read_example(self, index: int) -> tuple[bytes, list[int]]:
    """Returns an example's encoded image and its labels, unchecked."""
    record = tf.constant(self.read(np.array([index]))[0])
    encoded, labels = self._parse_unchecked(record)
    return encoded.numpy(), labels.numpy().tolist()

  def check_example(self, index: int) -> tuple[bytes, list[int], np.ndarray]:
    """Returns an example's encoded image, its labels, its pixels uint8[h w 3].

    Raises:
      BadExample: it cannot be used; names the example.
      UserError: it cannot be read; likewise.
    """
    what = self.describe(index)
    try:
      encoded, labels = self.read_example(index)
    except OSError as e:
      raise UserError(f"{what}: cannot be read: {e.strerror or e}") from e
    for label in labels:
      if not 0 <= label < self.num_classes:
        hint = "; the split has no labels" if label == -1 else ""
        raise BadExample(
          f"{what}: label {label} is out of range, {self.num_classes} classes "
          f"have labels 0 to {self.num_classes - 1}{hint}; choose another "
          "split or repair the set"
        )
    if len(labels) > self.max_labels:
      raise BadExample(
        f"{what}: {len(labels)} labels, but the data set declares at most "
        f"{self.max_labels}; prepare it again"
      )
    try:
      pixels = ops.decode(tf.constant(encoded), precise=False).numpy()
    except tf.errors.OpError as e:
      raise BadExample(
        f"{what}: not a readable image; repair or remove it"
      ) from e
    return encoded, labels, pixels


def replace_examples(source: Source, others: dict[int, int]) -> Source:
  """Returns a source that reads other examples in the place of some.

  Args:
    source: the data set.
    others: {example: the one in its place}, which may grow.
  """

  def read(indices):
    records = source.read(indices)
    for i, example in enumerate(np.asarray(indices).tolist()):
      if example in others:
        [records[i]] = source.read(np.array([others[example]]))
    return records

  found = copy.copy(source)
  found.read = read
  return found


def count_shared(source: Source, other: Source) -> int:
  """Returns how many examples of `other` are examples of `source` as well."""
  ranges: dict[str, list[tuple[int, int]]] = {}
  for file, first, end in source.locate():
    ranges.setdefault(file, []).append((first, end))
  return sum(
    max(0, min(end, other_end) - max(first, other_first))
    for file, other_first, other_end in other.locate()
    for first, end in ranges.get(file, ())
  )


def digest(values) -> str:
  """Returns sixteen hexadecimal digits that change with any of the values."""
  text = json.dumps(values)
  return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
