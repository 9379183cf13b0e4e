"""npz files of google-research/big_transfer (BiT), with TensorFlow's names."""

import pathlib
import re
from collections.abc import Mapping

from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.pretrained import archives, tables
from vit_jax.pretrained.tables import Rule
from vit_jax.pretrained.vision_transformer import describe_units
from vit_jax.pretrained.weights import LazyArray, Weights

ORIGIN = "big_transfer"
_UNIT = r"(block\d+/unit\d+)"
_CONV = "standardized_conv2d/kernel"


def _make_rules():
  rules = [
    Rule(r"root_block/conv_root/kernel", f"resnet/root_block/{_CONV}"),
    Rule(rf"{_UNIT}/conv_proj/kernel", rf"resnet/\1/a/proj/{_CONV}"),
    Rule(r"norm-pre-head/scale", "resnet/group_norm/gamma"),
    Rule(r"norm-pre-head/bias", "resnet/group_norm/beta"),
    Rule(r"head/kernel", "resnet/head/conv2d/kernel", tables.CONV_1X1),
    Rule(r"head/bias", "resnet/head/conv2d/bias"),
  ]
  for number, letter in enumerate("abc", 1):
    rules += [
      Rule(rf"{_UNIT}/conv{number}/kernel", rf"resnet/\1/{letter}/{_CONV}"),
      Rule(
        rf"{_UNIT}/gn{number}/scale", rf"resnet/\1/{letter}/group_norm/gamma"
      ),
      Rule(rf"{_UNIT}/gn{number}/bias", rf"resnet/\1/{letter}/group_norm/beta"),
    ]
  return tuple(rules)


RULES = _make_rules()


def matches(arrays: Mapping[str, LazyArray]) -> bool:
  """Returns whether a file with these names is of this format."""
  return any(name.startswith("resnet/root_block/") for name in arrays)


def read(source: str, arrays: Mapping[str, LazyArray]) -> Weights:
  """Returns the weights of a file that `matches`.

  Raises:
    UserError: missing, extra or misshapen arrays, or an unknown depth.
  """
  # Some files have numbered layer names.
  arrays = {
    re.sub(r"/standardized_conv2d_\d+/", "/standardized_conv2d/", name): x
    for name, x in arrays.items()
  }
  root = f"resnet/root_block/{_CONV}"
  width = tables.shape_of(source, arrays, root, 4)[-1] // 64
  bare = [name.removeprefix("resnet/") for name in arrays]
  units = describe_units(["conv_root/", *bare])
  variant = tables.name_variant(None, 0, units, width)
  if variant is None:
    raise UserError(
      f"{source}: a ResNet with {units} units; known are "
      f"{', '.join(f'{n} {u}' for n, u in variants.RESNETS.items())}"
    )
  weights = Weights(
    ORIGIN,
    source,
    {"variant": variant},
    image_size=(224, 224),
    num_classes=tables.width_of(arrays, "resnet/head/conv2d/bias"),
  )
  return tables.translate(RULES, weights, arrays)


def write(weights: Weights, out: pathlib.Path) -> None:
  """Writes an npz file."""
  archives.write_npz(out, tables.translate_back(RULES, weights))
