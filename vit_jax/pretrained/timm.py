"""safetensors of timm's vision transformers, with or without config.json.

Reads VisionTransformer (ViT, DINOv2, CLIP, SigLIP, MAE, DeiT III), its
distilled form (DeiT), and DINOv3 of the class Eva. Query, key and value are one
matrix. The number of heads, activation and LayerNorm epsilon come from
"model_args" in config.json, else from the architecture's name.
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
from vit_jax.pretrained.weights import LazyArray, Weights, as_lazy

ORIGIN = "timm"
_NAME = "timm's ViT"
_PATCHES = "patch_embed.proj.weight"
_ACTIVATIONS = {
  "gelu": "gelu_erf",
  "gelu_tanh": "gelu_tanh",
  "quick_gelu": "gelu_quick",
  "silu": "silu",
}
_POOLING = {"token": "token", "avg": "gap", "map": "map"}

# Settings that the arrays do not show: heads that are not 64 wide, activations
# and epsilons. From timm's vision_transformer.py.
_SIXTEEN_HEADS = (
  r"vit_(base_patch16_gap_224|huge_(?!plus)|giant_(?!.*dinov2)|giantopt_"
  r"|gigantic_|so400m_).*"
)
_HEADS_128_WIDE = r"vit_7b_.*"
_TANH = (
  r"vit_(base_patch32_siglip|large_patch16_siglip_(gap_)?512"
  r"|so400m_patch16_siglip|giantopt_patch16_siglip).*"
)
_EPSILON_1E_5 = r"vit_.*_(clip|dinov3).*"
# Supported names, and exceptions whose arrays may look the same.
_ARCHITECTURE = r"(vit|deit|deit3|test_vit)_?[a-z0-9_]*"
_OTHER_ARCHITECTURE = (
  r".*_(rpn|rope|relpos|srelpos|dlittle|pe|lingbot|eupe|naflex)_.*"
)
_IS_DINOV3 = r"vit_.*_dinov3.*"

# Unsupported layers: patterns of names in the file, and descriptions.
_FOREIGN = (
  (r"blocks\.\d+\.mlp\.norm\.", "a LayerNorm within the MLP"),
  (r"blocks\.\d+\.attn\.norm\.", "a LayerNorm before attention's output"),
  (r"patch_embed\.backbone\.", "of a hybrid; use the published npz instead"),
)

# Arguments that do not change the forward pass, or that the arrays show.
_HARMLESS = {
  *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth"),
  *("num_heads", "mlp_ratio", "class_token", "no_embed_class", "global_pool"),
  *("fc_norm", "final_norm", "act_layer", "pos_embed", "weight_init"),
  *("fix_init", "dynamic_img_size", "strict_img_size"),
  *("reg_tokens", "init_values", "pre_norm", "qkv_bias", "qk_norm"),
  *("num_reg_tokens", "swiglu_mlp", "use_fc_norm", "use_abs_pos_emb"),
  *("rope_temperature", "swiglu_align_to", "pool_include_prefix"),
}


_WITH_TOKEN = Rule(POS_EMBEDDING, "pos_embed")
_WITHOUT_TOKEN = Rule(POS_EMBEDDING, "pos_embed", tables.NO_TOKEN)


def _make_rules(is_dinov3: bool, gated: bool) -> tuple[Rule, ...]:
  """Returns the rules of VisionTransformer, or of Eva for DINOv3."""
  attention = f"{folders.BLOCK}/MultiHeadDotProductAttention_0"
  mlp = f"{folders.BLOCK}/MlpBlock_0"
  rules, scales = [], ("ls1.gamma", "ls2.gamma")
  for i, name in enumerate(("gate", "Dense_0") if gated else ()):
    theirs, part = r"blocks.\1.mlp.fc1", (i, 2)  # the gate comes first
    if is_dinov3:
      theirs, part = f"{theirs}_{'gx'[i]}", None
    rules += dense_rules(f"{mlp}/{name}", theirs, part=part)
  if is_dinov3:
    scales = ("gamma_1", "gamma_2")
    for name in ("query", "value"):
      theirs = rf"blocks.\1.attn.{name[0]}_bias"
      rules.append(Rule(f"{attention}/{name}/bias", theirs, tables.FLAT))
  rules += [
    Rule("cls", "cls_token"),
    Rule("dist", "dist_token"),
    Rule("registers", "reg_token"),
    _WITH_TOKEN,
    *dense_rules("embedding", "patch_embed.proj", tables.CONV),
    *block_rules(
      r"blocks.\1",
      norms=("norm1", "norm2"),
      attention=("attn.qkv", "attn.proj"),
      mlp=("mlp.fc1", "mlp.fc2"),
      scales=scales,
    ),
    *norm_rules(f"{attention}/query_norm", r"blocks.\1.attn.q_norm"),
    *norm_rules(f"{attention}/key_norm", r"blocks.\1.attn.k_norm"),
    *norm_rules("Transformer/pre_norm", "norm_pre"),
    *norm_rules("Transformer/encoder_norm", "norm"),
    *norm_rules("fc_norm", "fc_norm"),
    *dense_rules("head_dist", "head_dist"),
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


def matches(
  arrays: Mapping[str, LazyArray], config: dict[str, Any] | None
) -> bool:
  """Returns whether a file is timm's, of any architecture."""
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
  is_dinov3 = bool(re.fullmatch(_IS_DINOV3, architecture))
  encoder, patch, notes = _describe(arrays, architecture, arguments)
  switches = _describe_switches(arrays, is_dinov3, encoder)
  switches["rope_base"] = arguments.get("rope_temperature", 100.0)
  if switches["layer_scale_init"]:  # used at initialisation only
    switches["layer_scale_init"] = arguments.get("init_values", 1e-5)
  gated = switches["mlp"] == "gated"
  classifier = _describe_pooling(fields, arguments, arrays)
  # Old config.json files have everything at the top level.
  pretrained = fields.get("pretrained_cfg", fields.values)
  pretrained = folders.Fields(source, pretrained)
  image_size, rows = _describe_grid(
    arrays, arguments, pretrained, patch, is_dinov3
  )
  switches["class_token"] = "cls_token" in arrays and classifier != "token"
  registers = switches["registers"]
  tokens = ("cls_token" in arrays) + switches["distillation_token"]
  if registers and "pos_embed" in arrays and rows == tokens + registers:
    switches["prefix_positions"] = "all"
  rule = _WITHOUT_TOKEN if rows < tokens else _WITH_TOKEN
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
      "activation": _find_activation(architecture, arguments, gated),
      "layer_norm_epsilon": (
        1e-5 if re.fullmatch(_EPSILON_1E_5, architecture) else 1e-6
      ),
      **{k: v for k, v in switches.items() if v != models.DEFAULTS[k]},
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
    weights = read_preparation(weights, pretrained)
  rules = (rule, *_make_rules(is_dinov3, gated))
  return tables.translate(rules, weights, arrays)


