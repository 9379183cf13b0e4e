"""Warm start: which arrays are taken, resized, new or dropped."""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError
from vit_jax.pretrained import positions
from vit_jax.pretrained.weights import LazyArray

POS_EMBEDDING = "Transformer/posembed_input/pos_embedding"
HEADS = ("head/", "head_dist/")  # of the class and the distillation token
# Parameters that a new task or pooling may replace. All others must exist on
# both sides. Only position embeddings may differ in shape.
REPLACEABLE = (
  *HEADS,
  "pre_logits/",
  "cls",
  "dist",
  "MAPHead_0/",
  "fc_norm/",
  "projection/",
  "mask_token",
  "mpp_head/",
  POS_EMBEDDING,
)
# In MAE's fine-tuning, a new norm after the pooling replaces it.
_LAST_NORM = "Transformer/encoder_norm/"
_POSITIONS = re.compile(r".*/pos_embedding(_y|_x)?")


class Report(NamedTuple):
  """Paths of arrays by outcome, with shapes where relevant."""

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
  target: Mapping[str, Any],
  weights: Mapping[str, LazyArray],
  *,
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  same_classes: bool,
  source: str,
  resize: str = "corner_aligned",
) -> tuple[dict[str, LazyArray], Report]:
  """Returns the arrays of `weights` that fit a model, and a report.

  Other parameters stay as initialised. If the classes differ, so does the head,
  with a zero kernel and the configured bias. The head is also new if a tanh
  layer (pre_logits) is on one side only or has another width, because its
  inputs then differ. Position embeddings are resized to the new grid.

  Args:
    target: {path: array or shape} of the new model.
    weights: {path: LazyArray} of the other model, scanned or not.
    old_grid: (h, w) in patches of the other model's images.
    new_grid: (h, w) in patches of the new images.
    same_classes: whether both heads have the same classes.
    source: where `weights` are from, for messages.
    resize: how position embeddings are resized, see `positions`.

  Raises:
    UserError: another architecture; the message names parameters.
  """
  weights = match_layout(weights, scan=is_scanned(target))
  _check_architecture(target, weights, source)
  tanh_layers = [
    tree["pre_logits/kernel"].shape if "pre_logits/kernel" in tree else None
    for tree in (target, weights)
  ]
  keep_head = same_classes and tanh_layers[0] == tanh_layers[1]
  report = Report([], [], [], [])
  given = {}
  for path, x in target.items():
    there = weights.get(path)
    resized = False
    if there is not None and _POSITIONS.fullmatch(path):
      there = _fit_positions(path, there, x.shape, old_grid, new_grid, resize)
      resized = old_grid != new_grid
    is_new_head = path.startswith(HEADS) and not keep_head
    if there is None or there.shape != x.shape or is_new_head:
      report.new.append(f"{path} {by(x.shape)}")
      continue
    given[path] = there
    if resized:
      report.resized.append(f"{path} {by(old_grid)} -> {by(new_grid)}")
    else:
      report.taken.append(path)
  for path in sorted(weights.keys() - given.keys()):
    report.dropped.append(f"{path} {by(weights[path].shape)}")
  return given, report


def by(shape) -> str:
  """Returns a shape as in "4x4x3x8"."""
  return "x".join(map(str, shape)) or "a scalar"


def is_scanned(paths) -> bool:
  """Returns whether these are the paths of stacked blocks."""
  return any("/encoderblock/" in path for path in paths)


def match_layout(
  weights: Mapping[str, LazyArray], *, scan: bool
) -> Mapping[str, LazyArray]:
  """Stacks or unstacks the blocks lazily, if necessary."""
  if is_scanned(weights) == scan:
    return weights
  return _stack(weights) if scan else _unstack(weights)


def _stack(weights):
  out, blocks = {}, {}
  for path, x in weights.items():
    match = re.fullmatch(r"(.*)/encoderblock_(\d+)/(.*)", path)
    if match:
      name = f"{match[1]}/encoderblock/{match[3]}"
      blocks.setdefault(name, {})[int(match[2])] = x
    else:
      out[path] = x
  for name, layers in blocks.items():
    layers = [layers[i] for i in sorted(layers)]
    out[name] = LazyArray(
      (len(layers), *layers[0].shape),
      layers[0].dtype,
      lambda layers=layers: np.stack([x.read() for x in layers]),
    )
  return out


def _unstack(weights):
  out = {}
  for path, x in weights.items():
    if "/encoderblock/" not in path:
      out[path] = x
      continue
    # Read once for all blocks.
    read = functools.cache(x.read)
    for i in range(x.shape[0]):
      name = path.replace("/encoderblock/", f"/encoderblock_{i}/")
      out[name] = LazyArray(
        x.shape[1:], x.dtype, lambda i=i, read=read: read()[i]
      )
  return out


def _check_architecture(target, weights, source):
  problems, replaceable = [], REPLACEABLE
  if "fc_norm/scale" in target:
    replaceable = (*replaceable, _LAST_NORM)
  for path in sorted(target.keys() | weights.keys()):
    if path.startswith(replaceable):
      continue
    there, here = (
      by(tree[path].shape) if path in tree else "absent"
      for tree in (weights, target)
    )
    may_resize = _POSITIONS.fullmatch(path) and "absent" not in (there, here)
    if there != here and not may_resize:
      problems.append(f"{path} is {there} there and {here} here")
  if problems:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    advice = "set config.model as in that run"
    # They are indexed by distance in the token sequence. In a grid of another
    # width, the same distance is another direction.
    if any("relative_embedding" in problem for problem in problems):
      advice = (
        "relative position embeddings cannot be resized; keep the image size"
      )
    raise UserError(
      f"{source} holds another architecture: {'; '.join(problems[:3])}{more}; "
      f"{advice}"
    )


def _fit_positions(path, x, shape, old_grid, new_grid, resize):
  """Returns the embeddings for the new grid, lazily."""
  if x.shape == shape and old_grid == new_grid:
    return x
  if path.endswith(("_y", "_x")):
    axis = "yx".index(path[-1])
    return LazyArray(
      (*x.shape[:-2], new_grid[axis], x.shape[-1]),
      x.dtype,
      lambda: positions.resize_axis(x.read(), axis, new_grid, resize),
    )
  had = x.shape[-2] - old_grid[0] * old_grid[1]
  wants = shape[-2] - new_grid[0] * new_grid[1]
  kept = min(had, wants)

  def read():
    tokens = x.read()
    tokens = tokens.reshape(-1, *tokens.shape[-2:])
    # Drop entries of extra tokens, or pad them with zeros.
    first = np.pad(tokens[:, :kept], ((0, 0), (0, wants - kept), (0, 0)))
    tokens = np.concatenate([first, tokens[:, had:]], axis=1)
    # One at a time, because scanned blocks have a stack of them.
    resized = [
      positions.resize_tokens(one[None], old_grid, new_grid, resize)
      for one in tokens
    ]
    return np.stack(resized).reshape(*x.shape[:-2], -1, x.shape[-1])

  return LazyArray((*x.shape[:-2], shape[-2], x.shape[-1]), x.dtype, read)
