"""The same logits from other people's libraries, on the same weights.

They need PyTorch, transformers and timm, which the package itself does not.
"""

import covering
import numpy as np
import pytest
from random_models import (
  jit,
  models_are_kept,  # noqa: F401 - a fixture
)
from torch_formats import BICUBIC, BILINEAR, make_images, make_weights

from vit_jax import pretrained
from vit_jax.data.preprocess import preprocess_image
from vit_jax.pretrained import (
  bit,
  huggingface,
  positions,
  timm,
  vision_transformer,
)
from vit_jax.pretrained.weights import as_lazy
from vit_jax.state import unflatten

# Relative to the logits' standard deviation, in float32.
TOLERANCE = 1e-4
SIZE = (16, 24)
POS_EMBEDDING = "Transformer/posembed_input/pos_embedding"


@pytest.fixture(scope="module")
def libraries():
  """The libraries; imported here, as collecting this file needs none."""
  import torch_libraries

  return torch_libraries


def _read(path):
  return pretrained.read(str(path))


def _run_ours(weights, images, method=None):
  """Returns our logits; with a method, at the resolution of the images."""
  size = images.shape[1:3]
  model = weights.create_model(image_size=size, dtype="float32")
  params = {path: x.read() for path, x in weights.params.items()}
  if method:
    old_grid = weights.create_model().grid
    params[POS_EMBEDDING] = positions.resize_tokens(
      params[POS_EMBEDDING], old_grid, model.grid, method
    )
  return np.asarray(jit(model)(unflatten(params), images))


def _run_torch(libraries, model, images, **options):
  torch = libraries.torch
  with torch.no_grad():
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    out = model.eval()(pixels, **options)
  return out


def _randomise(libraries, module, seed=0):
  """Random values of a sensible size in every parameter, zeros included."""
  generator = libraries.torch.Generator().manual_seed(seed)
  with libraries.torch.no_grad():
    for name, x in module.named_parameters():
      is_scale = "norm" in name and name.endswith("weight")
      x.normal_(1 if is_scale else 0, 0.2, generator=generator)
  return module


def _difference(found, expected):
  """The largest one, relative to the standard deviation."""
  expected = np.asarray(expected)
  assert found.shape == expected.shape
  difference = np.abs(found - expected).max() / expected.std()
  print(f"difference: {difference:.2g}")  # pytest -s shows it
  return difference


# --- position embeddings ---


@pytest.mark.ci
@pytest.mark.parametrize(
  ("method", "mode", "antialias"),
  [
    ("timm", "bicubic", True),
    ("huggingface", "bicubic", False),
    ("dinov2", "bicubic", False),
    ("bilinear", "bilinear", False),
    ("bilinear_antialiased", "bilinear", True),
    ("cpe", "bilinear", False),
  ],
)
def test_resized_grids_equal_torch(libraries, method, mode, antialias):
  torch = libraries.torch
  for old in ((14, 14), (7, 5), (24, 24), (16, 16), (1, 6), (14, 28)):
    # Not to one column: there PyTorch 2.13 repeats the first row if it
    # antialiases, while to one row it does not repeat the first column.
    for new in ((24, 24), (12, 9), (14, 14), (37, 37), (1, 4), (14, 28)):
      if old == new:
        continue
      grid = np.random.default_rng(0).normal(size=(*old, 5))
      to: dict = {"size": (max(new), max(new)) if method == "cpe" else new}
      if method == "dinov2":  # Meta's scale_factor, of which the size follows
        factors = [(m + 0.1) / n for n, m in zip(old, new, strict=True)]
        to = {"scale_factor": factors}
      expected = torch.nn.functional.interpolate(
        torch.from_numpy(grid).permute(2, 0, 1)[None],
        mode=mode,
        align_corners=False,
        antialias=antialias,
        **to,
      )[0].permute(1, 2, 0)[: new[0], : new[1]]
      resized = positions.resize_grid(grid, new, method)
      np.testing.assert_allclose(resized, expected.numpy(), rtol=0, atol=1e-6)


# --- Hugging Face ---


