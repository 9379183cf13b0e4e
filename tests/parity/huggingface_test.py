"""Hugging Face's ViT: read to the right logits, written, refused."""

import json

import covering
import numpy as np
import pytest
import reference_vit
import safetensors.numpy
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
  assert_identical,
  assert_not_written,
  assert_refused,
  assert_same_bits,
  huggingface_config,
  make_images,
  random_weights,
  read_saved,
  run,
  save,
)

import vit_jax
from vit_jax import pretrained
from vit_jax.errors import UserError
from vit_jax.pretrained import families, huggingface, torch_folders

PREPROCESSOR = {
  "size": {"height": 16, "width": 24},
  "resample": 2,
  "do_normalize": True,
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
}


def _expected(params, images, **options):
  with_head = params
  if "head/kernel" not in params:
    width = len(params.get("pre_logits/bias", params["cls"][0, 0]))
    with_head = params | {"head/kernel": np.zeros((width, 1)), "head/bias": 0}
  return reference_vit.apply(
    with_head, images, patch=8, classifier="token", **options
  )


# --- reading ---


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "gelu_new"])
def test_logits(tmp_path, act):
  activation = "gelu_erf" if act == "gelu" else "gelu_tanh"
  params = random_weights()
  config = huggingface_config(hidden_act=act, layer_norm_eps=1e-3)
  arrays = torch_formats.huggingface(params)
  weights = read_saved(tmp_path, arrays, config, PREPROCESSOR)
  logits, _ = run(weights, make_images())
  expected = _expected(
    params, make_images(), activation=activation, layer_norm_epsilon=1e-3
  )
  assert_close({"logits": logits}, {"logits": expected["logits"]})
  assert weights.model["variant"] == VARIANT
  assert weights.image_size == (16, 24)
  assert weights.resize == "huggingface"


@pytest.mark.parametrize("representation_size", [0, 10])
def test_model_without_classifier(tmp_path, representation_size):
  params = random_weights(0, representation_size=representation_size)
  config = huggingface_config(architectures=["ViTModel"])
  arrays = torch_formats.huggingface(params, prefix="")
  weights = read_saved(tmp_path, arrays, config, PREPROCESSOR)
  assert weights.num_classes == 0
  _, out = run(weights, make_images())
  names = ["pooled"] + ["pre_logits"] * bool(representation_size)
  expected = _expected(
    params, make_images(), activation="gelu_erf", layer_norm_epsilon=1e-12
  )
  assert_close({n: out[n] for n in names}, {n: expected[n] for n in names})


def test_defaults_are_those_of_transformers():
  nothing, family = torch_folders.Fields("config.json", {}), families.VIT
  assert huggingface._read_model(nothing, family, family.layouts[0]) == {
    "variant": "ViT-B_16",
    "classifier": "token",
    "activation": "gelu_erf",
    "layer_norm_epsilon": 1e-12,
  }


def test_an_image_that_is_no_whole_patches(tmp_path):
  """As timm's so400m_patch14 at 384: the rest is cut off."""
  params = random_weights()
  config = huggingface_config(image_size=[20, 27])
  folder = save(tmp_path, torch_formats.huggingface(params), config)
  model = vit_jax.load(str(folder))
  assert model.config.image_size == (20, 27)
  assert model.config.grid == (2, 3)
  assert any("4 pixels at the bottom and 3 to the" in n for n in model.notes)
  images = make_images((20, 27))
  expected = _expected(
    params,
    images[:, :16, :24],
    activation="gelu_erf",
    layer_norm_epsilon=1e-12,
  )
  assert_close({"logits": model(images)}, {"logits": expected["logits"]})
  with pytest.raises(UserError, match="28 is not divisible by the patch size"):
    vit_jax.load(str(folder), image_size=28)


def test_files_in_parts(tmp_path):
  arrays = torch_formats.huggingface(random_weights())
  whole = read_saved(tmp_path, arrays, huggingface_config(), PREPROCESSOR)
  index = {}
  for i in range(2):
    part = dict(sorted(arrays.items())[i::2])
    save(tmp_path / str(i), part)
    file = tmp_path / str(i) / "model.safetensors"
    file.rename(tmp_path / f"{i}.safetensors")
    index |= dict.fromkeys(part, f"{i}.safetensors")
  (tmp_path / "model.safetensors").unlink()
  (tmp_path / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": index})
  )
  assert_identical(pretrained.read(str(tmp_path)), whole)
  part = tmp_path / "1.safetensors"
  part.write_bytes(part.read_bytes()[:-1])
  assert_refused(tmp_path, "1.safetensors: the file is corrupt")
  part.unlink()
  assert_refused(tmp_path, "its part 1.safetensors is missing; fetch it")
  for text in ("{}", '{"weight_map": []}'):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert_refused(tmp_path, "its weight_map names no files")


