"""Folders of Hugging Face's vision encoders: config.json and safetensors.

`families` has the tables. If a model has a text tower, only its vision tower is
read. Activation, epsilon and number of heads are only in config.json.
"""

import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax import models
from vit_jax.data.sizes import scale_side
from vit_jax.errors import UserError, check_choice
from vit_jax.models import variants
from vit_jax.pretrained import families, tables
from vit_jax.pretrained import torch_folders as folders
from vit_jax.pretrained.families import Family, Layout
from vit_jax.pretrained.tables import Rule
from vit_jax.pretrained.warmstart import by
from vit_jax.pretrained.weights import LazyArray, Weights

ORIGIN = "huggingface"
_ACTIVATIONS = {
  "gelu": "gelu_erf",
  "gelu_python": "gelu_erf",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "quick_gelu": "gelu_quick",
  "silu": "silu",
  "swish": "silu",
}
# Fields of config.json: biases of query, key, value -> our option.
_BIASES = {
  (True, True, True): "all",
  (True, False, True): "qv",
  (False, False, False): "none",
}
# Prefixes of arrays that no output depends on, in any family.
_UNUSED = (
  *("embeddings.mask_token", "decoder.", "text_model.", "text_projection."),
  *("logit_scale", "logit_bias"),
)
# Supported filters of Pillow, by number.
_FILTERS = {1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}
_BICUBIC = ("CLIP", "DeiT", "Bit", "Siglip")  # processors with this default
# Fields of preprocessor_config.json that are read below, and fields that do not
# affect pixels. Others raise an error unless they are off.
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


def matches(
  arrays: Mapping[str, LazyArray], config: dict[str, Any] | None
) -> bool:
  """Returns whether a file is Hugging Face's, of any architecture."""
  if config is not None and "model_type" in config:
    return True
  return any(
    f"{prefix}{family.patches}.weight" in arrays
    for family in families.ALL
    for prefix in _list_prefixes(family)
  )


def _list_prefixes(family):
  return sorted({"", *(layout.prefix for layout in family.layouts)})


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
      "the config.json that belongs to it is missing; only that has the "
      "activation, the epsilon and the number of heads"
    )
  family = _find_family(fields)
  encoder = _find_encoder(fields)
  prefix = _find_prefix(fields, family, arrays)
  layout = _find_layout(encoder, family, arrays)
  arrays, notes = _drop_unused(arrays, prefix, layout)
  num_classes = tables.width_of(arrays, f"{layout.head}.bias")
  class_names, name_notes = _read_names(fields, num_classes)
  weights = Weights(
    ORIGIN,
    source,
    _read_model(encoder, family, layout)
    | _read_widths(encoder, family, layout, arrays, prefix),
    encoder.pair("image_size", family.fields["image_size"]),
    num_classes,
    class_names=class_names,
    loss=_read_loss(fields, num_classes),
    resize=family.resize,
    notes=(*notes, *name_notes),
  )
  weights = _read_preprocessor(weights, preprocessor, family)
  rules = _make_rules(family, layout, prefix, weights.model)
  return tables.translate(rules, weights, arrays)


def _find_family(fields) -> Family:
  kind = fields.get("model_type", "")
  if kind not in families.BY_TYPE:
    known = f"supported are {', '.join(families.BY_TYPE)}"
    raise fields.error(
      f"its config.json has the model_type {kind!r}; "
      + families.REASONS.get(kind, known)
    )
  return families.BY_TYPE[kind]


def _find_encoder(fields):
  """Returns the fields of the vision encoder."""
  for name in ("vision_config_dict", "vision_config"):  # the first wins
    if fields.values.get(name) is not None:
      return folders.Fields(fields.source, fields.get(name, {}))
  return fields


def _find_prefix(fields, family, arrays):
  """Returns the prefix of the names of the encoder's arrays."""
  for prefix in _list_prefixes(family):
    if f"{prefix}{family.patches}.weight" in arrays:
      return prefix
  raise fields.error(
    f"{family.patches}.weight is missing; there is no vision encoder in it, "
    f"but {', '.join(sorted(arrays)[:3]) or 'nothing'}, ..."
  )


def _find_layout(encoder, family, arrays) -> Layout:
  """Returns the class of transformers that these weights belong to."""
  for layout in family.layouts:
    marks = (f"{x}.weight" for x in (layout.head, layout.projection) if x)
    if all(mark in arrays for mark in marks) and all(
      encoder.get(name, family.fields[name]) == value
      for name, value in layout.when.items()
    ):
      return layout
  raise AssertionError(family.title)


def _make_rules(family, layout, prefix, model) -> tuple[Rule, ...]:
  rules = family.rules
  if model.get("mlp") == "gated":
    rules = (*family.gated_rules, *rules)
  return (
    *(rule._replace(name=prefix + rule.name) for rule in rules),
    *layout.rules,
    *folders.dense_rules("head", layout.head),
    *folders.dense_rules("projection", layout.projection),
  )


