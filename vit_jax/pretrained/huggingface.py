"""Folders of Hugging Face's ViT: config.json and safetensors.

ViTForImageClassification has its encoder under "vit." and a classifier beside
it; ViTModel is the encoder alone, with or without a "pooler", which is our
`pre_logits`. Transformers 5 has new names in memory, and the old ones in files.
Activation, epsilon and number of heads stand in config.json only.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax import models
from vit_jax.errors import check_choice
from vit_jax.models import variants
from vit_jax.pretrained import tables
from vit_jax.pretrained import torch_folders as folders
from vit_jax.pretrained.tables import Rule
from vit_jax.pretrained.torch_folders import (
  ATTENTION,
  block_rules,
  dense_rules,
  norm_rules,
)
from vit_jax.pretrained.warmstart import POS_EMBEDDING
from vit_jax.pretrained.weights import LazyArray, Weights

ORIGIN = "huggingface"
_NAME = "Hugging Face's ViT"
_PATCHES = "embeddings.patch_embeddings.projection"
_ACTIVATIONS = {
  "gelu": "gelu_erf",
  "gelu_python": "gelu_erf",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
}
# Pillow's filters by their numbers, all that average.
_FILTERS = {1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}
_BICUBIC = ("CLIP", "DeiT", "Bit", "Siglip")  # processors, by default
_HALF = (0.5, 0.5, 0.5)
# Fields of preprocessor_config.json that are read below, and those that change
# no pixels. Others are refused, unless they are off.
_READ = {
  *("size", "do_resize", "resample", "do_center_crop", "crop_size"),
  *("do_rescale", "rescale_factor", "do_normalize"),
  *("image_mean", "image_std", "image_processor_type"),
}
_HARMLESS = {
  *("feature_extractor_type", "processor_class"),
  *("auto_map", "data_format", "input_data_format", "return_tensors"),
  *("default_to_square", "device", "disable_grouping", "do_convert_rgb"),
}
_SINGLE_LABEL = "single_label_classification"
_MULTI_LABEL = "multi_label_classification"


def _make_rules(prefix: str) -> tuple[Rule, ...]:
  embeddings = f"{prefix}embeddings"
  block = rf"{prefix}encoder.layer.\1"
  names = (
    *("layernorm_before", "attention.output.dense", "layernorm_after"),
    *("intermediate.dense", "output.dense"),
  )
  rules = [
    Rule("cls", f"{embeddings}.cls_token"),
    Rule(POS_EMBEDDING, f"{embeddings}.position_embeddings"),
    *dense_rules("embedding", f"{prefix}{_PATCHES}", tables.CONV),
    *block_rules(block, names),
    *norm_rules("Transformer/encoder_norm", f"{prefix}layernorm"),
    *dense_rules("pre_logits", f"{prefix}pooler.dense"),
    *dense_rules("head", "classifier"),
  ]
  for name in ("query", "key", "value"):
    theirs = f"{block}.attention.attention.{name}"
    rules += dense_rules(f"{ATTENTION}/{name}", theirs)
  return tuple(rules)


def matches(
  arrays: Mapping[str, LazyArray], config: dict[str, Any] | None
) -> bool:
  """Returns whether a file is Hugging Face's, of this architecture or not."""
  if config is not None and "model_type" in config:
    return True
  return any(
    name.removeprefix("vit.") == f"{_PATCHES}.weight" for name in arrays
  )


def read(
  source: str,
  arrays: Mapping[str, LazyArray],
  config: dict[str, Any] | None,
  preprocessor: dict[str, Any] | None = None,
) -> Weights:
  """Returns the weights of a file that `matches`.

  Args:
    source: the file's name, for messages.
    arrays: of the file, or of all its parts.
    config: the contents of config.json.
    preprocessor: the contents of preprocessor_config.json, if there is one.

  Raises:
    UserError: no config.json, another architecture, or missing, extra or
      misshapen arrays.
  """
  fields = folders.Fields(source, config or {})
  if config is None:
    raise fields.error(
      "the config.json that belongs to it is missing; activation, epsilon and "
      "number of heads stand nowhere else"
    )
  if fields.get("model_type", "") != "vit":
    raise fields.error(
      f"its config.json is of the architecture {config.get('model_type')!r}; "
      "of Hugging Face's, 'vit' is read here"
    )
  arrays, notes = _drop_unused(arrays)
  prefix = "vit." if any(n.startswith("vit.") for n in arrays) else ""
  num_classes = tables.width_of(arrays, "classifier.bias")
  class_names, name_notes = _read_names(fields, num_classes)
  weights = Weights(
    ORIGIN,
    source,
    _read_model(fields, tables.width_of(arrays, f"{prefix}pooler.dense.bias")),
    fields.pair("image_size", 224),
    num_classes,
    class_names=class_names,
    loss=_read_loss(fields, num_classes),
    resize="huggingface",
    notes=(*notes, *name_notes),
  )
  weights = _read_preprocessor(weights, preprocessor)
  return tables.translate(_make_rules(prefix), weights, arrays)


