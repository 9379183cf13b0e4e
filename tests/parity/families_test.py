"""Hugging Face's vision encoders: their tokens, features and logits, and back.

They need PyTorch and transformers. Each parameter is drawn anew, so that no
zero or one hides what it is multiplied with or added to. `-s` prints the
differences that docs/differences.md has.
"""

import json
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from random_models import (
  models_are_kept,  # noqa: F401 - a fixture
)

import vit_jax
from vit_jax import models, pretrained

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
  fields: dict[str, Any]
  output: str = "pooler_output"
  encoder: str = ""
  options: dict[str, Any] = {}
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
      x.normal_(1 if is_scale else 0, 0.1, generator=generator)
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
  """Returns the tokens after the last LayerNorm, and what `case` compares."""
  torch, options = libraries.torch, dict(case.options)
  images = ((images.astype(np.float64) + 1) / 2 - MEAN) / STD
  pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
  if case.model == "ViTMAEModel":  # which draws the order of the patches
    count = pixels.shape[2] * pixels.shape[3] // 64
    noise = torch.arange(float(count)).expand(len(pixels), -1)
    options = _RESIZED | {"noise": noise}
  encoder = getattr(model, case.encoder) if case.encoder else model
  with torch.no_grad():
    out = encoder(pixels, **options)
    tokens = out.last_hidden_state
    if "C" in case.config[:5] and "Clip" in case.config.replace("CLIP", "Clip"):
      ...
  return tokens.numpy(), out