def _read_loss(fields, num_classes) -> str:
  """Returns the loss; regression raises a UserError."""
  problem = fields.values.get("problem_type")
  if problem == _MULTI_LABEL:
    return "sigmoid"
  # transformers treats one output without problem_type as regression.
  if problem not in (None, _SINGLE_LABEL) or num_classes == 1:
    raise fields.error(
      f"problem_type is {problem!r} in its config.json and the head has "
      f"{num_classes} outputs: numbers rather than classes; classification is "
      f"{_SINGLE_LABEL!r} with 2 or more, or {_MULTI_LABEL!r}"
    )
  return "softmax"


def _drop_unused(arrays, prefix, layout):
  """Drops arrays that no output depends on; returns the others and notes.

  These are a text tower, the mask token and decoder of masked image modelling,
  and the pooling of a class that does not use it.
  """
  starts, rest = set(), {}
  for name, x in arrays.items():
    inner = name.removeprefix(prefix)
    unused = [s for s in (*_UNUSED, *layout.unused) if inner.startswith(s)]
    if unused:
      starts.add(unused[0].rstrip("."))
    elif 0 not in x.shape:  # no registers
      rest[name] = x
  out = ", ".join(sorted(starts))
  return rest, (f"left out, as no output depends on it: {out}",) * bool(out)


def _read_model(fields, family, layout) -> dict[str, Any]:
  """Returns the arguments of `models.create` in config.json."""

  def get(name):
    return fields.get(name, family.fields[name])

  has, options = family.fields.keys(), {**family.fixed, **layout.fixed}
  for name in has & {"proj_bias", "mlp_bias"}:
    if not get(name):
      raise fields.error(f"{name} is false; ours has that bias")
  biases = ["qkv_bias"] * 3 if "qkv_bias" in has else []
  biases = biases or ["query_bias", "key_bias", "value_bias"]
  if has >= set(biases):
    values = tuple(map(get, biases))
    if values not in _BIASES:
      raise fields.error(
        f"{', '.join(biases)} are {values}; ours has all, none, or all but the "
        "key's"
      )
    options["qkv_bias"] = _BIASES[values]
  activation = get("hidden_act")
  check_choice(f"{fields.source}: hidden_act", activation, _ACTIVATIONS)
  options["activation"] = _ACTIVATIONS[activation]
  if "use_gated_mlp" in has and get("use_gated_mlp"):
    options["mlp"] = "gated"
  if "use_swiglu_ffn" in has and get("use_swiglu_ffn"):
    options |= {"mlp": "gated", "activation": "silu"}  # ignores hidden_act
  if "layerscale_value" in has:  # the initial value; scales may be trained
    options["layer_scale_init"] = get("layerscale_value") or 1.0
  if "num_register_tokens" in has:
    options["registers"] = get("num_register_tokens")
  if "rope_theta" in has:
    options["rope_base"] = get("rope_theta")
  plain = {k: v for k, v in options.items() if v != models.DEFAULTS[k]}
  return {
    "variant": _read_variant(fields, family, options),
    "classifier": layout.classifier,
    "activation": options["activation"],
    "layer_norm_epsilon": get("layer_norm_eps"),
    **plain,
  }


def _read_variant(fields, family, options):
  """Returns the name of the encoder's sizes."""
  names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
  width, depth, heads = (fields.get(x, family.fields[x]) for x in names)
  if "mlp_ratio" in family.fields:
    ratio = fields.get("mlp_ratio", family.fields["mlp_ratio"])
    mlp_dim = _find_mlp_dim(width, ratio, options.get("mlp") == "gated")
  else:
    mlp_dim = fields.get(
      "intermediate_size", family.fields["intermediate_size"]
    )
  encoder = variants.Encoder(width, depth, mlp_dim, heads)
  if min(encoder) < 1 or width % heads:
    raise fields.error(
      f"its config.json has the sizes {tuple(encoder)}; they must be positive "
      "and the heads must divide the hidden size"
    )
  patch = fields.pair("patch_size", family.fields["patch_size"])
  if patch[0] != patch[1]:
    raise fields.error(f"its patches are {patch}; ours are square")
  return tables.name_variant(encoder, patch[0], None)


def _find_mlp_dim(width, ratio, gated) -> int:
  """Returns DINOv2's MLP width, two thirds of it if gated."""
  mlp_dim = int(width * ratio)
  return (int(mlp_dim * 2 / 3) + 7) // 8 * 8 if gated else mlp_dim


