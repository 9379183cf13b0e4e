"""Start from another run's weights: what is taken, resized, new, dropped."""

from typing import Any, NamedTuple

import numpy as np

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.state import flatten, unflatten

POS_EMBEDDING = "Transformer/posembed_input/pos_embedding"
# What a new task or a new way of pooling may replace. Everything else must be
# there on both sides, in the same shape.
REPLACEABLE = (
  "head/",
  "pre_logits/",
  "cls",
  "MAPHead_0/",
  "mask_token",
  "mpp_head/",
  POS_EMBEDDING,
)


class Report(NamedTuple):
  """What became of each array: paths, with shapes where they matter."""

  taken: list[str]
  resized: list[str]
  new: list[str]
  dropped: list[str]

  def __str__(self):
    lines = [f"taken: {len(self.taken)} arrays"]
    for name in ("resized", "new", "dropped"):
      lines += [f"{name}: {path}" for path in getattr(self, name)]
    return "\n".join(lines)


def warm_start(
  params: Any,
  weights: dict[str, Any],
  *,
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  same_classes: bool,
  source: str,
) -> tuple[Any, Report]:
  """Returns `params` with everything that `weights` can give them.

  A new head is as initialised: a zero kernel and the configured bias. A tanh
  layer (pre_logits) that only one side has, or that has another width, makes
  the head new as well: its inputs mean something else. The position embedding
  is resized to the new grid.

  Args:
    params: the new model's initial parameters, nested.
    weights: {path: array} of the other run, scanned or not.
    old_grid: (h, w) in patches of the other run's images.
    new_grid: (h, w) in patches of the new images.
    same_classes: whether both heads speak of the same classes.
    source: the other run's name, for messages.

  Raises:
    UserError: another architecture; the message names parameters.
  """
  target = flatten(params)
  weights = _match_layout(weights, target)
  _check_architecture(target, weights, source)
  tanh_layers = [
    tree["pre_logits/kernel"].shape if "pre_logits/kernel" in tree else None
    for tree in (target, weights)
  ]
  keep_head = same_classes and tanh_layers[0] == tanh_layers[1]
  report = Report([], [], [], [])
  used = set()
  for path, x in target.items():
    given = weights.get(path)
    if given is not None and path == POS_EMBEDDING:
      given = _resize(np.asarray(given), x.shape, old_grid, new_grid)
    is_new_head = path.startswith("head/") and not keep_head
    if given is None or given.shape != x.shape or is_new_head:
      report.new.append(f"{path} {_by(x.shape)}")
      continue
    target[path] = np.asarray(given)
    used.add(path)
    if path == POS_EMBEDDING and old_grid != new_grid:
      report.resized.append(f"{path} {_by(old_grid)} -> {_by(new_grid)}")
    else:
      report.taken.append(path)
  for path in sorted(weights.keys() - used):
    report.dropped.append(f"{path} {_by(weights[path].shape)}")
  return unflatten(target), report


def _by(shape):
  return "x".join(map(str, shape))


def _match_layout(weights, target):
  """Stacks or unstacks the blocks of `weights` as `target` has them."""
  stacked = [
    any("/encoderblock/" in path for path in tree) for tree in (weights, target)
  ]
  if stacked == [True, False]:
    return flatten(models.unstack_blocks(unflatten(weights)))
  if stacked == [False, True]:
    return flatten(models.stack_blocks(unflatten(weights)))
  return weights


def _check_architecture(target, weights, source):
  problems = []
  for path in target.keys() | weights.keys():
    if path.startswith(REPLACEABLE):
      continue
    there, here = (
      _by(tree[path].shape) if path in tree else "absent"
      for tree in (weights, target)
    )
    if there != here:
      problems.append(f"{path} is {there} there and {here} here")
  if problems:
    problems.sort()
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise UserError(
      f"{source} holds another architecture: {'; '.join(problems[:3])}{more}; "
      "set config.model as in that run"
    )


def _resize(pos_embedding, shape, old_grid, new_grid):
  """Resizes to the new grid; adds or drops the class token's entry."""
  had_token = pos_embedding.shape[1] - old_grid[0] * old_grid[1]
  wants_token = shape[1] - new_grid[0] * new_grid[1]
  if had_token > wants_token:
    pos_embedding = pos_embedding[:, 1:]
  elif had_token < wants_token:
    zero = np.zeros_like(pos_embedding[:, :1])
    pos_embedding = np.concatenate([zero, pos_embedding], axis=1)
  return models.posemb.resize_tokens(pos_embedding, old_grid, new_grid)
