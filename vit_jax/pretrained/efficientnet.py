"""EfficientNets: safetensors of timm's tf_efficientnet_*, Google's checkpoints.

Both use TensorFlow's padding and BatchNorm epsilon; timm's efficientnet_* use
other ones with the same arrays. Google's checkpoints (tensorflow/tpu,
google-research/noisystudent) also have a moving average of each variable. These
projects evaluate and publish the averages, so those are read.

Our blocks are numbered consecutively, like Google's; timm's within their stage.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.models.efficientnet import list_blocks, scale_width
from vit_jax.pretrained import archives, tables, timm
from vit_jax.pretrained import torch_folders as folders
from vit_jax.pretrained.tables import Kind, Rule
from vit_jax.pretrained.weights import LazyArray, Weights, as_lazy

ORIGIN = "tensorflow_tpu"
_NAME = "timm's EfficientNet"
# Image sizes of the authors' evaluation.
_SIZES = {
  **{"B0": 224, "B1": 240, "B2": 260, "B3": 300, "B4": 380},
  **{"B5": 456, "B6": 528, "B7": 600, "B8": 672, "L2": 800},
}
_CROPPED = 32  # pixels of the resized image that their evaluation crops away
_ARCHITECTURE = r"tf_efficientnet_(b[0-8]|l2)(_ap|_ns)?(_475)?"

# A dense layer as PyTorch's 1x1 convolution, and a depthwise kernel
# [h w 1 c] as TensorFlow's [h w c 1].
_DENSE_OIHW = Kind(
  lambda x: x.T.reshape(*x.shape[::-1], 1, 1),
  lambda x, shape: x.T.reshape(shape),
)
_DEPTHWISE = Kind(lambda x: x.reshape(*x.shape[:2], x.shape[3], 1))


class _Format(NamedTuple):
  """Names of a format; a layer has a pair: convolution and normalisation."""

  ends: dict[str, tuple[str, str]]  # of the stem and the head
  block: str  # prefix of the names in a block, whose number is \1
  first: dict[str, tuple[str, str]]  # of blocks that do not expand
  others: dict[str, tuple[str, str]]
  excite: tuple[str, str]
  dense: str
  norm: tuple[str, str, str, str]  # scale, bias, mean, var
  kernel: str
  depthwise: str
  bias: str
  kinds: tuple[Kind, Kind, Kind, Kind]  # convolution, depthwise, SE, dense


_TIMM = _Format(
  ends={"stem": ("conv_stem", "bn1"), "head": ("conv_head", "bn2")},
  block=r"blocks.\1.",
  first={"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")},
  others={
    "expand": ("conv_pw", "bn1"),
    "depthwise": ("conv_dw", "bn2"),
    "project": ("conv_pwl", "bn3"),
  },
  excite=("se.conv_reduce", "se.conv_expand"),
  dense="classifier",
  norm=(".weight", ".bias", ".running_mean", ".running_var"),
  kernel=".weight",
  depthwise=".weight",
  bias=".bias",
  kinds=(tables.CONV, tables.CONV, _DENSE_OIHW, tables.LINEAR),
)
_BN = "tpu_batch_normalization"
_GOOGLE = _Format(
  ends={
    "stem": ("stem/conv2d", f"stem/{_BN}"),
    "head": ("head/conv2d", f"head/{_BN}"),
  },
  block=r"blocks_\1/",
  first={
    "depthwise": ("depthwise_conv2d", _BN),
    "project": ("conv2d", f"{_BN}_1"),
  },
  others={
    "expand": ("conv2d", _BN),
    "depthwise": ("depthwise_conv2d", f"{_BN}_1"),
    "project": ("conv2d_1", f"{_BN}_2"),
  },
  excite=("se/conv2d", "se/conv2d_1"),
  dense="head/dense",
  norm=("/gamma", "/beta", "/moving_mean", "/moving_variance"),
  kernel="/kernel",
  depthwise="/depthwise_kernel",
  bias="/bias",
  kinds=(tables.SAME, _DEPTHWISE, tables.CONV_1X1, tables.SAME),
)


def _make_rules(names: _Format, variant: str) -> tuple[Rule, ...]:
  """Returns a format's rules for `variant`, which decides the blocks' kinds."""
  conv, depthwise, excite, dense = names.kinds
  blocks = list_blocks(_scaling(variant))
  count = sum(block.expansion == 1 for block in blocks)
  layers = dict(names.ends)
  places = [(rf"block0([0-{count - 1}])", names.first)]
  places += [(r"block0?(\d+)", names.others)]  # the first match wins
  for place, inner in places:
    for ours, pair in inner.items():
      found = tuple(f"{names.block}{theirs}" for theirs in pair)
      layers[f"{place}/{ours}"] = (found[0], found[1])
  rules = [Rule(r"pixels/(mean|std)", r"pixels.\1")]
  for ours, (kernel, norm) in layers.items():
    is_depthwise = ours.endswith("depthwise")
    leaf, kind = (
      (names.depthwise, depthwise) if is_depthwise else (names.kernel, conv)
    )
    rules.append(Rule(f"{ours}_conv/kernel", f"{kernel}{leaf}", kind))
    for name, theirs in zip(
      ("scale", "bias", "mean", "var"), names.norm, strict=True
    ):
      rules.append(Rule(f"{ours}_norm/{name}", f"{norm}{theirs}"))
  pairs = [
    (rf"block0?(\d+)/se_{ours}", f"{names.block}{theirs}", excite)
    for ours, theirs in zip(("reduce", "expand"), names.excite, strict=True)
  ]
  for ours, theirs, kind in (*pairs, ("head", names.dense, dense)):
    rules.append(Rule(f"{ours}/kernel", f"{theirs}{names.kernel}", kind))
    rules.append(Rule(f"{ours}/bias", f"{theirs}{names.bias}"))
  return tuple(rules)


def _scaling(variant) -> variants.Scaling:
  scaling = variants.parse(variant).scaling
  assert scaling is not None
  return scaling


def _find_size(source, arrays, stem, head, num_blocks) -> str:
  """Returns the size, such as "B0", from the number of blocks and the widths.

  `stem` and `head` name the scales of the normalisation layers, whose lengths
  are the widths.
  """
  found = (
    num_blocks,
    *tables.shape_of(source, arrays, stem, 1),
    *tables.shape_of(source, arrays, head, 1),
  )
  for size in _SIZES:
    scaling = variants.EFFICIENTNETS[size]
    widths = scale_width(32, scaling), scale_width(1280, scaling)
    if found == (len(list_blocks(scaling)), *widths):
      return size
  raise UserError(
    f"{source}: an EfficientNet of {found[0]} blocks, {found[1]} channels at "
    f"its beginning and {found[2]} at its end; known are "
    f"{', '.join(_SIZES)}"
  )


def _make_weights(origin, source, size, num_classes) -> Weights:
  """Returns weights without arrays, with the authors' preprocessing."""
  side, resized = _SIZES[size], _SIZES[size] + _CROPPED
  return Weights(
    origin,
    source,
    {"variant": f"{variants.EFFICIENTNET}{size}"},
    image_size=(side, side),
    num_classes=num_classes,
    preprocess=folders.preparation_text(
      False, (resized, resized), "bicubic", (side, side)
    ),
    mean=folders.IMAGENET.mean,
    std=folders.IMAGENET.std,
  )


