"""Hugging Face's ViT: read to the right logits, written, refused."""

import json
import types

import covering
import ml_dtypes
import numpy as np
import pytest
import reference_vit
import torch_formats
from random_models import (
  assert_close,
  jit,
  models_are_kept,  # noqa: F401 - a fixture
  random_images,
)
from torch_formats import (
  VARIANT,
  assert_identical,
  assert_one_line,
  assert_same_arrays,
  huggingface_config,
  random_weights,
  save,
)

import vit_jax
from vit_jax import files
from vit_jax.errors import UserError
from vit_jax.pretrained import archives, huggingface
from vit_jax.pretrained.weights import Weights
from vit_jax.state import as_lazy, unflatten

PREPROCESSOR = {
  "size": {"height": 16, "width": 24},
  "resample": 2,
  "do_normalize": True,
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
}


def _open(folder):
  """Reads a folder as `pretrained.read` does."""
  documents = [
    files.read_json(folder / name) if (folder / name).exists() else None
    for name in ("config.json", "preprocessor_config.json")
  ]
  index = folder / "model.safetensors.index.json"
  file = index if index.exists() else folder / "model.safetensors"
  arrays = archives.open_safetensors(file)
  assert huggingface.matches(arrays, documents[0])
  return huggingface.read(str(folder), arrays, *documents)


def _run(weights, images):
  """Returns everything on the way to the logits, in float32."""
  params = {path: x.read() for path, x in weights.params.items()}
  model = weights.create_model(dtype="float32")
  return jit(model)(unflatten(params), images, intermediates=True)


def _images(size=(16, 24)):
  return random_images(types.SimpleNamespace(image_size=size))


def _expected(params, images, **options):
  with_head = params
  if "head/kernel" not in params:
    width = len(params.get("pre_logits/bias", params["cls"][0, 0]))
    with_head = params | {"head/kernel": np.zeros((width, 1)), "head/bias": 0}
  return reference_vit.apply(
    with_head, images, patch=8, classifier="token", **options
  )


# --- reading ---


@pytest.mark.parametrize(
  ("act", "modern"),
  covering.product(["gelu", "gelu_pytorch_tanh", "gelu_new"], [False, True]),
)
def test_logits(tmp_path, act, modern):
  activation = "gelu_erf" if act == "gelu" else "gelu_tanh"
  params = random_weights()
  config = huggingface_config(hidden_act=act, layer_norm_eps=1e-3)
  arrays = torch_formats.huggingface(params, modern=modern)
  weights = _open(save(tmp_path, arrays, config, PREPROCESSOR))
  logits, _ = _run(weights, _images())
  expected = _expected(
    params, _images(), activation=activation, layer_norm_epsilon=1e-3
  )
  assert_close({"logits": logits}, {"logits": expected["logits"]})
  assert weights.model["variant"] == VARIANT
  assert weights.model["activation"] == activation
  assert weights.image_size == (16, 24)
  assert weights.num_classes == 5
  assert weights.resize == "huggingface"


@pytest.mark.parametrize("representation_size", [0, 24, 10])
def test_model_without_classifier(tmp_path, representation_size):
  params = random_weights(0, representation_size=representation_size)
  config = huggingface_config(architectures=["ViTModel"])
  arrays = torch_formats.huggingface(params, prefix="")
  weights = _open(save(tmp_path, arrays, config, PREPROCESSOR))
  assert weights.num_classes == 0
  assert weights.model["representation_size"] == representation_size
  _, out = _run(weights, _images())
  names = ["pooled"] + ["pre_logits"] * bool(representation_size)
  expected = _expected(
    params, _images(), activation="gelu_erf", layer_norm_epsilon=1e-12
  )
  assert_close({n: out[n] for n in names}, {n: expected[n] for n in names})


def test_defaults_are_those_of_transformers():
  read_model = huggingface._read_model
  assert read_model("config.json", {}, 0) == {
    "variant": "ViT-B_16",
    "classifier": "token",
    "representation_size": 0,
    "activation": "gelu_erf",
    "layer_norm_epsilon": 1e-12,
  }


def test_a_square_image_may_be_one_number(tmp_path):
  params = random_weights(image_size=16)
  config = huggingface_config(image_size=16)
  weights = _open(save(tmp_path, torch_formats.huggingface(params), config))
  assert weights.image_size == (16, 16)


