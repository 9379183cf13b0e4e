"""safetensors of timm's VisionTransformer, with or without config.json.

Query, key and value are one matrix. What does not show in the arrays (heads,
activation) is in config.json's "model_args", or else follows from the name of
the architecture. LayerNorm's epsilon is 1e-6.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax import models
from vit_jax.errors import UserError, check_choice
from vit_jax.models import variants
from vit_jax.pretrained import tables
from vit_jax.pretrained import torch_folders as folders
from vit_jax.pretrained.tables import Rule
from vit_jax.pretrained.torch_folders import (
  block_rules,
  dense_rules,
  norm_rules,
)
from vit_jax.pretrained.warmstart import POS_EMBEDDING
from vit_jax.pretrained.weights import LazyArray, Weights

ORIGIN = "timm"
_NAME = "timm's ViT"
_PATCHES = "patch_embed.proj.weight"
_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_tanh": "gelu_tanh"}
_POOLING = {"token": "token", "avg": "gap", "map": "map"}

# Architectures are told apart by their arrays, but for these: heads that are
# not 64 wide, and the tanh approximation. From timm's vision_transformer.py.
_SIXTEEN_HEADS = (
  r"vit_(base_patch16_gap_224|huge_|giant_|giantopt_|gigantic_|so400m_).*"
)
_TANH = (
  r"vit_(base_patch32_siglip|large_patch16_siglip_(gap_)?512"
  r"|so400m_patch16_siglip|giantopt_patch16_siglip).*"
)
# Plain ones: others are something else, though their arrays may look alike.
_ARCHITECTURE = r"(vit|deit|deit3|test_vit)_?[a-z0-9_]*"
_OTHER_ARCHITECTURE = r".*_(rpn|rope|relpos|quickgelu|clip|srelpos|dlittle)_.*"

# What there is no place for: names in the file, and what they mean.
_FOREIGN = (
  (r"fc_norm\.", "a LayerNorm after the mean over patches; ours is before it"),
  (r"blocks\.\d+\.(ls\d\.gamma|gamma_\d)", "LayerScale"),
  (r"blocks\.\d+\.attn\.[qk]_norm\.", "normalised queries and keys"),
  (r"reg_token", "register tokens"),
  (r"norm_pre\.", "a LayerNorm before the blocks"),
  (r"dist_token|head_dist\.", "a distillation token"),
  (r"patch_embed\.backbone\.", "a hybrid; of those, the published npz is read"),
)

# Arguments that change no forward pass, or that the arrays show.
_HARMLESS = {
  *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth"),
  *("num_heads", "mlp_ratio", "class_token", "no_embed_class", "global_pool"),
  *("fc_norm", "final_norm", "act_layer", "pos_embed", "weight_init"),
  *("fix_init", "dynamic_img_size", "strict_img_size"),
}


_WITH_TOKEN = Rule(POS_EMBEDDING, "pos_embed")
_WITHOUT_TOKEN = Rule(POS_EMBEDDING, "pos_embed", tables.NO_TOKEN)


def _make_rules() -> tuple[Rule, ...]:
  rules = [
    Rule("cls", "cls_token"),
    _WITH_TOKEN,
    *dense_rules("embedding", "patch_embed.proj", tables.CONV),
    *block_rules(
      r"blocks.\1",
      norms=("norm1", "norm2"),
      attention=("attn.qkv", "attn.proj"),
      mlp=("mlp.fc1", "mlp.fc2"),
    ),
    *norm_rules("Transformer/encoder_norm", "norm"),
    *folders.pool_rules(
      "attn_pool.latent",
      "attn_pool.proj",
      "attn_pool.norm",
      ("attn_pool.mlp.fc1", "attn_pool.mlp.fc2"),
    ),
    *dense_rules("head", "head"),
  ]
  pool = f"{folders.POOL}/MultiHeadDotProductAttention_0"
  rules += dense_rules(f"{pool}/query", "attn_pool.q")
  for i, name in enumerate(("key", "value")):
    rules += dense_rules(f"{pool}/{name}", "attn_pool.kv", part=(i, 2))
  return tuple(rules)


RULES = _make_rules()


def matches(
  arrays: Mapping[str, LazyArray], config: dict[str, Any] | None
) -> bool:
  """Returns whether a file is timm's, of this architecture or not."""
  return _PATCHES in arrays or "architecture" in (config or {})