def _check_architecture(architecture, arguments, arrays):
  for pattern, meaning in _FOREIGN:
    found = [name for name in arrays if re.match(pattern, name)]
    if found:
      raise arguments.error(f"{found[0]} is not supported: it is {meaning}")
  if architecture and (
    not re.fullmatch(_ARCHITECTURE, architecture)
    or re.fullmatch(_OTHER_ARCHITECTURE, architecture)
  ):
    raise arguments.error(
      f"its config.json has the architecture {architecture!r}; supported are "
      "timm's ViTs such as 'vit_base_patch16_224', with those of CLIP, SigLIP, "
      "MAE, DINO and DeiT"
    )
  for name, value in arguments.values.items():
    # Dropout is for training only.
    known = name in _HARMLESS or name.endswith("_rate")
    if not known and value not in (None, False):
      raise arguments.error(
        f"its model argument {name}={value!r} is not known here"
      )


def _describe(arrays, architecture, arguments):
  """Returns the encoder's sizes, the patch size, and notes."""
  source = arguments.source
  width, _, patch, patch_width = tables.shape_of(source, arrays, _PATCHES, 4)
  if patch != patch_width:
    raise arguments.error(
      f"its patches are {patch}x{patch_width}; ours are square"
    )
  depth = tables.count_numbers(arrays, r"blocks\.(\d+)\.")
  inner = tables.shape_of(source, arrays, "blocks.0.mlp.fc2.weight", 2)[1]
  sizes = (width, depth, inner)
  known = [e.num_heads for e in variants.ENCODERS.values() if e[:3] == sizes]
  notes = ()
  if "num_heads" in arguments.values:
    heads = arguments.get("num_heads", 12)
  elif re.fullmatch(_SIXTEEN_HEADS, architecture):
    heads = 16
  elif re.fullmatch(_HEADS_128_WIDE, architecture):
    heads = width // 128
  elif known and "dinov3" not in architecture:
    heads = known[0]
  elif width % 64:
    raise arguments.error(
      "the number of attention heads is unknown, and the hidden size "
      f"{width} is not a multiple of 64; put its config.json beside it"
    )
  else:
    heads = width // 64
    notes = (f"the number of heads is unknown; {heads} are assumed, 64 wide",)
  if heads < 1 or width % heads:
    raise arguments.error(
      f"{heads} attention heads do not divide the hidden size {width}"
    )
  return variants.Encoder(*sizes, heads), patch, notes