def test_an_image_that_is_no_whole_patches(tmp_path):
  """As timm's so400m_patch14 at 384: the rest is cut off."""
  params = random_weights()
  config = huggingface_config(image_size=[20, 27])
  folder = save(tmp_path, torch_formats.huggingface(params), config)
  model = vit_jax.load(str(folder))
  assert model.config.image_size == (20, 27)
  assert model.config.grid == (2, 3)
  assert any("4 pixels at the bottom and 3 to the" in n for n in model.notes)
  images = _images((20, 27))
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
  save(tmp_path, arrays, huggingface_config(), PREPROCESSOR)
  whole = _open(tmp_path)
  names = sorted(arrays)
  parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
  for part, mine in parts.items():
    save(tmp_path / part, {name: arrays[name] for name in mine})
    (tmp_path / part / "model.safetensors").rename(tmp_path / f"{part}.tmp")
    (tmp_path / part).rmdir()
    (tmp_path / f"{part}.tmp").rename(tmp_path / part)
  (tmp_path / "model.safetensors").unlink()
  index = {n: part for part, mine in parts.items() for n in mine}
  (tmp_path / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": index})
  )
  assert_identical(_open(tmp_path), whole)
  (tmp_path / "two.safetensors").unlink()
  with pytest.raises(UserError, match=r"two\.safetensors"):
    _open(tmp_path)


def test_what_no_classification_reads_is_left_out(tmp_path):
  params = random_weights()
  arrays = torch_formats.huggingface(params)
  extra = {
    "vit.embeddings.mask_token": np.zeros((1, 1, 24), np.float32),
    "vit.pooler.dense.weight": np.zeros((24, 24), np.float32),
    "vit.pooler.dense.bias": np.zeros(24, np.float32),
    "decoder.0.bias": np.zeros(3, np.float32),
  }
  config = huggingface_config()
  found = _open(save(tmp_path / "a", arrays | extra, config, PREPROCESSOR))
  plain = _open(save(tmp_path / "b", arrays, config, PREPROCESSOR))
  assert found.params.keys() == plain.params.keys()
  assert found.model == plain.model
  new = set(found.notes) - set(plain.notes)
  assert sorted(note.split(",")[0] for note in new) == [
    "left out: the mask token and decoder of masked image modelling",
    "left out: the pooler",
  ]


def test_class_names(tmp_path):
  arrays = torch_formats.huggingface(random_weights())
  names = ["cat", "dog", "ant", "bee", "elk"]
  # JSON sorts keys as text.
  labels = {str(i): names[i] for i in (4, 0, 3, 1, 2)}
  config = huggingface_config(id2label=labels)
  assert _open(save(tmp_path, arrays, config)).class_names == names
  config = huggingface_config(id2label={str(i): f"LABEL_{i}" for i in range(5)})
  assert _open(save(tmp_path, arrays, config)).class_names is None
  config = huggingface_config(id2label={"0": "cat"})
  weights = _open(save(tmp_path, arrays, config))
  assert weights.class_names is None
  assert any("1 class names for 5 classes" in note for note in weights.notes)


@pytest.mark.parametrize(
  ("preprocessor", "text"),
  [
    ({}, "resize(size)"),
    ({"size": {"height": 16, "width": 24}}, "resize(size)"),
    (
      {"size": {"shortest_edge": 32}, "do_center_crop": True},
      "resize_small(32)|central_crop(size)",
    ),
    (
      {"size": 32, "image_processor_type": "CLIPImageProcessor"},
      "resize_small(32)|central_crop(size)",
    ),
    (
      {"size": 32, "image_processor_type": "DeiTImageProcessor"},
      "resize(32)|central_crop(size)",
    ),
    (
      {
        "size": 32,
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 24},
      },
      "resize(32)|central_crop(size)",
    ),
  ],
)
def test_preprocessor(tmp_path, preprocessor, text):
  arrays = torch_formats.huggingface(random_weights())
  preprocessor |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
  preprocessor |= {"resample": 3}
  weights = _open(save(tmp_path, arrays, huggingface_config(), preprocessor))
  assert weights.preprocess == text
  assert weights.mean == (0.4, 0.5, 0.6)
  assert weights.std == (0.1, 0.2, 0.3)
  assert any("Pillow's bicubic" in note for note in weights.notes)