def _make_huggingface(libraries, kind="ViTForImageClassification", **changes):
  config = libraries.transformers.ViTConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    patch_size=8,
    num_labels=5,
    **{"image_size": list(SIZE), **changes},
  )
  model = getattr(libraries.transformers, kind)(config)
  return _randomise(libraries, model)


@pytest.mark.parametrize(
  ("act", "epsilon", "size"),
  covering.product(
    ["gelu", "gelu_pytorch_tanh", "gelu_new"],
    [1e-12, 1e-2],
    [SIZE, (16, 16)],
    mark="ci",
  ),
)
def test_huggingface_to_ours(libraries, tmp_path, act, epsilon, size):
  model = _make_huggingface(
    libraries, hidden_act=act, layer_norm_eps=epsilon, image_size=list(size)
  )
  model.save_pretrained(tmp_path)
  found = _run_ours(_read(tmp_path), make_images(size))
  expected = _run_torch(libraries, model, make_images(size)).logits
  assert _difference(found, expected) <= TOLERANCE


# Hugging Face resizes square embeddings only, and tells only by the number of
# patches whether it must.
@pytest.mark.ci
@pytest.mark.parametrize("size", [(40, 40), (16, 64), (16, 16)])
def test_huggingface_at_another_resolution(libraries, tmp_path, size):
  model = _make_huggingface(libraries, image_size=24)
  model.save_pretrained(tmp_path)
  weights = _read(tmp_path)
  found = _run_ours(weights, make_images(size), weights.resize)
  expected = _run_torch(
    libraries, model, make_images(size), interpolate_pos_encoding=True
  ).logits
  assert _difference(found, expected) <= TOLERANCE


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForMaskedImageModeling"])
def test_huggingface_model_without_head(libraries, tmp_path, kind):
  model = _make_huggingface(libraries, kind)
  model.save_pretrained(tmp_path)
  libraries.transformers.ViTImageProcessor(
    size={"height": 16, "width": 24}, image_std=[0.1, 0.2, 0.3]
  ).save_pretrained(tmp_path)
  weights = _read(tmp_path)
  assert weights.std == (0.1, 0.2, 0.3)
  assert weights.preprocess == f"resize(size, {BILINEAR})"
  found = _run_ours(weights, make_images())
  out = _run_torch(libraries, getattr(model, "vit", model), make_images())
  has_pooler = kind == "ViTModel"
  expected = out.pooler_output if has_pooler else out.last_hidden_state[:, 0]
  assert _difference(found, expected) <= TOLERANCE
  assert any("mask_token" in note for note in weights.notes) != has_pooler


@pytest.mark.parametrize(
  ("activation", "epsilon", "size"),
  covering.product(
    ["gelu_tanh", "gelu_erf"], [1e-6, 1e-2], [SIZE, (16, 16)], mark="ci"
  ),
)
def test_ours_to_huggingface(libraries, tmp_path, activation, epsilon, size):
  weights = make_weights(
    size=size, activation=activation, layer_norm_epsilon=epsilon
  )
  huggingface.write(weights, tmp_path / "out")
  cls = libraries.transformers.AutoModelForImageClassification
  model, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not any(info.values()), info
  expected = _run_torch(libraries, model, make_images(size)).logits
  found = _run_ours(weights, make_images(size))
  assert _difference(found, expected) <= TOLERANCE


@pytest.mark.ci
def test_ours_without_head_to_huggingface(libraries, tmp_path):
  weights = make_weights(num_classes=0, representation_size=10)
  huggingface.write(weights, tmp_path / "out")
  model, info = libraries.transformers.ViTModel.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(info.values()), info
  expected = _run_torch(libraries, model, make_images()).pooler_output
  assert _difference(_run_ours(weights, make_images()), expected) <= TOLERANCE


