"""Checks of a configuration that need no data, and so take seconds.

This module does not import TensorFlow. A run repeats the checks, with others.
"""

import contextlib
import os
import re
from pathlib import Path

from vit_jax import config as configuration
from vit_jax import files, models
from vit_jax.data import preprocess
from vit_jax.errors import UserError, check_choice
from vit_jax.models import variants
from vit_jax.training import losses, optim

# Metrics of the evaluators, except counts and few-shot accuracies.
METRICS = (
  *("accuracy", "accuracy@5", "prec@1", "lrap", "loss"),
  *("r2", "trivial_loss", "trivial_accuracy"),
)


def check(config) -> None:
  """Raises a UserError for a configuration that is invalid with any data."""
  configuration.check_ranges(config)
  if config.objective == "masked_patches":
    models.create_masked(
      target=config.masked_target, image_size=config.image_size, **config.model
    )
  else:
    models.create(num_classes=1, image_size=config.image_size, **config.model)
    losses.get_loss(**config.loss)
  preprocess.parse(config.train.preprocess, config.image_size)
  for e in configuration.list_evals(config):
    preprocess.parse(e.preprocess, config.image_size, evaluation=True)
  if config.total_steps > 0:
    optim.make_schedule(**config.schedule, total_steps=config.total_steps)
  if config.init_from:
    _check_architecture(config.init_from, config.model.variant)


def _check_architecture(source, variant):
  """Raises a UserError unless local weights are of a variant."""
  if not os.path.exists(source):
    return
  found = _read_variant(Path(source))
  if not found:
    from vit_jax import pretrained  # takes a second

    found = pretrained.read(source).model["variant"]
  if variants.parse(found) != variants.parse(variant):
    raise UserError(
      f"{source} holds another architecture: {found} there and {variant} here; "
      "set config.model as in that run"
    )


def _read_variant(path) -> str | None:
  """Returns the variant of a run or of one of its checkpoints, else None."""
  run = path.absolute().parent.parent if path.name.isdigit() else path
  with contextlib.suppress(UserError, KeyError):
    return files.read_run(run)["config"]["model"]["variant"]
  return None


def check_select(name: str | None) -> None:
  """Raises a UserError for a [NAME/]METRIC that no evaluator yields."""
  if name and not re.fullmatch(r".+/\d+shot", name):
    check_choice("--select", name.rpartition("/")[2], METRICS)
