"""Class names: matching of data sets, and labels in another order."""

import copy
import logging
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from vit_jax.data.source import Source
from vit_jax.errors import UserError

log = logging.getLogger(__name__)


def relabel(source: Source, class_names: list[str]) -> Source | None:
  """Returns a source with labels in the order of `class_names`.

  Classes that only `class_names` has never occur; predicting one is an error.
  Returns None if the source has no class names, or if `class_names` has
  duplicates or lacks a class of the source.
  """
  names = source.class_names
  if names == class_names:
    return source
  unique = len({*class_names}) == len(class_names)
  if not names or not unique or not {*names} <= {*class_names}:
    return None
  new = [class_names.index(name) for name in names]
  # Both ends keep invalid labels of the source out of range.
  table = np.array([-1, *new, len(class_names)], np.int32)

  def parse_labels(record):
    labels = source.parse_labels(record)
    return tf.gather(table, tf.clip_by_value(labels + 1, 0, len(table) - 1))

  found = copy.copy(source)
  vars(found).pop("_parse_unchecked", None)  # traced with the old labels
  found.class_names, found.num_classes = class_names, len(class_names)
  found.parse_labels = parse_labels
  return found


def allow_unlabelled(source: Source, class_names: list[str]) -> Source:
  """Returns a source that has only labels of `class_names`.

  They are those of `relabel`, or none if it returns None. A missing label, -1
  in test sets, is not an error.
  """
  relabelled = relabel(source, class_names)
  parse = (relabelled or source).parse_labels

  def parse_labels(record):
    labels = parse(record) if relabelled else tf.zeros([0], tf.int32)
    return labels[(labels >= 0) & (labels < len(class_names))]

  found = copy.copy(relabelled or source)
  vars(found).pop("_parse_unchecked", None)
  found.multilabel, found.parse_labels = True, parse_labels
  return found


def check_mixture(sources: Sequence[Source]) -> None:
  """Raises a UserError unless all sources have the same classes, in order."""
  first, *others = sources
  for source in others:
    if source.class_names != first.class_names:
      raise class_error(
        source,
        first.class_names,
        first.num_classes,
        repr(first.dataset),
        "a mixture needs the same classes in the same order",
      )


def class_error(
  source: Source, known: Sequence[str], count: int, owner: str, advice: str
) -> UserError:
  """Returns the error for a source whose classes do not match.

  Args:
    source: the data set at fault.
    known: the expected class names, if there are any.
    count: the expected number of classes.
    owner: what has the expected classes, for the message.
    advice: what to do.
  """
  names = source.class_names
  unknown = [repr(name) for name in names if known and name not in known]
  why = f"; {owner} has no {', '.join(unknown[:3])}" if unknown else ""
  if sorted(names) == sorted(known):
    why = ", in another order"
  return UserError(
    f"{source.dataset!r} has {len(names):,} classes, {owner} {count:,}{why}; "
    f"{advice}"
  )


def match_classes(weights, test: Source) -> Source:
  """Returns a test set with the labels of a head, matched by class names.

  The set may lack classes of the head, or have them in another order. Weights
  that were not trained here may have other class names or none; then the same
  number of classes is taken to mean the same order.

  Args:
    weights: a `pretrained.weights.Weights`.
    test: the test set.

  Raises:
    UserError: the set has other classes.
  """
  names, known = test.class_names, weights.class_names or []
  relabelled = relabel(test, known)
  if relabelled and relabelled.num_classes == weights.num_classes:
    if relabelled is not test:
      log.info(
        "%s has %d of the %d classes of %s, matched by name",
        *(test.dataset, len(names), len(known), weights.source),
      )
    return relabelled
  ordered = all(
    names.index(name) == known.index(name) for name in {*names} & {*known}
  )
  # A converted checkpoint has a config.json as well, but was not trained here.
  is_ours = weights.run and "train" in weights.run["config"]
  if test.num_classes != weights.num_classes or not ordered or is_ours:
    raise class_error(
      test,
      known,
      weights.num_classes,
      "the checkpoint",
      "choose another --dataset",
    )
  log.warning(
    "the classes of %s and %s do not match by name; taken to be in the same "
    "order",
    weights.source,
    test.dataset,
  )
  return test
