"""A test set whose labels are those of a model that names more classes."""

import logging

import numpy as np
import tensorflow as tf

from vit_jax.data.source import BAD_LABEL, Source
from vit_jax.errors import UserError

log = logging.getLogger(__name__)


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


def relabel(source: Source, class_names: list[str]) -> Source | None:
  """Returns a source with labels in another order of names; None: no such.

  All its classes have to be among `class_names`, which are all different.
  """
  names = source.class_names
  if names == class_names:
    return source
  if len({*class_names}) < len(class_names) or not {*names} <= {*class_names}:
    return None
  return RelabelledSource(source, class_names)


def match_classes(weights, test, dataset: str) -> Source:
  """Returns a test set with the labels of a head, by the names of the classes.

  The set may lack classes of the head, and have them in another order. Of other
  weights than our runs the names need not be the set's, or are not known; there
  the order is taken to be the same if the number is.

  Args:
    weights: a `pretrained.weights.Weights`.
    test: the test set.
    dataset: its name, for messages.

  Raises:
    UserError: the set has other classes.
  """
  names, known = test.class_names, weights.class_names or []
  relabelled = relabel(test, known)
  if relabelled and relabelled.num_classes == weights.num_classes:
    if relabelled is not test:
      log.info(
        "%s has %d of the %d classes of %s, matched by name",
        *(dataset, len(names), len(known), weights.source),
      )
    return relabelled
  ordered = all(
    names.index(name) == known.index(name) for name in {*names} & {*known}
  )
  # A converted checkpoint has a config.json as well, but was not trained here.
  is_ours = weights.run and "train" in weights.run["config"]
  same_number = test.num_classes == weights.num_classes
  if not same_number or not ordered or is_ours:
    unknown = [name for name in names if name not in known]
    raise UserError(
      f"{dataset} has {test.num_classes} classes and the checkpoint "
      f"{weights.num_classes}, or their names differ"
      f"{f' ({unknown[0]!r} is not among its)' if known and unknown else ''}; "
      "choose another --dataset"
    )
  log.warning(
    "%s does not name its classes as %s does; taken to be in the same order",
    weights.source,
    dataset,
  )
  return test
