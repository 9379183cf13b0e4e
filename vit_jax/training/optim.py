r"""Learning rate schedules and optimizers; parameters are chosen by path.

Paths are "/"-joined (`Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel`),
and a regular expression has to match a whole path. With scanned layers the
block is `Transformer/encoderblock`, with all depths in one array. A rule
written as `.*/encoderblock(_\d+)?/.*` matches both forms.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.errors import UserError, check_choice, suggest
from vit_jax.state import flatten, is_statistic, path_str

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(
  *,
  base_lr: float,
  decay: str,
  warmup_steps: int,
  linear_end: float,
  rsqrt_timescale: float,
  exponential_rate: float,
  exponential_steps: float,
  cooldown_steps: int,
  total_steps: int,
) -> Schedule:
  """Returns the learning rate as a function of the step.

  With t the step, w `warmup_steps`, T `total_steps`, c `cooldown_steps`, s
  `rsqrt_timescale` and p = clip((t - w) / (T - w), 0, 1):

    linear:       linear_end + (base_lr - linear_end) (1 - p)
    cosine:       base_lr (1 + cos(pi p)) / 2
    rsqrt:        base_lr / sqrt(1 + max(0, t - w) / s)
    constant:     base_lr
    exponential:  base_lr exponential_rate^floor(t / exponential_steps)

  all times min(1, t / w) and min(1, (T - t) / c), where w and c are not 0;
  the exponential power is 1 while t < w, as in EfficientNet's code (arXiv
  1905.11946). Steps count from 0: with warm-up the first update changes
  nothing, and the last one is taken at T - 1. `linear_end` is a learning rate,
  not a fraction. The rsqrt curve (Zhai et al., "Scaling Vision Transformers")
  is base_lr at the end of the warm-up whatever s is, and halves after another
  3 s steps.
  The step is an integer, traced or not; the rate is f32[].

  Raises:
    UserError: an unknown decay, or a warm-up and cooldown that do not fit in
      the run.
  """
  if warmup_steps + cooldown_steps > total_steps:
    raise UserError(
      f"warmup_steps {warmup_steps} and cooldown_steps {cooldown_steps} do not "
      f"fit in a run of {total_steps} steps; shorten them or train for longer"
    )
  curve = _make_curve(
    *(decay, base_lr, warmup_steps, linear_end, rsqrt_timescale),
    *(exponential_rate, exponential_steps),
  )
  decay_steps = max(1, total_steps - warmup_steps)

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    t = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((t - warmup_steps) / decay_steps, 0, 1)
    lr = curve(progress, t)
    if warmup_steps:
      lr *= jnp.minimum(1, t / warmup_steps)
    if cooldown_steps:
      lr *= jnp.clip((total_steps - t) / cooldown_steps, 0, 1)
    return lr

  return schedule


def _make_curve(decay, base_lr, warmup, linear_end, timescale, rate, steps):
  """Returns (p, t) -> the learning rate without warm-up and cooldown."""

  def rsqrt(p, t):
    return base_lr * jax.lax.rsqrt(1 + jnp.maximum(0, t - warmup) / timescale)

  def exponential(p, t):
    return base_lr * jnp.where(t < warmup, 1, rate ** jnp.floor(t / steps))

  curves = {
    "linear": lambda p, _: linear_end + (base_lr - linear_end) * (1 - p),
    "cosine": lambda p, _: base_lr * 0.5 * (1 + jnp.cos(jnp.pi * p)),
    "rsqrt": rsqrt,
    "exponential": exponential,
    "constant": lambda p, _: jnp.full_like(p, base_lr),
  }
  check_choice("config.schedule.decay", decay, curves)
  if decay == "linear" and linear_end > base_lr:
    raise UserError(
      f"linear_end {linear_end} is above base_lr {base_lr}, so the rate would "
      "grow; choose an end between 0 and base_lr"
    )
  return curves[decay]


def make_optimizer(
  *,
  name: str,
  b1: float,
  b2: float,
  eps: float,
  momentum: float,
  accumulator_dtype: str,
  weight_decay: float,
  weight_decay_scaling: str,
  weight_decay_params: str,
  clip_norm: float,
  lr_multipliers: Iterable[str],
  layer_decay: float,
  freeze_blocks: int,
  shard_state: int = 1,
  schedule: Schedule,
  base_lr: float,
  params: Any,
) -> optax.GradientTransformation:
  """Returns the optimizer as an optax transformation; update() needs params.

  One update of a parameter p, in this order:

    g <- g + decay p                    scaling "gradient": L2 in the loss
    g <- g min(1, clip_norm / norm)     norm over all parameters not frozen
    d <- the rule of `name`, with decoupled decay, see `_make_rule`
    p <- p - factor d

  where factor is that of `find_factors`, and decay is `weight_decay` (scaling
  "lr", the paper, and "gradient") or `weight_decay / base_lr` (scaling
  "schedule", big_vision) for parameters that match `weight_decay_params`, else
  0. A factor of 0 freezes a parameter: it has no gradient, not even in the
  norm, no decay and, except for some blocks of a stack, no moments. Paths of
  moments end in the parameter's.

  Args: the keys of `config.optimizer`, checked by `config.check_ranges`, of
  which `shard_state` is for `sharding.make_mesh`; the schedule and its base
  rate; the parameters or their shapes.

  Raises:
    UserError: regular expressions that do not compile or match no parameter,
      nothing left to train, LAMB without decay.
  """
  del shard_state
  factors = find_factors(params, lr_multipliers, layer_decay, freeze_blocks)
  decayed: set[str] = set()
  if weight_decay:
    paths = list(flatten(params))
    decayed = match("weight_decay_params", weight_decay_params, paths)
  parts = []
  if weight_decay and weight_decay_scaling == "gradient":
    parts.append(_add_decay(weight_decay, decayed))
  if any(np.ndim(x) and 0 in x for x in factors.values()):
    parts.append(_multiply({p: np.sign(x) for p, x in factors.items()}))
  if clip_norm:
    parts.append(optax.clip_by_global_norm(clip_norm))
  decay = _scale_decay(weight_decay, weight_decay_scaling, base_lr)
  numbers = (b1, b2, eps, momentum, accumulator_dtype)
  rule, rate = _make_rule(name, *numbers, schedule, decay, decayed)
  parts += rule
  if any(np.any(factor != 1) for factor in factors.values()):
    parts.append(_multiply(factors))
  parts.append(optax.scale_by_learning_rate(rate))
  return _freeze(optax.chain(*parts), factors)


def _scale_decay(decay, scaling, base_lr):
  """Returns the decoupled decay, a multiple of the learning rate."""
  if decay and scaling == "schedule":
    if not base_lr:
      raise UserError(
        "weight_decay_scaling 'schedule' divides by base_lr, which is 0; use "
        "a positive base_lr, or weight_decay 0"
      )
    return decay / base_lr
  return 0.0 if scaling == "gradient" else decay


def _make_rule(
  name, b1, b2, eps, momentum, dtype, schedule, decay, decayed
) -> tuple[list[optax.GradientTransformation], Any]:
  """Returns the transformations of g to d / rate, and the rate.

    adam:     d <- lr(t) (Adam(g) + decay p)              eps outside the root
    lamb:     d <- lr(t) ratio (Adam(g) + decay p)
    sgd:      d <- lr(t) (m + decay p)                    m <- momentum m + g
    rmsprop:  d <- m + lr(t) decay p
              m <- momentum m + lr(t) g / sqrt(s + eps)
              s <- b2 s + (1 - b2) g^2                    s = 1 at first

  LAMB is arXiv 1904.00962, see `_adapt` for the ratio. RMSProp is TensorFlow
  1's RMSPropOptimizer, for which EfficientNet's settings are: its momentum
  includes the rate, but not the decay. `dtype` is that of m, or of Adam's first
  moment. Momentum is never Nesterov's.
  """
  decay_part = [_add_decay(decay, decayed)] if decay else []
  trace = optax.trace(momentum, accumulator_dtype=dtype)
  if name == "sgd":
    return [trace, *decay_part], schedule
  if name == "rmsprop":
    rms = optax.scale_by_rms(b2, eps, initial_scale=1.0)
    if decay:
      decay_part = [_add_decay(lambda t: decay * schedule(t), decayed)]
    return [rms, optax.scale_by_schedule(schedule), trace, *decay_part], 1.0
  adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=dtype)
  if name == "adam":
    return [adam, *decay_part], schedule
  if not decayed:
    raise UserError(
      "optimizer.name 'lamb' adapts what is decayed, and weight_decay is 0; "
      "set weight_decay, or choose 'adam'"
    )
  return [adam, *decay_part, _adapt(decayed)], schedule


def _add_decay(decay, decayed: set[str]):
  """Adds `decay`, a number or a schedule, times the parameters `decayed`."""
  mask = _map_paths(lambda path, _: path in decayed)
  return optax.add_decayed_weights(decay, mask)


def _adapt(decayed: set[str]):
  """Returns LAMB's scaling of updates u by |p| / |u|, of decayed parameters.

  The ratio is 1 for others and where either norm is 0, as in apex and timm.
  Blocks have separate ratios, stacked or not. So have queries, keys and values,
  which are one array in timm.
  """

  def adapt(path, update, param):
    if path not in decayed:
      return update
    axes = tuple(range("/encoderblock/" in path, update.ndim))
    lengths = [
      jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))
      for x in (param, update)
    ]
    ratio = lengths[0] / jnp.where(lengths[1] > 0, lengths[1], 1)
    return update * jnp.where((lengths[0] > 0) & (lengths[1] > 0), ratio, 1)

  return optax.stateless(_map_paths(adapt))


def _multiply(factors: dict[str, Any]):
  """Returns the transformation of updates that multiplies them by factors."""

  def multiply(path, update):
    factor = factors[path]
    if not np.ndim(factor):
      return factor * update
    factor = np.reshape(factor, (-1, *[1] * (update.ndim - 1)))
    # Infinities and NaNs stay out of frozen blocks.
    return jnp.where(factor > 0, factor * update, 0)

  multiply_all = _map_paths(multiply)
  return optax.stateless(lambda updates, _: multiply_all(updates))


def _freeze(optimizer, factors: dict[str, Any]):
  """Hides the parameters of factor 0 from the optimizer."""
  frozen = {path for path, factor in factors.items() if not np.any(factor)}
  if not frozen:
    return optimizer
  if len(frozen) == len(factors):
    raise UserError(
      "lr_multipliers freeze every parameter; leave something to train, for "
      "instance with 'head/.*=1' in front"
    )
  label = _map_paths(lambda path, _: "frozen" if path in frozen else "trained")
  return optax.partition(
    {"trained": optimizer, "frozen": optax.set_to_zero()}, label
  )


def _map_paths(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns trees -> the tree of function(path, leaf of each).

  Paths are those of the trees, which may lack the frozen parameters.
  """
  return lambda *trees: jax.tree_util.tree_map_with_path(
    lambda path, *x: function(path_str(path), *x), *trees
  )


