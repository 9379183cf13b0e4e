"""Which classes a whole test set is taken for, and the worst mistakes."""

import collections
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.evaluation.sums import fetch, make_sums
from vit_jax.training import steps
from vit_jax.training.losses import multi_hot


class Mistake(NamedTuple):
  """An image whose predicted class is none of its labels.

  Attributes:
    probability: of the predicted class.
    index: of the example in the test set.
    labels: its class ids.
    given: the predicted class id.
    label_probability: the highest of its labels.
    pixels: u8[h w 3], as the model got them.
  """

  probability: float
  index: int
  labels: list[int]
  given: int
  label_probability: float
  pixels: Any


class Tally(NamedTuple):
  """Counts over a test set.

  Attributes:
    examples: all there are.
    labelled: those with a label; only they count below.
    pairs: {(label, given): images}; of a multi-label set the label is the given
      class itself where that is among the labels, -1 where it is not.
    mistakes: the most confident ones, the worst first.
  """

  examples: int
  labelled: int
  pairs: collections.Counter[tuple[int, int]]
  mistakes: list[Mistake]

  @property
  def correct(self) -> int:
    return sum(n for (label, given), n in self.pairs.items() if label == given)


def make_tally(
  *, to_probabilities: Callable, mistakes: int, **where: Any
) -> Callable:
  """Returns params -> `Tally` of a test set.

  Memory does not grow with the test set: each batch leaves its counts and its
  most confident mistakes, of which the worst so far are kept.

  Args:
    to_probabilities: logits f32[b k] -> f32[b k].
    mistakes: how many to keep.
    **where: the other arguments of `make_sums`.

  Raises:
    UserError: see `make_sums`.
  """
  model, multilabel = where["model"], where["source"].multilabel
  count = min(mistakes, where["batch_size"])

  def evaluate(params, batch):
    logits = model.apply(params, steps.normalize(batch["image"]))
    return _count(logits, batch, to_probabilities, count)

  batches = make_sums(evaluate, **where)
  return lambda params: _add_up(batches(params), multilabel, mistakes)


def _count(logits, batch, to_probabilities, count):
  """Returns what is to be known of a batch, and its `count` worst mistakes."""
  labels = batch["labels"]
  targets = multi_hot(labels, logits.shape[-1])
  top = jnp.argmax(logits, -1)
  labelled = batch["mask"] & (targets.sum(-1) > 0)
  correct = jnp.take_along_axis(targets, top[:, None], 1)[:, 0] > 0
  probabilities = to_probabilities(logits)
  confidence = jnp.take_along_axis(probabilities, top[:, None], 1)[:, 0]
  of_labels = jnp.max(jnp.where(targets > 0, probabilities, 0), -1)
  wrong = jnp.where(labelled & ~correct, confidence, -1)
  _, worst = jax.lax.top_k(wrong, count)
  each = (wrong, batch["index"], labels, top, of_labels, batch["image"])
  return {
    "mask": batch["mask"],
    "labelled": labelled,
    "label": labels[:, 0],
    "top": top,
    "correct": correct,
    "worst": [x[worst] for x in each],
  }


def _add_up(batches: Iterable[dict], multilabel: bool, count: int) -> Tally:
  examples = labelled = 0
  pairs = collections.Counter()
  kept: list[Mistake] = []
  for batch in fetch(batches):
    examples += int(batch["mask"].sum())
    mine = batch["labelled"]
    labelled += int(mine.sum())
    top, correct = batch["top"][mine], batch["correct"][mine]
    label = np.where(correct, top, -1) if multilabel else batch["label"][mine]
    pairs.update(zip(label.tolist(), top.tolist(), strict=True))
    worst = map(Mistake._make, zip(*batch["worst"], strict=True))
    kept += [mistake for mistake in worst if mistake.probability >= 0]
    kept = sorted(kept, key=lambda m: (-m.probability, m.index))[:count]
  mistakes = [m._replace(labels=[x for x in m.labels if x >= 0]) for m in kept]
  return Tally(examples, labelled, pairs, mistakes)
