"""Code shared by the folder formats of Hugging Face and timm.

Rules for PyTorch's layouts, fields of JSON files, resizing of images, and
atomic writing of a folder.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vit_jax import files
from vit_jax.data import preprocess
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.pretrained import archives, tables
from vit_jax.pretrained.tables import Rule
from vit_jax.pretrained.weights import Weights

BLOCK = r"Transformer/encoderblock_(\d+)"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_0"
POOL = "MAPHead_0"
WEIGHTS_FILE = "model.safetensors"
_Value = TypeVar("_Value")


# --- tables ---


def norm_rules(path: str, name: str) -> list[Rule]:
  """Returns a LayerNorm's two rules."""
  return [
    Rule(f"{path}/scale", f"{name}.weight"),
    Rule(f"{path}/bias", f"{name}.bias"),
  ]


def dense_rules(
  path: str, name: str, kind=tables.LINEAR, part=None
) -> list[Rule]:
  """Returns a dense layer's two rules; `part` as in `Rule`."""
  return [
    Rule(f"{path}/kernel", f"{name}.weight", kind, part),
    Rule(f"{path}/bias", f"{name}.bias", tables.FLAT, part),
  ]


def block_rules(
  block: str,
  norms: Sequence[str],
  attention: Sequence[str],
  mlp: Sequence[str],
  scales: Sequence[str] = (),
  gate: str = "",
) -> list[Rule]:
  """Returns the rules of an encoder's blocks, from the names in the file.

  Args:
    block: a block; may use its number, "\\1". The other names are below it.
    norms: the LayerNorms before attention and before the MLP.
    attention: query, key, value and output. The first three have one name if
      they are one array.
    mlp: the layer that widens and the layer that narrows.
    scales: LayerScale of attention and of the MLP.
    gate: the gate of a gated MLP.
  """
  *inputs, out = (f"{block}.{name}" for name in attention)
  rules = [*dense_rules(f"{ATTENTION}/out", out, tables.LINEAR_OUT)]
  for i, name in enumerate(("query", "key", "value")):
    joined = len(inputs) == 1
    theirs, part = (inputs[0], (i, 3)) if joined else (inputs[i], None)
    rules += dense_rules(f"{ATTENTION}/{name}", theirs, part=part)
  for i, name in enumerate(norms):
    rules += norm_rules(f"{BLOCK}/LayerNorm_{i}", f"{block}.{name}")
  for i, name in enumerate(mlp):
    rules += dense_rules(f"{BLOCK}/MlpBlock_0/Dense_{i}", f"{block}.{name}")
  if gate:
    rules += dense_rules(f"{BLOCK}/MlpBlock_0/gate", f"{block}.{gate}")
  for i, name in enumerate(scales):
    rules.append(Rule(f"{BLOCK}/LayerScale_{i}/scale", f"{block}.{name}"))
  return rules


def pool_rules(
  probe: str, out: str, norm: str, mlp: Sequence[str]
) -> list[Rule]:
  """Returns the rules of attention pooling except query, key and value."""
  path = f"{POOL}/MultiHeadDotProductAttention_0/out"
  rules = [
    Rule(f"{POOL}/probe", probe),
    *dense_rules(path, out, tables.LINEAR_OUT),
    *norm_rules(f"{POOL}/LayerNorm_0", norm),
  ]
  for i, name in enumerate(mlp):
    rules += dense_rules(f"{POOL}/MlpBlock_0/Dense_{i}", name)
  return rules


# --- fields of JSON files ---


class Fields(NamedTuple):
  """A user's JSON file, whose fields are checked on access.

  Attributes:
    source: the file, for messages.
    values: its contents.
  """

  source: str
  values: Mapping[str, Any]

  def get(self, name: str, default: _Value) -> _Value:
    """Returns a field of the default's type, the default if absent or null.

    Raises:
      UserError: it has another type or is negative.
    """
    value = self.values.get(name)
    if value is None:
      return default
    if type(default) is float and type(value) is int:
      value = float(value)
    is_number = isinstance(value, (int, float))
    # `not value >= 0` also rejects NaN.
    if type(value) is not type(default) or (is_number and not value >= 0):
      raise self.error(f"{name} is {value!r}; give one such as {default!r}")
    return value

  def pair(self, name: str, default: int) -> tuple[int, int]:
    """Returns an integer field as (h, w); it may be a pair."""
    value = self.values.get(name)
    value = default if value is None else value
    pair: Any = (value, value) if type(value) is int else value
    if not _is_numbers(pair, 2, (int,)) or not all(pair):
      raise self.error(f"{name} is {value!r}; give an integer or two")
    return pair[0], pair[1]

  def colour(self, name: str, default: tuple) -> tuple[float, ...]:
    """Returns three numbers, such as the mean of the pixels."""
    value = self.values.get(name)
    value = default if value is None else value
    if not _is_numbers(value, 3) or (name.endswith("std") and not all(value)):
      raise self.error(f"{name} is {value!r}; give three numbers")
    return tuple(map(float, value))

  def error(self, words: str) -> UserError:
    """Returns a UserError that names the file."""
    return UserError(f"{self.source}: {words}")


