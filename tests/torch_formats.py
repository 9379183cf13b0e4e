"""Weights laid out as Hugging Face and timm have them, by hand.

Written from the layers of PyTorch, without vit_jax.pretrained: what that reads
is compared with this. Parameters are {path: array} in our names, unrolled.
"""

import json

import ml_dtypes
import numpy as np
import pytest
import random_models
import safetensors.numpy
from random_models import jit

from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import Weights, archives
from vit_jax.state import unflatten

# Width, depth, MLP and heads; the head dimension differs from the heads.
VARIANT = "ViT-w24d2m40h3_8"
SIZES = {"width": 24, "depth": 2, "mlp": 40, "heads": 3, "patch": 8}


def random_weights(num_classes=5, image_size=(16, 24), **options):
  """Returns random parameters {path: array} of a small ViT."""
  arrays = make_weights(num_classes, image_size, **options).params
  return {path: x.read() for path, x in arrays.items()}


# How these libraries resize, in a preprocessing string.
BILINEAR, BICUBIC = (
  f"method={method!r}, antialias=True" for method in ("bilinear", "bicubic")
)


def make_weights(num_classes=5, size=(16, 24), variant=VARIANT, **options):
  """Returns random weights as a run has them, with any fields of `Weights`."""
  fields = {x: options.pop(x) for x in Weights._fields if x in options}
  fields.setdefault("preprocess", f"resize(size, {BILINEAR})")
  return random_models.random_weights(
    variant, size, num_classes, **options
  )._replace(**fields)


def run(weights, images):
  """Returns (the logits, everything on the way to them), in float32."""
  params = {path: x.read() for path, x in weights.params.items()}
  model = weights.create_model(dtype="float32")
  return jit(model)(unflatten(params), images, intermediates=True)


def make_images(size=(16, 24)):
  """Returns f32[3 h w 3] in [-1, 1]."""
  shape = (3, *size, 3)
  return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def largest_difference(found, expected):
  """Of several arrays, each relative to its standard deviation."""
  for x, y in zip(found, expected, strict=True):
    assert x.shape == y.shape
  return max(
    np.abs(x - y).max() / y.std() for x, y in zip(found, expected, strict=True)
  )


def huggingface(params, *, prefix="vit."):
  """ViTForImageClassification, or with no prefix ViTModel."""
  out = {
    "embeddings.cls_token": params["cls"],
    "embeddings.position_embeddings": params[
      "Transformer/posembed_input/pos_embedding"
    ],
  }
  out |= _conv(params, "embedding", "embeddings.patch_embeddings.projection")
  for i in range(_depth(params)):
    ours = f"Transformer/encoderblock_{i}"
    attention = f"{ours}/MultiHeadDotProductAttention_0"
    theirs = f"encoder.layer.{i}"
    out |= _norm(params, f"{ours}/LayerNorm_0", f"{theirs}.layernorm_before")
    out |= _norm(params, f"{ours}/LayerNorm_1", f"{theirs}.layernorm_after")
    for name in ("query", "key", "value"):
      weight, bias = _heads(params, f"{attention}/{name}")
      name = f"{theirs}.attention.attention.{name}"
      out |= {f"{name}.weight": weight, f"{name}.bias": bias}
    mlp = f"{ours}/MlpBlock_0"
    out |= _merge(
      params, f"{attention}/out", f"{theirs}.attention.output.dense"
    )
    out |= _dense(params, f"{mlp}/Dense_0", f"{theirs}.intermediate.dense")
    out |= _dense(params, f"{mlp}/Dense_1", f"{theirs}.output.dense")
  out |= _norm(params, "Transformer/encoder_norm", "layernorm")
  if "pre_logits/kernel" in params:
    out |= _dense(params, "pre_logits", "pooler.dense")
  out = {prefix + name: x for name, x in out.items()}
  if "head/kernel" in params:
    out |= _dense(params, "head", "classifier")
  return out


