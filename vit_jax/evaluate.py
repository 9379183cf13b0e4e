"""The `evaluate` command: the whole test set through saved weights."""

from typing import Any

import ml_collections

from vit_jax import checkpoint, data, losses, models, sharding
from vit_jax.errors import UserError
from vit_jax.evaluators import classification
from vit_jax.state import unflatten


def evaluate(
  source: str,
  *,
  dataset: str | None = None,
  split: str | None = None,
  data_dir: str | None = None,
) -> dict[str, Any]:
  """Evaluates a checkpoint.

  Args:
    source: a run folder (its best checkpoint if it kept one, else its newest)
      or one of its checkpoints.
    dataset: another data set than the run's own; with the same classes.
    split: another split than the run's own.
    data_dir: where the TFDS data sets are, if not where they were.

  Returns:
    {"checkpoint", "dataset", "split", "examples", "loss", ...metrics}.

  Raises:
    UserError: no checkpoint, no data, or other classes.
  """
  weights = checkpoint.load_weights(source)
  config: Any = ml_collections.ConfigDict(weights.run["config"])
  class_names = weights.run["class_names"]
  first_training_set = data.parse_mixture(config.train.dataset)[0][0]
  dataset = str(dataset or config.eval.dataset or first_training_set)
  split = str(split or config.eval.split)
  test = data.get_source(dataset, split, data_dir or config.data_dir)
  if test.class_names != class_names:
    raise UserError(
      f"{dataset} has {test.num_classes} classes and the checkpoint "
      f"{len(class_names)}, or their names differ; choose another --dataset"
    )
  mesh = sharding.make_mesh()
  model = models.create(
    num_classes=len(class_names), image_size=config.image_size, **config.model
  )
  run = classification.make_evaluate(
    model=model,
    loss_fn=losses.get_loss(**config.loss),
    source=test,
    mesh=mesh,
    batch_size=round_up(config.eval.batch_size or config.batch_size, mesh.size),
    preprocess=config.eval.preprocess,
  )
  params = sharding.replicate(mesh, unflatten(weights.params))
  return {
    "checkpoint": str(weights.source),
    "dataset": dataset,
    "split": split,
    **dict(run(params)),
  }


def round_up(batch_size: int, devices: int) -> int:
  """Returns the batch size that these devices can share; results are equal."""
  return -(-batch_size // devices) * devices
