"""npz files of google-research/big_vision, with looped or scanned blocks.

The position embedding is at the root and has no entry for the class token. On
writing, that entry is added to the token itself, which is equivalent.
"""

import pathlib
from collections.abc import Mapping

from vit_jax.pretrained import archives, tables
from vit_jax.pretrained.tables import Rule
from vit_jax.pretrained.warmstart import POS_EMBEDDING
from vit_jax.pretrained.weights import LazyArray, Weights, as_lazy

ORIGIN = "big_vision"
_OLD_POS_EMBEDDING = "Transformer/pos_embedding"
_MAP_HEAD = ("probe", "MultiHeadDotProductAttention_0", "LayerNorm_0")


RULES = (
  Rule(POS_EMBEDDING, "pos_embedding"),
  Rule(r"(.*)", r"\1"),
)
# `write` adds the first entry to the class token before it is dropped.
TOKEN_RULES = (
  Rule(POS_EMBEDDING, "pos_embedding", tables.NO_TOKEN),
  *RULES[1:],
)


def matches(arrays: Mapping[str, LazyArray]) -> bool:
  """Returns whether a file with these names is of this format."""
  return "embedding/kernel" in arrays and (
    POS_EMBEDDING not in arrays
    and any(name.startswith("Transformer/encoderblock") for name in arrays)
  )


def read(source: str, arrays: Mapping[str, LazyArray]) -> Weights:
  """Returns the weights of a file that `matches`.

  Raises:
    UserError: missing, extra or misshapen arrays.
  """
  arrays = {_modern_name(name, arrays): x for name, x in arrays.items()}
  scan = "Transformer/encoderblock/LayerNorm_0/scale" in arrays
  block = "Transformer/encoderblock" if scan else "Transformer/encoderblock_0"
  encoder = tables.describe_encoder(
    source,
    arrays,
    query=f"{block}/MultiHeadDotProductAttention_0/query/kernel",
    mlp=f"{block}/MlpBlock_0/Dense_0/kernel",
    num_layers=None
    if scan
    else tables.count_numbers(arrays, r"Transformer/encoderblock_(\d+)/"),
  )
  patch = tables.shape_of(source, arrays, "embedding/kernel", 4)[0]
  learned = "pos_embedding" in arrays
  token = "cls" in arrays
  # Sinusoidal embeddings do not depend on the resolution; big_vision uses 224.
  grid = (round(224 / patch),) * 2
  if learned:
    grid = tables.square_grid(
      source, tables.shape_of(source, arrays, "pos_embedding", 3)[1]
    )
  model = {
    "variant": tables.name_variant(encoder, patch, None),
    "classifier": "token"
    if token
    else "map"
    if "MAPHead_0/probe" in arrays
    else "gap",
    "representation_size": tables.width_of(arrays, "pre_logits/bias"),
    "pos_embedding": "learned" if learned else "sincos2d",
    "scan": scan,
  }
  weights = Weights(
    ORIGIN,
    source,
    model,
    image_size=(grid[0] * patch, grid[1] * patch),
    num_classes=tables.width_of(arrays, "head/bias"),
    preprocess="resize_small(size * 8 / 7)|central_crop(size)",
  )
  rules = TOKEN_RULES if token else RULES
  return tables.translate(rules, weights, arrays)


def _modern_name(name, arrays):
  """Returns the current name of the position embedding or MAP head."""
  if name == _OLD_POS_EMBEDDING:
    return "pos_embedding"
  if "probe" in arrays and name.startswith((*_MAP_HEAD, "MlpBlock_0")):
    return f"MAPHead_0/{name}"
  return name


def check(weights: Weights) -> None:
  """Raises a UserError that names what the format cannot represent."""
  tables.check_options(
    weights, ORIGIN, **tables.PAPER, pos_embedding=("learned", "sincos2d")
  )


def write(weights: Weights, out: pathlib.Path) -> None:
  """Writes an npz file with looped blocks, of weights that pass `check`."""
  params = dict(weights.params)
  has_token = weights.model.get("classifier", "token") == "token"
  if has_token and POS_EMBEDDING in params:
    first = params[POS_EMBEDDING].read()[:, :1]
    # Adding a zero would turn -0 into 0.
    if first.any():
      params["cls"] = as_lazy(params["cls"].read() + first)
  rules = TOKEN_RULES if has_token else RULES
  archives.write_npz(
    out, tables.translate_back(rules, weights._replace(params=params))
  )
