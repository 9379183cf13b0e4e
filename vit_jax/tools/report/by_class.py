"""What of a whole test set was taken for what, and the worst mistakes."""

import collections
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import data, models
from vit_jax.evaluation.sums import fetch, make_sums
from vit_jax.training import steps
from vit_jax.training.losses import multi_hot


class Mistake(NamedTuple):
  """An image whose top class is none of its labels.

  Attributes:
    index: of the example in the test set.
    labels: its class ids.
    given: the class id that the model gave.
    probability: of that.
    label_probability: the highest of its labels.
    pixels: u8[h w 3], as the model got them.
  """

  index: int
  labels: list[int]
  given: int
  probability: float
  label_probability: float
  pixels: np.ndarray


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
  *,
  model: models.Model,
  to_probabilities: Callable,
  source: data.Source,
  mesh,
  batch_size: int,
  preprocess: str,
  mistakes: int,
) -> Callable:
  """Returns params -> `Tally` of all of `source`.

  Memory does not grow with the test set: each batch leaves its counts and its
  most confident mistakes, of which the worst so far are kept.

  Args:
    model: the model.
    to_probabilities: logits f32[b k] -> f32[b k].
    source: the test set; every example counts once, on any number of devices.
    mesh: where to compute.
    batch_size: of the global batch.
    preprocess: evaluation preprocessing.
    mistakes: how many to keep.

  Raises:
    UserError: the batch size is not divisible, or the preprocessing is random.
  """

  def look(params, batch):
    logits = model.apply(params, steps.normalize(batch["image"]))
    return _look(logits, batch, to_probabilities, min(mistakes, batch_size))

  batches = make_sums(
    look,
    model=model,
    source=source,
    mesh=mesh,
    batch_size=batch_size,
    preprocess=preprocess,
  )
  return lambda params: _add_up(batches(params), source.multilabel, mistakes)


def _look(logits, batch, to_probabilities, count):
  """Returns what is to be known of a batch, a few arrays."""
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
  each = (
    wrong,
    batch["index"],
    labels,
    top,
    of_labels,
    batch["image"],
  )
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
    worst = zip(*batch["worst"], strict=True)
    kept += [_make_mistake(*row) for row in worst if row[0] >= 0]
    kept = sorted(kept, key=lambda m: (-m.probability, m.index))[:count]
  return Tally(examples, labelled, pairs, kept)


def _make_mistake(probability, index, labels, given, of_labels, pixels):
  return Mistake(
    index=int(index),
    labels=[int(label) for label in labels if label >= 0],
    given=int(given),
    probability=float(probability),
    label_probability=float(of_labels),
    pixels=np.array(pixels),  # a copy: the batch's own array may go
  )