def _read_widths(fields, family, layout, arrays, prefix) -> dict[str, int]:
  """Returns the arguments of `models.create` that are widths of arrays."""
  widths = {}
  if "pooler_act" in family.fields:
    width = tables.width_of(arrays, f"{prefix}pooler.dense.bias")
    act = fields.get("pooler_act", family.fields["pooler_act"])
    if width and act != "tanh":
      raise fields.error(f"pooler_act is {act!r}; ours is 'tanh'")
    widths["representation_size"] = width
  if layout.projection:
    shape = arrays[f"{layout.projection}.weight"].shape
    widths["projection_size"] = shape[0]
  return widths


def _read_names(fields, num_classes):
  """Returns the class names (None for placeholders) and notes."""
  labels = fields.get("id2label", {})
  try:
    names = [labels[i] for i in sorted(labels, key=int)]
  except ValueError as e:
    raise fields.error("id2label has keys that are not numbers") from e
  if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
    return None, ()
  return folders.get_names(names, num_classes)


def _read_preprocessor(weights, preprocessor, family):
  """Adds the preprocessing of preprocessor_config.json to the weights."""
  if preprocessor is None:
    file = "preprocessor_config.json"
    return folders.assume_pixels(weights, file, family.pixels)
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
      f"resample is {number}; supported are Pillow's filters 1 to 4"
    )
  scale = 255 * fields.get("rescale_factor", 1 / 255)
  if not fields.get("do_rescale", True) or not 0.999999 < scale < 1.000001:
    raise fields.error("pixels must be rescaled, and rescale_factor be 1/255")
  mean, std = (0.0,) * 3, (1.0,) * 3
  if fields.get("do_normalize", True):
    mean = fields.colour("image_mean", folders.HALF.mean)
    std = fields.colour("image_std", folders.HALF.std)
  method, notes = folders.find_method(_FILTERS[number])
  text, size_notes = _read_preparation(
    fields, kind, method, weights.image_size, family
  )
  return weights._replace(
    preprocess=text,
    mean=mean,
    std=std,
    notes=(*weights.notes, *size_notes, *notes),
  )


def _read_preparation(
  fields, kind, method, image_size, family
) -> tuple[str, list[str]]:
  """Returns the preprocessing string, and notes.

  Raises:
    UserError: images that are not resized, or do not get the model's size.
  """
  if kind.startswith("ConvNext"):  # it decides differently whether to crop
    raise fields.error(f"{kind} is not supported; those of ViT, DeiT, CLIP are")
  if not fields.get("do_resize", True):
    raise fields.error("do_resize is false; images must get the model's size")
  size, shorter = fields.values.get("size"), False
  if isinstance(size, dict) and "shortest_edge" in size:
    size, shorter = size["shortest_edge"], True
  elif isinstance(size, int):  # these apply one number to the shorter side
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
  notes = []
  if found != image_size:
    if not family.any_size:
      raise fields.error(
        f"{name} is {found}, and image_size {image_size} in its config.json; "
        "they must agree"
      )
    notes.append(
      f"its authors' images are {by(found)}, its position embedding is of "
      f"{by(image_size)}; take their size: load(..., image_size={found})"
    )
    resized = tuple(map(scale_side, resized, found, image_size))
  text = folders.preparation_text(not shorter, resized, method, image_size)
  return text, notes


def _get_size(fields, name, value, default):
  """Returns a field as (h, w): a number, a pair, or height and width."""
  if isinstance(value, dict):
    value = [value.get("height"), value.get("width")]
  if value is None:
    return default
  return folders.Fields(fields.source, {name: value}).pair(name, 0)


def write(weights: Weights, out: pathlib.Path) -> None:
  """Writes a folder for `from_pretrained`, of weights that pass `check`.

  Uses the first family and class that can represent the model.
  """
  family, layout, problems = _choose(weights)
  assert not problems, problems
  documents = {
    "config.json": _make_config(weights, family, layout),
    "preprocessor_config.json": _make_preprocessor(weights),
  }
  folders.write_folder(out, documents, _list_arrays(weights, family, layout))


def check(weights: Weights) -> None:
  """Raises a UserError that names what the format cannot represent."""
  weights.create_model()  # checks the configuration
  family, _, problems = _choose(weights)
  if problems:
    raise UserError(f"{family.title} cannot represent {', '.join(problems)}")
  _make_preprocessor(weights)


def _choose(weights) -> tuple[Family, Layout, list[str]]:
  """Returns the family and class with the fewest problems, and the problems."""
  found = [
    (family, layout, _find_problems(weights, family, layout))
    for family in families.ALL
    for layout in family.layouts
    if weights.num_classes or not layout.head
  ]
  return min(found, key=lambda x: len(x[2]))


# Arguments of `models.create` that are checked elsewhere or change no output.
_FREE = {
  *models.RATES,
  *("head_bias_init", "dtype", "scan", "remat", "layer_norm_epsilon"),
  "representation_size",
}


