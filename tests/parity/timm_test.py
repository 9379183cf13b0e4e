"""timm's VisionTransformer: read to the right logits, written, refused."""

import itertools
import math
import types

import covering
import numpy as np
import pytest
import reference_vit
import torch_formats
from random_models import (
  assert_close,
  models_are_kept,  # noqa: F401 - a fixture
)
from torch_formats import (
  BICUBIC,
  BILINEAR,
  VARIANT,
  assert_comes_back,
  assert_not_written,
  assert_refused,
  assert_same_bits,
  make_images,
  random_weights,
  read_saved,
  run,
  save,
  timm_config,
)

from vit_jax.pretrained import timm, torch_folders

_POSITIONS = "Transformer/posembed_input/pos_embedding"
_NOTHING = torch_folders.Fields("file", {})


def _config(arguments=None, pretrained=None, **changes):
  config = timm_config()
  config["model_args"] |= arguments or {}
  config["pretrained_cfg"] |= pretrained or {}
  return config | changes


# --- reading ---


@pytest.mark.parametrize(
  ("classifier", "arguments"),
  [
    ("token", {}),
    ("token", {"act_layer": "gelu_tanh"}),
    ("gap", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    ("map", {"class_token": False, "global_pool": "map"}),
    ("map", {"global_pool": "map", "act_layer": "gelu_tanh"}),
  ],
)
def test_logits(tmp_path, classifier, arguments):
  params = random_weights(classifier=classifier)
  config = _config(arguments)
  del config["global_pool"]
  weights = read_saved(tmp_path, torch_formats.timm(params), config)
  activation = "gelu_tanh" if "act_layer" in arguments else "gelu_erf"
  expected = reference_vit.apply(
    params, make_images(), patch=8, classifier=classifier, activation=activation
  )["logits"]
  found, _ = run(weights, make_images())
  assert_close({"logits": found}, {"logits": expected})
  assert weights.model["variant"] == VARIANT
  assert weights.model["layer_norm_epsilon"] == 1e-6
  assert weights.image_size == (16, 24)
  assert weights.resize == "timm"
  assert weights.preprocess == f"resize(size, {BILINEAR})"


@pytest.mark.parametrize(
  ("size", "with_config"),
  [((16, 16), True), ((16, 24), True), ((16, 16), False)],
)
def test_positions_without_the_class_token(tmp_path, size, with_config):
  variant = VARIANT if with_config else "ViT-w64d2m40h1_8"
  params = random_weights(variant=variant, image_size=size)
  params[_POSITIONS][:, 0] = 0
  arrays = torch_formats.timm(params)
  arrays["pos_embed"] = arrays["pos_embed"][:, 1:]
  config = _config({"img_size": list(size), "no_embed_class": True})
  weights = read_saved(tmp_path, arrays, config if with_config else None)
  assert weights.image_size == size
  found = weights.params[_POSITIONS].read()
  np.testing.assert_array_equal(found, params[_POSITIONS])


def test_without_positions(tmp_path):
  params = random_weights(pos_embedding="none")
  arrays = torch_formats.timm(params)
  weights = read_saved(tmp_path, arrays, _config({"pos_embed": "none"}))
  expected = reference_vit.apply(
    params,
    make_images(),
    patch=8,
    classifier="token",
    activation="gelu_erf",
    pos_embedding="none",
  )["logits"]
  found, _ = run(weights, make_images())
  assert_close({"logits": found}, {"logits": expected})


def test_a_file_alone(tmp_path):
  """Sizes from shapes, heads 64 wide, pixels in [-1, 1]; and that is said."""
  variant = "ViT-w128d1m40h2_8"
  params = random_weights(variant=variant, image_size=24)
  weights = read_saved(tmp_path, torch_formats.timm(params))
  assert weights.model["variant"] == variant
  assert weights.model["activation"] == "gelu_erf"
  assert weights.image_size == (24, 24)
  assert (weights.mean, weights.std) == ((0.5,) * 3, (0.5,) * 3)
  heads, pixels = weights.notes
  assert "2 are assumed, 64 wide" in heads
  assert "config.json is missing" in pixels


@pytest.mark.parametrize(
  ("architecture", "sizes", "heads"),
  [
    ("", (192, 12, 768), 3),  # Ti, by its sizes
    ("", (1280, 32, 5120), 16),  # H
    ("vit_huge_patch14_224", (1280, 32, 5120), 16),
    ("vit_base_patch16_gap_224", (768, 12, 3072), 16),
    ("vit_so400m_patch14_siglip_384", (1152, 27, 4304), 16),
    ("vit_betwixt_patch16_gap_256", (640, 12, 2560), 10),
    ("vit_giant_patch14_dinov2", (1536, 40, 4096), 24),
    ("vit_huge_plus_patch16_dinov3", (1280, 32, 5120), 20),
    ("vit_7b_patch16_dinov3", (4096, 40, 8192), 32),
    ("vit_gigantic_patch14_clip_224", (1664, 48, 8192), 16),
  ],
)
def test_heads_of_architectures(architecture, sizes, heads):
  width, depth, mlp = sizes
  shapes = {
    "patch_embed.proj.weight": (width, 3, 16, 16),
    "blocks.0.mlp.fc2.weight": (width, mlp),
    **{f"blocks.{i}.norm1.bias": (width,) for i in range(depth)},
  }
  arrays = {name: types.SimpleNamespace(shape=s) for name, s in shapes.items()}
  encoder, patch, _ = timm._describe(arrays, architecture, _NOTHING)
  assert (encoder, patch) == ((*sizes, heads), 16)


@pytest.mark.parametrize(
  ("architecture", "activation"),
  [
    ("vit_base_patch16_224", "gelu_erf"),
    ("vit_base_patch16_siglip_224", "gelu_erf"),
    ("vit_so400m_patch14_siglip_384", "gelu_erf"),
    ("vit_so400m_patch16_siglip_384", "gelu_tanh"),
    ("vit_base_patch32_siglip_256", "gelu_tanh"),
    ("vit_large_patch16_siglip_gap_512", "gelu_tanh"),
    ("vit_giantopt_patch16_siglip_256", "gelu_tanh"),
  ],
)
def test_activations_of_architectures(architecture, activation):
  assert timm._find_activation(architecture, _NOTHING) == activation


@pytest.mark.parametrize(
  ("interpolation", "method"),
  [("bilinear", "bilinear"), ("bicubic", "bicubic"), ("lanczos", "bicubic")],
)
@pytest.mark.parametrize(
  ("pretrained", "text"),
  [
    ({"crop_pct": 0.9, "crop_mode": "center"}, "resize_small(17"),
    ({"crop_pct": 0.5, "crop_mode": "squash"}, "resize((32, 48)"),
    ({"crop_pct": 0.8, "crop_mode": "border"}, "resize_small(20"),
    ({"crop_pct": None, "crop_mode": None}, "resize_small(18"),
  ],
)
def test_preparation(tmp_path, pretrained, text, interpolation, method):
  arrays = torch_formats.timm(random_weights())
  pretrained = pretrained | {"interpolation": interpolation, "mean": None}
  weights = read_saved(tmp_path, arrays, _config(pretrained=pretrained))
  options = f"method='{method}', antialias=True"
  assert weights.preprocess == f"{text}, {options})|central_crop(size)"
  noted = any("Pillow's lanczos" in note for note in weights.notes)
  assert noted == (interpolation == "lanczos")
  assert ("border" in str(weights.notes)) == ("border" in str(pretrained))
  assert weights.mean == (0.485, 0.456, 0.406)


def test_an_old_configuration_has_everything_at_the_top(tmp_path):
  params = random_weights(variant="ViT-w64d2m40h1_8")
  config = {
    "architecture": "vit_tiny_patch16_224",
    "input_size": [3, 16, 24],
    "crop_pct": 0.8,
    "mean": [0.1, 0.2, 0.3],
    "label_names": list("abcde"),
  }
  weights = read_saved(tmp_path, torch_formats.timm(params), config)
  assert weights.image_size == (16, 24)
  assert weights.mean == (0.1, 0.2, 0.3)
  assert weights.preprocess == (
    "resize_small(20, method='bicubic', antialias=True)|central_crop(size)"
  )
  assert weights.class_names == list("abcde")


# --- writing ---


@pytest.mark.parametrize(
  ("kind", "dtype"),
  covering.product(
    ["token", "no_embed_class", "gap", "map"], ["float32", "bfloat16"]
  ),
)
def test_file_to_file_is_the_same_bits(tmp_path, kind, dtype):
  classifier = "token" if kind == "no_embed_class" else kind
  arrays = torch_formats.timm(random_weights(classifier=classifier))
  if kind == "no_embed_class":
    arrays["pos_embed"] = arrays["pos_embed"][:, 1:]
  pool = {"gap": "avg", "map": "map"}.get(kind, "token")
  config = _config(global_pool=pool, label_names=list("abcde"))
  assert_same_bits(tmp_path, arrays, dtype, config)


@pytest.mark.parametrize(
  "options",
  [
    {"activation": "gelu_erf", "size": (16, 16)},
    {"class_names": list("abcde"), "variant": "ViT-w24d1m37h3_8"},
    {"num_classes": 0, "classifier": "gap"},
    {"pos_embedding": "none"},
    {"preprocess": f"resize_small(20, {BILINEAR})|central_crop(size)"},
    {"preprocess": f"resize((32, 48), {BICUBIC})|central_crop(size)"},
    {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)},
  ],
)
def test_ours_there_and_back(tmp_path, options):
  defaults = {"pos_embedding": "learned"}
  assert_comes_back(tmp_path / "out", "timm", "timm", defaults, **options)


