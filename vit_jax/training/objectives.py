"""What a run trains for, by name, and the steps that this comes to."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.evaluation import classification, masked
from vit_jax.state import TrainState
from vit_jax.training import losses, optim, steps


class Task(NamedTuple):
  """One of the things that a model can learn.

  Attributes:
    model: the model.
    objective: what a training step minimises.
    eval_step: what `make_evaluate` computes on the devices.
    make_evaluate: (source=, mesh=, batch_size=, preprocess=) -> evaluate, see
      the evaluators.
    main_metric: the result by which checkpoints are compared; more is better.
    class_names: what the model tells apart; none for a model without labels.
  """

  model: models.Model
  objective: steps.Objective
  eval_step: Callable
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
    eval_step=steps.make_eval_step(
      apply=model.apply, loss_fn=loss_fn, num_classes=num_classes
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
  options = {
    "apply": model.apply,
    "patch_size": model.image_size[0] // model.grid[0],
    "target": target,
  }
  return Task(
    model=model,
    objective=steps.make_masked_patches(**options),
    eval_step=steps.make_masked_eval_step(**options),
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


def build(config, task: Task, total_steps: int):
  """Returns train_step(state, batch) and init_state(key), both pure."""
  schedule = optim.make_schedule(**config.schedule, total_steps=total_steps)
  optimizer = optim.make_optimizer(
    **config.optimizer,
    schedule=schedule,
    base_lr=config.schedule.base_lr,
    params=jax.eval_shape(task.model.init, jax.random.key(0)),
  )
  train_step = steps.make_train_step(
    objective=task.objective,
    optimizer=optimizer,
    schedule=schedule,
    micro_batches=config.micro_batches,
    ema_decay=config.ema_decay,
  )

  def init_state(key):
    init_key, step_key = jax.random.split(key)
    params = task.model.init(init_key)
    ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      ema=ema,
      rng=jax.random.key_data(step_key),
    )

  return train_step, init_state