def test_what_no_classification_reads_is_left_out(tmp_path):
  arrays = torch_formats.huggingface(random_weights())
  extra = {
    "vit.embeddings.mask_token": np.zeros((1, 1, 24), np.float32),
    "vit.pooler.dense.weight": np.zeros((24, 24), np.float32),
    "vit.pooler.dense.bias": np.zeros(24, np.float32),
    "decoder.0.bias": np.zeros(3, np.float32),
  }
  config = huggingface_config()
  found = read_saved(tmp_path / "a", arrays | extra, config, PREPROCESSOR)
  plain = read_saved(tmp_path / "b", arrays, config, PREPROCESSOR)
  assert_identical(found, plain)
  assert len(found.notes) == len(plain.notes) + 1


def test_class_names(tmp_path):
  arrays = torch_formats.huggingface(random_weights())
  names = ["cat", "dog", "ant", "bee", "elk"]
  # JSON sorts keys as text.
  labels = {str(i): names[i] for i in (4, 0, 3, 1, 2)}
  config = huggingface_config(id2label=labels)
  assert read_saved(tmp_path, arrays, config).class_names == names
  config = huggingface_config(id2label={str(i): f"LABEL_{i}" for i in range(5)})
  assert read_saved(tmp_path, arrays, config).class_names is None
  config = huggingface_config(id2label={"0": "cat"})
  weights = read_saved(tmp_path, arrays, config)
  assert weights.class_names is None
  assert any("1 class names for 5 classes" in note for note in weights.notes)


@pytest.mark.parametrize(
  ("preprocessor", "text"),
  [
    ({}, f"resize(size, {BILINEAR})"),
    (
      {"size": {"height": 16, "width": 24}, "resample": 3},
      f"resize(size, {BICUBIC})",
    ),
    ({"resample": 1}, f"resize(size, {BICUBIC})"),
    (
      {"size": {"shortest_edge": 32}, "do_center_crop": True},
      f"resize_small(32, {BILINEAR})|central_crop(size)",
    ),
    (
      {"size": 32, "image_processor_type": "CLIPImageProcessor"},
      f"resize_small(32, {BICUBIC})|central_crop(size)",
    ),
    (
      {"size": 32, "image_processor_type": "BitImageProcessor", "resample": 2},
      f"resize_small(32, {BILINEAR})|central_crop(size)",
    ),
    (
      {"size": 32, "feature_extractor_type": "DeiTFeatureExtractor"},
      f"resize(32, {BICUBIC})|central_crop(size)",
    ),
    (
      {"image_processor_type": "SiglipImageProcessor"},
      f"resize(size, {BICUBIC})",
    ),
  ],
)
def test_preprocessor(tmp_path, preprocessor, text):
  arrays = torch_formats.huggingface(random_weights())
  preprocessor |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
  weights = read_saved(tmp_path, arrays, huggingface_config(), preprocessor)
  assert weights.preprocess == text
  assert weights.mean == (0.4, 0.5, 0.6)
  assert weights.std == (0.1, 0.2, 0.3)
  noted = any("Pillow's Lanczos" in note for note in weights.notes)
  assert noted == (preprocessor.get("resample") == 1)
  preprocessor["do_normalize"] = False
  weights = read_saved(tmp_path, arrays, huggingface_config(), preprocessor)
  assert (weights.mean, weights.std) == ((0,) * 3, (1,) * 3)


DINOV3 = {
  "pos_embedding": "none",
  "rope": "dinov3",
  "layer_scale_init": 1.0,
  "qkv_bias": "qv",
  "variant": "ViT-w24d2m40h2_8",
}
DINOV2 = {
  "classifier": "token",
  "layer_scale_init": 1.0,
  "variant": "ViT-w24d2m48h3_8",
}
CLIP = {"pre_norm": True, "patch_bias": False}


def _write(folder, **options):
  """Writes random weights; returns the folder."""
  weights = torch_formats.make_weights(**options)
  pretrained.write(weights, str(folder / "out"), "hf")
  return folder / "out"


@pytest.mark.parametrize(
  ("options", "mean"),
  [(DINOV3, 0.485), (DINOV2, 0.485), (CLIP, 0.48145466), ({}, 0.5)],
)
def test_pixels_without_a_preprocessor(tmp_path, options, mean):
  folder = _write(tmp_path, num_classes=0, size=(16, 16), **options)
  (folder / "preprocessor_config.json").unlink()
  weights = pretrained.read(str(folder))
  assert weights.mean[0] == mean
  assert any(
    "preprocessor_config.json is missing" in note for note in weights.notes
  )