def _translate(names, weights, arrays) -> Weights:
  """Returns the weights, with their mean and std among the parameters."""
  mean, std = np.array(weights.mean), np.array(weights.std)
  pixels = {"pixels.mean": 2 * mean - 1, "pixels.std": 2 * std}
  arrays = arrays | {k: as_lazy(x.astype("f4")) for k, x in pixels.items()}
  half = (0.5, 0.5, 0.5)
  weights = weights._replace(mean=half, std=half)
  rules = _make_rules(names, weights.model["variant"])
  return tables.translate(rules, weights, arrays)


# --- timm ---


def matches(
  arrays: Mapping[str, LazyArray], config: dict[str, Any] | None
) -> bool:
  """Returns whether a file is, or may be, one of timm's tf_efficientnet_*."""
  architecture = (config or {}).get("architecture")
  if architecture is None:
    return {"conv_stem.weight", "blocks.0.0.conv_dw.weight"} <= arrays.keys()
  return re.fullmatch(_ARCHITECTURE, str(architecture)) is not None


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
  arguments = folders.Fields(source, fields.get("model_args", {}))
  _check_arguments(arguments)
  places = (re.match(r"blocks\.(\d+\.\d+)\.", name) for name in arrays)
  num_blocks = len({place[1] for place in places if place})
  size = _find_size(source, arrays, "bn1.weight", "bn2.weight", num_blocks)
  num_classes = tables.width_of(arrays, "classifier.bias")
  weights = _make_weights(timm.ORIGIN, source, size, num_classes)
  if config:
    pretrained = folders.Fields(source, fields.get("pretrained_cfg", config))
    image_size = pretrained.values.get("input_size")
    if isinstance(image_size, (list, tuple)):
      image_size = list(image_size)[1:]
    given = folders.Fields(source, {"input_size": image_size})
    names = config.get("label_names") or pretrained.values.get("label_names")
    class_names, notes = folders.get_names(names, num_classes)
    weights = weights._replace(
      image_size=given.pair("input_size", _SIZES[size]),
      class_names=class_names,
      notes=notes,
    )
    weights = timm.read_preparation(weights, pretrained)
  else:
    note = (
      f"there is no config.json; it is assumed to be tf_efficientnet_"
      f"{size.lower()}: timm's efficientnet_{size.lower()} has the same arrays "
      "but other padding"
    )
    weights = weights._replace(notes=(note,))
  number = _number_blocks(weights)

  def rename(match):
    return f"blocks.{number.get(match[1], match[1])}."

  pattern = re.compile(r"^blocks\.(\d+\.\d+)\.")
  renamed = {pattern.sub(rename, name): x for name, x in arrays.items()}
  return _translate(_TIMM, weights, renamed)


