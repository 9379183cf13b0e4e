"""Evaluation of a whole test set, batch by batch."""

import collections
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax import data, models, sharding
from vit_jax.data import preprocess as preprocessing
from vit_jax.training.inputs import prefetch


def make_sums(
  eval_step: Callable,
  *,
  model: models.Model,
  source: data.Source,
  mesh,
  batch_size: int,
  preprocess: str,
  before_batch: Callable[[], None] = lambda: None,
  start_step: int = 0,
) -> Callable:
  """Returns params -> iterator of the results of each batch.

  Every process gets all results, and every example counts once, on any number
  of devices.

  Args:
    eval_step: (params, batch) -> sums over the examples whose mask is set, or
      values of each. The batch is that of `data.eval_batches` with "index"
      i32[b], the index of each example in the data set.
    model: has the image size.
    source: the data set.
    mesh, batch_size: the devices, and the images at once on all of them.
    preprocess: evaluation preprocessing.
    before_batch: may raise, to end an evaluation between two batches.
    start_step: the first batch.

  Raises:
    UserError: the batch size is not divisible, or the preprocessing is random.
  """
  sharding.check_batch_size(batch_size, mesh)
  # Mistakes are reported now, not at the first evaluation.
  preprocessing.parse(preprocess, model.image_size, evaluation=True)
  step = sharding.on_mesh(mesh, eval_step)
  step = jax.jit(step, out_shardings=NamedSharding(mesh, P()))
  rows = sharding.local_rows(mesh, batch_size)
  options = {"preprocess": preprocess, "image_size": model.image_size}

  def run(params):
    batches = data.eval_batches(
      source,
      batch_size=batch_size,
      rows=rows,
      start_step=start_step,
      **options,
    )
    for i, batch in enumerate(batches, start_step):
      before_batch()
      batch["index"] = (i * batch_size + rows).astype(np.int32)
      yield step(params, sharding.put_batch(mesh, batch, batch_size))

  return run


def add_up(sums: Iterable[dict]) -> dict:
  """Returns {name: f64[...]}, the totals of all batches, 0 for other names."""
  totals: collections.defaultdict = collections.defaultdict(np.float64)
  for batch_sums in fetch(sums):
    for name, x in batch_sums.items():
      totals[name] = totals[name] + np.asarray(x, np.float64)
  return totals


def fetch(results: Iterable) -> Iterator:
  """Yields results on the host, a few batches after they are dispatched."""
  return map(jax.device_get, prefetch(results, sharding.RUN_AHEAD))