def huggingface_config(**changes):
  """config.json of the small ViT, as transformers writes it."""
  return {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": SIZES["width"],
    "num_hidden_layers": SIZES["depth"],
    "intermediate_size": SIZES["mlp"],
    "num_attention_heads": SIZES["heads"],
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": [16, 24],
    "patch_size": SIZES["patch"],
    "num_channels": 3,
    "qkv_bias": True,
    **changes,
  }


def timm(params):
  """VisionTransformer; query, key and value are one matrix."""
  out = {}
  if "cls" in params:
    out["cls_token"] = params["cls"]
  position = params.get("Transformer/posembed_input/pos_embedding")
  if position is not None:
    out["pos_embed"] = position
  out |= _conv(params, "embedding", "patch_embed.proj")
  for i in range(_depth(params)):
    ours, theirs = f"Transformer/encoderblock_{i}", f"blocks.{i}"
    attention = f"{ours}/MultiHeadDotProductAttention_0"
    out |= _norm(params, f"{ours}/LayerNorm_0", f"{theirs}.norm1")
    out |= _norm(params, f"{ours}/LayerNorm_1", f"{theirs}.norm2")
    names = ("query", "key", "value")
    out |= _fuse(params, attention, names, f"{theirs}.attn.qkv")
    out |= _merge(params, f"{attention}/out", f"{theirs}.attn.proj")
    for j in (0, 1):
      dense = f"{ours}/MlpBlock_0/Dense_{j}"
      out |= _dense(params, dense, f"{theirs}.mlp.fc{j + 1}")
  out |= _norm(params, "Transformer/encoder_norm", "norm")
  if "MAPHead_0/probe" in params:
    out |= _timm_pool(params)
  if "head/kernel" in params:
    out |= _dense(params, "head", "head")
  return out


def _timm_pool(params):
  attention = "MAPHead_0/MultiHeadDotProductAttention_0"
  out = {"attn_pool.latent": params["MAPHead_0/probe"]}
  out |= _fuse(params, attention, ("query",), "attn_pool.q")
  out |= _fuse(params, attention, ("key", "value"), "attn_pool.kv")
  out |= _merge(params, f"{attention}/out", "attn_pool.proj")
  out |= _norm(params, "MAPHead_0/LayerNorm_0", "attn_pool.norm")
  for j in (0, 1):
    dense = f"MAPHead_0/MlpBlock_0/Dense_{j}"
    out |= _dense(params, dense, f"attn_pool.mlp.fc{j + 1}")
  return out


def timm_config(**changes):
  """config.json of the small ViT, as timm's hub writes it."""
  return {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 5,
    "global_pool": "token",
    "model_args": {
      "img_size": [16, 24],
      "patch_size": SIZES["patch"],
      "embed_dim": SIZES["width"],
      "depth": SIZES["depth"],
      "num_heads": SIZES["heads"],
      "mlp_ratio": 1.7,
    },
    "pretrained_cfg": {
      "input_size": [3, 16, 24],
      "interpolation": "bilinear",
      "crop_pct": 1.0,
      "crop_mode": "squash",
      "mean": [0.5, 0.5, 0.5],
      "std": [0.5, 0.5, 0.5],
    },
    **changes,
  }


def assert_same_bits(tmp_path, arrays, dtype, *documents):
  """A folder that is read, and written again, has the same bits."""
  arrays = {
    name: x.astype(getattr(ml_dtypes, dtype, dtype))
    for name, x in arrays.items()
  }
  weights = read_saved(tmp_path / "old", arrays, *documents)
  to = "hf" if "model_type" in documents[0] else "timm"
  pretrained.write(weights, str(tmp_path / "new"), to)
  assert_identical(pretrained.read(str(tmp_path / "new")), weights)
  assert_same_arrays(tmp_path / "new" / "model.safetensors", arrays)


def save(folder, arrays, config=None, preprocessor=None):
  """Writes a folder as those libraries do; returns it."""
  folder.mkdir(exist_ok=True, parents=True)
  arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
  safetensors.numpy.save_file(
    arrays, folder / "model.safetensors", metadata={"format": "pt"}
  )
  for name, document in (
    ("config.json", config),
    ("preprocessor_config.json", preprocessor),
  ):
    if document is not None:
      (folder / name).write_text(json.dumps(document))
  return folder


