"""Hugging Face's vision encoders: names in files, fields of config.json.

These tables are the data of huggingface.py, which reads and writes. Names are
those in files; transformers 5 uses others in memory.
"""

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from vit_jax.pretrained import tables
from vit_jax.pretrained import torch_folders as folders
from vit_jax.pretrained.tables import ANY, POSITIVE, Rule
from vit_jax.pretrained.torch_folders import (
  BLOCK,
  block_rules,
  dense_rules,
  norm_rules,
)
from vit_jax.pretrained.warmstart import POS_EMBEDDING


class Layout(NamedTuple):
  """A model class of transformers.

  Attributes:
    name: of the class.
    model_type: in config.json.
    classifier: our option of that name.
    head: name of the classification head, "" without one.
    projection: name of CLIP's projection, "" without one.
    prefix: of the encoder's names when writing.
    rules: other layers after the encoder; they override the rules of `head`.
    unused: prefixes of the encoder's names that do not affect the output.
    nested: whether the encoder's fields are in "vision_config".
    when: fields that distinguish it from similar classes.
    fixed, filled: as in `Family`.
  """

  name: str
  model_type: str
  classifier: str
  head: str = ""
  projection: str = ""
  prefix: str = ""
  rules: tuple[Rule, ...] = ()
  unused: tuple[str, ...] = ()
  nested: bool = False
  when: Mapping[str, Any] = {}
  fixed: Mapping[str, Any] = {}
  filled: Mapping[str, tuple[int, float]] = {}


class Family(NamedTuple):
  """Models with the same names and the same computation.

  Attributes:
    title: for messages.
    layouts: its classes; the first that fits is used.
    patches: name of the patch embedding.
    rules: the encoder's names, without their prefix.
    fields: {field of config.json: default}.
    fixed: our options that have the same non-default value in all of them.
    options: allowed values of other options, see `tables.check_options`.
    gated_rules: rules of a gated MLP, where they differ.
    pixels: normalisation if there is no preprocessor_config.json.
    resize: method for position embeddings.
    any_size: whether the position embedding is resized automatically.
    square: whether images must be square.
    filled: {name: (rank, value)} of arrays [1 ... d] that transformers expects
      in a file although no output depends on them.
  """

  title: str
  layouts: tuple[Layout, ...]
  patches: str
  rules: tuple[Rule, ...]
  fields: Mapping[str, Any]
  fixed: Mapping[str, Any] = {}
  options: Mapping[str, Container] = {}
  gated_rules: tuple[Rule, ...] = ()
  pixels: folders.Pixels = folders.IMAGENET
  resize: str = "huggingface"
  any_size: bool = False
  square: bool = True
  filled: Mapping[str, tuple[int, float]] = {}


_SIZES = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "image_size": 224,
}
_MLP = f"{BLOCK}/MlpBlock_0"
_QKV = {"qkv_bias": ("all", "none")}

# --- ViT, DeiT, MAE ---

_BLOCK = r"encoder.layer.\1"
_PATCHES = "embeddings.patch_embeddings.projection"
_AROUND_BLOCKS = (
  Rule("cls", "embeddings.cls_token"),
  Rule("dist", "embeddings.distillation_token"),
  Rule("registers", "embeddings.register_tokens"),
  Rule(POS_EMBEDDING, "embeddings.position_embeddings"),
  *dense_rules("embedding", _PATCHES, tables.CONV),
  *norm_rules("Transformer/encoder_norm", "layernorm"),
  *dense_rules("pre_logits", "pooler.dense"),
)
_ATTENTION = tuple(
  f"attention.{name}"
  for name in (
    "attention.query",
    "attention.key",
    "attention.value",
    "output.dense",
  )
)

