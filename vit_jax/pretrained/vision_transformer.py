"""npz files of google-research/vision_transformer: ViT, AugReg, SAM, hybrids.

Our parameter names differ only in the numbers. Published files number all
layers of a block together (LayerNorm_0, MultiHeadDotProductAttention_1,
LayerNorm_2, MlpBlock_3), Linen numbers each kind separately. Both are read; the
published form is written. The class token's position embedding comes first.
"""

import pathlib
import re
from collections.abc import Mapping

from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.pretrained import archives, tables
from vit_jax.pretrained.tables import Rule
from vit_jax.pretrained.warmstart import POS_EMBEDDING
from vit_jax.pretrained.weights import LazyArray, Weights

ORIGIN = "vision_transformer"
_BLOCK = r"(Transformer/encoderblock_\d+)"
PUBLISHED_RULES = (
  Rule(
    rf"{_BLOCK}/MultiHeadDotProductAttention_0/(.*)",
    r"\1/MultiHeadDotProductAttention_1/\2",
  ),
  Rule(rf"{_BLOCK}/LayerNorm_1/(.*)", r"\1/LayerNorm_2/\2"),
  Rule(rf"{_BLOCK}/MlpBlock_0/(.*)", r"\1/MlpBlock_3/\2"),
  Rule(r"(.*)", r"\1"),
)
LINEN_RULES = (Rule(r"(.*)", r"\1"),)


def matches(arrays: Mapping[str, LazyArray]) -> bool:
  """Returns whether a file with these names is of this format."""
  return POS_EMBEDDING in arrays and "embedding/kernel" in arrays


def read(source: str, arrays: Mapping[str, LazyArray]) -> Weights:
  """Returns the weights of a file that `matches`.

  Raises:
    UserError: missing, extra or misshapen arrays, or an unknown hybrid.
  """
  published = any("MultiHeadDotProductAttention_1/" in name for name in arrays)
  rules = PUBLISHED_RULES if published else LINEN_RULES
  attention, mlp = (1, 3) if published else (0, 0)
  block = "Transformer/encoderblock_"
  encoder = tables.describe_encoder(
    source,
    arrays,
    query=f"{block}0/MultiHeadDotProductAttention_{attention}/query/kernel",
    mlp=f"{block}0/MlpBlock_{mlp}/Dense_0/kernel",
    num_layers=tables.count_numbers(arrays, rf"{block}(\d+)/"),
  )
  token = "cls" in arrays
  grid = tables.square_grid(
    source, tables.shape_of(source, arrays, POS_EMBEDDING, 3)[1] - token
  )
  patch = tables.shape_of(source, arrays, "embedding/kernel", 4)[0]
  units = describe_units(arrays)
  variant = tables.name_variant(encoder, patch, units)
  if variant is None:
    known = [f"{u}, {p}x{p}" for u, p in variants.HYBRIDS.values()]
    raise UserError(
      f"{source}: a hybrid with {units} units and {patch}x{patch} patches; "
      f"known are {'; '.join(known)}"
    )
  stride = variants.parse(variant).stride
  model = {
    "variant": variant,
    "classifier": "token" if token else "gap",
    "representation_size": tables.width_of(arrays, "pre_logits/bias"),
  }
  weights = Weights(
    ORIGIN,
    source,
    model,
    image_size=(grid[0] * stride, grid[1] * stride),
    num_classes=tables.width_of(arrays, "head/bias"),
  )
  return tables.translate(rules, weights, arrays)


def check(weights: Weights) -> None:
  """Raises a UserError that names what the format cannot represent."""
  tables.check_options(
    weights,
    "npz",
    **tables.PAPER,
    pos_embedding=("learned",),
    classifier=("token", "gap"),
  )


def write(weights: Weights, out: pathlib.Path) -> None:
  """Writes an npz file of weights that pass `check`."""
  archives.write_npz(out, tables.translate_back(PUBLISHED_RULES, weights))


def describe_units(names) -> tuple[int, ...] | None:
  """Returns the units of each of a ResNet's stages, None without a ResNet."""
  if not any("conv_root/" in name for name in names):
    return None
  matches = (re.match(r"block(\d+)/unit(\d+)/", name) for name in names)
  units = {(int(match[1]), int(match[2])) for match in matches if match}
  return tuple(dict(sorted(units)).values())  # the last one of each stage
