"""The `evaluate` command: metrics of saved weights on a test set."""

from typing import Any

import ml_collections

from vit_jax import config as configuration
from vit_jax import data, pretrained, sharding
from vit_jax.data.relabelled import match_classes
from vit_jax.errors import UserError
from vit_jax.evaluation import devices
from vit_jax.evaluation.evaluators import make_evaluate
from vit_jax.state import unflatten
from vit_jax.training import losses, objectives
from vit_jax.training.objectives import Classification

# Default for weights without a training configuration.
_BATCH_SIZE = 64


def evaluate(
  source: str,
  *,
  dataset: str | None = None,
  split: str | None = None,
  data_dir: str | None = None,
  batch_size: int | None = None,
) -> dict[str, Any]:
  """Evaluates a checkpoint.

  Args:
    source: whatever `vit_jax.load` reads; of a run folder its best checkpoint
      if it kept one, else its newest.
    dataset: the data set, see `match_classes`; unset: the run's own. Weights
      that are not a run folder need it.
    split: as `dataset`.
    data_dir: where the TFDS data sets are; unset: the run's own.
    batch_size: images at once, on all devices; rounded up to a multiple of
      these. Unset: the run's, or 64.

  Returns:
    {"checkpoint", "dataset", "split", "image_size", "preprocess", "examples",
    "loss", ...metrics}.

  Raises:
    UserError: no checkpoint, no data, other classes, or no batch size.
  """
  weights = pretrained.fold_normalization(pretrained.read(source))
  config = _training_config(weights)
  if config:
    dataset = dataset or configuration.find_test_set(config)
    split = split or config.eval.split
    data_dir = data_dir or config.data_dir
  if not dataset or not split:
    raise UserError(
      f"{weights.source} does not name its data; give --dataset=NAME and "
      "--split=test"
    )
  test = data.get_source(dataset, split, data_dir)
  if config:
    objective = objectives.create(config, weights.class_names or [])
    usual = config.eval.batch_size or config.batch_size
    if objective.class_names:
      test = match_classes(weights, test)
  else:
    test = match_classes(weights, test)
    objective = Classification(
      model=weights.create_model(),
      class_names=test.class_names,
      loss_fn=losses.get_loss(name=weights.loss),
    )
    usual = _BATCH_SIZE
  mesh = sharding.make_mesh()
  chosen = usual if batch_size is None else batch_size
  run = make_evaluate(
    objective,
    test,
    mesh=mesh,
    batch_size=devices.round_up(chosen, mesh),
    preprocess=weights.preprocess,
  )
  params = {path: x.read() for path, x in weights.params.items()}
  return {
    "checkpoint": weights.source,
    "dataset": dataset,
    "split": split,
    "image_size": list(weights.image_size),
    "preprocess": weights.preprocess,
    **dict(run(devices.replicate(mesh, unflatten(params)))),
  }


def _training_config(weights) -> Any:
  """Returns the configuration that weights were trained with, or None.

  A converted checkpoint has a config.json as well, but no training in it.
  """
  if not weights.run or "train" not in weights.run["config"]:
    return None
  return ml_collections.ConfigDict(weights.run["config"])