def _check_arguments(arguments):
  """Raises a UserError for arguments that change the model."""
  for name, value in arguments.values.items():
    # Dropout is for training only; the arrays show the other arguments.
    known = name in ("num_classes", "in_chans") or name.endswith("_rate")
    known = known or (name, value) == ("global_pool", "avg")
    if not known and value not in (None, False):
      raise arguments.error(
        f"its model argument {name}={value!r} is not known here"
      )


def _number_blocks(weights) -> dict[str, int]:
  """Returns {timm's "STAGE.BLOCK": the number of our block}."""
  numbers, count = {}, {}
  for i, block in enumerate(list_blocks(_scaling(weights.model["variant"]))):
    index = count[block.stage] = count.get(block.stage, -1) + 1
    numbers[f"{block.stage}.{index}"] = i
  return numbers


def check(weights: Weights) -> None:
  """Raises a UserError that names what timm's format cannot represent."""
  weights.create_model()  # checks the configuration
  variant = weights.model["variant"]
  if variant.removeprefix(variants.EFFICIENTNET) not in _SIZES:
    raise UserError(f"timm has no {variant}")
  timm.make_pretrained(weights, _NAME)


def write(weights: Weights, out: pathlib.Path) -> None:
  """Writes a folder for `timm.create_model("local-dir:OUT", pretrained=True)`.

  The weights must pass `check`.
  """
  variant = weights.model["variant"]
  params = dict(weights.params)
  mean, std = (params.pop(f"pixels/{name}").read() for name in ("mean", "std"))
  weights = weights._replace(
    params=params,
    mean=_shorten((mean.astype(np.float64) + 1) / 2, lambda x: 2 * x - 1, mean),
    std=_shorten(std.astype(np.float64) / 2, lambda x: 2 * x, std),
  )
  places = {i: place for place, i in _number_blocks(weights).items()}
  rules = _make_rules(_TIMM, variant)

  def rename(match):
    return f"blocks.{places[int(match[1])]}."

  arrays = (
    (re.sub(r"^blocks\.(\d+)\.", rename, name), x)
    for name, x in tables.translate_back(rules, weights)
  )
  size = variant.removeprefix(variants.EFFICIENTNET).lower()
  config = {
    "architecture": f"tf_efficientnet_{size}",
    "num_classes": weights.num_classes,
    "num_features": scale_width(1280, _scaling(variant)),
    "global_pool": "avg",
    "pretrained_cfg": timm.make_pretrained(weights, _NAME)
    | {
      "fixed_input_size": False,
      "first_conv": "conv_stem",
      "classifier": "classifier",
    },
  }
  if weights.class_names:
    config["label_names"] = list(weights.class_names)
  folders.write_folder(out, {"config.json": config}, arrays)


def _shorten(values, back, expected) -> tuple[float, ...]:
  """Returns values rounded, if they are still read back as `expected`."""
  short = np.round(values, 6)
  same = np.array_equal(back(short).astype(expected.dtype), expected)
  return tuple((short if same else values).tolist())


# --- TensorFlow ---

_TWIN = "/ExponentialMovingAverage"
# Last parts of the names of the model's variables; others are an optimizer's.
_VARIABLES = (
  *("kernel", "depthwise_kernel", "bias"),
  *("gamma", "beta", "moving_mean", "moving_variance"),
)


def read_tensorflow(prefix: pathlib.Path) -> Weights:
  """Returns the weights of a TensorFlow checkpoint of Google's code.

  Args:
    prefix: its path without ".index".

  Raises:
    UserError: another model, corrupt, or missing, extra or misshapen arrays.
  """
  source = str(prefix)
  found = archives.open_tensorflow(prefix)
  stem = "stem/conv2d/kernel"
  scopes = [
    name.removesuffix(stem) for name in found if name.endswith(f"/{stem}")
  ]
  if len(scopes) != 1:
    raise UserError(
      f"{prefix} is not a checkpoint of an EfficientNet, the only model read "
      f"from TensorFlow checkpoints: its variables are "
      f"{', '.join(sorted(found)[:3]) or 'none'}, ..."
    )
  arrays = {
    name.removeprefix(scopes[0]): found.get(f"{name}{_TWIN}", x)
    for name, x in found.items()
    if name.startswith(scopes[0]) and name.split("/")[-1] in _VARIABLES
  }
  size = _find_size(
    source,
    arrays,
    f"stem/{_BN}/gamma",
    f"head/{_BN}/gamma",
    tables.count_numbers(arrays, r"blocks_(\d+)/"),
  )
  num_classes = tables.width_of(arrays, "head/dense/bias")
  weights = _make_weights(ORIGIN, source, size, num_classes)
  if size == "L2":
    note = "it is assumed to be for 800 pixels; for l2_475 give image_size 475"
    weights = weights._replace(notes=(note,))
  return _translate(_GOOGLE, weights, arrays)
