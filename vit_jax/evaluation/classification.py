"""Top-1 and top-5 on a whole test set, single- or multi-label."""

from collections.abc import Iterable, Iterator

from vit_jax.evaluation.sums import add_up


def summarize(
  sums: Iterable[dict], multilabel: bool
) -> Iterator[tuple[str, float]]:
  """Turns the sums of `Classification.eval_step`, a batch each, into metrics.

  Yields:
    "examples", all that were seen; then, over those with a label, "loss", the
    mean, and for single-label sets "accuracy" and, of ten classes or more,
    "accuracy@5" (the label is among the five top classes); for multi-label ones
    "labelled", their number, "prec@1" (the top class is one of the labels) and
    "lrap" (label ranking average precision). ImageNet-ReaL has images without.
  """
  totals = add_up(sums)
  labelled = max(totals["labelled"], 1)
  yield "examples", int(totals["examples"])
  yield "loss", float(totals["loss"] / labelled)
  if multilabel:
    yield "labelled", int(totals["labelled"])
    yield "prec@1", float(totals["correct"] / labelled)
    yield "lrap", float(totals["ranking_precision"] / labelled)
  else:
    yield "accuracy", float(totals["correct"] / labelled)
    if "correct@5" in totals:
      yield "accuracy@5", float(totals["correct@5"] / labelled)
