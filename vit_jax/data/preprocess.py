"""Preprocessing strings: from an image to the model's uint8 pixels.

A preprocessing string names operations and their arguments, joined by "|":

    inception_crop(size)|flip_lr                      training, ImageNet
    resize(size)                                      evaluation, fine-tuning
    resize_small(size * 8 / 7)|central_crop(size)     evaluation, ImageNet
    resize(size, method='bicubic', antialias=True)    evaluation, as in Pillow

Arguments are Python literals; the word `size` means `config.image_size`, and
may be multiplied and divided by numbers. `vit_jax.data.ops` runs the operations
in TensorFlow, and `preprocess_image` those of evaluation without it.
"""

import ast
import math
import os
from fractions import Fraction
from typing import Any

import numpy as np

from vit_jax.data import numpy_ops
from vit_jax.data.pillow import decode_image
from vit_jax.data.pillow import open_image as open_image
from vit_jax.data.pillow import read_turn as read_turn
from vit_jax.data.sizes import MAX_PIXELS as MAX_PIXELS
from vit_jax.data.sizes import as_pair
from vit_jax.data.sizes import scale_side as scale_side
from vit_jax.errors import UserError, suggest


def _is_count(x, least=1):
  return type(x) is int and x >= least


def _is_size(x):
  pair = isinstance(x, tuple | list) and len(x) == 2
  return _is_count(x) or (pair and all(map(_is_count, x)))


def _is_number(x, least, most):
  return type(x) in (int, float) and least <= x <= most


# What an argument has to be, and the check.
_SIZE = ("a positive integer or (height, width)", _is_size)
_SIDE = ("a positive integer", _is_count)
_METHOD = (
  "'bilinear', 'bicubic' or 'area'",
  ("bilinear", "bicubic", "area").__contains__,
)
_ANTIALIAS = ("True or False", lambda x: type(x) is bool)
_PERCENT = ("a percentage above 0", lambda x: _is_number(x, 1e-9, 100))
_COUNT = ("an integer, 0 or more", lambda x: _is_count(x, 0))
_MAGNITUDE = ("between 0 and 30", lambda x: _is_number(x, 0, 30))
_STRENGTH = ("a number, 0 or more", lambda x: _is_number(x, 0, math.inf))
_CONTRAST = ("'mean' or 'augreg'", ("mean", "augreg").__contains__)

# Operation -> its arguments, in order; a size comes first and is required.
EVALUATION_OPS = {
  "resize": {"size": _SIZE, "method": _METHOD, "antialias": _ANTIALIAS},
  "resize_small": {
    "smaller_size": _SIDE,
    "method": _METHOD,
    "antialias": _ANTIALIAS,
  },
  "central_crop": {"size": _SIZE},
}
TRAINING_OPS = {
  "inception_crop": {"size": _SIZE, "area_min": _PERCENT, "area_max": _PERCENT},
  "random_crop": {"size": _SIZE},
  "simple_crop": {"size": _SIZE},
  "flip_lr": {},
  "randaug": {
    "num_ops": _COUNT,
    "magnitude": _MAGNITUDE,
    "contrast": _CONTRAST,
  },
  "three_augment": {},
  "color_jitter": {"strength": _STRENGTH},
}
_OPS = EVALUATION_OPS | TRAINING_OPS


def parse(
  text: str, image_size: int | tuple[int, int], *, evaluation: bool = False
) -> list[tuple[str, dict[str, Any]]]:
  """Returns [(operation, {argument: value})] of a preprocessing string.

  Args:
    text: operations joined by "|", see the module.
    image_size: what `size` stands for: one integer or (height, width), pixels.
    evaluation: whether random operations are an error.

  Raises:
    UserError: bad syntax, unknown operation, bad arguments, or an output whose
      size is not `image_size`.
  """
  image_size = as_pair(image_size)
  try:
    tree = ast.parse(text.strip(), mode="eval").body
  except (SyntaxError, ValueError) as e:
    raise UserError(
      f"preprocess {text!r} does not parse; write operations joined by '|', "
      "as in 'resize_small(size * 8 / 7)|central_crop(size)'"
    ) from e
  ops = [_parse_op(node, text, image_size) for node in _split(tree)]
  size = None
  for name, arguments in ops:
    if evaluation and name in TRAINING_OPS:
      raise UserError(
        f"preprocess {text!r}: {name} is random, for training only; "
        f"evaluation has {', '.join(EVALUATION_OPS)}"
      )
    if name == "resize_small":
      size = None  # one side depends on the image
    elif "size" in arguments:
      size = as_pair(arguments["size"])
  if size != image_size:
    found = "differing sizes" if size is None else f"{size[0]}x{size[1]} pixels"
    raise UserError(
      f"preprocess {text!r} gives images of {found}, image_size is "
      f"{image_size[0]}x{image_size[1]}; end with e.g. central_crop(size)"
    )
  return ops


def _split(node):
  """Returns the operations of a|b|c, which Python parses as (a|b)|c."""
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    return [*_split(node.left), *_split(node.right)]
  return [node]


