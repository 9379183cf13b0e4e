"""Confusion counts of a test set, and its most confident mistakes."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vit_jax.evaluation.sums import fetch, make_sums
from vit_jax.training import steps


class Mistake(NamedTuple):
  """An image whose predicted class is none of its labels."""

  probability: float  # of the predicted class
  index: int  # of the example in the test set
  labels: list[int]  # class ids
  given: int  # the predicted class id
  label_probability: float  # the highest among its labels
  pixels: Any  # u8[h w 3], preprocessed


class Tally(NamedTuple):
  """Counts over a test set.

  `pairs` counts (label, predicted class) of the labelled images. In a
  multi-label set the label is the predicted class if that is correct, else -1.
  """

  pairs: collections.Counter[tuple[int, int]]
  mistakes: list[Mistake]  # the most confident first

  @property
  def labelled(self) -> int:
    return self.pairs.total()

  @property
  def correct(self) -> int:
    return sum(n for (label, given), n in self.pairs.items() if label == given)


def make_tally(
  *, to_probabilities: Callable, mistakes: int, **where: Any
) -> Callable:
  """Returns params -> `Tally` of a test set.

  Memory does not grow with the test set, because only the counts and the most
  confident mistakes so far are kept.

  Args:
    to_probabilities: logits f32[b k] -> f32[b k].
    mistakes: how many to keep.
    **where: the other arguments of `make_sums`.

  Raises:
    UserError: see `make_sums`.
  """
  model, multilabel = where["model"], where["source"].multilabel

  def evaluate(params, batch):
    logits = model.apply(params, steps.normalize(batch["image"]))
    return {**batch, "probabilities": to_probabilities(logits)}

  batches = make_sums(evaluate, **where)
  return lambda params: _add_up(fetch(batches(params)), multilabel, mistakes)


def _add_up(batches, multilabel, count):
  tally = Tally(collections.Counter(), [])
  for batch in batches:
    labelled = batch["mask"] & (batch["labels"] >= 0).any(-1)
    tops = batch["probabilities"].argmax(-1)
    for i in np.flatnonzero(labelled):
      labels = [x for x in batch["labels"][i].tolist() if x >= 0]
      row, top = batch["probabilities"][i], int(tops[i])
      is_right = top in labels
      label = (top if is_right else -1) if multilabel else labels[0]
      tally.pairs[label, top] += 1
      if not is_right:
        place = int(batch["index"][i])
        others = top, float(row[labels].max()), batch["image"][i]
        tally.mistakes.append(Mistake(float(row[top]), place, labels, *others))
    tally.mistakes.sort(key=lambda m: (-m.probability, m.index))
    # Copied, because a view would keep its whole batch in memory.
    tally.mistakes[:] = [
      m._replace(pixels=m.pixels.copy()) for m in tally.mistakes[:count]
    ]
  return tally
