r"""Schedules and optimizers, built from values; parameters chosen by path.

Paths are "/"-joined (`Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel`),
and a regular expression has to match the whole of one. With scanned layers the
block is `Transformer/encoderblock`, all depths in one array: a rule written as
`.*/encoderblock(_\d+)?/.*` serves both forms.
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
  cooldown_steps: int,
  total_steps: int,
) -> Schedule:
  """Returns the learning rate as a function of the step.

  With t the step, w `warmup_steps`, T `total_steps`, c `cooldown_steps`, s
  `rsqrt_timescale` and p = clip((t - w) / (T - w), 0, 1):

    linear:    linear_end + (base_lr - linear_end) (1 - p)
    cosine:    base_lr (1 + cos(pi p)) / 2
    rsqrt:     base_lr / sqrt(1 + max(0, t - w) / s)
    constant:  base_lr

  all times min(1, t / w) and min(1, (T - t) / c), where w and c are not 0.
  Steps count from 0: with warm-up the first update changes nothing, and the
  last one is taken at T - 1. `linear_end` is a learning rate, not a fraction.
  The rsqrt curve (Zhai et al., "Scaling Vision Transformers") is base_lr at
  the end of the warm-up whatever s is, and halves after another 3 s steps.
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
  curve = _make_curve(decay, base_lr, linear_end, rsqrt_timescale)
  decay_steps = max(1, total_steps - warmup_steps)

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    t = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((t - warmup_steps) / decay_steps, 0, 1)
    lr = curve(progress, jnp.maximum(0, t - warmup_steps))
    if warmup_steps:
      lr *= jnp.minimum(1, t / warmup_steps)
    if cooldown_steps:
      lr *= jnp.clip((total_steps - t) / cooldown_steps, 0, 1)
    return lr

  return schedule


def _make_curve(decay, base_lr, linear_end, rsqrt_timescale):
  """Returns (p, max(0, t - w)) -> the rate without warm-up and cooldown."""
  curves = {
    "linear": lambda p, _: linear_end + (base_lr - linear_end) * (1 - p),
    "cosine": lambda p, _: base_lr * 0.5 * (1 + jnp.cos(jnp.pi * p)),
    "rsqrt": lambda _, t: base_lr * jax.lax.rsqrt(1 + t / rsqrt_timescale),
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
  schedule: Schedule,
  base_lr: float,
  params: Any,
) -> optax.GradientTransformation:
  """Returns the optimizer as an optax transformation; update() needs params.

  One update of a parameter p, in this order:

    g <- g min(1, clip_norm / norm)     norm over all parameters not frozen
    d <- Adam(g), or momentum d + g     no Nesterov; eps outside the root
    p <- p - factor lr(t) (d + decay p)

  where lr is `schedule`, factor is that of `find_factors`, and decay is
  `weight_decay` (scaling "lr", the paper) or `weight_decay / base_lr` (scaling
  "schedule", big_vision) for parameters that match `weight_decay_params`, else
  0. A factor of 0 freezes: no gradient, in the norm either, no decay and, but
  for some blocks of a stack, no moments. Their paths end in the parameter's.

  Args: the keys of `config.optimizer`, as `config.check_ranges` lets them pass;
  the schedule and its base rate; the parameters or their shapes.

  Raises:
    UserError: regular expressions that do not compile or match no parameter,
      nothing left to train.
  """
  paths = list(flatten(params))
  factors = find_factors(params, lr_multipliers, layer_decay, freeze_blocks)
  parts = []
  if any(np.ndim(x) and 0 in x for x in factors.values()):
    parts.append(_multiply({p: np.sign(x) for p, x in factors.items()}))
  if clip_norm:
    parts.append(optax.clip_by_global_norm(clip_norm))
  if name == "adam":
    parts.append(optax.scale_by_adam(b1, b2, eps, mu_dtype=accumulator_dtype))
  else:
    parts.append(optax.trace(momentum, accumulator_dtype=accumulator_dtype))
  if weight_decay:
    if weight_decay_scaling == "schedule":
      if not base_lr:
        raise UserError(
          "weight_decay_scaling 'schedule' divides by base_lr, which is 0; use "
          "a positive base_lr, or weight_decay 0"
        )
      weight_decay /= base_lr
    decayed = match("weight_decay_params", weight_decay_params, paths)
    mask = _map_paths(lambda path, _: path in decayed)
    parts.append(optax.add_decayed_weights(weight_decay, mask))
  if any(np.any(factor != 1) for factor in factors.values()):
    parts.append(_multiply(factors))
  parts.append(optax.scale_by_learning_rate(schedule))
  return _freeze(optax.chain(*parts), factors)


def _multiply(factors: dict[str, Any]):
  """Returns the transformation of updates that multiplies them by factors."""

  def multiply(path, update):
    factor = factors[path]
    if not np.ndim(factor):
      return factor * update
    factor = np.reshape(factor, (-1, *[1] * (update.ndim - 1)))
    # What is not finite stays out of frozen blocks.
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


def _map_paths(function: Callable[[str, Any], Any]) -> Callable[[Any], Any]:
  """Returns tree -> the tree of function(path, leaf).

  Not of the parameters, because the tree may lack the frozen ones.
  """
  return lambda tree: jax.tree_util.tree_map_with_path(
    lambda path, x: function(path_str(path), x), tree
  )


def list_frozen(
  params, *, lr_multipliers, layer_decay, freeze_blocks, **_
) -> frozenset[str]:
  """Returns the paths of what is not trained; arguments as `make_optimizer`."""
  factors = find_factors(params, lr_multipliers, layer_decay, freeze_blocks)
  return frozenset(path for path, x in factors.items() if not np.any(x))


# What comes after the blocks, and so learns at the full rate.
_AFTER = re.compile(
  "(Transformer/encoder_norm|fc_norm|MAPHead_0|projection|pre_logits|head|"
  "head_dist|mpp_head)/.*"
)
# What is trained beside a low-rank update, unless other rules come first.
_LORA = (r"(.*/lora_[ab]|(pre_logits|head|head_dist|mpp_head)/.*)=1", ".*=0")


def find_factors(
  params, lr_multipliers, layer_decay: float, freeze_blocks: int
) -> dict[str, Any]:
  """Returns what the learning rate of each parameter is multiplied by.

  It is 0 for what is no parameter (`state.is_statistic`); else the factor of
  the first matching rule of `lr_multipliers` (of none: 1, but 0 where there are
  low-rank updates, see `lora`), times layer_decay^(L + 1
  - depth), where L is the number of blocks. The depth is 0 before the blocks,
  i + 1 in block i and L + 1 after them, as in BEiT's code (arXiv 2106.08254)
  and MAE's (arXiv 2111.06377). Up to depth `freeze_blocks` it is 0, if that is
  not 0.

  Returns:
    {path: float, or f32[L] of stacked blocks}.

  Raises:
    UserError: values out of range, rules that are none or match no parameter,
      no blocks.
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
  """Returns {path: depth, or those of stacked blocks}, and how many blocks."""
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
  """Returns the paths of which all matches; at least one."""
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
