"""Folders of Hugging Face's ViT: config.json and safetensors.

ViTForImageClassification has its encoder under "vit." and a classifier beside
it; ViTModel is the encoder alone, with or without a "pooler", which is our
`pre_logits`. Transformers 5 has new names in memory and still writes the old
ones; both are read, the old ones are written. Activation, epsilon and number
of heads stand in config.json only.
"""

import math
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
_NEAREST = 0
_HALF = (0.5, 0.5, 0.5)
# Fields of preprocessor_config.json that are read below, and those that change
# no pixels. Others are refused, unless they are off.
_READ = {
  *("size", "do_resize", "resample", "do_center_crop", "crop_size"),
  *("crop_pct", "do_rescale", "rescale_factor", "do_normalize"),
  *("image_mean", "image_std"),
}
_HARMLESS = {
  *("image_processor_type", "feature_extractor_type", "processor_class"),
  *("auto_map", "data_format", "input_data_format", "return_tensors"),
  *("default_to_square", "device", "disable_grouping", "do_convert_rgb"),
}
# Processors that crop, and take one number for the shorter side, unless told
# otherwise; the first of them do the latter.
_SHORTER = ("CLIP", "ConvNext")
_CROPPING = ("CLIP", "DeiT")
_WHOLE_FROM = 384  # pixels, where ConvNext crops no more
_SINGLE_LABEL = "single_label_classification"
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
  multi_label = _check_problem(source, config, num_classes)
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


def _check_problem(source, config, num_classes) -> bool:
  """Returns whether the classes are independent of each other.

  Raises:
    UserError: the head's outputs are not classes.
  """
  problem = config.get("problem_type")
  if problem == _MULTI_LABEL:
    return True
  # Of one output and no problem_type, transformers makes a regression.
  if problem not in (None, _SINGLE_LABEL) or num_classes == 1:
    raise UserError(
      f"{source}: problem_type is {problem!r} in its config.json and the head "
      f"has {num_classes} outputs: numbers rather than classes; classification "
      f"is {_SINGLE_LABEL!r} with 2 or more, or {_MULTI_LABEL!r}"
    )
  return False


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
  for name, value in preprocessor.items():
    if name not in _READ | _HARMLESS and value and not name.startswith("_"):
      raise UserError(
        f"{source}: its preprocessor_config.json has {name}={value!r}, which "
        "is not known here"
      )
  number = hub.get_field(source, preprocessor, "resample", 2)
  if number == _NEAREST or number not in _FILTERS:
    raise UserError(
      f"{source}: resample is {number} in its preprocessor_config.json; of "
      "Pillow's filters there are 1 to 4 here, nearest that is bilinear"
    )
  note = (
    f"its authors resize with Pillow's {_FILTERS[number]} filter, "
    "which averages when it makes images smaller; ours is bilinear and does "
    "not, so that pixels differ a little"
  )
  mean, std = _read_normalization(source, preprocessor)
  return weights._replace(
    preprocess=_read_preparation(weights, preprocessor),
    mean=mean,
    std=std,
    notes=(*weights.notes, note),
  )


def _read_normalization(source, preprocessor):
  """Returns mean and standard deviation of pixels in [0, 1].

  From 0 to 255 they are multiplied by a factor before they are normalised.
  """
  mean, std = (0.0,) * 3, (1.0,) * 3
  if hub.get_field(source, preprocessor, "do_normalize", True):
    mean = hub.get_colour(source, preprocessor, "image_mean", _HALF)
    std = hub.get_colour(source, preprocessor, "image_std", _HALF)
  factor = 1.0
  if hub.get_field(source, preprocessor, "do_rescale", True):
    factor = hub.get_field(source, preprocessor, "rescale_factor", 1 / 255)
  if not factor:
    raise UserError(f"{source}: rescale_factor is 0; all images would be black")
  scale = 255 * factor
  if math.isclose(scale, 1, rel_tol=1e-6):
    return mean, std
  return tuple(x / scale for x in mean), tuple(x / scale for x in std)


def _read_preparation(weights, preprocessor):
  """Returns the preprocessing string.

  Raises:
    UserError: images that are not resized, or do not get the model's size.
  """
  source, image_size = weights.source, weights.image_size
  if not hub.get_field(source, preprocessor, "do_resize", True):
    raise UserError(
      f"{source}: do_resize is false in its preprocessor_config.json; images "
      "of all sizes have to get the model's"
    )
  kind = str(
    preprocessor.get("image_processor_type")
    or preprocessor.get("feature_extractor_type")
  )
  size, shorter = preprocessor.get("size"), False
  if isinstance(size, dict) and "shortest_edge" in size:
    size, shorter = size["shortest_edge"], True
  elif isinstance(size, int):
    shorter = kind.startswith(_SHORTER)
  resized = _get_size(source, "size", size, image_size)
  crops = hub.get_field(
    source, preprocessor, "do_center_crop", kind.startswith(_CROPPING)
  )
  name, found = "size", resized
  if crops:
    crop_size = preprocessor.get("crop_size")
    name, found = "crop_size", _get_size(source, name, crop_size, image_size)
  if preprocessor.get("crop_pct") is not None:
    resized, shorter, crops = _apply_crop_pct(
      source, preprocessor, resized, shorter
    )
  if found != image_size:
    raise UserError(
      f"{source}: {name} is {found} in its preprocessor_config.json, and "
      f"image_size {image_size} in its config.json; they must agree"
    )
  if shorter and not crops:
    raise UserError(
      f"{source}: size is {preprocessor['size']} and do_center_crop false in "
      "its preprocessor_config.json; images would get different sizes"
    )
  if not crops:
    return hub.Preparation().to_text(image_size)
  return hub.Preparation(not shorter, resized).to_text(image_size)


def _apply_crop_pct(source, preprocessor, size, shorter):
  """Returns (resized, shorter, crops) by the rule of ConvNext's processor.

  The shorter side gets size / crop_pct, then the middle is cropped; from 384 on
  images are resized whole.
  """
  crop = hub.get_field(source, preprocessor, "crop_pct", 1.0)
  if not 0 < crop <= 1 or not shorter:
    raise UserError(
      f"{source}: crop_pct is {crop} in its preprocessor_config.json; it must "
      "be in (0, 1], and size have a shortest_edge"
    )
  if size[0] >= _WHOLE_FROM:
    return size, False, False
  side = int(size[0] / crop)
  return (side, side), True, True


def _get_size(source, name, value, default):
  """Returns a field as (h, w): a number, a pair, or height and width."""
  if isinstance(value, dict):
    value = [value.get("height"), value.get("width")]
  if value is None:
    return default
  return hub.get_pair(source, {name: value}, name, 0)


def write(weights: Weights, out: pathlib.Path) -> None:
  """Writes a folder that `from_pretrained` reads.

  It is a ViTForImageClassification, or without classes a ViTModel.

  Raises:
    UserError: see `check`; or there is something at `out`.
  """
  check(weights)
  documents = {
    "config.json": _make_config(weights),
    "preprocessor_config.json": _make_preprocessor(weights),
  }
  rules = _make_rules("vit." if weights.num_classes else "", modern=False)
  hub.write_folder(out, documents, translate_back(rules, weights))


def check(weights: Weights) -> None:
  """Raises a UserError that names what the format cannot represent."""
  weights.create_model()  # checks the configuration
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
      f"Hugging Face's ViT cannot represent {', '.join(problems)}"
    )
  _make_preprocessor(weights)


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