def read(
  source: str,
  arrays: Mapping[str, LazyArray],
  config: dict[str, Any] | None = None,
) -> Weights:
  """Returns the weights of a file that `matches`.

  Args:
    source: the file's name, for messages.
    arrays: of the file.
    config: the contents of config.json, if there is one.

  Raises:
    UserError: another architecture, or missing, extra or misshapen arrays.
  """
  fields = folders.Fields(source, config or {})
  architecture = fields.get("architecture", "")
  arguments = folders.Fields(source, fields.get("model_args", {}))
  _check_architecture(architecture, arguments, arrays)
  encoder, patch, notes = _describe(arrays, architecture, arguments)
  classifier = _describe_pooling(fields, arguments, arrays)
  # Old config.json files have everything at the top.
  pretrained = fields.get("pretrained_cfg", fields.values)
  pretrained = folders.Fields(source, pretrained)
  image_size, rule = _describe_grid(
    arrays, arguments, pretrained, patch, classifier
  )
  num_classes = tables.width_of(arrays, "head.bias")
  names = fields.values.get("label_names")
  names = names or pretrained.values.get("label_names")
  class_names, name_notes = folders.get_names(names, num_classes)
  weights = Weights(
    ORIGIN,
    source,
    {
      "variant": tables.name_variant(encoder, patch, None),
      "classifier": classifier,
      "pos_embedding": "learned" if "pos_embed" in arrays else "none",
      "activation": _find_activation(architecture, arguments),
      "layer_norm_epsilon": 1e-6,
    },
    image_size,
    num_classes,
    class_names=class_names,
    resize="timm",
    notes=(*notes, *name_notes),
  )
  if not config:
    weights = folders.assume_pixels(weights, "config.json")
  else:
    weights = _read_preparation(weights, pretrained)
  return tables.translate((rule, *RULES), weights, arrays)


def _check_architecture(architecture, arguments, arrays):
  for pattern, meaning in _FOREIGN:
    found = [name for name in arrays if re.match(pattern, name)]
    if found:
      raise arguments.error(
        f"{found[0]} is {meaning}; there is no place for it here"
      )
  if architecture and (
    not re.fullmatch(_ARCHITECTURE, architecture)
    or re.fullmatch(_OTHER_ARCHITECTURE, architecture)
  ):
    raise arguments.error(
      f"its config.json is of the architecture {architecture!r}; of timm's, "
      "the plain ViTs such as 'vit_base_patch16_224' are read here"
    )
  for name, value in arguments.values.items():
    # Rates of dropout are for training.
    known = name in _HARMLESS or name.endswith("_rate")
    if not known and value not in (None, False):
      raise arguments.error(
        f"its model argument {name}={value!r} is not known here"
      )


def _describe(arrays, architecture, arguments):
  """Returns the encoder's sizes, the patch's, and notes."""
  source, first = arguments.source, "blocks.0.mlp.fc1.weight"
  width, _, patch, patch_width = tables.shape_of(source, arrays, _PATCHES, 4)
  if patch != patch_width:
    raise arguments.error(
      f"its patches are {patch}x{patch_width}; ours are square"
    )
  depth = tables.count_numbers(arrays, r"blocks\.(\d+)\.")
  sizes = (width, depth, tables.shape_of(source, arrays, first, 2)[0])
  known = [e.num_heads for e in variants.ENCODERS.values() if e[:3] == sizes]
  notes = ()
  if "num_heads" in arguments.values:
    heads = arguments.get("num_heads", 12)
  elif re.fullmatch(_SIXTEEN_HEADS, architecture):
    heads = 16
  elif known:
    heads = known[0]
  elif width % 64:
    raise arguments.error(
      "nothing says the number of attention heads, and the hidden size "
      f"{width} is no multiple of 64; put its config.json beside it"
    )
  else:
    heads = width // 64
    notes = (f"nothing says the number of heads; {heads} are taken, 64 wide",)
  if heads < 1 or width % heads:
    raise arguments.error(
      f"{heads} attention heads do not divide the hidden size {width}"
    )
  return variants.Encoder(*sizes, heads), patch, notes


def _find_activation(architecture, arguments):
  default = "gelu_tanh" if re.fullmatch(_TANH, architecture) else "gelu"
  name = arguments.get("act_layer", default)
  check_choice(f"{arguments.source}: act_layer", name, _ACTIVATIONS)
  return _ACTIVATIONS[name]


def _describe_pooling(fields, arguments, arrays):
  """Returns our `classifier`."""
  pooled = "token" if "cls_token" in arrays else "avg"
  if "attn_pool.latent" in arrays:
    pooled = "map"
  said = fields.values.get("global_pool", pooled)
  said = arguments.values.get("global_pool", said)
  if said != pooled or (pooled == "map" and "cls_token" in arrays):
    raise arguments.error(
      f"global_pool is {said!r}, its arrays are for {pooled!r}; a class token "
      "that is not read has no place here"
    )
  return _POOLING[pooled]