def _describe_switches(arrays, is_dinov3, encoder):
  """Returns the options of `models.SWITCHES` that the arrays show."""
  inner = tables.width_of(arrays, "blocks.0.mlp.fc1.bias")
  gated = inner == 2 * encoder.mlp_dim or "blocks.0.mlp.fc1_g.weight" in arrays
  scales = ("blocks.0.ls1.gamma", "blocks.0.gamma_1")
  bias = "all" if "blocks.0.attn.qkv.bias" in arrays else "none"
  return {
    "distillation_token": "dist_token" in arrays,
    "registers": arrays["reg_token"].shape[1] if "reg_token" in arrays else 0,
    "patch_bias": "patch_embed.proj.bias" in arrays,
    "pre_norm": "norm_pre.weight" in arrays,
    "final_norm": "pooled" if "fc_norm.weight" in arrays else "tokens",
    "layer_scale_init": 1e-5 if any(name in arrays for name in scales) else 0.0,
    "qkv_bias": "qv" if "blocks.0.attn.q_bias" in arrays else bias,
    "qk_norm": "blocks.0.attn.q_norm.weight" in arrays,
    "mlp": "gated" if gated else "plain",
    "rope": "dinov3" if is_dinov3 else "none",
  }


def _find_activation(architecture, arguments, gated=False):
  default = "gelu_tanh" if re.fullmatch(_TANH, architecture) else "gelu"
  if "_quickgelu_" in architecture:
    default = "quick_gelu"
  if gated:
    default = "silu"
  name = arguments.get("act_layer", default)
  check_choice(f"{arguments.source}: act_layer", name, _ACTIVATIONS)
  return _ACTIVATIONS[name]


def _describe_pooling(fields, arguments, arrays):
  """Returns our `classifier`."""
  pooled = "token" if "cls_token" in arrays else "avg"
  if "attn_pool.latent" in arrays:
    pooled = "map"
  if "fc_norm.weight" in arrays:
    pooled = "avg"
  said = fields.values.get("global_pool", pooled)
  said = arguments.values.get("global_pool", said)
  # The mean of the patches needs no array of its own.
  if said not in (pooled, "avg") or (said == "avg" and pooled == "map"):
    raise arguments.error(
      f"global_pool is {said!r}, its arrays are for {pooled!r}"
    )
  # timm's attention pooling leaves these out by default.
  prefix = {"cls_token", "reg_token"} & arrays.keys()
  includes = arguments.values.get("pool_include_prefix", False)
  if bool(includes) != (said == "map" and bool(prefix)):
    raise arguments.error(
      f"pool_include_prefix is {includes} and global_pool {said!r}; our "
      "attention pooling always includes the tokens before the patches, the "
      "others never do"
    )
  return _POOLING[said]