def _read_loss(fields, num_classes) -> str:
  """Returns the loss; numbers that are not classes are an error."""
  problem = fields.values.get("problem_type")
  if problem == _MULTI_LABEL:
    return "sigmoid"
  # Of one output and no problem_type, transformers makes a regression.
  if problem not in (None, _SINGLE_LABEL) or num_classes == 1:
    raise fields.error(
      f"problem_type is {problem!r} in its config.json and the head has "
      f"{num_classes} outputs: numbers rather than classes; classification is "
      f"{_SINGLE_LABEL!r} with 2 or more, or {_MULTI_LABEL!r}"
    )
  return "softmax"


def _drop_unused(arrays):
  """Leaves out what no classification reads; returns the rest and notes.

  That is the mask token and decoder of masked image modelling, and a pooler
  beside a classifier, which ViTForImageClassification ignores.
  """
  unused = ("embeddings.mask_token", "decoder.")
  if "classifier.weight" in arrays:
    unused += ("pooler.",)
  rest = {
    name: x
    for name, x in arrays.items()
    if not name.removeprefix("vit.").startswith(unused)
  }
  out = ", ".join(sorted(arrays.keys() - rest.keys()))
  return rest, (f"left out, as no classification reads it: {out}",) * bool(out)


def _read_model(fields, representation_size):
  """Returns the arguments of `models.create` that config.json says."""
  encoder = variants.Encoder(
    fields.get("hidden_size", 768),
    fields.get("num_hidden_layers", 12),
    fields.get("intermediate_size", 3072),
    fields.get("num_attention_heads", 12),
  )
  if min(encoder) < 1 or encoder.hidden_size % encoder.num_heads:
    raise fields.error(
      f"its config.json has the sizes {tuple(encoder)}; they must be positive "
      "and the heads must divide the hidden size"
    )
  patch = fields.pair("patch_size", 16)
  if patch[0] != patch[1]:
    raise fields.error(f"its patches are {patch}; ours are square")
  needed = {"qkv_bias": True, "pooler_act": "tanh"}
  for name, value in needed.items():
    is_used = name != "pooler_act" or representation_size
    if is_used and fields.get(name, value) != value:
      raise fields.error(f"{name} is not {value!r}, which ours is")
  activation = fields.get("hidden_act", "gelu")
  check_choice(f"{fields.source}: hidden_act", activation, _ACTIVATIONS)
  return {
    "variant": tables.name_variant(encoder, patch[0], None),
    "classifier": "token",
    "representation_size": representation_size,
    "activation": _ACTIVATIONS[activation],
    "layer_norm_epsilon": fields.get("layer_norm_eps", 1e-12),
  }


def _read_names(fields, num_classes):
  """Returns the class names, None for placeholders; and notes."""
  labels = fields.get("id2label", {})
  try:
    names = [labels[i] for i in sorted(labels, key=int)]
  except ValueError as e:
    raise fields.error("id2label has keys that are no numbers") from e
  if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
    return None, ()
  return folders.get_names(names, num_classes)


def _read_preprocessor(weights, preprocessor):
  """Adds what preprocessor_config.json says to the weights."""
  if preprocessor is None:
    return folders.assume_pixels(weights, "preprocessor_config.json")
  source = f"{weights.source}: its preprocessor_config.json"
  fields = folders.Fields(source, preprocessor)
  for name, value in preprocessor.items():
    if name not in _READ | _HARMLESS and value and not name.startswith("_"):
      raise fields.error(f"{name}={value!r} is not known here")
  kind = fields.get("image_processor_type", "")
  kind = kind or fields.get("feature_extractor_type", "")
  number = fields.get("resample", 3 if kind.startswith(_BICUBIC) else 2)
  if number not in _FILTERS:
    raise fields.error(
      f"resample is {number}; of Pillow's filters there are 1 to 4 here"
    )
  scale = 255 * fields.get("rescale_factor", 1 / 255)
  if not fields.get("do_rescale", True) or not 0.999999 < scale < 1.000001:
    raise fields.error("pixels must be rescaled, and rescale_factor be 1/255")
  mean, std = (0.0,) * 3, (1.0,) * 3
  if fields.get("do_normalize", True):
    mean = fields.colour("image_mean", _HALF)
    std = fields.colour("image_std", _HALF)
  method, notes = folders.find_method(_FILTERS[number])
  return weights._replace(
    preprocess=_read_preparation(fields, kind, method, weights.image_size),
    mean=mean,
    std=std,
    notes=(*weights.notes, *notes),
  )


