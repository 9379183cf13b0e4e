"""timm's vision encoders: their tokens, features and logits, and back.

They need PyTorch and timm. Each parameter is drawn anew, so that no zero or one
hides what it is multiplied with or added to. `-s` prints the differences that
docs/differences.md has.
"""

import numpy as np
import pytest
from random_models import (
  models_are_kept,  # noqa: F401 - a fixture
)
from torch_formats import largest_difference, make_weights, run

import vit_jax
from vit_jax import models, pretrained

TOLERANCE = 1e-5  # of a standard deviation
SIZES = {
  "native": (24, 24),
  "smaller": (16, 16),
  "larger": (40, 40),
  "wide": (16, 40),
}
_SMALL = {"img_size": 24, "patch_size": 8, "embed_dim": 64, "depth": 2}
_SMALL |= {"num_heads": 4, "num_classes": 5}
# Architecture -> what is not as in it.
CASES = {
  "vit_base_patch14_dinov2": {},
  "vit_base_patch14_reg4_dinov2": {},
  "vit_giant_patch14_dinov2": {"mlp_ratio": 2.75},
  "vit_small_patch16_dinov3": {},
  "vit_small_plus_patch16_dinov3_qkvb": {"global_pool": "token"},
  "vit_7b_patch16_dinov3": {"num_heads": 1, "embed_dim": 128},
  "vit_base_patch32_clip_224": {},
  "vit_base_patch32_clip_quickgelu_224": {},
  "vit_base_patch16_siglip_224": {},
  "vit_so400m_patch16_siglip_256": {"num_heads": 4},
  "vit_base_patch16_siglip_gap_224": {},
  "vit_base_patch16_224": {"num_classes": 0},  # MAE's
  "deit_base_distilled_patch16_224": {},
  "deit3_base_patch16_224": {},
  "vit_betwixt_patch16_reg4_gap_256": {},
  "vit_so150m2_patch16_reg1_gap_256": {},
  "vit_medium_patch16_gap_256": {"qk_norm": True},
}


@pytest.fixture(scope="module")
def libraries():
  """The libraries; imported here, as collecting this file needs none."""
  import torch_libraries

  return torch_libraries


def _make(libraries, name):
  """Returns the model, all of its parameters random."""
  torch = libraries.torch
  options = _SMALL | CASES[name]
  model = libraries.timm.create_model(name, **options).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for path, x in model.named_parameters():
      is_scale = "norm" in path and path.endswith("weight")
      spread = 1 if "gamma" in path else 0.1
      x.normal_(1 if is_scale else 0, spread, generator=generator)
  return model


def _save(libraries, model, name, folder):
  """As timm's own push_to_hf_hub does, but for the network."""
  arguments = {
    key: value
    for key, value in (_SMALL | CASES[name]).items()
    if key not in ("num_classes", "global_pool")
  }
  libraries.timm.models._hub.save_for_hf(
    model, folder, model_args=arguments, safe_serialization=True
  )
  return str(folder)


def _make_images(size):
  """Returns f32[2 h w 3] in [-1, 1]."""
  shape = (2, *size, 3)
  return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def _run_theirs(libraries, model, images):
  """Returns the tokens f32[b n d] and the logits, or what a head would get."""
  torch, about = libraries.torch, model.pretrained_cfg
  model = model.double()  # so that its own rounding is no difference
  pixels = (images.astype(np.float64) + 1) / 2
  pixels = (pixels - about["mean"]) / about["std"]
  with torch.no_grad():
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    tokens = model.forward_features(pixels)
    output = model.forward_head(tokens)
  return tokens.numpy(), output.numpy()


def _run_ours(folder, images, dtype="float32"):
  """Returns the same two of ours."""
  model = vit_jax.load(folder, image_size=images.shape[1:3], dtype=dtype)
  logits, out = model.model.apply(model.params, images, intermediates="tokens")
  last = logits if model.config.num_classes else models.representation(out)
  return np.asarray(out["encoded"], np.float32), np.asarray(last)


def _list_cases():
  """Each architecture at each size."""
  for name in CASES:
    for size in SIZES:
      mark = pytest.mark.ci if size == "wide" else pytest.mark.nightly
      yield pytest.param(name, size, marks=mark)


@pytest.mark.parametrize(("name", "size"), list(_list_cases()))
def test_tokens_and_logits(libraries, tmp_path, name, size):
  images = _make_images(SIZES[size])
  model = _make(libraries, name)
  folder = _save(libraries, model, name, tmp_path)
  model.set_input_size(SIZES[size])
  expected = _run_theirs(libraries, model, images)
  difference = largest_difference(_run_ours(folder, images), expected)
  rough = largest_difference(_run_ours(folder, images, "bfloat16"), expected)
  print(f"| {name} | {size} | {difference:.1e} | {rough:.1e} |")
  assert difference <= TOLERANCE


@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
def test_back_to_timm(libraries, tmp_path, name):
  """What timm reads of what is written gives the same tokens and logits."""
  images = _make_images(SIZES["native"])
  model = _make(libraries, name)
  weights = pretrained.read(_save(libraries, model, name, tmp_path / "theirs"))
  out = tmp_path / "ours"
  pretrained.write(weights, str(out), "timm")
  found = libraries.timm.create_model(f"local-dir:{out}", pretrained=True)
  expected = _run_theirs(libraries, model, images)
  difference = largest_difference(
    _run_theirs(libraries, found.eval(), images), expected
  )
  assert difference <= 1e-6


@pytest.mark.ci
def test_a_class_token_takes_its_position_along(libraries, tmp_path):
  """With registers timm has no entry for it, and Hugging Face has one."""
  weights = make_weights(
    registers=2,
    activation="gelu_erf",
    layer_scale_init=1.0,
    num_classes=0,
    size=(24, 24),
  )
  pretrained.write(weights, str(tmp_path / "out"), "timm")
  model = libraries.timm.create_model(
    f"local-dir:{tmp_path / 'out'}", pretrained=True
  )
  images = _make_images((24, 24))
  _, found = run(weights, images)
  expected = _run_theirs(libraries, model.eval(), images)
  assert (
    largest_difference((found["encoded"], found["pooled"]), expected)
    <= TOLERANCE
  )
