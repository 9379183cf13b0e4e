"""Folders of Hugging Face's ViT: config.json and safetensors.

ViTForImageClassification has its encoder under "vit." and a classifier beside
it; ViTModel is the encoder alone, with or without a "pooler", which is our
`pre_logits`. Transformers 5 has new names in memory and still writes the old
ones; both are read, the old ones are written. Activation, epsilon and number
of heads stand in config.json only.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.pretrained import hub
from vit_jax.pretrained.hub import dense_rules, norm_rules, out_rules
from vit_jax.pretrained.weights import (
  CONV,
  POS_EMBEDDING,
  Rule,
  Weights,
  count_numbers,
  translate,
  translate_back,
  width_of,
)
from vit_jax.state import LazyArray

ORIGIN = "huggingface"
_PATCHES = "embeddings.patch_embeddings.projection"
_ACTIVATIONS = {
  "gelu": "gelu_erf",
  "gelu_python": "gelu_erf",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
}
# Pillow's filters by their numbers.
_FILTERS = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}
_HALF = (0.5, 0.5, 0.5)
_MULTI_LABEL = "multi_label_classification"


def _make_rules(prefix: str, modern: bool) -> tuple[Rule, ...]:
  embeddings = f"{prefix}embeddings"
  ours = r"Transformer/encoderblock_(\d+)"
  attention = f"{ours}/MultiHeadDotProductAttention_0"
  if modern:
    block = rf"{prefix}layers.\1"
    names = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    out, dense_0, dense_1 = "attention.o_proj", "mlp.fc1", "mlp.fc2"
  else:
    block = rf"{prefix}encoder.layer.\1"
    names = tuple(f"attention.attention.{n}" for n in ("query", "key", "value"))
    out, dense_0 = "attention.output.dense", "intermediate.dense"
    dense_1 = "output.dense"
  query, key, value = names
  return (
    Rule("cls", f"{embeddings}.cls_token"),
    Rule(POS_EMBEDDING, f"{embeddings}.position_embeddings"),
    *dense_rules("embedding", f"{prefix}{_PATCHES}", CONV),
    *norm_rules(f"{ours}/LayerNorm_0", f"{block}.layernorm_before"),
    *dense_rules(f"{attention}/query", f"{block}.{query}"),
    *dense_rules(f"{attention}/key", f"{block}.{key}"),
    *dense_rules(f"{attention}/value", f"{block}.{value}"),
    *out_rules(f"{attention}/out", f"{block}.{out}"),
    *norm_rules(f"{ours}/LayerNorm_1", f"{block}.layernorm_after"),
    *dense_rules(f"{ours}/MlpBlock_0/Dense_0", f"{block}.{dense_0}"),
    *dense_rules(f"{ours}/MlpBlock_0/Dense_1", f"{block}.{dense_1}"),
    *norm_rules("Transformer/encoder_norm", f"{prefix}layernorm"),
    *dense_rules("pre_logits", f"{prefix}pooler.dense"),
    *dense_rules("head", "classifier"),
  )


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
  if config is None:
    raise UserError(
      f"{source}: the config.json that belongs to it is missing; activation, "
      "epsilon and number of heads stand nowhere else"
    )
  if config.get("model_type") != "vit":
    raise UserError(
      f"{source}: its config.json is of the architecture "
      f"{config.get('model_type')!r}; of Hugging Face's, 'vit' is read here"
    )
  arrays, notes = _drop_unused(arrays)
  prefix = "vit." if any(n.startswith("vit.") for n in arrays) else ""
  modern = any(name.startswith(f"{prefix}layers.") for name in arrays)
  blocks = rf"{re.escape(prefix)}(?:encoder\.layer|layers)\.(\d+)\."
  num_layers = count_numbers(arrays, blocks)
  image_size = hub.get_pair(source, config, "image_size", 224)
  num_classes = width_of(arrays, "classifier.bias")
  representation_size = width_of(arrays, f"{prefix}pooler.dense.bias")
  model = _read_model(source, config, representation_size)
  num_layers_said = hub.get_field(source, config, "num_hidden_layers", 12)
  if num_layers_said != num_layers:
    raise UserError(
      f"{source}: its config.json has {num_layers_said} layers, the file "
      f"{num_layers}"
    )
  class_names, name_notes = _read_names(source, config, num_classes)
  multi_label = config.get("problem_type") == _MULTI_LABEL
  weights = Weights(
    ORIGIN,
    source,
    model,
    image_size,
    num_classes,
    params={},
    class_names=class_names,
    loss="sigmoid" if multi_label else "softmax",
    resize="huggingface",
    notes=(*notes, *name_notes),
  )
  weights = _read_preprocessor(weights, preprocessor)
  rules = _make_rules(prefix, modern)
  params = translate(rules, weights.shapes(), arrays, source)
  return weights._replace(params=params)


def _drop_unused(arrays):
  """Leaves out what no classification reads; returns the rest and notes."""
  classifies = "classifier.weight" in arrays
  unused = {
    "the mask token and decoder of masked image modelling": lambda name: (
      name.endswith("embeddings.mask_token") or name.startswith("decoder.")
    ),
    # ViTForImageClassification makes no pooler and ignores a file's.
    "the pooler, which is not before the classifier": lambda name: (
      classifies and name.removeprefix("vit.").startswith("pooler.")
    ),
  }
  notes = [
    f"left out: {what}"
    for what, is_unused in unused.items()
    if any(map(is_unused, arrays))
  ]
  rest = {
    name: x
    for name, x in arrays.items()
    if not any(is_unused(name) for is_unused in unused.values())
  }
  return rest, notes


def _read_model(source, config, representation_size):
  """Returns the arguments of `models.create` that config.json says."""
  encoder = variants.Encoder(
    hub.get_field(source, config, "hidden_size", 768),
    hub.get_field(source, config, "num_hidden_layers", 12),
    hub.get_field(source, config, "intermediate_size", 3072),
    hub.get_field(source, config, "num_attention_heads", 12),
  )
  if min(encoder) < 1 or encoder.hidden_size % encoder.num_heads:
    raise UserError(
      f"{source}: its config.json has the sizes {tuple(encoder)}; they must be "
      "positive and the heads must divide the hidden size"
    )
  patch = hub.get_pair(source, config, "patch_size", 16)
  if patch[0] != patch[1]:
    raise UserError(f"{source}: its patches are {patch}; ours are square")
  activation = hub.get_field(source, config, "hidden_act", "gelu")
  if activation not in _ACTIVATIONS:
    raise UserError(
      f"{source}: hidden_act is {activation!r}; there are "
      f"{', '.join(_ACTIVATIONS)}"
    )
  if not hub.get_field(source, config, "qkv_bias", True):
    raise UserError(f"{source}: qkv_bias is false; our attention has biases")
  pooler = hub.get_field(source, config, "pooler_act", "tanh")
  if representation_size and pooler != "tanh":
    raise UserError(f"{source}: pooler_act is {pooler!r}; ours is 'tanh'")
  return {
    "variant": variants.name_of(encoder, patch[0], None),
    "classifier": "token",
    "representation_size": representation_size,
    "activation": _ACTIVATIONS[activation],
    "layer_norm_epsilon": hub.get_field(
      source, config, "layer_norm_eps", 1e-12
    ),
  }


def _read_names(source, config, num_classes):
  """Returns the class names, None for placeholders; and notes."""
  labels = hub.get_field(source, config, "id2label", {})
  try:
    names = [labels[i] for i in sorted(labels, key=int)]
  except ValueError as e:
    raise UserError(
      f"{source}: id2label has keys that are no numbers in its configuration"
    ) from e
  if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
    return None, ()
  return hub.get_names(names, num_classes)


def _read_preprocessor(weights, preprocessor):
  """Adds what preprocessor_config.json says to the weights."""
  source = weights.source
  if preprocessor is None:
    note = (
      "there is no preprocessor_config.json; pixels are taken to be in "
      "[-1, 1], of images that were resized whole"
    )
    return weights._replace(notes=(*weights.notes, note))
  number = hub.get_field(source, preprocessor, "resample", 2)
  note = (
    f"its authors resize with Pillow's {_FILTERS.get(number, number)} filter, "
    "which averages when it makes images smaller; ours is bilinear and does "
    "not, so that pixels differ a little"
  )
  normalised = hub.get_field(source, preprocessor, "do_normalize", True)
  if not normalised:
    mean, std = (0.0,) * 3, (1.0,) * 3
  else:
    mean = hub.get_colour(source, preprocessor, "image_mean", _HALF)
    std = hub.get_colour(source, preprocessor, "image_std", _HALF)
  return weights._replace(
    preprocess=_read_preparation(weights, preprocessor),
    mean=mean,
    std=std,
    notes=(*weights.notes, note),
  )


def _read_preparation(weights, preprocessor):
  """Returns the preprocessing string."""
  size = preprocessor.get("size")
  crops = hub.get_field(weights.source, preprocessor, "do_center_crop", False)
  shorter = isinstance(size, dict) and "shortest_edge" in size
  if isinstance(size, dict):
    edge = size.get("shortest_edge")
    size = edge if shorter else [size.get("height"), size.get("width")]
  resized = hub.get_pair(
    weights.source, {"size": size}, "size", weights.image_size[0]
  )
  if not shorter and not crops:
    # What the images are resized to is what the model takes.
    return hub.Preparation().to_text(weights.image_size)
  return hub.Preparation(not shorter, resized).to_text(weights.image_size)


def write(weights: Weights, out: pathlib.Path) -> None:
  """Writes a folder that `from_pretrained` reads.

  It is a ViTForImageClassification, or without classes a ViTModel.

  Raises:
    UserError: something that the format cannot say, or a folder that is there.
  """
  weights.create_model()  # checks the configuration
  _check_sayable(weights)
  documents = {
    "config.json": _make_config(weights),
    "preprocessor_config.json": _make_preprocessor(weights),
  }
  rules = _make_rules("vit." if weights.num_classes else "", modern=False)
  hub.write_folder(out, documents, translate_back(rules, weights))


def _check_sayable(weights):
  options = {"classifier": "token", "pos_embedding": "learned"}
  options["pos_embedding_at"] = "input"
  problems = [
    f"{name} {weights.model[name]!r}"
    for name, value in options.items()
    if weights.model.get(name, value) != value
  ]
  sizes = variants.parse(weights.model["variant"])
  if sizes.encoder is None or sizes.units is not None:
    problems.append(f"the ResNet of {weights.model['variant']}")
  if "pre_logits/kernel" in weights.params and weights.num_classes:
    problems.append("a pre_logits layer together with a head")
  if problems:
    raise UserError(
      f"Hugging Face's ViT cannot say {', '.join(problems)}; convert "
      f"{weights.source} to orbax instead"
    )


def _make_config(weights):
  sizes = variants.parse(weights.model["variant"])
  assert sizes.encoder is not None
  activation = weights.model.get("activation", "gelu_tanh")
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
    "hidden_act": {"gelu_erf": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[
      activation
    ],
    "layer_norm_eps": weights.model.get("layer_norm_epsilon", 1e-6),
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
  """The nearest that there is: bilinear, though Pillow's averages."""
  preparation = hub.parse_preparation(
    weights.preprocess, weights.image_size, "Hugging Face's ViT"
  )
  height, width = weights.image_size
  resized = preparation.resized or weights.image_size
  processor = {
    "do_resize": True,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(weights.mean),
    "image_std": list(weights.std),
  }
  whole = {"height": resized[0], "width": resized[1]}
  if preparation == hub.Preparation():
    return {
      "image_processor_type": "ViTImageProcessor",
      "size": whole,
      **processor,
    }
  # The processor of ViT does not crop.
  squash = preparation.squash
  return {
    "image_processor_type": (
      "DeiTImageProcessor" if squash else "CLIPImageProcessor"
    ),
    "size": whole if squash else {"shortest_edge": min(resized)},
    "do_center_crop": True,
    "crop_size": {"height": height, "width": width},
    **processor,
  }
