"""The training step, a pure function."""

import jax
import jax.numpy as jnp
import optax

from vit_jax.sharding import split_like_moments
from vit_jax.state import KEY_IMPL, TrainState, flatten, unflatten


def train_step(
  state: TrainState,
  batch,
  *,
  objective,
  optimizer,
  schedule,
  micro_batches: int = 1,
  ema_decay: float = 0.0,
  ema_warmup: bool = False,
  frozen: frozenset[str] = frozenset(),
):
  """Returns (the next state, metrics); all randomness is from rng and step.

  Args:
    state: before the step.
    batch: {"image": u8[b h w 3], "labels": i32[b l]} with -1 for no label; for
      an objective with a teacher also its parameters, as "teacher".
    objective: see `objectives`. The {path: running statistic} that its loss
      returns replace those of the parameters.
    optimizer, schedule: of optax; the schedule is only for the metrics.
    micro_batches: the gradient is the mean over that many pieces.
    ema_decay: of the Polyak average; 0 for none.
    ema_warmup: the decay is at most (1 + t) / (10 + t) after update t = 1, ...
    frozen: paths of parameters that are not trained, whose gradient is not
      computed.
  """
  key = jax.random.wrap_key_data(state.rng, impl=KEY_IMPL)
  key = jax.random.fold_in(key, state.step)
  loss_key, prepare_key = jax.random.split(key)
  examples = objective.prepare(batch, prepare_key)
  loss_fn, trained = objective.loss, state.params
  if frozen:
    loss_fn, trained = split_frozen(loss_fn, state.params, frozen)
  (loss, statistics), gradient = mean_gradient(
    loss_fn, trained, examples, loss_key, micro_batches
  )
  given = gradient
  if frozen:
    zeros = jax.tree.map(jnp.zeros_like, flatten(state.params))
    given = unflatten(zeros | gradient)
  given, old = map(split_like_moments, (given, state.params))
  updates, opt_state = optimizer.update(given, state.opt_state, old)
  params = optax.apply_updates(old, updates)
  if statistics:
    params = unflatten(flatten(params) | statistics)
  ema = None
  if ema_decay:
    new = 1 - ema_decay
    if ema_warmup:
      # 1 - (1 + t) / (10 + t), with t = step + 1.
      new = jnp.maximum(new, 9 / (11 + state.step))
    ema = optax.incremental_update(params, state.ema, new)
  metrics = {
    "loss": loss,
    "gradient_norm": optax.tree.norm(gradient),
    "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
  }
  if "replaced" in batch:
    metrics["replaced"] = batch["replaced"].sum()
  return TrainState(state.step + 1, params, opt_state, ema, state.rng), metrics


def split_frozen(loss_fn, params, frozen):
  """Returns the loss as a function of the trained parameters, and these."""
  flat = flatten(params)

  def loss(trained, examples, key):
    return loss_fn(unflatten(flat | trained), examples, key)

  return loss, {path: x for path, x in flat.items() if path not in frozen}


def mean_gradient(loss_fn, params, examples, key, micro_batches: int):
  """Returns ((loss, statistics), gradient), means over the micro-batches."""
  gradient = jax.value_and_grad(loss_fn, has_aux=True)
  if micro_batches == 1:
    return gradient(params, examples, key)
  pieces = split_micro_batches(examples, micro_batches)
  keys = jax.random.split(key, micro_batches)

  def add(total, piece):
    (loss, statistics), found = gradient(params, *piece)
    return jax.tree.map(jnp.add, total, (loss, found)), statistics

  zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  total, statistics = jax.lax.scan(add, zero, (pieces, keys))
  loss, mean = jax.tree.map(lambda x: x / micro_batches, total)
  return (loss, jax.tree.map(lambda x: x.mean(0), statistics)), mean


def split_micro_batches(tree, count):
  """[b ...] -> [count b/count ...] without moving a row between devices."""
  # Micro-batch j takes every count-th row: each device contributes equally.
  return jax.tree.map(
    lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree
  )


def init_state(key, *, model, optimizer, ema_decay: float = 0.0) -> TrainState:
  """Returns the state before the first step."""
  init_key, step_key = jax.random.split(key)
  params = model.init(init_key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    ema=jax.tree.map(jnp.copy, params) if ema_decay else None,
    rng=jax.random.key_data(step_key),
  )


def normalize(images):
  """u8[b h w 3] -> f32 in [-1, 1]; pixels are sent to the device as uint8."""
  return (images.astype(jnp.float32) - 127.5) / 127.5


def mixup(key, images, targets, alpha, shift=1):
  """Mixes each example with the one `shift` before it in the global batch.

  One weight a ~ Beta(alpha, alpha) a batch, the larger of a and 1 - a, so that
  the first image dominates (arXiv 1710.09412; AugReg, arXiv 2106.10270).
  """
  a = jax.random.beta(key, alpha, alpha)
  a = jnp.maximum(a, 1 - a)
  mixed = (images, targets)
  return tuple(a * x + (1 - a) * jnp.roll(x, shift, axis=0) for x in mixed)


def cutmix(key, images, targets, alpha, shift=1):
  """Pastes into each example a box of the one `shift` before it.

  One box a batch (arXiv 1905.04899): 1 - a of the area with a ~ Beta(alpha,
  alpha), in the image's proportions, at a uniform centre, cut off at the
  borders. The targets are mixed by the area that remains.
  """
  area_key, *keys = jax.random.split(key, 3)
  side = jnp.sqrt(1 - jax.random.beta(area_key, alpha, alpha))
  within = []
  for axis, size in enumerate(images.shape[1:3]):
    half = jnp.int32(size * side) // 2
    offset = jnp.arange(size) - jax.random.randint(keys[axis], (), 0, size)
    within.append((offset >= -half) & (offset < half))
  inside = within[0][:, None] & within[1]
  kept = 1 - inside.mean()
  targets = kept * targets + (1 - kept) * jnp.roll(targets, shift, axis=0)
  other = jnp.roll(images, shift, axis=0)
  return jnp.where(inside[..., None], other, images), targets