@pytest.mark.ci
@pytest.mark.parametrize(
  "preprocess",
  [
    f"resize(size, {BILINEAR})",
    f"resize((32, 48), {BICUBIC})|central_crop(size)",
    f"resize_small(32, {BICUBIC})|central_crop(size)",
    f"resize_small(32, {BILINEAR})|central_crop(size)",
  ],
)
def test_our_preprocessing_to_huggingface(libraries, tmp_path, preprocess):
  weights = make_weights()._replace(preprocess=preprocess)
  huggingface.write(weights, tmp_path / "out")
  processor = libraries.transformers.AutoImageProcessor.from_pretrained(
    tmp_path / "out"
  )
  image = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
  theirs = processor(image, return_tensors="np")["pixel_values"][0]
  ours = preprocess_image(image, preprocess, SIZE)
  assert theirs.shape == (3, *SIZE)
  theirs = np.rint((theirs.transpose(1, 2, 0) + 1) * 127.5)
  assert np.abs(theirs - ours).max() <= 1


# --- timm ---


def _make_timm(libraries, **options):
  model = libraries.timm.create_model(
    "vit_base_patch16_224",
    **{
      "img_size": SIZE,
      "patch_size": 8,
      "embed_dim": 24,
      "depth": 2,
      "num_heads": 3,
      "mlp_ratio": 40 / 24,
      "num_classes": 5,
      **options,
    },
  )
  return _randomise(libraries, model)


def _save_timm(libraries, model, folder):
  """As timm's own push_to_hf_hub does, but for the network."""
  hub = libraries.timm.models._hub
  hub.save_for_hf(model, folder, safe_serialization=True)


_POOLINGS = {
  "token": {},
  "token, no entry": {"no_embed_class": True},
  "avg": {"global_pool": "avg", "class_token": False, "fc_norm": False},
  "map": {"global_pool": "map", "class_token": False},
}


@pytest.mark.parametrize(
  ("pooling", "act"),
  covering.product(list(_POOLINGS), ["gelu", "gelu_tanh"], mark="ci"),
)
def test_timm_to_ours(libraries, tmp_path, pooling, act):
  model = _make_timm(libraries, act_layer=act, **_POOLINGS[pooling])
  _save_timm(libraries, model, tmp_path)
  found = _run_ours(_read(tmp_path), make_images())
  expected = _run_torch(libraries, model, make_images())
  assert _difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize(
  ("size", "pooling"),
  covering.product([(40, 24), (32, 64), (8, 16)], ["token", "avg"], mark="ci"),
)
def test_timm_at_another_resolution(libraries, tmp_path, size, pooling):
  model = _make_timm(libraries, **_POOLINGS[pooling])
  _save_timm(libraries, model, tmp_path)
  weights = _read(tmp_path)
  found = _run_ours(weights, make_images(size), weights.resize)
  model.set_input_size(size)
  expected = _run_torch(libraries, model, make_images(size))
  assert _difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize(
  ("options", "activation"),
  covering.product(
    [
      {},
      {"size": (16, 16)},
      {"classifier": "gap"},
      {"classifier": "map"},
      {"classifier": "map", "registers": 2, "class_token": True},
      {"pos_embedding": "none"},
      {"num_classes": 0},
    ],
    ["gelu_tanh", "gelu_erf"],
    mark="ci",
  ),
)
def test_ours_to_timm(libraries, tmp_path, options, activation):
  weights = make_weights(activation=activation, **options)
  weights = weights._replace(
    preprocess=f"resize_small(20, {BICUBIC})|central_crop(size)",
    mean=(0.4, 0.5, 0.6),
  )
  timm.write(weights, tmp_path / "out")
  model = libraries.timm.create_model(
    f"local-dir:{tmp_path / 'out'}", pretrained=True
  )
  images = make_images(weights.image_size)
  expected = _run_torch(libraries, model, images)
  assert _difference(_run_ours(weights, images), expected) <= TOLERANCE
  assert tuple(model.pretrained_cfg["mean"]) == (0.4, 0.5, 0.6)
  assert model.pretrained_cfg["crop_pct"] == pytest.approx(0.8)
  assert model.pretrained_cfg["interpolation"] == "bicubic"


# --- published npz, by timm's own readers ---


@pytest.mark.ci
def test_npz_to_timm(libraries, tmp_path):
  images = make_images((16, 16))
  vision_transformer.write(make_weights(size=(16, 16)), tmp_path / "vit.npz")
  model = _make_timm(libraries, img_size=(16, 16), act_layer="gelu_tanh")
  model.load_pretrained(str(tmp_path / "vit.npz"))
  expected = _run_torch(libraries, model, images)
  found = _run_ours(_read(tmp_path / "vit.npz"), images)
  assert _difference(found, expected) <= TOLERANCE