@pytest.mark.parametrize(
  ("size", "crop_pct", "text"),
  [
    # transformers' ConvNextImageProcessor: int(224 / 0.875) = 256.
    (224, 0.875, "resize_small(256)|central_crop(size)"),
    (384, 0.875, "resize(size)"),
  ],
)
def test_crop_pct(tmp_path, size, crop_pct, text):
  arrays = torch_formats.huggingface(random_weights(image_size=size))
  preprocessor = {"size": {"shortest_edge": size}, "crop_pct": crop_pct}
  config = huggingface_config(image_size=size)
  assert _open(save(tmp_path, arrays, config, preprocessor)).preprocess == text


@pytest.mark.parametrize(
  ("changes", "factor", "mean", "std"),
  [
    ({}, 1 / 255, 0.4, 0.2),
    ({"do_normalize": False}, 1 / 255, 0, 1),
    ({"rescale_factor": 1 / 127.5}, 1 / 127.5, 0.4, 0.2),
    ({"do_rescale": False}, 1, 0.4, 0.2),
    ({"do_rescale": False, "do_normalize": False}, 1, 0, 1),
  ],
)
def test_pixels_are_those_of_the_processor(
  tmp_path, changes, factor, mean, std
):
  """(pixel * rescale_factor - image_mean) / image_std, of 0 to 255."""
  arrays = torch_formats.huggingface(random_weights())
  given = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3} | changes
  weights = _open(save(tmp_path, arrays, huggingface_config(), given))
  pixels = np.array([0, 7, 255])
  found = (pixels / 255 - weights.mean[0]) / weights.std[0]
  np.testing.assert_allclose(found, (pixels * factor - mean) / std, rtol=1e-9)


# --- writing ---


@pytest.mark.parametrize(
  ("head", "dtype"),
  covering.product([(5, 0), (0, 0), (0, 10)], ["float32", "bfloat16"]),
)
def test_file_to_file_is_the_same_bits(tmp_path, head, dtype):
  num_classes, representation_size = head
  params = random_weights(num_classes, representation_size=representation_size)
  prefix = "vit." if num_classes else ""
  arrays = {
    name: x.astype(getattr(ml_dtypes, dtype, dtype))
    for name, x in torch_formats.huggingface(params, prefix=prefix).items()
  }
  old = save(tmp_path / "old", arrays, huggingface_config(), PREPROCESSOR)
  weights = _open(old)
  huggingface.write(weights, tmp_path / "new")
  assert_identical(_open(tmp_path / "new"), weights)
  assert_same_arrays(tmp_path / "new" / "model.safetensors", arrays)


def _ours(num_classes=5, size=(16, 24), **options):
  """Weights as a run of ours has them."""
  fields = {
    name: options.pop(name)
    for name in ("class_names", "preprocess", "mean", "std", "loss")
    if name in options
  }
  params = random_weights(num_classes, image_size=size, **options)
  model = {"variant": VARIANT, **options}
  lazy = {path: as_lazy(x) for path, x in params.items()}
  return Weights("vit_jax", "a run", model, size, num_classes, lazy, **fields)


@pytest.mark.parametrize(
  "options",
  [
    {"activation": "gelu_erf", "layer_norm_epsilon": 1e-12},
    {"class_names": list("abcde"), "loss": "sigmoid", "size": (16, 16)},
    {"preprocess": "resize_small(20)|central_crop(size)"},
    {"preprocess": "resize((20, 30))|central_crop(size)"},
    {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)},
    {"num_classes": 0, "representation_size": 7},
  ],
)
def test_ours_there_and_back(tmp_path, options):
  weights = _ours(**options)
  huggingface.write(weights, tmp_path / "out")
  found = _open(tmp_path / "out")
  defaults = {
    "classifier": "token",
    "representation_size": 0,
    "activation": "gelu_tanh",
    "layer_norm_epsilon": 1e-6,
  }
  expected = weights._replace(
    model=defaults | weights.model, resize="huggingface"
  )
  assert_identical(found, expected)


def test_writing_is_complete_or_nothing(tmp_path):
  weights = _ours()
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine.txt").write_text("kept")
  with pytest.raises(UserError, match="full exists; nothing is overwritten"):
    huggingface.write(weights, tmp_path / "full")
  (tmp_path / "empty").mkdir()
  huggingface.write(weights, tmp_path / "empty")

  def fail():
    raise OSError("disk")

  broken = weights.params["cls"]._replace(read=fail)
  broken = weights._replace(params={**weights.params, "cls": broken})
  with pytest.raises(OSError, match="disk"):
    huggingface.write(broken, tmp_path / "broken")
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["empty", "full"]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"classifier": "gap"}, "cannot represent classifier 'gap'"),
    ({"classifier": "map"}, "cannot represent classifier 'map'"),
    ({"pos_embedding": "sincos2d"}, "pos_embedding 'sincos2d'"),
    ({"pos_embedding_at": "every_layer"}, "pos_embedding_at 'every_layer'"),
    ({"representation_size": 4}, "a pre_logits layer together with a head"),
    ({"variant": "RN+ViT-w24d2m40h3_8"}, "the ResNet of RN+ViT"),
    ({"preprocess": "central_crop(size)"}, "preprocessing 'central_crop"),
  ],
)
def test_what_cannot_be_said(tmp_path, options, message):
  with pytest.raises(UserError) as error:
    huggingface.write(_ours(**options), tmp_path / "out")
  assert_one_line(error, message)
  assert not list(tmp_path.iterdir())