def list_frozen(
  params, *, lr_multipliers, layer_decay, freeze_blocks, **_
) -> frozenset[str]:
  """Returns the paths of frozen parameters; arguments as `make_optimizer`."""
  factors = find_factors(params, lr_multipliers, layer_decay, freeze_blocks)
  return frozenset(path for path, x in factors.items() if not np.any(x))


# Parameters after the blocks, which have the full learning rate.
_AFTER = re.compile(
  "(Transformer/encoder_norm|fc_norm|MAPHead_0|projection|pre_logits|head|"
  "head_dist|mpp_head)/.*"
)
# Trained parameters with low-rank updates, unless earlier rules match.
_LORA = (r"(.*/lora_[ab]|(pre_logits|head|head_dist|mpp_head)/.*)=1", ".*=0")


def find_factors(
  params, lr_multipliers, layer_decay: float, freeze_blocks: int
) -> dict[str, Any]:
  """Returns the factor of each parameter's learning rate.

  It is 0 for running statistics (`state.is_statistic`). For others it is the
  factor of the first matching rule of `lr_multipliers`, times
  layer_decay^(L + 1 - depth) with L blocks. Without a matching rule it is 1, or
  0 in models with low-rank updates, see `lora`. The depth is 0 before the
  blocks, i + 1 in block i and L + 1 after them, as in BEiT's code (arXiv
  2106.08254) and MAE's (arXiv 2111.06377). Up to depth `freeze_blocks`, if that
  is not 0, the factor is 0.

  Returns:
    {path: float, or f32[L] of stacked blocks}.

  Raises:
    UserError: values out of range, rules that are invalid or match no
      parameter, no blocks.
  """
  flat = flatten(params)
  rules = (
    [lr_multipliers] if isinstance(lr_multipliers, str) else lr_multipliers
  )
  if any(path.endswith("/lora_a") for path in flat):
    rules = (*rules, *_LORA)
  factors: dict[str, Any] = _parse_multipliers(rules, list(flat))
  if layer_decay == 1 and not freeze_blocks:
    return factors
  depths, blocks = _find_depths(flat)
  if not 0 < layer_decay <= 1:
    raise UserError(f"optimizer.layer_decay {layer_decay} is not in (0, 1]")
  if not blocks or not 0 <= freeze_blocks <= blocks:
    raise UserError(
      f"optimizer.layer_decay is {layer_decay} and freeze_blocks "
      f"{freeze_blocks}, but this model has {blocks} blocks; leave them at 1 "
      "and 0, or freeze at most so many"
    )
  for path, depth in depths.items():
    factor = factors[path] * layer_decay ** (blocks + 1.0 - depth)
    if freeze_blocks:
      factor = factor * (depth > freeze_blocks)
    factors[path] = np.float32(factor) if np.ndim(factor) else float(factor)
  return factors


