"""What a run trains for: its model, objective and evaluation, by name."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from vit_jax import losses, models, steps
from vit_jax.errors import UserError
from vit_jax.evaluators import classification, masked


class Task(NamedTuple):
  """One of the things that a model can learn.

  Attributes:
    model: the model.
    objective: what a training step minimises.
    make_evaluate: (source=, mesh=, batch_size=, preprocess=) -> evaluate, see
      the evaluators.
    main_metric: the result by which checkpoints are compared; more is better.
    class_names: what the model tells apart; none for a model without labels.
  """

  model: models.Model
  objective: steps.Objective
  make_evaluate: Callable
  main_metric: str
  class_names: list[str]


def make_task(config, class_names: list[str], multilabel: bool) -> Task:
  """Returns the task that `config.objective` names.

  Args:
    config: with the keys of configs/common.py.
    class_names: of the training set.
    multilabel: whether its images may have several labels.

  Raises:
    UserError: an unknown objective, or a model or loss that cannot be had.
  """
  models.check_choice("objective", config.objective, tuple(TASKS))
  return TASKS[config.objective](config, class_names, multilabel)


def make_classification(config, class_names, multilabel) -> Task:
  """Naming the classes of an image; see `make_task`."""
  num_classes = len(class_names)
  model = models.create(
    num_classes=num_classes, image_size=config.image_size, **config.model
  )
  loss_fn = losses.get_loss(**config.loss)
  return Task(
    model=model,
    objective=steps.make_classification(
      apply=model.apply,
      loss_fn=loss_fn,
      num_classes=num_classes,
      mixup_alpha=config.train.mixup_alpha,
    ),
    make_evaluate=functools.partial(
      classification.make_evaluate, model=model, loss_fn=loss_fn
    ),
    main_metric="prec@1" if multilabel else "accuracy",
    class_names=class_names,
  )


def make_masked_patches(config, class_names, multilabel) -> Task:
  """Predicting corrupted patches, which takes no labels; see `make_task`."""
  if config.train.mixup_alpha:
    raise UserError(
      f"train.mixup_alpha is {config.train.mixup_alpha}; masked_patches "
      "predicts the pixels of one image, so leave it at 0"
    )
  target = config.masked_target
  model = models.create_masked(
    target=target, image_size=config.image_size, **config.model
  )
  return Task(
    model=model,
    objective=steps.make_masked_patches(
      apply=model.apply,
      patch_size=model.image_size[0] // model.grid[0],
      target=target,
    ),
    make_evaluate=functools.partial(
      masked.make_evaluate, model=model, target=target
    ),
    main_metric="r2" if target == "pixels" else "accuracy",
    class_names=[],
  )


TASKS = {
  "classification": make_classification,
  "masked_patches": make_masked_patches,
}