def _parse_op(node, text, image_size):
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  name = call.func.id if isinstance(call.func, ast.Name) else ""
  if name not in _OPS:
    problem = f"{ast.unparse(node)!r} is not an operation"
    if name:
      problem = f"unknown operation {name!r}{suggest(name, _OPS)}"
    raise UserError(
      f"preprocess {text!r}: {problem}; there are {', '.join(_OPS)}"
    )
  known = _OPS[name]
  try:
    size = max(image_size) if name == "resize_small" else image_size
    keywords = {str(k.arg): k.value for k in call.keywords}
    given = dict(zip(known, call.args, strict=False)) | keywords
    if len(given) < len(call.args) + len(keywords) or not {*given} <= {*known}:
      raise ValueError("unknown or repeated arguments")
    if {"size", "smaller_size"} & {*known} - {*given}:
      raise ValueError("a size is missing")
    arguments: dict[str, Any] = {
      key: _literal(given[key], size) for key in known if key in given
    }
    for key, value in arguments.items():
      what, fits = known[key]
      if not fits(value):
        raise ValueError(f"{key} must be {what}, not {value!r}")
    if arguments.get("area_min", 5) > arguments.get("area_max", 100):
      raise ValueError("area_min is more than area_max")
    usual = "area" if name == "resize_small" else "bilinear"
    method = arguments.get("method", usual)
    antialias = arguments.get("antialias", False)
    if (method == "bicubic" and not antialias) or (
      method == "area" and antialias
    ):
      raise ValueError(
        "antialias=True needs method='bilinear' or 'bicubic', and 'bicubic' "
        "needs antialias=True"
      )
  except (TypeError, ValueError, ArithmeticError) as e:
    raise UserError(
      f"preprocess {text!r}: {ast.unparse(node)}: {e}; it takes "
      f"{name}({', '.join(known)})"
    ) from e
  return name, arguments


def _literal(node, size):
  """Returns a literal, or `size` multiplied or divided by numbers, rounded."""
  match node:
    case ast.Name():
      if node.id != "size":
        raise ValueError(f"{node.id!r} is neither a number nor `size`")
      return size
    case ast.BinOp() if isinstance(size, tuple):
      return tuple(_literal(node, side) for side in size)
    case ast.BinOp():  # halves up
      return math.floor(_calculate(node, size) + Fraction(1, 2))
  return ast.literal_eval(node)


def _calculate(node, size) -> Fraction:
  match node:
    case ast.Name(id="size"):
      return Fraction(size)
    case ast.Constant(value=int() | float() as number):
      return Fraction(number)
    case ast.BinOp(op=ast.Mult()):
      return _calculate(node.left, size) * _calculate(node.right, size)
    case ast.BinOp(op=ast.Div()):
      return _calculate(node.left, size) / _calculate(node.right, size)
  raise ValueError(
    f"{ast.unparse(node)!r} is not a literal, nor `size` multiplied or divided "
    "by a number"
  )


def check_crops(text: str, image_size: int | tuple[int, int]) -> None:
  """Raises a UserError if a crop always enlarges the output of a resize.

  resize_small(256)|central_crop(size) does so for 384 pixels. A wide crop that
  fits into wide images is not an error.
  """
  image_size = as_pair(image_size)
  sides, before = (math.inf, math.inf), ""
  for name, arguments in parse(text, image_size):
    size = arguments.get("size", arguments.get("smaller_size"))
    if size is None:
      continue
    crop = size = as_pair(size)
    if before == "resize_small":
      crop = min(size), min(size)
    crops = name in ("central_crop", "random_crop", "simple_crop")
    if crops and (sides[0] < crop[0] or sides[1] < crop[1]):
      right = math.floor(max(image_size) * 8 / 7 + 0.5)
      raise UserError(
        f"preprocess {text!r}: {before} makes images of {min(sides)} pixels, "
        f"which {name} enlarges again to {size[0]}x{size[1]}; write "
        f"resize_small(size * 8 / 7), which is {right} pixels here, or "
        "resize(size)"
      )
    sides, before = size, name


def preprocess_image(
  image, text: str, image_size: int | tuple[int, int], name: str = "image"
) -> np.ndarray:
  """Runs an evaluation preprocessing string on one image.

  Args:
    image: a path, the bytes of an image file, a PIL image, or uint8[h w],
      [h w 1], [h w 3] or [h w 4].
    text, image_size: the string, and the height and width of `size` in it.
    name: of an image that is not a path, for errors.

  Returns:
    uint8[h w 3], equal to what `vit_jax.data` feeds the model in evaluation.

  Raises:
    UserError: bad string, or an image (named) that cannot be read.
  """
  ops = parse(text, image_size, evaluation=True)
  name = os.fspath(image) if isinstance(image, str | os.PathLike) else name
  pixels = decode_image(image, name)
  for op, arguments in ops:
    pixels = numpy_ops.OPS[op](pixels, **arguments, name=name)
  return pixels
