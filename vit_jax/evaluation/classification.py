"""Top-1 and top-5 on a whole test set, single- or multi-label."""

from collections.abc import Callable, Iterable, Iterator

from vit_jax import data, models
from vit_jax.evaluation.sums import add_up, make_sums
from vit_jax.training import steps


def make_evaluate(
  *,
  model: models.Model,
  loss_fn: Callable,
  source: data.Source,
  mesh,
  batch_size: int,
  preprocess: str,
  before_batch: Callable[[], None] = lambda: None,
) -> Callable:
  """Returns params -> iterator of (name, value) over all of `source`.

  Args:
    model: the model.
    loss_fn: (logits f32[b k], targets f32[b k]) -> f32[b].
    source: the test set; every example counts once, on any number of devices.
    mesh: where to compute.
    batch_size: of the global batch.
    preprocess: evaluation preprocessing.
    before_batch: may raise, to end an evaluation between two batches.

  Raises:
    UserError: the batch size is not divisible, or the preprocessing is random.
  """
  eval_step = steps.make_eval_step(
    apply=model.apply, loss_fn=loss_fn, num_classes=source.num_classes
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
  return lambda params: summarize(sums(params), source.multilabel)


def summarize(
  sums: Iterable[dict], multilabel: bool
) -> Iterator[tuple[str, float]]:
  """Turns the sums of `steps.make_eval_step`, a batch each, into metrics.

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
