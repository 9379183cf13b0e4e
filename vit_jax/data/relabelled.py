"""A test set whose labels are those of a model that names more classes."""

import numpy as np
import tensorflow as tf

from vit_jax.data.source import BAD_LABEL, Source


class RelabelledSource(Source):
  """A source with its labels in the order of other class names.

  Classes that only the model has never occur, and giving them is wrong.
  """

  def __init__(self, source: Source, class_names: list[str]):
    """Takes a source all of whose classes are among `class_names`."""
    self._source = source
    self.dataset, self.split = source.dataset, source.split
    self.num_examples = source.num_examples
    self.multilabel, self.max_labels = source.multilabel, source.max_labels
    self.class_names, self.num_classes = class_names, len(class_names)
    new = [class_names.index(name) for name in source.class_names]
    # Labels that the source should not have stay unusable: one place at each
    # end.
    self._new = np.array([BAD_LABEL, *new, BAD_LABEL], np.int32)

  def identity(self):
    return self._source.identity()

  def describe(self, index):
    return self._source.describe(index)

  def read(self, indices):
    return self._source.read(indices)

  def parse_image(self, record):
    return self._source.parse_image(record)

  def parse_labels(self, record):
    labels = self._source.parse_labels(record)
    places = tf.clip_by_value(labels + 1, 0, len(self._new) - 1)
    return tf.gather(self._new, places)