def _describe_grid(arrays, arguments, pretrained, patch, classifier):
  """Returns (h, w) in pixels, and the rule for the position embedding."""
  source, size = arguments.source, pretrained.values.get("input_size")
  size = list(size)[1:] if isinstance(size, (list, tuple)) else size
  size = arguments.values.get("img_size") or size
  given = size is not None
  image_size = folders.Fields(source, {"img_size": size}).pair("img_size", 224)
  token = classifier == "token"
  if "pos_embed" not in arrays:
    if arguments.values.get("pos_embed") not in ("", "none"):
      raise arguments.error(
        "pos_embed is missing, and its config.json does not say 'none'"
      )
    return image_size, _WITH_TOKEN
  count = tables.shape_of(source, arrays, "pos_embed", 3)[1]
  num_patches = (image_size[0] // patch) * (image_size[1] // patch)
  if not given or count not in (num_patches, num_patches + token):
    # Nobody says the size, or not this embedding's.
    without_token = token and math.isqrt(count) ** 2 == count
    num_patches = count - (token and not without_token)
    grid = tables.square_grid(source, num_patches)
    image_size = (grid[0] * patch, grid[1] * patch)
  rule = _WITHOUT_TOKEN if token and count == num_patches else _WITH_TOKEN
  return image_size, rule


def _read_preparation(weights, fields):
  """Adds what the configuration says of pixels to the weights."""
  notes = list(weights.notes)
  crop = fields.get("crop_pct", 0.875)
  if not 0 < crop <= 1:
    raise fields.error(f"crop_pct is {crop}; it must be in (0, 1]")
  mode = fields.get("crop_mode", "center")
  if mode not in ("center", "squash"):
    notes.append(
      f"its authors prepare images with crop_mode={mode!r}; here their middle "
      "is cropped"
    )
  method, filter_notes = folders.find_method(
    fields.get("interpolation", "bicubic")
  )
  height, width = weights.image_size
  resized = math.floor(height / crop), math.floor(width / crop)
  return weights._replace(
    preprocess=folders.preparation_text(
      mode == "squash", resized, method, weights.image_size
    ),
    mean=fields.colour("mean", folders.IMAGENET.mean),
    std=fields.colour("std", folders.IMAGENET.std),
    notes=(*notes, *filter_notes),
  )


def write(weights: Weights, out: pathlib.Path) -> None:
  """Writes a folder for `timm.create_model("local-dir:OUT", pretrained=True)`.

  Of weights that pass `check`.
  """
  rules, with_token = RULES, True
  if "cls" in weights.params and POS_EMBEDDING in weights.params:
    # A first entry of zeros is left out: that is how it was read.
    first = weights.params[POS_EMBEDDING].read()[:, :1]
    if not first.any() and not np.signbit(first).any():
      rules, with_token = (_WITHOUT_TOKEN, *RULES), False
  config = _make_config(weights, with_token)
  folders.write_folder(
    out, {"config.json": config}, tables.translate_back(rules, weights)
  )


def check(weights: Weights) -> None:
  """Raises a UserError that names what the format cannot represent."""
  tables.check_options(
    weights,
    _NAME,
    *folders.find_problems(weights),
    pos_embedding=("learned", "none"),
    pos_embedding_at=("input",),
    layer_norm_epsilon=(1e-6,),
  )
  _make_pretrained(weights)


def _make_config(weights, with_token):
  sizes = variants.parse(weights.model["variant"])
  assert sizes.encoder is not None
  encoder, options = sizes.encoder, models.DEFAULTS | weights.model
  names = {ours: theirs for theirs, ours in (_POOLING | _ACTIVATIONS).items()}
  pool = names[options["classifier"]]
  config = {
    # The arguments say everything; the name has to be one that timm knows.
    "architecture": "vit_base_patch16_224",
    "num_classes": weights.num_classes,
    "num_features": encoder.hidden_size,
    "global_pool": pool,
    "model_args": {
      "img_size": list(weights.image_size),
      "patch_size": sizes.patch_size,
      "embed_dim": encoder.hidden_size,
      "depth": encoder.num_layers,
      "num_heads": encoder.num_heads,
      "mlp_ratio": _find_ratio(encoder.mlp_dim, encoder.hidden_size),
      "class_token": pool == "token",
      "no_embed_class": not with_token,
      "global_pool": pool,
      "fc_norm": False,
      "act_layer": names[options["activation"]],
      "pos_embed": {"learned": "learn"}.get(options["pos_embedding"], "none"),
    },
    "pretrained_cfg": _make_pretrained(weights),
  }
  if weights.class_names:
    config["label_names"] = list(weights.class_names)
  return config


def _find_ratio(mlp_dim, hidden_size):
  """Returns a ratio that timm's int(hidden_size * ratio) makes mlp_dim of."""
  ratio = mlp_dim / hidden_size
  if int(hidden_size * ratio) != mlp_dim:
    ratio = (mlp_dim + 0.5) / hidden_size
  return ratio


def _make_pretrained(weights):
  squash, resized, method = folders.parse_preparation(
    weights.preprocess, weights.image_size, _NAME
  )
  side = min(weights.image_size)
  crop = _find_crop(side, resized[weights.image_size.index(side)])
  aimed = tuple(math.floor(s / crop) for s in weights.image_size)
  if crop > 1 or (squash and aimed != resized):
    raise UserError(
      f"timm's ViT cannot represent the preprocessing {weights.preprocess!r}: "
      "there height and width are enlarged by one factor, then cropped"
    )
  return {
    "num_classes": weights.num_classes,
    "input_size": [3, *weights.image_size],
    "fixed_input_size": True,
    "interpolation": method,
    "crop_pct": crop,
    "crop_mode": "squash" if squash else "center",
    "mean": list(weights.mean),
    "std": list(weights.std),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
  }


def _find_crop(size, resized):
  """Returns the crop_pct of which timm makes `resized`: floor(size / it)."""
  crop = round(size / resized, 3)
  if math.floor(size / crop) != resized:
    crop = size / (resized + 0.5)
  return crop