def _is_numbers(value, count, types=(int, float)) -> bool:
  return (
    isinstance(value, (list, tuple))
    and len(value) == count
    and all(type(x) in types and x >= 0 for x in value)
  )


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


# Resizing is described by (squash, resized, method). If `squash`, the whole
# image is resized to the (h, w) pixels of `resized`, else its shorter side to
# the lesser of them. `method` is a filter of Pillow. A central crop follows.


def preparation_text(
  squash: bool,
  resized: tuple[int, int],
  method: str,
  image_size: tuple[int, int],
) -> str:
  """Returns (squash, resized, method) as a preprocessing string."""
  options = f"method={method!r}, antialias=True"
  if not squash:
    return f"resize_small({min(resized)}, {options})|central_crop(size)"
  if resized == image_size:
    return f"resize(size, {options})"
  height, width = resized
  size = height if height == width else resized
  return f"resize({size}, {options})|central_crop(size)"


def parse_preparation(
  text: str, image_size: tuple[int, int], format_name: str
) -> tuple[bool, tuple[int, int], str]:
  """Returns the (squash, resized, method) of a preprocessing string.

  Methods that Pillow does not have become "bilinear", the nearest one.

  Raises:
    UserError: it has other operations.
  """
  ops = preprocess.parse(text, image_size, evaluation=True)
  (name, arguments), *others = ops
  method = "bicubic" if arguments.get("method") == "bicubic" else "bilinear"
  if [other for other, _ in others] in ([], ["central_crop"]):
    if name == "resize":
      return True, preprocess.as_pair(arguments["size"]), method
    if name == "resize_small":
      return False, (arguments["smaller_size"],) * 2, method
  raise UserError(
    f"{format_name} cannot represent the preprocessing {text!r}; supported are "
    "'resize(size)', 'resize(256)|central_crop(size)' and "
    "'resize_small(256)|central_crop(size)'"
  )


def find_method(name: str) -> tuple[str, tuple[str, ...]]:
  """Returns our method for a filter of Pillow, and notes if they differ."""
  if name in ("bilinear", "bicubic"):
    return name, ()
  note = (
    f"its authors resize with Pillow's {name} filter; ours is bicubic, so that "
    "pixels differ a little"
  )
  return "bicubic", (note,)


class Pixels(NamedTuple):
  """A mean and a standard deviation of pixels in [0, 1], and their name."""

  name: str
  mean: tuple[float, ...]
  std: tuple[float, ...]


HALF = Pixels("in [-1, 1]", (0.5,) * 3, (0.5,) * 3)
IMAGENET = Pixels(
  "normalised as ImageNet's", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)
CLIP = Pixels(
  "normalised as CLIP's",
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
)


def assume_pixels(
  weights: Weights, file: str, pixels: Pixels = HALF
) -> Weights:
  """Returns weights with assumed pixel statistics; `file` is missing."""
  note = (
    f"{file} is missing; pixels are assumed to be {pixels.name}, of images "
    "resized without cropping"
  )
  return weights._replace(
    mean=pixels.mean, std=pixels.std, notes=(*weights.notes, note)
  )


# --- folders ---


def find_problems(weights: Weights, with_head: bool = True) -> list[str]:
  """Returns features of the weights that neither library's ViT has."""
  problems = []
  sizes = variants.parse(weights.model["variant"])
  if sizes.units is not None:
    problems.append(f"the ResNet of {weights.model['variant']}")
  if with_head and "pre_logits/kernel" in weights.params:
    problems.append("a pre_logits layer before a head")
  return problems


def write_folder(
  out: pathlib.Path,
  documents: Mapping[str, Any],
  arrays: Iterable[tuple[str, np.ndarray]],
) -> None:
  """Writes a folder of JSON files and weights atomically."""
  with files.atomic_folder(out) as partial:
    archives.write_safetensors(partial / WEIGHTS_FILE, arrays)
    for name, document in documents.items():
      text = json.dumps(document, indent=2, ensure_ascii=False)
      (partial / name).write_text(text + "\n", encoding="utf-8")