def test_images_of_another_size_than_the_position_embedding(tmp_path):
  """DINOv2 has 37x37 positions, and its preprocessor makes 16x16 patches."""
  folder = _write(tmp_path, num_classes=0, size=(40, 40), **DINOV2)
  preprocessor = PREPROCESSOR | {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 20},
    "crop_size": {"height": 16, "width": 16},
  }
  text = json.dumps(preprocessor)
  (folder / "preprocessor_config.json").write_text(text)
  weights = pretrained.read(str(folder))
  options = "method='bilinear', antialias=True"
  assert weights.preprocess == f"resize_small(50, {options})|central_crop(size)"
  assert any("load(..., image_size=(16, 16))" in x for x in weights.notes)
  model = vit_jax.load(str(folder), image_size=16)
  assert "smaller_size=20, " in model.config.preprocess


def test_integers_of_older_versions_are_passed_over(tmp_path):
  """CLIP's position_ids, which are 0, 1, 2, ..."""
  folder = _write(tmp_path, num_classes=0, size=(16, 16), **CLIP)
  expected = pretrained.read(str(folder))
  file = folder / "model.safetensors"
  arrays = safetensors.numpy.load_file(file)
  arrays["vision_model.embeddings.position_ids"] = np.arange(5)[None]
  safetensors.numpy.save_file(arrays, file)
  assert_identical(pretrained.read(str(folder)), expected)


# --- writing ---


@pytest.mark.parametrize(
  ("head", "dtype"),
  covering.product([(5, 0), (0, 0), (0, 10)], ["float32", "bfloat16"]),
)
def test_file_to_file_is_the_same_bits(tmp_path, head, dtype):
  num_classes, representation_size = head
  params = random_weights(num_classes, representation_size=representation_size)
  prefix = "vit." if num_classes else ""
  arrays = torch_formats.huggingface(params, prefix=prefix)
  assert_same_bits(tmp_path, arrays, dtype, huggingface_config(), PREPROCESSOR)


@pytest.mark.parametrize(
  "options",
  [
    {"activation": "gelu_erf", "layer_norm_epsilon": 1e-12},
    {"class_names": list("abcde"), "loss": "sigmoid", "size": (16, 16)},
    {"preprocess": f"resize_small(20, {BILINEAR})|central_crop(size)"},
    {"preprocess": f"resize((20, 30), {BICUBIC})|central_crop(size)"},
    {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)},
    {"num_classes": 0, "representation_size": 7},
  ],
)
def test_ours_there_and_back(tmp_path, options):
  assert_comes_back(
    tmp_path / "out", "hf", "huggingface", {"representation_size": 0}, **options
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"classifier": "map"}, "Hugging Face's ViT cannot represent classifier"),
    ({"classifier": "gap"}, "classifier 'gap'"),  # but of square images
    ({"qk_norm": True}, "qk_norm True"),
    ({"rope": "dinov3"}, "rope 'dinov3'"),
    (
      {"rope": "dinov3", "pos_embedding": "none", "layer_scale_init": 1.0},
      "Hugging Face's DINOv3 cannot represent a classification head",
    ),
    (
      {"layer_scale_init": 1.0, "classifier": "token+gap", "size": (16, 16)},
      "Hugging Face's DINOv2 cannot represent an MLP of the width 40",
    ),
    (
      {
        "layer_scale_init": 1.0,
        "classifier": "token+gap",
        "size": (16, 16),
        "mlp": "gated",
        "variant": "ViT-w24d2m64h3_8",
      },
      "activation 'gelu_tanh' of a gated MLP",
    ),
    ({"pos_embedding": "sincos2d"}, "pos_embedding 'sincos2d'"),
    ({"pos_embedding_at": "every_layer"}, "pos_embedding_at 'every_layer'"),
    ({"representation_size": 4}, "a pre_logits layer before a head"),
    ({"variant": "RN+ViT-w24d2m40h3_8"}, "the ResNet of RN+ViT"),
    ({"preprocess": "central_crop(size)"}, "preprocessing 'central_crop"),
  ],
)
def test_what_cannot_be_said(tmp_path, options, message):
  assert_not_written(tmp_path / "out", "hf", message, **options)


