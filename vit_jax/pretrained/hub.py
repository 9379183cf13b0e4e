"""What the folders of Hugging Face and timm have in common.

PyTorch's layouts, fields of a JSON file, the size of the images, and a folder
that is complete or not there.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vit_jax import files
from vit_jax.data import preprocess
from vit_jax.errors import UserError, check_free
from vit_jax.pretrained import archives
from vit_jax.pretrained.weights import FLAT, LINEAR, LINEAR_OUT, Rule

WEIGHTS_FILE = "model.safetensors"
_Value = TypeVar("_Value")


# --- tables ---


def norm_rules(path: str, name: str) -> list[Rule]:
  """A LayerNorm's two lines."""
  return [
    Rule(f"{path}/scale", f"{name}.weight"),
    Rule(f"{path}/bias", f"{name}.bias"),
  ]


def dense_rules(path: str, name: str, kind=LINEAR, part=None) -> list[Rule]:
  """A dense layer's two lines; `part` as in `Rule`."""
  return [
    Rule(f"{path}/kernel", f"{name}.weight", kind, part),
    Rule(f"{path}/bias", f"{name}.bias", FLAT, part),
  ]


def out_rules(path: str, name: str) -> list[Rule]:
  """The two lines of attention's output projection."""
  return dense_rules(path, name, LINEAR_OUT)


# --- fields of JSON files ---


def get_field(
  source: str, config: Mapping[str, Any], name: str, default: _Value
) -> _Value:
  """Returns a field of the default's type, the default if absent or null.

  Raises:
    UserError: it has another type, or is a number below zero.
  """
  value = config.get(name)
  if value is None:
    return default
  if type(default) is float and type(value) is int:
    value = float(value)
  if type(value) is not type(default) or (
    isinstance(value, (int, float)) and not value >= 0  # NaN is not, either
  ):
    raise UserError(
      f"{source}: {name} is {value!r} in its configuration; a value such as "
      f"{default!r} is needed"
    )
  return value


def get_pair(source: str, config: Mapping[str, Any], name: str, default: int):
  """Returns an integer field as (h, w); it may be a pair.

  Raises:
    UserError: neither.
  """
  value = config.get(name)
  value = default if value is None else value
  pair = [value, value] if type(value) is int else value
  if (
    not isinstance(pair, (list, tuple))
    or len(pair) != 2
    or not all(type(side) is int and side > 0 for side in pair)
  ):
    raise UserError(
      f"{source}: {name} is {value!r} in its configuration; an integer or "
      "[height, width] is needed"
    )
  return pair[0], pair[1]


def get_colour(
  source: str,
  config: Mapping[str, Any],
  name: str,
  default: tuple[float, ...],
) -> tuple[float, ...]:
  """Returns three numbers, such as the mean of the pixels.

  Raises:
    UserError: something else, or a deviation of zero.
  """
  value = config.get(name)
  value = default if value is None else value
  if (
    not isinstance(value, (list, tuple))
    or len(value) != 3
    or not all(type(x) in (int, float) and x >= 0 for x in value)
    or (name.endswith("std") and not all(value))
  ):
    raise UserError(
      f"{source}: {name} is {value!r} in its configuration; three numbers are "
      "needed"
    )
  return tuple(map(float, value))


def get_names(names, num_classes: int) -> tuple[Any, tuple[str, ...]]:
  """Returns the class names or None, and notes if they do not fit the head."""
  if not isinstance(names, list) or not num_classes:
    return None, ()
  if len(names) != num_classes or not all(isinstance(n, str) for n in names):
    note = (
      f"there are {len(names)} class names for {num_classes} classes; they are "
      "left out"
    )
    return None, (note,)
  return list(names), ()


# --- images ---


class Preparation(NamedTuple):
  """How an image gets its size.

  Attributes:
    squash: whether both sides are resized, whatever the image's proportions;
      else the shorter one is and the other follows.
    resized: (h, w) in pixels that are aimed at, before the middle is cropped
      out; None for the model's.
  """

  squash: bool = True
  resized: tuple[int, int] | None = None

  def to_text(self, image_size: tuple[int, int]) -> str:
    """Returns it as a preprocessing string."""
    resized = self.resized or image_size
    if not self.squash:
      return f"resize_small({min(resized)})|central_crop(size)"
    if resized == image_size:
      return "resize(size)"
    height, width = resized
    size = height if height == width else resized
    return f"resize({size})|central_crop(size)"


def parse_preparation(
  text: str, image_size: tuple[int, int], format_name: str
) -> Preparation:
  """Returns what a preprocessing string does.

  Raises:
    UserError: something that a `Preparation` is not.
  """
  ops = preprocess.parse(text, image_size, evaluation=True)
  (name, arguments), *others = ops
  if [other for other, _ in others] in ([], ["central_crop"]):
    if name == "resize":
      resized = preprocess.as_pair(arguments["size"])
      return Preparation(True, None if resized == image_size else resized)
    if name == "resize_small":
      return Preparation(False, (arguments["smaller_size"],) * 2)
  raise UserError(
    f"{format_name} cannot represent the preprocessing {text!r}, but "
    "'resize(size)', 'resize(256)|central_crop(size)' and "
    "'resize_small(256)|central_crop(size)'"
  )


# --- folders ---


def write_folder(
  out: pathlib.Path,
  documents: Mapping[str, Any],
  arrays: Iterable[tuple[str, np.ndarray]],
) -> None:
  """Writes JSON files and weights; the folder appears when it is complete.

  Raises:
    UserError: there is something at `out` already.
  """
  if not out.is_dir() or any(out.iterdir()):
    check_free(out)
  with files.atomic_folder(out) as partial:
    archives.write_safetensors(partial / WEIGHTS_FILE, arrays)
    for name, document in documents.items():
      text = json.dumps(document, indent=2, ensure_ascii=False)
      (partial / name).write_text(text + "\n", encoding="utf-8")