def _describe_grid(arrays, arguments, pretrained, patch, is_dinov3):
  """Returns (h, w) in pixels, and how many extra tokens have positions."""
  source, size = arguments.source, pretrained.values.get("input_size")
  size = list(size)[1:] if isinstance(size, (list, tuple)) else size
  size = arguments.values.get("img_size") or size
  given = size is not None
  image_size = folders.Fields(source, {"img_size": size}).pair("img_size", 224)
  prefix = sum(
    arrays[name].shape[1]
    for name in ("cls_token", "dist_token", "reg_token")
    if name in arrays
  )
  if "pos_embed" not in arrays:
    if not is_dinov3 and arguments.values.get("pos_embed") not in ("", "none"):
      raise arguments.error(
        "pos_embed is missing, and its config.json does not have 'none'"
      )
    return image_size, prefix
  count = tables.shape_of(source, arrays, "pos_embed", 3)[1]
  num_patches = (image_size[0] // patch) * (image_size[1] // patch)
  if not given or count not in (num_patches, num_patches + prefix):
    # The size is missing, or does not match the embedding.
    is_square = math.isqrt(count) ** 2 == count
    num_patches = count if is_square else count - prefix
    grid = tables.square_grid(source, num_patches)
    image_size = (grid[0] * patch, grid[1] * patch)
  return image_size, count - num_patches


def read_preparation(weights: Weights, fields: folders.Fields) -> Weights:
  """Returns the weights with the preprocessing of a "pretrained_cfg"."""
  notes = list(weights.notes)
  crop = fields.get("crop_pct", 0.875)
  if not 0 < crop <= 1:
    raise fields.error(f"crop_pct is {crop}; it must be in (0, 1]")
  mode = fields.get("crop_mode", "center")
  if mode not in ("center", "squash"):
    notes.append(
      f"its authors prepare images with crop_mode={mode!r}; here it is a "
      "central crop"
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

  The weights must pass `check`.
  """
  options = weights.options()
  rules = _make_rules(options["rope"] != "none", options["mlp"] == "gated")
  params, with_token = dict(weights.params), True
  if "cls" in params and POS_EMBEDDING in params:
    table = params[POS_EMBEDDING].read()
    first = table[:, :1]
    # With registers, timm's class token already includes its position.
    if options["registers"] and options["prefix_positions"] == "tokens":
      params["cls"] = as_lazy(params["cls"].read() + first)
      first = np.zeros_like(first)
    # A first entry of zeros is omitted, because reading adds it.
    if not first.any() and not np.signbit(first).any():
      rules, with_token = (_WITHOUT_TOKEN, *rules), False
  weights = weights._replace(params=params)
  config = _make_config(weights, options, with_token)
  folders.write_folder(
    out, {"config.json": config}, tables.translate_back(rules, weights)
  )


# Supported options by architecture. An architecture's name implies a class and
# an epsilon that config.json cannot express; "model_args" has everything else.
_ANY = {
  "pos_embedding": ("learned", "none"),
  "pos_embedding_at": ("input",),
  "layer_scale_init": tables.ANY,
  "registers": tables.ANY,
  "classifier": ("token", "gap"),
  "class_token": (False, True),
  "final_norm": ("tokens", "pooled"),
}
_KINDS = {
  "deit_base_distilled_patch16_224": _ANY
  | {
    "layer_norm_epsilon": (1e-6,),
    "classifier": ("token",),
    "distillation_token": (True,),
    "registers": (0,),
    "pos_embedding": ("learned",),
  },
  "vit_giant_patch14_dinov2": _ANY
  | {
    "layer_norm_epsilon": (1e-6,),
    "mlp": ("gated",),
    "activation": ("silu",),
  },
  "vit_small_patch16_dinov3": _ANY
  | {
    "layer_norm_epsilon": (1e-5,),
    "rope": ("dinov3",),
    "rope_base": tables.ANY,
    "pos_embedding": ("none",),
    "qkv_bias": ("none", "qv"),
    "mlp": ("plain", "gated"),
    "activation": ("gelu_erf", "silu"),
  },
  "vit_base_patch32_clip_224": _ANY
  | {
    "layer_norm_epsilon": (1e-5,),
    "patch_bias": (False,),
    "pre_norm": (True,),
    "qkv_bias": ("all", "none"),
    "qk_norm": (False, True),
  },
  "vit_base_patch16_224": _ANY
  | {
    "layer_norm_epsilon": (1e-6,),
    "classifier": ("token", "gap", "map"),
    "qkv_bias": ("all", "none"),
    "qk_norm": (False, True),
    "prefix_positions": ("tokens", "all", "none"),
  },
}


def _find_kind(options) -> str:
  """Returns the architecture of `_KINDS` for these options."""
  if options["distillation_token"]:
    return "deit_base_distilled_patch16_224"
  if options["rope"] != "none":
    return "vit_small_patch16_dinov3"
  if options["mlp"] == "gated":
    return "vit_giant_patch14_dinov2"
  return (
    "vit_base_patch" + ("32_clip" if options["pre_norm"] else "16") + "_224"
  )


def check(weights: Weights) -> None:
  """Raises a UserError that names what the format cannot represent."""
  options = weights.options()
  tables.check_options(
    weights,
    _NAME,
    *folders.find_problems(weights),
    **_KINDS[_find_kind(options)],
  )
  make_pretrained(weights)


def _make_config(weights, options, with_token):
  sizes = variants.parse(weights.model["variant"])
  assert sizes.encoder is not None
  encoder, kind = sizes.encoder, _find_kind(options)
  names = {ours: theirs for theirs, ours in (_POOLING | _ACTIVATIONS).items()}
  pool, gated = names[options["classifier"]], options["mlp"] == "gated"
  arguments = {
    "img_size": list(weights.image_size),
    "patch_size": sizes.patch_size,
    "embed_dim": encoder.hidden_size,
    "depth": encoder.num_layers,
    "num_heads": encoder.num_heads,
    "mlp_ratio": _find_ratio(encoder.mlp_dim, encoder.hidden_size),
    "class_token": pool == "token" or options["class_token"],
    "global_pool": pool,
    # The value is used at initialisation only.
    "init_values": options["layer_scale_init"] or None,
    "qkv_bias": options["qkv_bias"] != "none",
  }
  if options["rope"] != "none":
    arguments |= {
      "num_reg_tokens": options["registers"],
      "rope_temperature": options["rope_base"],
      "swiglu_mlp": gated,
      # Without it, timm has the gate and the gated branch in one matrix.
      "swiglu_align_to": int(gated),
      "use_fc_norm": options["final_norm"] == "pooled",
    }
  else:
    positions = {"learned": "learn"}.get(options["pos_embedding"], "none")
    if gated:
      ratio = _find_ratio(2 * encoder.mlp_dim, encoder.hidden_size)
      arguments["mlp_ratio"] = ratio
    arguments |= {
      "reg_tokens": options["registers"],
      "no_embed_class": not with_token
      or options["prefix_positions"] == "none"
      or (options["registers"] > 0 and options["prefix_positions"] != "all"),
      "fc_norm": options["final_norm"] == "pooled",
      "final_norm": True,
      "pool_include_prefix": pool == "map"
      and (options["class_token"] or options["registers"] > 0),
      "pos_embed": positions,
      "pre_norm": options["pre_norm"],
      "qk_norm": options["qk_norm"],
      "act_layer": names[options["activation"]],
    }
  config = {
    "architecture": kind,
    "num_classes": weights.num_classes,
    "num_features": encoder.hidden_size,
    "global_pool": pool,
    "model_args": arguments,
    "pretrained_cfg": make_pretrained(weights),
  }
  if weights.class_names:
    config["label_names"] = list(weights.class_names)
  return config


def _find_ratio(mlp_dim, hidden_size):
  """Returns a ratio for which timm's int(hidden_size * ratio) is mlp_dim."""
  ratio = mlp_dim / hidden_size
  if int(hidden_size * ratio) != mlp_dim:
    ratio = (mlp_dim + 0.5) / hidden_size
  return ratio


def make_pretrained(weights: Weights, name: str = _NAME) -> dict[str, Any]:
  """Returns the "pretrained_cfg" of a model; `name` is for messages.

  Raises:
    UserError: preprocessing that it cannot represent.
  """
  squash, resized, method = folders.parse_preparation(
    weights.preprocess, weights.image_size, name
  )
  side = min(weights.image_size)
  crop = _find_crop(side, resized[weights.image_size.index(side)])
  aimed = tuple(math.floor(s / crop) for s in weights.image_size)
  if crop > 1 or (squash and aimed != resized):
    raise UserError(
      f"{name} cannot represent the preprocessing {weights.preprocess!r}: "
      "it enlarges height and width by one factor, then crops"
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
  """Returns a crop_pct such that timm's floor(size / crop_pct) is `resized`."""
  crop = round(size / resized, 3)
  if math.floor(size / crop) != resized:
    crop = size / (resized + 0.5)
  return crop
