"""Name tables of file formats, and model sizes from array shapes.

A format is a table of rules: a pattern for our parameter's path, its name in
the file, and the layout conversion between the two. The same table is used for
reading and writing.
"""

import math
import re
from collections.abc import (
  Callable,
  Container,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax import models
from vit_jax.errors import UserError, suggest
from vit_jax.models import variants
from vit_jax.pretrained.warmstart import by
from vit_jax.pretrained.weights import LazyArray, Weights


class Kind(NamedTuple):
  """A layout conversion: `write` from ours to theirs, `read` back to ours."""

  write: Callable[[Any], Any]
  read: Callable[[Any, tuple[int, ...]], Any] = np.reshape


# Ours is f32[in ...out] where PyTorch has [out in], and HWIO where it has OIHW.
SAME = Kind(lambda x: x)
FLAT = Kind(lambda x: x.reshape(-1))
LINEAR = Kind(
  lambda x: x.reshape(x.shape[0], -1).T, lambda x, shape: x.T.reshape(shape)
)
# The output projection of attention, whose inputs are split into heads.
LINEAR_OUT = Kind(
  lambda x: x.reshape(-1, x.shape[-1]).T, lambda x, shape: x.T.reshape(shape)
)
CONV = Kind(
  lambda x: x.transpose(3, 2, 0, 1), lambda x, shape: x.transpose(2, 3, 1, 0)
)
# Twice the file's values, for a head whose logits are averaged with zeros.
TWICE = Kind(
  lambda x: x * x.dtype.type(0.5), lambda x, shape: x * x.dtype.type(2)
)
TWICE_LINEAR = Kind(
  lambda x: TWICE.write(LINEAR.write(x)),
  lambda x, shape: LINEAR.read(x * x.dtype.type(2), shape),
)
# A position embedding whose first entry, the class token's, is zero and not in
# the file.
NO_TOKEN = Kind(
  lambda x: x[:, 1:],
  lambda x, shape: np.pad(x, ((0, 0), (shape[1] - x.shape[1], 0), (0, 0))),
)
# A position embedding without the leading axis of 1.
ROWS = Kind(lambda x: x[0])
# A dense layer that the file has as a 1x1 convolution.
CONV_1X1 = Kind(lambda x: x.reshape(1, 1, *x.shape))


class Rule(NamedTuple):
  """One line of a format's table.

  Attributes:
    path: regular expression of our whole path.
    name: the file's name; may use the groups of `path`. "" for zeros that are
      not in the file.
    kind: the layout conversion.
    part: (i, n) if this is part i of n that the file concatenates along axis 0.
  """

  path: str
  name: str
  kind: Kind = SAME
  part: tuple[int, int] | None = None


class _Entry(NamedTuple):
  path: str
  name: str
  rule: Rule
  shape: tuple[int, ...]  # ours
  file_shape: tuple[int, ...]  # of the file's array, all parts of it


def _find_entries(rules, shapes) -> list[_Entry]:
  """Returns the file's entry for each of our arrays."""
  entries = []
  for path, x in shapes.items():
    for rule in rules:
      match = re.fullmatch(rule.path, path)
      if match:
        like = jax.ShapeDtypeStruct(x.shape, np.float32)
        shape = jax.eval_shape(rule.kind.write, like).shape
        if rule.part:
          shape = (shape[0] * rule.part[1], *shape[1:])
        name = match.expand(rule.name)
        entries.append(_Entry(path, name, rule, tuple(x.shape), shape))
        break
    else:
      raise UserError(f"this format has no place for the parameter {path}")
  return entries


def translate(
  rules: Sequence[Rule], weights: Weights, arrays: Mapping[str, LazyArray]
) -> Weights:
  """Returns weights with the file's arrays under our paths, lazily.

  Args:
    rules: the format's table.
    weights: the contents of the file except for the arrays.
    arrays: {name: LazyArray} of the file.

  Raises:
    UserError: missing, extra or misshapen arrays, by name.
  """
  source, entries = weights.source, _find_entries(rules, weights.shapes())
  absent = {e.path: _zeros(e.shape) for e in entries if not e.name}
  entries = [e for e in entries if e.name]
  _check_names(source, {e.name for e in entries}, arrays)
  for entry in entries:
    found = arrays[entry.name].shape
    # Old files have (1, 1, 1, c) for (c,).
    if _squeeze(found) != _squeeze(entry.file_shape):
      raise UserError(
        f"{source}: {entry.name} is {by(found)}, "
        f"{by(entry.file_shape)} is needed for this model"
      )
  params = {
    entry.path: LazyArray(
      entry.shape,
      arrays[entry.name].dtype,
      lambda entry=entry: _read_entry(entry, arrays[entry.name], source),
    )
    for entry in entries
  }
  return weights._replace(params=params | absent)


def _zeros(shape):
  return LazyArray(shape, np.dtype(np.float32), lambda: np.zeros(shape, "f4"))


def translate_back(
  rules: Sequence[Rule], weights: Weights
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, array) in the file's layout.

  Raises:
    UserError: the format has no name for one of them.
  """
  groups: dict[str, list[_Entry]] = {}
  for entry in _find_entries(rules, weights.params):
    groups.setdefault(entry.name, []).append(entry)
  groups.pop("", None)
  for name, entries in groups.items():
    entries.sort(key=lambda e: e.rule.part or (0, 1))
    pieces = [
      entry.rule.kind.write(weights.params[entry.path].read())
      for entry in entries
    ]
    x = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    yield name, np.ascontiguousarray(x)


def _read_entry(entry, array, source):
  x = array.read()
  if not np.isfinite(x.astype(np.float32, copy=False)).all():
    raise UserError(
      f"{source}: {entry.name} holds values that are not finite; the file is "
      "corrupt or its training had diverged"
    )
  if entry.rule.part:
    i, n = entry.rule.part
    x = np.split(x, n)[i]
  return entry.rule.kind.read(x, entry.shape)


def _check_names(source, expected, found):
  missing = sorted(expected - found.keys())
  extra = sorted(found.keys() - expected)
  problems = [f"{x} is missing{suggest(x, extra)}" for x in missing[:3]]
  problems += [f"{x} is not known{suggest(x, missing)}" for x in extra[:3]]
  more = len(missing) + len(extra) - len(problems)
  if more:
    problems.append(f"{more} more are missing or not known")
  if problems:
    raise UserError(f"{source}: {'; '.join(problems)}")


def _squeeze(shape):
  return tuple(side for side in shape if side != 1)


# Settings of files without a configuration.
PAPER = {
  "pos_embedding_at": ("input",),
  "activation": ("gelu_tanh",),
  "layer_norm_epsilon": (1e-6,),
}


class _Above:
  """A container of all numbers above a limit."""

  def __init__(self, low):
    self.low = low

  def __contains__(self, x):
    return x > self.low


POSITIVE, ANY = _Above(0), _Above(-1)


def check_options(
  weights: Weights, format_name: str, *problems: str, **options: Container
) -> None:
  """Raises a UserError that names what a format cannot represent.

  Args:
    weights: the weights to write.
    format_name: for the message.
    *problems: found by the caller.
    **options: supported values, by argument of `models.create`.
  """
  weights.create_model()  # checks the configuration
  found = models.DEFAULTS | weights.model
  standard = {name: (models.DEFAULTS[name],) for name in models.SWITCHES}
  problems += tuple(
    f"{name} {found[name]!r}"
    for name, choices in (standard | options).items()
    if found[name] not in choices
  )
  if options.keys() >= PAPER.keys():
    height, width = weights.image_size
    problems += (f"images {height}x{width}",) * (height != width)
  if problems:
    raise UserError(f"{format_name} cannot represent {', '.join(problems)}")


def square_grid(source: str, num_tokens: int) -> tuple[int, int]:
  """Returns (h, w) in patches, for a format of square images.

  Raises:
    UserError: the number of tokens is not a square.
  """
  side = math.isqrt(num_tokens)
  if side * side != num_tokens:
    raise UserError(
      f"{source}: its position embedding has {num_tokens} patches, which is "
      "not a square number; the file does not give the grid"
    )
  return side, side


def describe_encoder(
  source: str,
  arrays: Mapping[str, LazyArray],
  query: str,
  mlp: str,
  num_layers: int | None = None,
) -> variants.Encoder:
  """Returns an encoder's sizes from the shapes of one of its blocks.

  Args:
    source: the file's name, for messages.
    arrays: the file's.
    query: name of the kernel [d a d/a] of a block's query projection.
    mlp: name of the kernel [d m] of its first dense layer.
    num_layers: of the encoder; None if both have a leading axis of layers.

  Raises:
    UserError: one of the arrays is missing, or has another rank.
  """
  stacked = num_layers is None
  *layers, width, heads, _ = shape_of(source, arrays, query, 3 + stacked)
  mlp_dim = shape_of(source, arrays, mlp, 2 + stacked)[-1]
  return variants.Encoder(width, num_layers or layers[0], mlp_dim, heads)


def count_numbers(names: Iterable[str], pattern: str) -> int:
  """Returns how many numbers `pattern` captures, such as indices of blocks."""
  matches = (re.match(pattern, name) for name in names)
  return len({int(match[1]) for match in matches if match})


def shape_of(
  source: str, arrays: Mapping[str, LazyArray], name: str, rank: int
) -> tuple[int, ...]:
  """Returns the shape of an array that determines sizes of the model.

  Raises:
    UserError: it is missing, empty, or has another rank.
  """
  shape = arrays[name].shape if name in arrays else ()
  if len(shape) != rank or 0 in shape:
    raise UserError(f"{source}: {name} is missing, or has another rank")
  return shape


def width_of(arrays: Mapping[str, LazyArray], name: str) -> int:
  """Returns the last axis of an array, 0 if there is no such array."""
  return sum(arrays[name].shape[-1:]) if name in arrays else 0


def name_variant(
  encoder: variants.Encoder | None,
  patch_size: int,
  units: tuple[int, ...] | None,
  width: int = 1,
) -> str | None:
  """Returns the variant's name for `variants.parse`, None if there is none."""
  if encoder is None:
    depths = [
      name for name, value in variants.RESNETS.items() if value == units
    ]
    return f"{depths[0]}x{width}" if depths else None
  sizes = [
    name for name, value in variants.ENCODERS.items() if value == encoder
  ]
  size = sizes[0] if sizes else "w{}d{}m{}h{}".format(*encoder)
  if units is None:
    return f"ViT-{size}_{patch_size}"
  for (resnet, patch), value in variants.HYBRIDS.items():
    if value == (units, patch_size) and width == 1:
      return f"{resnet}+ViT-{size}_{patch}"
  return None
