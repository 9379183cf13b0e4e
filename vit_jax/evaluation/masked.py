"""How well corrupted patches are predicted, beside the trivial predictor.

The trivial predictor says the same of every patch: the most frequent colour
(its loss is that of the colours' frequencies), or the mean pixels. They are
those of the very patches that are evaluated: no constant does better on them.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from vit_jax.evaluation.sums import add_up


def summarize(sums: Iterable[dict], target: str) -> Iterator[tuple[str, float]]:
  """Turns the sums of `MaskedPatches.eval_step` into metrics.

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
