"""Top-1 on a whole test set, single- or multi-label."""

import collections
from collections.abc import Callable, Iterable, Iterator

import jax

from vit_jax import data, models, sharding, steps
from vit_jax import preprocess as preprocessing

# How many batches the host runs ahead of the devices.
RUN_AHEAD = 4


def make_evaluate(
  *,
  model: models.Model,
  loss_fn: Callable,
  source: data.Source,
  mesh,
  batch_size: int,
  preprocess: str,
) -> Callable:
  """Returns params -> iterator of (name, value) over all of `source`.

  Args:
    model: the model.
    loss_fn: (logits f32[b k], targets f32[b k]) -> f32[b].
    source: the test set; every example counts once, on any number of devices.
    mesh: where to compute.
    batch_size: of the global batch.
    preprocess: evaluation preprocessing.

  Raises:
    UserError: the batch size is not divisible, or the preprocessing is random.
  """
  sharding.check_batch_size(batch_size, mesh)
  # A mistake shows now, not at the first evaluation.
  preprocessing.parse(preprocess, model.image_size, evaluation=True)
  eval_step = jax.jit(
    steps.make_eval_step(
      apply=model.apply, loss_fn=loss_fn, num_classes=source.num_classes
    )
  )

  def batches():
    host_batches = data.eval_batches(
      source,
      batch_size=batch_size,
      rows=sharding.local_rows(mesh, batch_size),
      preprocess=preprocess,
      image_size=model.image_size,
    )
    for batch in host_batches:
      yield sharding.put_batch(mesh, batch, batch_size)

  def evaluate(params):
    sums = (eval_step(params, batch) for batch in batches())
    return summarize(sums, source.multilabel)

  return evaluate


def summarize(
  sums: Iterable[dict], multilabel: bool
) -> Iterator[tuple[str, float]]:
  """Turns the sums of `steps.make_eval_step`, a batch each, into metrics.

  Yields:
    "examples"; "loss", the mean; then, over the images with a label, for
    single-label sets "accuracy", for multi-label ones "prec@1" (the top class
    is one of the labels) and "lrap" (label ranking average precision).
  """
  totals: collections.Counter = collections.Counter()
  running = collections.deque()

  def collect():
    # Added up on the host in float64: exact for counts of any size.
    values = jax.device_get(running.popleft())
    totals.update({name: float(x) for name, x in values.items()})

  for batch_sums in sums:
    running.append(batch_sums)
    if len(running) > RUN_AHEAD:
      collect()
  while running:
    collect()
  labelled = max(totals["labelled"], 1)
  yield "examples", int(totals["examples"])
  yield "loss", totals["loss"] / max(totals["examples"], 1)
  if multilabel:
    yield "prec@1", totals["correct"] / labelled
    yield "lrap", totals["ranking_precision"] / labelled
  else:
    yield "accuracy", totals["correct"] / labelled
