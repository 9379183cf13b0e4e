"""Interface of data sources: index -> record -> (encoded image, labels)."""

import abc
import functools
import hashlib
import json

import numpy as np
import tensorflow as tf

from vit_jax.data import ops
from vit_jax.errors import UserError

_CHECKED_LABELS = 1000  # before a run starts; the others as they are read


class BadExample(UserError):
  """An example whose content is unusable, on any machine."""


class Source(abc.ABC):
  """One split of one data set."""

  dataset: str  # as it was opened, like the split
  split: str
  num_examples: int
  num_classes: int
  class_names: list[str]
  multilabel: bool  # whether an image may have several labels, or none
  max_labels: int  # of one image; 1 for single-label sets
  soft: bool = False  # one label an image: probabilities of its top classes
  num_bytes: int = 0  # of all records; 0: unknown
  remote: bool = False  # in a bucket: high latency, high throughput

  @abc.abstractmethod
  def read(self, indices: np.ndarray) -> list[bytes]:
    """Returns the records of `indices`, int64[b], in one call. Thread-safe.

    In a bucket, neighbours in ascending order cost one request.
    """

  @abc.abstractmethod
  def parse_labels(self, record: tf.Tensor | bytes) -> tf.Tensor:
    """Returns the class ids of a record, int32[any number], unchecked."""

  @abc.abstractmethod
  def parse_image(self, record: tf.Tensor | bytes) -> tf.Tensor:
    """Returns the encoded image of a record, a scalar string."""

  def parse_probabilities(
    self, record: tf.Tensor | bytes, length: int
  ) -> tf.Tensor:
    """Returns the probabilities of a record's labels, 0-padded: f32[length].

    They are all 0 if labels are hard.
    """
    del record
    return tf.zeros([length])

  def identity(self) -> str:
    """Returns text that changes with the examples, but not with the folder."""
    return f"{self.num_examples:,} examples"

  def locate(self) -> list[tuple[str, int, int]]:
    """Returns (file, first, end) of the examples, for `count_shared`."""
    return []

  def parse(
    self, record: tf.Tensor | bytes, length: int | None = None
  ) -> tuple[tf.Tensor, tf.Tensor]:
    """Parses one record that `read` returns, in a graph or eagerly.

    Returns:
      (encoded image: scalar string, labels: int32[length], padded with -1); a
      length of None means `max_labels`.

    Raises:
      tf.errors.OpError: invalid labels; `check_example` names the example.
    """
    labels = self.parse_labels(record)
    usable = tf.reduce_all((labels >= 0) & (labels < self.num_classes))
    count = tf.size(labels)
    several = self.multilabel or self.soft
    usable &= (count <= self.max_labels) & (several | (count == 1))
    tf.debugging.Assert(usable, [labels])
    length = length or self.max_labels
    labels = tf.pad(labels, [[0, length - count]], constant_values=-1)
    return self.parse_image(record), tf.ensure_shape(labels, [length])

  def describe(self, index: int) -> str:
    """Returns the name of an example for messages."""
    return f"example {index} of {self.dataset} {self.split}"

  @functools.cached_property
  def _parse_unchecked(self):
    # Traced once, because TFDS takes milliseconds per record in eager mode.
    return tf.function(
      lambda record: (self.parse_image(record), self.parse_labels(record)),
      input_signature=[tf.TensorSpec([], tf.string)],
    ).get_concrete_function()

  def check_labels(self) -> None:
    """Checks the labels of all examples, or of a sample in a large set.

    Raises:
      UserError: an example has invalid labels; names it.
    """
    count = min(_CHECKED_LABELS, self.num_examples)
    indices = np.arange(count) * self.num_examples // count
    if self.remote:  # one request, instead of one for each
      indices = np.arange(count // 10 + 1)
    records = tf.data.Dataset.from_tensor_slices(self.read(indices))
    labels = records.map(self.parse_labels).ragged_batch(count)
    found = labels.get_single_element().numpy()  # dense or ragged
    for index, labels in zip(indices.tolist(), found, strict=True):
      self._check_labels(index, labels)

  def read_example(self, index: int) -> tuple[bytes, list[int]]:
    """Returns an example's encoded image and its labels, unchecked."""
    record = tf.constant(self.read(np.array([index]))[0])
    encoded, labels = self._parse_unchecked(record)
    return encoded.numpy(), labels.numpy().tolist()

  def check_example(self, index: int) -> tuple[bytes, list[int], np.ndarray]:
    """Returns an example's encoded image, its labels, its pixels uint8[h w 3].

    Raises:
      BadExample: the example is unusable; names it.
      UserError: it cannot be read; names it.
    """
    what = self.describe(index)
    try:
      encoded, labels = self.read_example(index)
    except OSError as e:
      raise UserError(f"{what}: cannot be read: {e.strerror or e}") from e
    self._check_labels(index, labels)
    try:
      pixels = ops.decode(tf.constant(encoded), precise=False).numpy()
    except tf.errors.OpError as e:
      raise BadExample(
        f"{what}: not a readable image; repair or remove it"
      ) from e
    return encoded, labels, pixels

  def _check_labels(self, index, labels):
    what = self.describe(index)
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


def count_shared(source: Source, other: Source) -> int:
  """Returns how many examples of `other` are also in `source`."""
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
