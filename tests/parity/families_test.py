"""Hugging Face's vision encoders: their tokens, features and logits, and back.

They need PyTorch and transformers. Each parameter is drawn anew, so that no
zero or one hides what it is multiplied with or added to. `-s` prints the
differences that docs/differences.md has.
"""

import functools
import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from random_models import (
  models_are_kept,  # noqa: F401 - a fixture
)
from torch_formats import largest_difference, make_weights

import vit_jax
from vit_jax import models, pretrained
from vit_jax.pretrained import families

# Of a standard deviation.
TOLERANCE = 1e-5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NATIVE = (24, 24)
SIZES = {
  "native": NATIVE,
  "smaller": (16, 16),
  "larger": (40, 40),
  "wide": (16, 40),
}

_ENCODER = {
  "hidden_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "image_size": 24,
  "patch_size": 8,
}
_WITH_MLP = _ENCODER | {"intermediate_size": 112}
_TEXT = {
  "hidden_size": 32,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 40,
  "vocab_size": 9,
  "bos_token_id": 0,
  "eos_token_id": 2,
}
_CLASSES = {"num_labels": 5}


class Case(NamedTuple):
  """A class of transformers.

  Attributes:
    model: its name.
    config: its configuration's.
    fields: of the configuration.
    output: what is compared beside the tokens, "" for their mean.
    encoder: the attribute that gives the tokens, "" for the model itself.
    options: arguments of its calls.
    back: the class that it is written as, where that is another.
  """

  model: str
  config: str
  fields: Mapping[str, Any]
  output: str = "pooler_output"
  encoder: str = ""
  options: Mapping[str, Any] = {}
  back: str = ""


_BOTH = {"vision_config": _WITH_MLP, "text_config": _TEXT}
_RESIZED = {"interpolate_pos_encoding": True}
CASES = {
  "ViT": Case("ViTModel", "ViTConfig", _WITH_MLP, options=_RESIZED),
  "ViT, no qkv bias": Case(
    "ViTForImageClassification",
    "ViTConfig",
    _WITH_MLP | _CLASSES | {"qkv_bias": False},
    "logits",
    "vit",
    _RESIZED,
  ),
  "DeiT": Case("DeiTModel", "DeiTConfig", _WITH_MLP, options=_RESIZED),
  "DeiT, one head": Case(
    "DeiTForImageClassification",
    "DeiTConfig",
    _WITH_MLP | _CLASSES,
    "logits",
    "deit",
    _RESIZED,
  ),
  "DeiT, two heads": Case(
    "DeiTForImageClassificationWithTeacher",
    "DeiTConfig",
    _WITH_MLP | _CLASSES,
    "logits",
    "deit",
    _RESIZED,
  ),
  "MAE": Case(
    "ViTMAEModel", "ViTMAEConfig", _WITH_MLP | {"mask_ratio": 0.0}, ""
  ),
  "DINOv2": Case("Dinov2Model", "Dinov2Config", _ENCODER),
  "DINOv2, classes": Case(
    "Dinov2ForImageClassification",
    "Dinov2Config",
    _ENCODER | _CLASSES,
    "logits",
    "dinov2",
  ),
  "DINOv2, giant's MLP": Case(
    "Dinov2Model",
    "Dinov2Config",
    _ENCODER | {"use_swiglu_ffn": True, "layer_norm_eps": 1e-3},
  ),
  "DINOv2, registers": Case(
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersConfig",
    _ENCODER | {"num_register_tokens": 3, "use_swiglu_ffn": True},
  ),
  "DINOv2, registers, classes": Case(
    "Dinov2WithRegistersForImageClassification",
    "Dinov2WithRegistersConfig",
    _ENCODER | _CLASSES,
    "logits",
    "dinov2_with_registers",
  ),
  "DINOv3": Case(
    "DINOv3ViTModel",
    "DINOv3ViTConfig",
    _WITH_MLP | {"num_register_tokens": 4},
  ),
  "DINOv3, gated": Case(
    "DINOv3ViTModel",
    "DINOv3ViTConfig",
    _WITH_MLP
    | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
  ),
  "DINOv3, 7B's options": Case(
    "DINOv3ViTModel",
    "DINOv3ViTConfig",
    _WITH_MLP
    | {
      "use_gated_mlp": True,
      "query_bias": False,
      "value_bias": False,
      "rope_theta": 50.0,
    },
  ),
  "SigLIP": Case(
    "SiglipVisionModel", "SiglipVisionConfig", _WITH_MLP, options=_RESIZED
  ),
  "SigLIP, whole": Case(
    "SiglipModel",
    "SiglipConfig",
    _BOTH | {"text_config": _TEXT | {"projection_size": 64}},
    "pooler_output",
    "vision_model",
    _RESIZED,
    "SiglipVisionModel",
  ),
  "SigLIP, no head": Case(
    "SiglipVisionModel",
    "SiglipVisionConfig",
    _WITH_MLP | {"vision_use_head": False},
    "",
    options=_RESIZED,
  ),
  "SigLIP, classes": Case(
    "SiglipForImageClassification",
    "SiglipConfig",
    _BOTH | _CLASSES,
    "logits",
    "vision_model",
    _RESIZED,
  ),
  "CLIP": Case(
    "CLIPVisionModel", "CLIPVisionConfig", _WITH_MLP, options=_RESIZED
  ),
  "CLIP, erf": Case(
    "CLIPVisionModelWithProjection",
    "CLIPVisionConfig",
    _WITH_MLP | {"projection_dim": 48, "hidden_act": "gelu"},
    "image_embeds",
    "vision_model",
    _RESIZED,
  ),
  "CLIP, whole": Case(
    "CLIPModel",
    "CLIPConfig",
    _BOTH | {"projection_dim": 48},
    "image_embeds",
    "vision_model",
    _RESIZED,
    "CLIPVisionModelWithProjection",
  ),
  "CLIP, classes": Case(
    "CLIPForImageClassification",
    "CLIPConfig",
    _BOTH | _CLASSES,
    "logits",
    "vision_model",
    _RESIZED,
  ),
  "MetaCLIP 2": Case(
    "MetaClip2VisionModelWithProjection",
    "MetaClip2VisionConfig",
    _WITH_MLP | {"projection_dim": 48},
    "image_embeds",
    "vision_model",
    _RESIZED,
    "CLIPVisionModelWithProjection",
  ),
}