def _find_depths(flat) -> tuple[dict[str, Any], int]:
  """Returns {path: depth, or depths of a stack}, and the number of blocks."""
  depths: dict[str, Any] = {}
  blocks = 0
  for path, x in flat.items():
    block = re.match(r"Transformer/encoderblock(?:_(\d+))?/", path)
    if not block:
      continue
    depths[path] = 1 + (int(block[1]) if block[1] else np.arange(x.shape[0]))
    blocks = max(blocks, np.max(depths[path]))
  for path in flat.keys() - depths.keys():
    depths[path] = blocks + 1 if _AFTER.fullmatch(path) else 0
  return depths, int(blocks)


def _parse_multipliers(rules, paths: list[str]) -> dict[str, float]:
  """Returns each parameter's factor from "regex=factor" rules."""
  factors: dict[str, float] = {}
  for rule in rules:
    pattern, _, text = str(rule).rpartition("=")
    try:
      factor = float(text)
    except ValueError:
      factor = -1.0
    if not pattern or not 0 <= factor < math.inf:
      raise UserError(
        f"lr_multipliers has {rule!r}, which is not 'regex=factor' with a "
        "factor of at least 0; write for instance 'head/.*=10'"
      )
    for path in match("lr_multipliers", pattern, paths):
      factors.setdefault(path, factor)
  return {
    path: 0.0 if is_statistic(path) else factors.get(path, 1.0)
    for path in paths
  }


def match(key: str, pattern: str, paths: list[str]) -> set[str]:
  """Returns the paths that a pattern matches as a whole; at least one."""
  try:
    regex = re.compile(pattern)
  except re.error as e:
    raise UserError(
      f"{key} {pattern!r} is not a regular expression ({e}); correct it"
    ) from None
  matches = {path for path in paths if regex.fullmatch(path)}
  if not matches:
    raise UserError(
      f"{key} {pattern!r} matches no parameter; it has to match a whole path, "
      f"such as {paths[0]!r}{suggest(pattern, paths)}"
    )
  return matches