def read_saved(*saved):
  """Returns what is read of what `save` writes."""
  return pretrained.read(str(save(*saved)))


def assert_refused(folder, message):
  """A folder is not read, for a reason that is one line."""
  with pytest.raises(UserError) as error:
    pretrained.read(str(folder))
  _assert_one_line(error, message)


def assert_not_written(out, to, message, **options):
  """Weights are not written, for a reason that is one line."""
  with pytest.raises(UserError) as error:
    pretrained.write(make_weights(**options), str(out), to)
  _assert_one_line(error, message)
  assert not list(out.parent.iterdir())


def assert_comes_back(out, to, resize, defaults, **options):
  """Weights that are written, "hf" or "timm", are read as they were.

  A file also says the `defaults` of the model's options.
  """
  weights = make_weights(**options)
  pretrained.write(weights, str(out), to)
  defaults |= {"classifier": "token", "activation": "gelu_tanh"}
  model = {"layer_norm_epsilon": 1e-6, **defaults, **weights.model}
  found = pretrained.read(str(out))
  assert_identical(found, weights._replace(model=model, resize=resize))


def assert_identical(a, b):
  """Two `Weights`: the same parameters to the bit, the same description."""
  assert a.params.keys() == b.params.keys()
  for path, x in a.params.items():
    left, right = x.read(), b.params[path].read()
    assert left.dtype == right.dtype == x.dtype, path
    assert left.shape == right.shape == x.shape, path
    assert left.tobytes() == right.tobytes(), path
  names = ("model", "image_size", "num_classes", "class_names", "preprocess")
  for name in (*names, "mean", "std", "loss", "resize"):
    assert getattr(a, name) == getattr(b, name), name


def assert_same_arrays(file, arrays):
  """A written file holds the same bits under the same names."""
  written = archives.open_safetensors(file)
  assert written.keys() == arrays.keys()
  for name, x in written.items():
    assert x.read().dtype == arrays[name].dtype, name
    assert x.read().shape == arrays[name].shape, name
    assert x.read().tobytes() == arrays[name].tobytes(), name


def _assert_one_line(error, message):
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def _depth(params):
  names = [path.split("/")[1] for path in params if "encoderblock_" in path]
  return len(set(names))


def _dense(params, ours, theirs):
  """y[o] = sum of weight[o, i] x[i]."""
  kernel = params[f"{ours}/kernel"]
  return {
    f"{theirs}.weight": np.einsum("io->oi", kernel),
    f"{theirs}.bias": params[f"{ours}/bias"],
  }


def _norm(params, ours, theirs):
  return {
    f"{theirs}.weight": params[f"{ours}/scale"],
    f"{theirs}.bias": params[f"{ours}/bias"],
  }


def _conv(params, ours, theirs):
  return {
    f"{theirs}.weight": np.einsum("hwio->oihw", params[f"{ours}/kernel"]),
    f"{theirs}.bias": params[f"{ours}/bias"],
  }


def _heads(params, ours):
  """The outputs of head after head: weight [a*h d], bias [a*h]."""
  kernel, bias = params[f"{ours}/kernel"], params[f"{ours}/bias"]
  heads = range(kernel.shape[1])
  weight = np.concatenate([kernel[:, a].T for a in heads])
  return weight, np.concatenate([bias[a] for a in heads])


def _fuse(params, attention, names, theirs):
  pairs = [_heads(params, f"{attention}/{name}") for name in names]
  weights, biases = zip(*pairs, strict=True)
  return {
    f"{theirs}.weight": np.concatenate(weights),
    f"{theirs}.bias": np.concatenate(biases),
  }


def _merge(params, ours, theirs):
  """The inputs of head after head: weight [d a*h]."""
  kernel = params[f"{ours}/kernel"]
  weight = np.concatenate([kernel[a].T for a in range(len(kernel))], axis=1)
  return {f"{theirs}.weight": weight, f"{theirs}.bias": params[f"{ours}/bias"]}