@pytest.fixture(scope="module")
def libraries():
  """The libraries; imported here, as collecting this file needs none."""
  import torch_libraries

  return torch_libraries


def _make(libraries, case):
  """Returns the model, all of its parameters random."""
  torch, transformers = libraries.torch, libraries.transformers
  config = getattr(transformers, case.config)(**case.fields)
  model = getattr(transformers, case.model)(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      is_scale = "norm" in name and name.endswith("weight")
      spread = 1 if "lambda" in name else 0.1
      x.normal_(1 if is_scale else 0, spread, generator=generator)
  return model


def _save(model, folder):
  """Writes the model and what its pixels are; returns the folder."""
  model.save_pretrained(folder)
  processor = {"size": {"height": NATIVE[0], "width": NATIVE[1]}}
  processor |= {"image_mean": MEAN, "image_std": STD}
  (folder / "preprocessor_config.json").write_text(json.dumps(processor))
  return str(folder)


def _make_images(size):
  """Returns f32[2 h w 3] in [-1, 1]."""
  shape = (2, *size, 3)
  return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def _run_theirs(libraries, model, case, images):
  """Returns the tokens f32[b n d] and what `case` compares beside them."""
  torch, options = libraries.torch, dict(case.options)
  images = ((images.astype(np.float64) + 1) / 2 - MEAN) / STD
  pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
  if case.model == "ViTMAEModel":  # which draws the order of the patches
    count = pixels.shape[2] * pixels.shape[3] // 64
    noise = torch.arange(float(count)).expand(len(pixels), -1)
    options = _RESIZED | {"noise": noise}
  encoder = getattr(model, case.encoder) if case.encoder else model
  with torch.no_grad():
    tokens = encoder(pixels, **options).last_hidden_state
    if hasattr(encoder, "pre_layrnorm") and case.output != "logits":
      # CLIP's last LayerNorm is for its class token alone.
      tokens = encoder.post_layernorm(tokens)
    if not case.output:
      prefix = int("MAE" in case.model)
      output = tokens[:, prefix:].mean(dim=1)
    elif case.model == "CLIPModel":
      output = model.get_image_features(pixels, **options).pooler_output
    elif case.model == "SiglipModel":
      output = encoder(pixels, **options).pooler_output
    else:
      output = model(pixels, **options)[case.output]
  return tokens.numpy(), output.numpy()


@functools.cache
def _jit(model):
  return jax.jit(model.apply, static_argnames="intermediates")


def _run_ours(folder, images, dtype="float32"):
  """Returns the same two of ours."""
  size = images.shape[1:3]
  model = vit_jax.load(folder, image_size=size, dtype=dtype)
  logits, out = _jit(model.model)(model.params, images, intermediates="tokens")
  last = logits if model.config.num_classes else models.representation(out)
  return np.asarray(out["encoded"], np.float32), np.asarray(last)


def _list_cases():
  """Each class at each size; in CI at "wide", which is both ways."""
  for name in CASES:
    for size in SIZES:
      mark = pytest.mark.ci if size == "wide" else pytest.mark.nightly
      yield pytest.param(name, size, marks=mark)


@pytest.mark.parametrize(("name", "size"), list(_list_cases()))
def test_tokens_and_features(libraries, tmp_path, name, size):
  case, images = CASES[name], _make_images(SIZES[size])
  model = _make(libraries, case)
  found = _run_ours(_save(model, tmp_path), images)
  expected = _run_theirs(libraries, model, case, images)
  difference = largest_difference(found, expected)
  print(f"| {name} | {size} | float32 | {difference:.1e} |")
  assert difference <= TOLERANCE


@pytest.mark.nightly
@pytest.mark.parametrize(
  ("name", "size"), list(itertools.product(CASES, SIZES))
)
def test_bfloat16(libraries, tmp_path, name, size):
  """Eight bits of a number in two blocks, the largest of thousands of them."""
  case, images = CASES[name], _make_images(SIZES[size])
  model = _make(libraries, case)
  found = _run_ours(_save(model, tmp_path), images, "bfloat16")
  expected = _run_theirs(libraries, model, case, images)
  difference = largest_difference(found, expected)
  print(f"| {name} | {size} | bfloat16 | {difference:.1e} |")
  assert difference <= 0.2


def _read_back(libraries, case, folder):
  """Returns the model of transformers that is in a folder, nothing missing."""
  cls = getattr(libraries.transformers, case.back or case.model)
  model, info = cls.from_pretrained(folder, output_loading_info=True)
  assert not any(info.values()), info
  assert model.config.architectures == [cls.__name__]
  return model.eval()


@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
def test_back_to_transformers(libraries, tmp_path, name):
  """Reading and writing changes no value that an output depends on."""
  case, images = CASES[name], _make_images(NATIVE)
  model = _make(libraries, case)
  weights = pretrained.read(_save(model, tmp_path / "theirs"))
  out = str(tmp_path / "ours")
  notes = pretrained.write(weights, out, "hf")
  assert not any("does not keep" in note for note in notes)
  if not case.back:
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == model.config.model_type
  found = _read_back(libraries, case, out)
  if case.back == "SiglipVisionModel":
    case = CASES["SigLIP"]
  elif case.back:
    case = CASES["CLIP, erf"]
  for x, y in zip(
    _run_theirs(libraries, found, case, images),
    _run_theirs(libraries, model, CASES[name], images),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


# Models that were made here, and the class that each becomes.
OURS = {
  "DINOv2": (
    "Dinov2WithRegistersForImageClassification",
    {"classifier": "token+gap", "registers": 2, "layer_scale_init": 1e-5},
  ),
  "DINOv3": (
    "DINOv3ViTModel",
    {
      "num_classes": 0,
      "pos_embedding": "none",
      "rope": "dinov3",
      "layer_scale_init": 0.1,
      "qkv_bias": "qv",
      "mlp": "gated",
      "activation": "silu",
    },
  ),
  "gap": ("SiglipForImageClassification", {"classifier": "gap"}),
  "distilled": (
    "DeiTForImageClassificationWithTeacher",
    {"distillation_token": True},
  ),
  "CLIP": (
    "CLIPVisionModelWithProjection",
    {
      "num_classes": 0,
      "patch_bias": False,
      "pre_norm": True,
      "projection_size": 12,
      "activation": "gelu_quick",
    },
  ),
}


@pytest.mark.ci
@pytest.mark.parametrize("name", OURS)
def test_ours_to_transformers(libraries, tmp_path, name):
  architecture, options = OURS[name]
  weights = make_weights(
    size=(16, 16), variant="ViT-w24d2m48h3_8", **options
  )._replace(mean=MEAN, std=STD)
  out = str(tmp_path / "out")
  pretrained.write(weights, out, "hf")
  case = Case(architecture, "", {}, "logits")
  model = _read_back(libraries, case, out)
  images = _make_images((16, 16))
  pixels = ((images.astype(np.float64) + 1) / 2 - MEAN) / STD
  with libraries.torch.no_grad():
    found = model(
      libraries.torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    )
  _, kept = _run_ours(out, images)
  names = ("logits", "image_embeds", "pooler_output")
  expected = next(found[x] for x in names if x in found)
  assert largest_difference([kept], [expected.numpy()]) <= TOLERANCE


_CONFIGS = {
  "ViTConfig": families.VIT,
  "DeiTConfig": families.DEIT,
  "ViTMAEConfig": families.MAE,
  "Dinov2Config": families.DINOV2,
  "Dinov2WithRegistersConfig": families.DINOV2_REGISTERS,
  "DINOv3ViTConfig": families.DINOV3,
  "SiglipVisionConfig": families.SIGLIP,
  "CLIPVisionConfig": families.CLIP,
  "MetaClip2VisionConfig": families.CLIP,
}


@pytest.mark.ci
@pytest.mark.parametrize("name", _CONFIGS)
def test_defaults_are_those_of_transformers(libraries, name):
  """A config.json may leave out what it has of them."""
  config = getattr(libraries.transformers, name)()
  for field, value in _CONFIGS[name].fields.items():
    assert getattr(config, field) == value, field
  assert config.model_type in families.BY_TYPE