def test_crops_give_the_size_they_were_made_for():
  sizes = itertools.product(range(1, 600, 7), range(0, 400, 5))
  for size, more in sizes:
    resized = size + more
    assert math.floor(size / timm._find_crop(size, resized)) == resized


def test_ratios_give_the_width_they_were_made_for():
  for hidden_size in (24, 192, 768, 1152, 1664):
    for mlp_dim in range(1, 4 * hidden_size, 3):
      ratio = timm._find_ratio(mlp_dim, hidden_size)
      assert int(hidden_size * ratio) == mlp_dim


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"representation_size": 4}, "cannot represent a pre_logits layer"),
    ({"layer_norm_epsilon": 1e-12}, "layer_norm_epsilon 1e-12"),
    ({"pos_embedding": "relative"}, "pos_embedding 'relative'"),
    ({"pos_embedding_at": "every_layer"}, "pos_embedding_at 'every_layer'"),
    ({"variant": "RN+ViT-w24d2m40h3_8"}, "the ResNet of RN+ViT"),
    ({"preprocess": "central_crop(size)"}, "preprocessing 'central_crop"),
    ({"preprocess": "resize((32, 40))|central_crop(size)"}, "by one factor"),
    ({"preprocess": "resize_small(9)|central_crop(size)"}, "by one factor"),
  ],
)
def test_what_cannot_be_said(tmp_path, options, message):
  assert_not_written(tmp_path / "out", "timm", message, **options)