VIT = Family(
  "Hugging Face's ViT",
  (
    Layout(
      "ViTForImageClassification",
      "vit",
      "token",
      head="classifier",
      prefix="vit.",
      unused=("pooler.",),
    ),
    Layout("ViTModel", "vit", "token"),
  ),
  _PATCHES,
  (
    *_AROUND_BLOCKS,
    *block_rules(
      _BLOCK,
      norms=("layernorm_before", "layernorm_after"),
      attention=_ATTENTION,
      mlp=("intermediate.dense", "output.dense"),
    ),
  ),
  {
    **_SIZES,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "patch_size": 16,
    "qkv_bias": True,
    "pooler_act": "tanh",
  },
  options=_QKV,
  pixels=folders.HALF,
  square=False,
)
DEIT = VIT._replace(
  title="Hugging Face's DeiT",
  layouts=(
    # Uses the class token only. Our model averages two heads, so its first one
    # has twice the values and its second one zeros.
    Layout(
      "DeiTForImageClassification",
      "deit",
      "token",
      head="classifier",
      prefix="deit.",
      unused=("pooler.",),
      rules=(
        Rule("head/kernel", "classifier.weight", tables.TWICE_LINEAR),
        Rule("head/bias", "classifier.bias", tables.TWICE),
        Rule("head_dist/(kernel|bias)", ""),
      ),
    ),
    Layout(
      "DeiTForImageClassificationWithTeacher",
      "deit",
      "token",
      head="cls_classifier",
      prefix="deit.",
      unused=("pooler.",),
      rules=tuple(dense_rules("head_dist", "distillation_classifier")),
    ),
    Layout("DeiTModel", "deit", "token"),
  ),
  fixed={"distillation_token": True},
  pixels=folders.IMAGENET,
)
MAE = VIT._replace(
  title="Hugging Face's MAE",
  layouts=(Layout("ViTMAEModel", "vit_mae", "gap", prefix="vit."),),
  fields={k: v for k, v in VIT.fields.items() if k != "pooler_act"},
  fixed={"class_token": True},
  pixels=folders.IMAGENET,
  square=True,
)

# --- DINO ---

_SCALES = ("layer_scale1.lambda1", "layer_scale2.lambda1")
_SCALED = {"layer_scale_init": POSITIVE, "mlp": ("plain", "gated")}

DINOV2 = Family(
  "Hugging Face's DINOv2",
  (
    Layout(
      "Dinov2ForImageClassification",
      "dinov2",
      "token+gap",
      head="classifier",
      prefix="dinov2.",
    ),
    Layout("Dinov2Model", "dinov2", "token"),
  ),
  _PATCHES,
  (
    *_AROUND_BLOCKS,
    *block_rules(
      _BLOCK,
      norms=("norm1", "norm2"),
      attention=_ATTENTION,
      mlp=("mlp.fc1", "mlp.fc2"),
      scales=_SCALES,
    ),
  ),
  {
    **_SIZES,
    "mlp_ratio": 4.0,
    "use_swiglu_ffn": False,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "qkv_bias": True,
    "layerscale_value": 1.0,
  },
  options=_QKV | _SCALED,
  # One matrix: first the gate, then the gated branch.
  gated_rules=(
    *dense_rules(f"{_MLP}/gate", f"{_BLOCK}.mlp.weights_in", part=(0, 2)),
    *dense_rules(f"{_MLP}/Dense_0", f"{_BLOCK}.mlp.weights_in", part=(1, 2)),
    *dense_rules(f"{_MLP}/Dense_1", f"{_BLOCK}.mlp.weights_out"),
  ),
  any_size=True,
  filled={"embeddings.mask_token": (2, 0.0)},
)
DINOV2_REGISTERS = DINOV2._replace(
  title="Hugging Face's DINOv2 with registers",
  layouts=(
    Layout(
      "Dinov2WithRegistersForImageClassification",
      "dinov2_with_registers",
      "token+gap",
      head="classifier",
      prefix="dinov2_with_registers.",
    ),
    Layout("Dinov2WithRegistersModel", "dinov2_with_registers", "token"),
  ),
  fields={**DINOV2.fields, "patch_size": 16, "num_register_tokens": 4},
  options={**DINOV2.options, "registers": POSITIVE},
  resize="timm",
)
DINOV3 = Family(
  "Hugging Face's DINOv3",
  (Layout("DINOv3ViTModel", "dinov3_vit", "token"),),
  "embeddings.patch_embeddings",
  (
    *_AROUND_BLOCKS[:3],
    *dense_rules("embedding", "embeddings.patch_embeddings", tables.CONV),
    *norm_rules("Transformer/encoder_norm", "norm"),
    *block_rules(
      r"layer.\1",
      norms=("norm1", "norm2"),
      attention=tuple(f"attention.{x}_proj" for x in "qkvo"),
      mlp=("mlp.up_proj", "mlp.down_proj"),
      scales=_SCALES,
      gate="mlp.gate_proj",
    ),
  ),
  {
    **_SIZES,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "patch_size": 16,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "layerscale_value": 1.0,
    "use_gated_mlp": False,
    "num_register_tokens": 0,
    "rope_theta": 100.0,
  },
  fixed={"rope": "dinov3", "pos_embedding": "none"},
  options={
    **_SCALED,
    "qkv_bias": ("all", "qv", "none"),
    "registers": ANY,
    "rope_base": ANY,
  },
  any_size=True,
  square=False,
  filled={"embeddings.mask_token": (3, 0.0)},
)

# --- SigLIP, CLIP: alone, or beside a text tower ---

