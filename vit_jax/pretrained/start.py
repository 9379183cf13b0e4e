"""Initial weights of a run from a checkpoint: `config.init_from`."""

import logging

import jax
import jax.numpy as jnp

from vit_jax import pretrained
from vit_jax.pretrained.warmstart import warm_start
from vit_jax.state import TrainState, flatten, unflatten
from vit_jax.training import lora

log = logging.getLogger(__name__)


def start_from(source: str, state: TrainState, objective, config) -> TrainState:
  """Returns the state with the weights of `source`, and logs a report.

  Args:
    source: what `pretrained.read` takes.
    state: at step 0, on the devices.
    objective: the run's objective; its model and class names are used.
    config: the model's configuration.

  Raises:
    UserError: `source` cannot be read, or has another architecture.
  """
  weights = pretrained.fold_normalization(pretrained.read(source))
  pretrained.check_numerics(weights, config)
  params = flatten(state.params)
  given, changes = warm_start(
    {path: x for path, x in params.items() if not lora.is_update(path)},
    weights.params,
    old_grid=weights.create_model().grid,
    new_grid=objective.model.grid,
    same_classes=weights.class_names == objective.class_names,
    source=weights.source,
    resize=weights.resize,
  )
  log.info("weights from %s\n%s", weights.source, changes)
  for path, lazy in given.items():
    old = params[path]
    new = lazy.read().astype(old.dtype)
    params[path] = jax.make_array_from_callback(
      old.shape, old.sharding, lambda index, new=new: new[index]
    )
  tree = unflatten(params)
  ema = None if state.ema is None else jax.tree.map(jnp.copy, tree)
  return state._replace(params=tree, ema=ema)