def _find_problems(weights, family, layout) -> list[str]:
  """Returns what a class of transformers cannot represent."""
  options, fields = weights.options(), family.fields.keys()
  fixed = models.DEFAULTS | family.fixed | layout.fixed
  choices = {name: (value,) for name, value in fixed.items()} | {
    "activation": tuple(_ACTIVATIONS.values()),
    "classifier": (layout.classifier,),
    "projection_size": tables.POSITIVE if layout.projection else (0,),
    **family.options,
  }
  problems = folders.find_problems(weights, with_head=bool(layout.head))
  if weights.num_classes and not layout.head:
    problems.append("a classification head")
  if "pre_logits/kernel" in weights.params and "pooler_act" not in fields:
    problems.append("a pre_logits layer")
  problems += [
    f"{name} {options[name]!r}"
    for name, values in choices.items()
    if name not in _FREE and options[name] not in values
  ]
  height, width = weights.image_size
  if family.square and height != width:
    problems.append(f"images {height}x{width}")
  if "mlp_ratio" in fields:
    gated, encoder = options["mlp"] == "gated", _sizes(weights).encoder
    if gated and options["activation"] != "silu":
      problems.append(f"activation {options['activation']!r} of a gated MLP")
    if encoder and not _find_ratio(encoder, gated):
      problems.append(f"an MLP of the width {encoder.mlp_dim}")
  for rule in layout.rules:
    absent = (x for x in weights.params if re.fullmatch(rule.path, x))
    if not rule.name and any(weights.params[x].read().any() for x in absent):
      problems.append(rule.path)
  return problems


def _sizes(weights):
  return variants.parse(weights.model["variant"])


def _find_ratio(encoder, gated) -> int:
  """Returns DINOv2's mlp_ratio, which is an integer; 0 if there is none."""
  ratio = encoder.mlp_dim / encoder.hidden_size * (1.5 if gated else 1)
  for x in (math.floor(ratio), math.ceil(ratio)):
    if _find_mlp_dim(encoder.hidden_size, x, gated) == encoder.mlp_dim:
      return x
  return 0


def _list_arrays(weights, family, layout) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the (name, array) pairs to write."""
  rules = _make_rules(family, layout, layout.prefix, weights.model)
  yield from tables.translate_back(rules, weights)
  kernel = weights.params["embedding/kernel"]
  width, dtype = kernel.shape[-1], kernel.dtype
  for name, (rank, value) in {**family.filled, **layout.filled}.items():
    shape = (*(1,) * (rank - 1), width)
    yield layout.prefix + name, np.full(shape, value, dtype)
  needs_registers = "num_register_tokens" in family.fields
  if needs_registers and "registers" not in weights.params:
    name = f"{layout.prefix}embeddings.register_tokens"
    yield name, np.zeros((1, 0, width), dtype)


def _make_config(weights, family, layout):
  sizes, options = _sizes(weights), weights.options()
  assert sizes.encoder is not None
  names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  gated = options["mlp"] == "gated"
  biases = {ours: theirs for theirs, ours in _BIASES.items()}
  query, key, value = biases[options["qkv_bias"]]
  height, width = weights.image_size
  values = {
    "hidden_size": sizes.encoder.hidden_size,
    "num_hidden_layers": sizes.encoder.num_layers,
    "num_attention_heads": sizes.encoder.num_heads,
    "intermediate_size": sizes.encoder.mlp_dim,
    "mlp_ratio": _find_ratio(sizes.encoder, gated),
    "use_swiglu_ffn": gated,
    "use_gated_mlp": gated,
    "hidden_act": names[options["activation"]],
    "layer_norm_eps": options["layer_norm_epsilon"],
    "image_size": height if height == width else [height, width],
    "patch_size": sizes.patch_size,
    "qkv_bias": query,
    "query_bias": query,
    "key_bias": key,
    "value_bias": value,
    "layerscale_value": options["layer_scale_init"],
    "num_register_tokens": options["registers"],
    "rope_theta": options["rope_base"],
    "vision_use_head": options["classifier"] == "map",
  }
  encoder: dict[str, Any] = {"num_channels": 3}
  encoder |= {k: values.get(k, v) for k, v in family.fields.items()}
  if family is families.MAE:
    encoder["mask_ratio"] = 0.0  # encode all patches
  if layout.projection:
    encoder["projection_dim"] = options["projection_size"]
  if "pre_logits/bias" in weights.params:
    encoder["pooler_output_size"] = weights.params["pre_logits/bias"].shape[0]
  config = {
    "model_type": layout.model_type,
    "architectures": [layout.name],
    "torch_dtype": np.dtype(weights.params["embedding/kernel"].dtype).name,
    **({"vision_config": encoder} if layout.nested else encoder),
  }
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
    weights.preprocess, size, "a preprocessor_config.json"
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
