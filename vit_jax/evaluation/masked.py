"""How well corrupted patches are predicted, beside the trivial predictor.

The trivial predictor says the same of every patch: the most frequent colour
(its loss is that of the colours' frequencies), or the mean pixels. They are
those of the very patches that are evaluated: no constant does better on them.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vit_jax import data, models
from vit_jax.evaluation.sums import add_up, make_sums
from vit_jax.training import steps


def make_evaluate(
  *,
  model: models.Model,
  target: str,
  source: data.Source,
  mesh,
  batch_size: int,
  preprocess: str,
  before_batch: Callable[[], None] = lambda: None,
) -> Callable:
  """Returns params -> iterator of (name, value) over all of `source`.

  Which patches of an image are corrupted, and how, depends on its place in the
  data set alone: the same on any number of devices, in every evaluation.

  Args:
    model: from `models.create_masked`.
    target: one of `masking.TARGETS`.
    source: the test set; its labels do not matter.
    mesh: where to compute.
    batch_size: of the global batch.
    preprocess: evaluation preprocessing.
    before_batch: may raise, to end an evaluation between two batches.

  Raises:
    UserError: the batch size is not divisible, or the preprocessing is random.
  """
  eval_step = steps.make_masked_eval_step(
    apply=model.apply,
    patch_size=model.image_size[0] // model.grid[0],
    target=target,
  )
  sums = make_sums(
    eval_step,
    model=model,
    source=source,
    mesh=mesh,
    batch_size=batch_size,
    preprocess=preprocess,
    before_batch=before_batch,
  )
  return lambda params: summarize(sums(params), target)


def summarize(sums: Iterable[dict], target: str) -> Iterator[tuple[str, float]]:
  """Turns the sums of `steps.make_masked_eval_step` into metrics.

  Yields:
    "examples" and "loss", the mean over the corrupted patches. Colours:
    "accuracy", the share of the predictions (one a cell) that name the right
    one of 512; pixels: "r2", the share of their variance that is explained.
    Then "trivial_loss" and, for colours, "trivial_accuracy".
  """
  totals = add_up(sums)
  examples = max(totals["examples"], 1)
  loss = totals["loss"] / examples
  yield "examples", int(totals["examples"])
  yield "loss", float(loss)
  if target == "pixels":
    patches = totals["patches"]
    mean = totals["sum"] / patches
    trivial_loss = np.mean(totals["squares"] / patches - mean**2)
    yield "r2", float(1 - loss / trivial_loss)
    yield "trivial_loss", float(trivial_loss)
    return
  # f64[cells 512]: each cell has a constant of its own.
  counts = totals["colours"]
  frequency = counts / counts.sum(-1, keepdims=True)
  nats = -np.log(np.maximum(frequency, 1e-300))
  yield "accuracy", float(totals["correct"] / counts.sum())
  yield "trivial_loss", float((counts * nats).sum() / counts.sum())
  yield "trivial_accuracy", float(counts.max(-1).sum() / counts.sum())