# --- refusing ---


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (None, "the config.json that belongs to it is missing"),
    ({"model_type": "bert"}, "'bert'; supported are vit, deit, dinov2,"),
    ({"model_type": "siglip2"}, "'siglip2'; that is SigLIP 2's NaFlex"),
    ({"model_type": "clip_text_model"}, "that is a text tower"),
    ({"model_type": "aimv2"}, "'aimv2'; it has RMSNorm"),
    ({"model_type": "beit"}, "'beit'; its blocks have a bias"),
    ({"model_type": "ijepa"}, "'ijepa'; "),
    ({"model_type": "clip"}, "embeddings.patch_embedding.weight is missing"),
    ({"model_type": "siglip", "vision_config": 3}, "vision_config is 3"),
    ({"model_type": "deit"}, "there is no vision encoder in it"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ({"qkv_bias": False}, "attention.key.bias is not known"),
    ({"qkv_bias": "no"}, "qkv_bias is 'no'"),
    ({"patch_size": [8, 4]}, "patches are (8, 4)"),
    ({"image_size": "big"}, "image_size is 'big'"),
    ({"image_size": [16, 20]}, "position_embeddings is"),
    ({"hidden_size": 24.5}, "hidden_size is 24.5"),
    ({"num_attention_heads": 0}, "(24, 2, 40, 0)"),
    ({"intermediate_size": 41}, "intermediate.dense.bias is 40, 41 is needed"),
    ({"num_hidden_layers": 3}, "more are missing"),
    ({"id2label": {"a": "cat"}}, "id2label has keys that are not numbers"),
    ({"problem_type": "regression"}, "problem_type is 'regression'"),
  ],
)
def test_bad_configurations(tmp_path, changes, message):
  arrays = torch_formats.huggingface(random_weights())
  config = None if changes is None else huggingface_config(**changes)
  assert_refused(save(tmp_path, arrays, config), message)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"proj_bias": False}, "proj_bias is false"),
    ({"query_bias": False}, "are (False, False, True); ours has all, none"),
    ({"hidden_act": "gelu_10"}, "hidden_act is 'gelu_10'"),
    ({"use_gated_mlp": True}, "gate_proj.bias is missing"),
    ({"num_register_tokens": 3}, "register_tokens is 1x2x24, 1x3x24 is needed"),
    ({"key_bias": True}, "k_proj.bias is missing"),
    ({"rope_theta": "fast"}, "rope_theta is 'fast'"),
  ],
)
def test_bad_configurations_of_dinov3(tmp_path, changes, message):
  folder = _write(tmp_path, num_classes=0, registers=2, **DINOV3)
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  assert_refused(folder, message)


def test_a_text_tower_alone(tmp_path):
  """As CLIPTextModel in older versions, whose config.json says 'clip'."""
  arrays = {"text_model.final_layer_norm.weight": np.ones(8, np.float32)}
  folder = save(tmp_path, arrays, {"model_type": "clip", "vision_config": {}})
  assert_refused(
    folder,
    "there is no vision encoder in it, but text_model.final_layer_norm.weight",
  )


@pytest.mark.parametrize("problem", [None, "single_label_classification"])
def test_one_output_is_no_class(tmp_path, problem):
  """transformers takes it for a regression, a softmax would be 100 %."""
  arrays = torch_formats.huggingface(random_weights(num_classes=1))
  config = huggingface_config(problem_type=problem)
  assert_refused(save(tmp_path, arrays, config), "1 outputs: numbers rather")
  config["problem_type"] = "multi_label_classification"
  assert read_saved(tmp_path, arrays, config).loss == "sigmoid"


@pytest.mark.parametrize(
  ("preprocessor", "message"),
  [
    ({"image_mean": [1, 2]}, "image_mean is [1, 2]"),
    ({"image_std": [0, 1, 1]}, "image_std is [0, 1, 1]"),
    ({"size": {"longest_edge": 3}}, "size is [None, None]"),
    ({"size": 384}, "size is (384, 384)"),
    ({"do_center_crop": True, "crop_size": 16}, "crop_size is (16, 16)"),
    ({"size": {"shortest_edge": 16}}, "do_center_crop false"),
    ({"crop_pct": 0.9}, "crop_pct=0.9"),
    ({"feature_extractor_type": "ConvNextFeatureExtractor"}, "ConvNext"),
    ({"do_resize": False}, "do_resize is false"),
    ({"do_pad": True}, "do_pad=True"),
    ({"do_rescale": False}, "must be rescaled"),
    ({"rescale_factor": 0}, "must be rescaled"),
    ({"resample": 0}, "resample is 0"),
  ],
)
def test_bad_preprocessors(tmp_path, preprocessor, message):
  arrays = torch_formats.huggingface(random_weights())
  folder = save(tmp_path, arrays, huggingface_config(), preprocessor)
  assert_refused(folder, message)