# --- refusing ---


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("blocks.0.mlp.norm.weight", "a LayerNorm within the MLP"),
    ("blocks.0.attn.norm.weight", "a LayerNorm before attention's output"),
    ("blocks.0.ls1.gamma", "blocks.0.ls2.gamma is missing"),
    ("norm_pre.weight", "norm_pre.bias is missing"),
    ("patch_embed.backbone.stem.conv.weight", "a hybrid"),
    ("norm.scale", "norm.scale is not known"),
  ],
)
def test_what_there_is_no_place_for(tmp_path, name, message):
  arrays = torch_formats.timm(random_weights())
  arrays[name] = np.zeros(24, np.float32)
  assert_refused(save(tmp_path, arrays, timm_config()), message)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"act_layer": "mish"}, "act_layer is 'mish'"),
    ({"norm_layer": "rmsnorm"}, "model argument norm_layer='rmsnorm'"),
    ({"attn_layer": "diff"}, "model argument attn_layer='diff'"),
    ({"global_pool": "map"}, "global_pool is 'map', its arrays are for"),
    ({"pool_include_prefix": True}, "pool_include_prefix is True"),
    ({"num_heads": 5}, "5 attention heads do not divide the hidden size 24"),
    ({"num_heads": "3"}, "num_heads is '3'"),
    ({"img_size": "big"}, "img_size is 'big'"),
  ],
)
def test_bad_arguments(tmp_path, arguments, message):
  arrays = torch_formats.timm(random_weights())
  assert_refused(save(tmp_path, arrays, _config(arguments)), message)


@pytest.mark.parametrize(
  "name", ["resnet50", "vit_base_patch16_rpn_224", "vit_base_patch16_rope_224"]
)
def test_other_architectures(tmp_path, name):
  arrays = torch_formats.timm(random_weights())
  folder = save(tmp_path, arrays, _config(architecture=name))
  assert_refused(folder, f"architecture {name!r}; supported are timm's")


@pytest.mark.parametrize(
  ("variant", "message"),
  [
    ("ViT-w64d2m40h1_8", "has 6 patches, which is not"),
    (VARIANT, "the hidden size 24 is not a multiple of 64; put"),
  ],
)
def test_what_a_file_alone_does_not_say(tmp_path, variant, message):
  arrays = torch_formats.timm(random_weights(variant=variant))
  assert_refused(save(tmp_path, arrays), message)


def test_a_missing_array(tmp_path):
  arrays = torch_formats.timm(random_weights())
  for name in ("blocks.1.attn.qkv.bias", "pos_embed"):
    del arrays[name]
    folder = save(tmp_path, arrays, timm_config())
    assert_refused(folder, f"{name} is missing")
