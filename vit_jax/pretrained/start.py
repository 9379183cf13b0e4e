"""Initial weights of a run from a checkpoint: `config.init_from`."""

import logging

import jax
import jax.numpy as jnp

from vit_jax import pretrained
from vit_jax.pretrained.warmstart import warm_start
from vit_jax.state import TrainState, flatten, unflatten
from vit_jax.training import lora

log = logging.getLogger(__name__)


def start_from(
  source: str, init_state, key, layout: TrainState, objective, config
) -> TrainState:
  """Returns a state with the weights of `source`, and logs a report.

  Only the other parameters are drawn, because compiling random numbers takes
  long.

  Args:
    source: what `pretrained.read` takes.
    init_state: key -> the state at step 0 without them.
    key: its argument.
    layout: its shardings.
    objective: the run's objective; its model and class names are used.
    config: the model's configuration.

  Raises:
    UserError: `source` cannot be read, or has another architecture.
  """
  weights = pretrained.fold_normalization(pretrained.read(source))
  pretrained.check_numerics(weights, config)
  shapes = flatten(jax.eval_shape(init_state, key).params)
  given, changes = warm_start(
    {path: x for path, x in shapes.items() if not lora.is_update(path)},
    weights.params,
    old_grid=weights.create_model().grid,
    new_grid=objective.model.grid,
    same_classes=weights.class_names == objective.class_names,
    source=weights.source,
    resize=weights.resize,
  )
  log.info("weights from %s\n%s", weights.source, changes)

  def without_given(state):
    params = flatten(state.params)
    new = {path: x for path, x in params.items() if path not in given}
    return state._replace(params=new, ema=None)

  # XLA drops the random numbers of parameters that are not returned.
  init_others = jax.jit(
    lambda key: without_given(init_state(key)),
    out_shardings=without_given(layout),
  )
  state, placed = init_others(key), flatten(layout.params)

  def place(path, x):
    if path not in given:
      return state.params[path]
    new = given[path].read().astype(x.dtype)
    return jax.make_array_from_callback(
      x.shape, placed[path], lambda index: new[index]
    )

  params = unflatten({path: place(path, x) for path, x in shapes.items()})
  ema = None if layout.ema is None else jax.tree.map(jnp.copy, params)
  return state._replace(params=params, ema=ema)
