"""Weights laid out as other people's files have them, by hand.

Written from the descriptions of the formats, without vit_jax.pretrained: what
that reads is compared with this. Parameters are {path: array} in our names.
"""

import re

import numpy as np


def published_npz(params):
  """google-research/vision_transformer: numbers count all layers of a block."""
  numbers = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
  }
  out = {}
  for path, x in params.items():
    parts = path.split("/")
    if len(parts) > 2 and parts[1].startswith("encoderblock_"):
      parts[2] = numbers.get(parts[2], parts[2])
    out["/".join(parts)] = x
  return out


def old_group_norms(arrays):
  """Old hybrids keep the vectors of a group norm as [1 1 1 c]."""
  return {
    name: x.reshape(1, 1, 1, -1) if re.search(r"(^|/)gn[^/]*/", name) else x
    for name, x in arrays.items()
  }


def prefixed(arrays, prefix="opt/target/"):
  """An optimizer's dump: weights under a prefix, the rest beside them."""
  out = {prefix + name: x for name, x in arrays.items()}
  return out | {"opt/state/step": np.zeros((), np.int32)}


def big_vision_npz(params):
  """google-research/big_vision: positions at the root, without the token."""
  out = dict(params)
  position = out.pop("Transformer/posembed_input/pos_embedding", None)
  if position is not None:
    if "cls" in out:
      out["cls"] = out["cls"] + position[:, :1]
      position = position[:, 1:]
    out["pos_embedding"] = position
  return out


def scanned(arrays):
  """Blocks stacked along a leading axis."""
  out, layers = {}, {}
  for name, x in arrays.items():
    match = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.*)", name)
    if match:
      layers.setdefault(match[2], {})[int(match[1])] = x
    else:
      out[name] = x
  for name, values in layers.items():
    stacked = np.stack([values[i] for i in range(len(values))])
    out[f"Transformer/encoderblock/{name}"] = stacked
  return out


def old_map_head(arrays):
  """Old big_vision files have the MAP head's layers at the root."""
  return {name.removeprefix("MAPHead_0/"): x for name, x in arrays.items()}


def bit_npz(params):
  """google-research/big_transfer: TensorFlow's names."""
  out = {}
  for path, x in params.items():
    *block, layer, kind = path.split("/")
    prefix = "/".join(["resnet", *block])
    if layer == "conv_root":
      name = "resnet/root_block/standardized_conv2d/kernel"
    elif layer == "head":
      name = f"resnet/head/conv2d/{kind}"
      x = x[None, None] if kind == "kernel" else x
    elif layer == "conv_proj":
      name = f"{prefix}/a/proj/standardized_conv2d/kernel"
    else:
      end = {"kernel": "standardized_conv2d/kernel"}
      end |= {"scale": "group_norm/gamma", "bias": "group_norm/beta"}
      letter = (
        "" if layer == "norm-pre-head" else f"/{'abc'[int(layer[-1]) - 1]}"
      )
      name = f"{prefix}{letter}/{end[kind]}"
    out[name] = x
  return out