def _read_preparation(fields, kind, method, image_size) -> str:
  """Returns the preprocessing string.

  Raises:
    UserError: images that are not resized, or do not get the model's size.
  """
  if kind.startswith("ConvNext"):  # which crops or not by a rule of its own
    raise fields.error(f"{kind} is not read, but those of ViT, DeiT and CLIP")
  if not fields.get("do_resize", True):
    raise fields.error("do_resize is false; images must get the model's size")
  size, shorter = fields.values.get("size"), False
  if isinstance(size, dict) and "shortest_edge" in size:
    size, shorter = size["shortest_edge"], True
  elif isinstance(size, int):  # these take one number for the shorter side
    shorter = kind.startswith(("CLIP", "Bit"))
  name, found = "size", _get_size(fields, "size", size, image_size)
  resized = found
  if fields.get("do_center_crop", kind.startswith(("CLIP", "DeiT", "Bit"))):
    size, name = fields.values.get("crop_size"), "crop_size"
    found = _get_size(fields, name, size, image_size)
  elif shorter:
    raise fields.error(
      f"size is {fields.values['size']} and do_center_crop false; images would "
      "get different sizes"
    )
  if found != image_size:
    raise fields.error(
      f"{name} is {found}, and image_size {image_size} in its config.json; "
      "they must agree"
    )
  return folders.preparation_text(not shorter, resized, method, image_size)


def _get_size(fields, name, value, default):
  """Returns a field as (h, w): a number, a pair, or height and width."""
  if isinstance(value, dict):
    value = [value.get("height"), value.get("width")]
  if value is None:
    return default
  return folders.Fields(fields.source, {name: value}).pair(name, 0)


def write(weights: Weights, out: pathlib.Path) -> None:
  """Writes a folder that `from_pretrained` reads, of what passes `check`.

  It is a ViTForImageClassification, or without classes a ViTModel.
  """
  documents = {
    "config.json": _make_config(weights),
    "preprocessor_config.json": _make_preprocessor(weights),
  }
  rules = _make_rules("vit." if weights.num_classes else "")
  folders.write_folder(out, documents, tables.translate_back(rules, weights))


def check(weights: Weights) -> None:
  """Raises a UserError that names what the format cannot represent."""
  tables.check_options(
    weights,
    _NAME,
    *folders.find_problems(weights, with_head=weights.num_classes > 0),
    classifier=("token",),
    pos_embedding=("learned",),
    pos_embedding_at=("input",),
  )
  _make_preprocessor(weights)


def _make_config(weights):
  sizes = variants.parse(weights.model["variant"])
  assert sizes.encoder is not None
  options = models.DEFAULTS | weights.model
  activations = {"gelu_erf": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
  height, width = weights.image_size
  config = {
    "model_type": "vit",
    "architectures": [
      "ViTForImageClassification" if weights.num_classes else "ViTModel"
    ],
    "hidden_size": sizes.encoder.hidden_size,
    "num_hidden_layers": sizes.encoder.num_layers,
    "intermediate_size": sizes.encoder.mlp_dim,
    "num_attention_heads": sizes.encoder.num_heads,
    "hidden_act": activations[options["activation"]],
    "layer_norm_eps": options["layer_norm_epsilon"],
    "image_size": height if height == width else [height, width],
    "patch_size": sizes.patch_size,
    "encoder_stride": sizes.patch_size,
    "num_channels": 3,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "torch_dtype": np.dtype(weights.params["embedding/kernel"].dtype).name,
  }
  if "pre_logits/bias" in weights.params:
    config["pooler_act"] = "tanh"
    config["pooler_output_size"] = weights.params["pre_logits/bias"].shape[0]
  if weights.num_classes:
    count = range(weights.num_classes)
    names = weights.class_names or [f"LABEL_{i}" for i in count]
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    config["label2id"] = {name: i for i, name in enumerate(names)}
  if weights.loss == "sigmoid":
    config["problem_type"] = _MULTI_LABEL
  return config


def _make_preprocessor(weights):
  size = weights.image_size
  squash, resized, method = folders.parse_preparation(
    weights.preprocess, size, _NAME
  )
  height, width = resized
  # The processor of ViT does not crop.
  kind = "ViT" if resized == size else "DeiT"
  processor: dict[str, Any] = {"size": {"height": height, "width": width}}
  if not squash:
    kind, processor = "CLIP", {"size": {"shortest_edge": min(height, width)}}
  if kind != "ViT":
    processor["do_center_crop"] = True
    processor["crop_size"] = {"height": size[0], "width": size[1]}
  return {
    "image_processor_type": f"{kind}ImageProcessor",
    **processor,
    "do_resize": True,
    "resample": {"bilinear": 2, "bicubic": 3}[method],
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(weights.mean),
    "image_std": list(weights.std),
  }