# --- refusing ---


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "bert"}, "architecture 'bert'; of Hugging Face's, 'vit'"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ({"qkv_bias": False}, "qkv_bias is false"),
    ({"patch_size": [8, 4]}, "patches are (8, 4)"),
    ({"image_size": "big"}, "image_size is 'big'"),
    ({"image_size": [16, 20]}, "position_embeddings is"),
    ({"hidden_size": 24.5}, "hidden_size is 24.5"),
    ({"num_attention_heads": 5}, "(24, 2, 40, 5)"),
    ({"num_attention_heads": 0}, "(24, 2, 40, 0)"),
    ({"intermediate_size": 41}, "intermediate.dense.bias is 40, 41 is needed"),
    ({"num_hidden_layers": 1}, "config.json has 1 layers, the file 2"),
    ({"num_hidden_layers": 3}, "config.json has 3 layers, the file 2"),
    ({"id2label": {"a": "cat"}}, "id2label has keys that are no numbers"),
    ({"problem_type": "regression"}, "problem_type is 'regression'"),
  ],
)
def test_bad_configurations(tmp_path, changes, message):
  arrays = torch_formats.huggingface(random_weights())
  save(tmp_path, arrays, huggingface_config(**changes))
  with pytest.raises(UserError) as error:
    _open(tmp_path)
  assert_one_line(error, message)


@pytest.mark.parametrize("problem", [None, "single_label_classification"])
def test_one_output_is_no_class(tmp_path, problem):
  """transformers takes it for a regression, a softmax would be 100 %."""
  arrays = torch_formats.huggingface(random_weights(num_classes=1))
  config = huggingface_config(problem_type=problem)
  with pytest.raises(UserError, match="1 outputs: numbers rather than classes"):
    _open(save(tmp_path, arrays, config))
  config["problem_type"] = "multi_label_classification"
  assert _open(save(tmp_path, arrays, config)).loss == "sigmoid"


def test_a_file_without_its_configuration(tmp_path):
  save(tmp_path, torch_formats.huggingface(random_weights()))
  with pytest.raises(UserError) as error:
    _open(tmp_path)
  assert_one_line(error, "config.json that belongs to it is missing")


@pytest.mark.parametrize(
  ("preprocessor", "message"),
  [
    ({"image_mean": [1, 2]}, "image_mean is [1, 2]"),
    ({"image_std": [0, 1, 1]}, "image_std is [0, 1, 1]"),
    ({"size": {"longest_edge": 3}}, "size is [None, None]"),
    ({"size": 384}, "size is (384, 384)"),
    ({"do_center_crop": True, "crop_size": 16}, "crop_size is (16, 16)"),
    ({"size": {"shortest_edge": 16}}, "size is (16, 16)"),
    ({"crop_pct": 0.9}, "crop_pct is 0.9"),
    ({"do_resize": False}, "do_resize is false"),
    ({"do_pad": True}, "do_pad=True"),
    ({"rescale_factor": 0}, "rescale_factor is 0"),
    ({"resample": 0}, "resample is 0"),
  ],
)
def test_bad_preprocessors(tmp_path, preprocessor, message):
  arrays = torch_formats.huggingface(random_weights())
  save(tmp_path, arrays, huggingface_config(), preprocessor)
  with pytest.raises(UserError) as error:
    _open(tmp_path)
  assert_one_line(error, message)


def test_values_that_are_not_finite(tmp_path):
  arrays = torch_formats.huggingface(random_weights())
  arrays["vit.layernorm.bias"][3] = np.nan
  weights = _open(save(tmp_path, arrays, huggingface_config()))
  with pytest.raises(UserError, match=r"layernorm\.bias holds values"):
    weights.params["Transformer/encoder_norm/bias"].read()