_TOWER = (
  Rule("cls", "embeddings.class_embedding", tables.FLAT),
  Rule(POS_EMBEDDING, "embeddings.position_embedding.weight", tables.ROWS),
  *dense_rules("embedding", "embeddings.patch_embedding", tables.CONV),
  *norm_rules("Transformer/pre_norm", "pre_layrnorm"),  # sic
  *norm_rules("Transformer/encoder_norm", "post_layernorm"),
  *block_rules(
    r"encoder.layers.\1",
    norms=("layer_norm1", "layer_norm2"),
    attention=tuple(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
    mlp=("mlp.fc1", "mlp.fc2"),
  ),
)


def _join_heads() -> list[Rule]:
  """Returns the rules of the pooling's query, key and value, in one array."""
  rules = []
  for i, name in enumerate(("query", "key", "value")):
    path = f"{folders.POOL}/MultiHeadDotProductAttention_0/{name}"
    theirs = "head.attention.in_proj"
    rules += [
      Rule(f"{path}/kernel", f"{theirs}_weight", tables.LINEAR, (i, 3)),
      Rule(f"{path}/bias", f"{theirs}_bias", tables.FLAT, (i, 3)),
    ]
  return rules


SIGLIP = Family(
  "Hugging Face's SigLIP",
  (
    Layout(
      "SiglipForImageClassification",
      "siglip",
      "gap",
      head="classifier",
      prefix="vision_model.",
      unused=("head.",),
      nested=True,
    ),
    Layout(
      "SiglipVisionModel",
      "siglip_vision_model",
      "gap",
      prefix="vision_model.",
      unused=("head.",),
      when={"vision_use_head": False},
    ),
    Layout(
      "SiglipVisionModel", "siglip_vision_model", "map", prefix="vision_model."
    ),
  ),
  "embeddings.patch_embedding",
  (
    *_TOWER,
    *folders.pool_rules(
      "head.probe",
      "head.attention.out_proj",
      "head.layernorm",
      ("head.mlp.fc1", "head.mlp.fc2"),
    ),
    *_join_heads(),
  ),
  {
    **_SIZES,
    "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "patch_size": 16,
    "vision_use_head": True,
  },
  pixels=folders.HALF,
)
CLIP = Family(
  "Hugging Face's CLIP",
  (
    # The last LayerNorm is not used.
    Layout(
      "CLIPForImageClassification",
      "clip",
      "gap",
      head="classifier",
      prefix="vision_model.",
      unused=("post_layernorm.",),
      nested=True,
      fixed={"class_token": True, "final_norm": "none"},
      filled={
        "post_layernorm.weight": (1, 1.0),
        "post_layernorm.bias": (1, 0.0),
      },
    ),
    Layout(
      "CLIPVisionModelWithProjection",
      "clip_vision_model",
      "token",
      projection="visual_projection",
      prefix="vision_model.",
    ),
    Layout(
      "CLIPVisionModel", "clip_vision_model", "token", prefix="vision_model."
    ),
  ),
  "embeddings.patch_embedding",
  _TOWER,
  {
    **_SIZES,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "patch_size": 32,
  },
  fixed={"patch_bias": False, "pre_norm": True},
  pixels=folders.CLIP,
)

# In the order in which writing tries them.
ALL = (VIT, DEIT, DINOV2, DINOV2_REGISTERS, DINOV3, SIGLIP, CLIP, MAE)
BY_TYPE = {
  layout.model_type: family for family in ALL for layout in family.layouts
} | {
  "siglip": SIGLIP,
  "clip": CLIP,
  "metaclip_2": CLIP,
  "metaclip_2_vision_model": CLIP,
}
# Why other architectures are not supported.
_TEXT = "that is a text tower without a vision encoder"
_NAFLEX = (
  "that is SigLIP 2's NaFlex, which takes any number of patches; the fixed "
  "resolutions, such as google/siglip2-base-patch16-224, are 'siglip'"
)
REASONS = {
  "siglip2": _NAFLEX,
  "siglip2_vision_model": _NAFLEX,
  "clip_text_model": _TEXT,
  "siglip_text_model": _TEXT,
  "siglip2_text_model": _TEXT,
  "metaclip_2_text_model": _TEXT,
  "aimv2": "it has RMSNorm where ours has LayerNorm",
  "aimv2_vision_model": "it has RMSNorm where ours has LayerNorm",
  "beit": "its blocks have a bias for relative positions, ours have none",
  "data2vec-vision": (
    "its blocks have a bias for relative positions, ours have none"
  ),
  "dinov3_convnext": "it is a convolutional network",
  "swin": "its attention is windowed",
  "ijepa": "it has not been verified",
}