# How the ports add a small number to what kernels are divided by differs, and
# so kernels that are small themselves show it. Those of the published files
# deviate by some hundredths.
_DEVIATION = 0.03


def _with_small_kernels(weights):
  """Standardised kernels have `_DEVIATION`, instead of 0.3."""

  def is_standardised(path):
    return "conv" in path.split("/")[-2]

  params = {
    path: as_lazy(x.read() * np.float32(_DEVIATION / 0.3))
    if "/" in path and is_standardised(path)
    else x
    for path, x in weights.params.items()
  }
  return weights._replace(params=params)


def _run_torch_in_float64(libraries, model, images):
  return _run_torch(libraries, model.double(), images.astype(np.float64))


def _set_epsilon(model, cls, epsilon):
  modules = [module for module in model.modules() if isinstance(module, cls)]
  assert modules
  for module in modules:
    module.eps = epsilon


def _make_timm_hybrid(libraries):
  hybrid = libraries.timm.models.vision_transformer_hybrid
  return hybrid._create_vision_transformer_hybrid(
    "vit_base_r50_s16_224",
    backbone=hybrid._resnetv2((3, 4, 9)),
    img_size=(32, 32),
    embed_dim=24,
    depth=2,
    num_heads=3,
    mlp_ratio=40 / 24,
    num_classes=5,
    act_layer="gelu_tanh",
  )


def _standardise_as_the_authors(libraries, monkeypatch):
  """Divides kernels by their deviation + 1e-5, where timm has 1e-8 inside."""

  def forward(self, x):
    if self.same_pad:
      x = libraries.timm.layers.pad_same(x, self.kernel_size, self.stride)
    axes = (1, 2, 3)
    kernel = self.weight - self.weight.mean(axes, keepdim=True)
    kernel /= self.weight.std(axes, correction=0, keepdim=True) + 1e-5
    return libraries.torch.nn.functional.conv2d(
      x, kernel, None, self.stride, self.padding
    )

  conv = libraries.timm.layers.StdConv2dSame
  monkeypatch.setattr(conv, "forward", forward)


@pytest.mark.ci
def test_hybrid_npz_to_timm(libraries, tmp_path, monkeypatch):
  weights = _with_small_kernels(
    make_weights(variant="R50+ViT-w24d2m40h3_16", size=(32, 32))
  )
  images = make_images(weights.image_size)
  vision_transformer.write(weights, tmp_path / "hybrid.npz")
  model = _make_timm_hybrid(libraries)
  model.load_pretrained(str(tmp_path / "hybrid.npz"))
  found = _run_ours(_read(tmp_path / "hybrid.npz"), images)
  as_it_is = _run_torch_in_float64(libraries, model, images)
  assert TOLERANCE < _difference(found, as_it_is) < 1e-3
  _set_epsilon(model, libraries.torch.nn.GroupNorm, 1e-6)
  _standardise_as_the_authors(libraries, monkeypatch)
  expected = _run_torch_in_float64(libraries, model, images)
  assert _difference(found, expected) <= TOLERANCE


@pytest.mark.ci
def test_bit_npz_to_timm(libraries, tmp_path):
  weights = _with_small_kernels(make_weights(variant="R50x1", size=(64, 64)))
  images = make_images(weights.image_size)
  bit.write(weights, tmp_path / "bit.npz")
  model = libraries.timm.create_model("resnetv2_50x1_bit", num_classes=5)
  model.load_pretrained(str(tmp_path / "bit.npz"))
  found = _run_ours(_read(tmp_path / "bit.npz"), images)
  as_it_is = _run_torch_in_float64(libraries, model, images)
  assert _difference(found, as_it_is) < 1e-3
  # The authors have 1e-10 where timm has 1e-8.
  _set_epsilon(model, libraries.timm.layers.StdConv2d, 1e-10)
  expected = _run_torch_in_float64(libraries, model, images)
  assert _difference(found, expected) <= TOLERANCE
