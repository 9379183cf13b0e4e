"""Other people's npz files: read to the right logits, written, refused."""

import logging
import pickle
import zipfile

import covering
import file_formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_resnet
import reference_vit
from random_models import (
  models_are_kept,  # noqa: F401 - a fixture
  random_images,
  random_weights,
)

import vit_jax
from vit_jax import models, pretrained
from vit_jax.data.preprocess import parse
from vit_jax.errors import UserError
from vit_jax.pretrained import archives, positions
from vit_jax.pretrained.weights import as_lazy

VIT = "ViT-w16d2m24h2_8"
HYBRID = "RN+ViT-w16d2m24h2_8"
SIZE = 32


def _weights(variant=VIT, **options):
  return random_weights(variant, SIZE, num_classes=5, **options)


def _random(variant, **options):
  """Returns random parameters {path: array} of a small model."""
  arrays = _weights(variant, **options).params
  return {path: x.read() for path, x in arrays.items()}


def _images(size=(SIZE, SIZE)):
  model = models.create(variant=VIT, num_classes=5, image_size=size)
  return random_images(model)


def _save(folder, arrays):
  file = folder / "weights.npz"
  np.savez(file, **arrays)
  return str(file)


def _assert_logits(found, expected):
  """To 1e-4 of their standard deviation, in float32."""
  assert found.dtype == np.float32
  assert np.abs(found - expected).max() <= 1e-4 * expected.std()


def _vit_logits(params, images, classifier="token", **options):
  patch = params["embedding/kernel"].shape[0]
  return reference_vit.apply(
    params, images, patch=patch, classifier=classifier, **options
  )["logits"]


# --- reading ---

_LAYOUTS = {
  "published": file_formats.published_npz,
  "linen": dict,
  "optimizer dump": lambda p: file_formats.prefixed(
    file_formats.published_npz(p)
  ),
  "params/": lambda p: file_formats.prefixed(dict(p), "params/"),
}


@pytest.mark.parametrize(
  ("layout", "head"),
  covering.product(list(_LAYOUTS), [("token", 0), ("token", 16), ("gap", 0)]),
)
def test_vision_transformer_files(tmp_path, layout, head):
  classifier, representation_size = head
  params = _random(
    VIT, classifier=classifier, representation_size=representation_size
  )
  model = vit_jax.load(_save(tmp_path, _LAYOUTS[layout](params)))
  images = _images()
  _assert_logits(model(images), _vit_logits(params, images, classifier))
  config = model.config
  assert config.origin == "vision_transformer"
  assert (config.variant, config.patch, config.grid) == (VIT, 8, (4, 4))
  assert (config.image_size, config.num_classes) == ((SIZE, SIZE), 5)
  assert (config.classifier, config.representation_size) == (
    classifier,
    representation_size,
  )
  assert (config.activation, config.layer_norm_epsilon) == ("gelu_tanh", 1e-6)
  assert config.preprocess == "resize(size)"
  assert sorted(model.report.taken) == sorted(params)


@pytest.mark.parametrize("old", [False, True])
def test_hybrid_files(tmp_path, old):
  params = _random(HYBRID)
  arrays = file_formats.published_npz(params)
  if old:
    arrays = file_formats.old_group_norms(arrays)
    assert arrays["block1/unit1/gn_proj/scale"].ndim == 4
  model = vit_jax.load(_save(tmp_path, arrays))
  images = _images()
  _assert_logits(model(images), _vit_logits(params, images, units=(1, 1)))
  assert model.config.variant == HYBRID
  assert model.config.patch == 8


@pytest.mark.parametrize("numbered", [False, True])
def test_bit_files(tmp_path, numbered):
  params = _random("RNx1")
  arrays = file_formats.bit_npz(params)
  if numbered:  # as TensorFlow does to a second layer of the same name
    arrays = {
      name.replace("a/standardized_conv2d/", "a/standardized_conv2d_1/"): x
      for name, x in arrays.items()
    }
  model = vit_jax.load(_save(tmp_path, arrays))
  images = _images((40, 24))  # a ResNet takes any size
  expected = reference_resnet.apply_bit(params, images, (1, 1))
  _assert_logits(model(images), expected["logits"])
  assert (model.config.origin, model.config.variant) == ("big_transfer", "RNx1")


_BIG_VISION_LAYOUTS = {
  "looped": dict,
  "scanned": file_formats.scanned,
  "params/": lambda a: file_formats.prefixed(a, "params/"),
  "old MAP head": file_formats.old_map_head,
  "old place": lambda a: {
    name.replace("pos_embedding", "Transformer/pos_embedding"): x
    for name, x in a.items()
  },
}


@pytest.mark.parametrize(
  ("layout", "classifier"),
  covering.product(list(_BIG_VISION_LAYOUTS), ["map", "token", "gap"]),
)
def test_big_vision_files(tmp_path, layout, classifier):
  params = _random(VIT, classifier=classifier)
  arrays = file_formats.big_vision_npz(params)
  model = vit_jax.load(_save(tmp_path, _BIG_VISION_LAYOUTS[layout](arrays)))
  images = _images()
  _assert_logits(model(images), _vit_logits(params, images, classifier))
  assert model.config.origin == "big_vision"
  assert model.config.classifier == classifier


def test_fixed_waves(tmp_path):
  options = {"classifier": "gap", "pos_embedding": "sincos2d"}
  params = _random(VIT, representation_size=16, **options)
  model = vit_jax.load(_save(tmp_path, params), image_size=SIZE)
  images = _images()
  _assert_logits(model(images), _vit_logits(params, images, **options))
  assert model.config.pos_embedding == "sincos2d"


def test_bfloat16(tmp_path):
  params = {
    name: x.astype(jnp.bfloat16)
    for name, x in _random(VIT, classifier="gap").items()
  }
  arrays = file_formats.big_vision_npz(params)
  source = _save(tmp_path, arrays)
  with np.load(source) as file:  # that is what NumPy makes of it
    assert file["embedding/kernel"].dtype == np.dtype("V2")
  images = _images()
  found = vit_jax.load(source)(images)
  _assert_logits(found, _vit_logits(params, images, "gap"))


def test_one_of_several_models(tmp_path):
  params = _random(VIT)
  arrays = file_formats.big_vision_npz(params)
  both = {f"params/{part}/{n}": x for n, x in arrays.items() for part in "ab"}
  source = _save(tmp_path, both)
  images = _images()
  found = vit_jax.load(f"{source}:b")(images)
  _assert_logits(found, _vit_logits(params, images))
  with pytest.raises(UserError, match=r"holds the models a, b; choose one"):
    vit_jax.load(source)


# --- another size, other classes ---


@pytest.mark.parametrize("size", [(32, 64), *covering.nightly(64, 16)])
def test_another_image_size(tmp_path, size):
  params = _random(VIT)
  source = _save(tmp_path, file_formats.published_npz(params))
  model = vit_jax.load(source, image_size=size)
  new_grid = model.config.grid
  path = "Transformer/posembed_input/pos_embedding"
  resized = positions.resize_tokens(params[path], (4, 4), new_grid)
  images = _images(size)
  expected = _vit_logits(params | {path: resized}, images)
  _assert_logits(model(images), expected)
  height, width = new_grid
  assert model.report.resized == [f"{path} 4x4 -> {height}x{width}"]


def test_another_way_to_resize(tmp_path):
  params = _random(VIT)
  source = _save(tmp_path, file_formats.published_npz(params))
  model = vit_jax.load(source, image_size=(32, 64), resize="bilinear")
  path = "Transformer/posembed_input/pos_embedding"
  grid = params[path][:, 1:].reshape(4, 4, -1)
  shape = (*model.config.grid, grid.shape[-1])
  resized = jax.image.resize(grid, shape, "linear", antialias=False)
  found = model.params["Transformer"]["posembed_input"]["pos_embedding"]
  np.testing.assert_allclose(
    found[0, 1:], resized.reshape(-1, shape[-1]), atol=1e-5
  )
  assert model.config.resize == "bilinear"
  assert pretrained.read(source).resize == "corner_aligned"


def test_another_image_size_shows_as_much_of_a_picture(tmp_path):
  arrays = file_formats.big_vision_npz(_random(VIT))
  source = _save(tmp_path, arrays)
  # 32 pixels out of the middle of 37, so 64 out of 74.
  prepared = "resize_small(size * 8 / 7)|central_crop(size)"
  assert vit_jax.load(source).config.preprocess == prepared
  larger = vit_jax.load(source, image_size=64).config.preprocess
  ops = parse(larger, (64, 64), evaluation=True)
  assert ops == [
    ("resize_small", {"smaller_size": 74}),
    ("central_crop", {"size": (64, 64)}),
  ]


def test_other_classes_get_a_head_of_zeros(tmp_path, caplog):
  source = _save(tmp_path, file_formats.published_npz(_random(VIT)))
  model = vit_jax.load(source, num_classes=7)
  assert not model(_images()).any()
  assert model(_images()).shape == (3, 7)
  assert model.report.new == ["head/bias 7", "head/kernel 16x7"]
  assert not caplog.records  # it was asked for


def test_no_head(tmp_path):
  params = _random(VIT, representation_size=16)
  source = _save(tmp_path, file_formats.published_npz(params))
  model = vit_jax.load(source, num_classes=0)
  images = _images()
  expected = reference_vit.apply(params, images, patch=8, classifier="token")
  _assert_logits(model.features(images), expected["pre_logits"])
  with pytest.raises(UserError, match="has no head"):
    model(images)


def test_a_head_of_zeros_is_said_loudly(tmp_path, caplog):
  params = _random(VIT)
  params["head/kernel"] = np.zeros_like(params["head/kernel"])
  source = _save(tmp_path, file_formats.published_npz(params))
  with caplog.at_level(logging.WARNING):
    model = vit_jax.load(source)
  assert "the head is all zeros" in caplog.text
  assert "the head is all zeros" in model.notes[0]


def test_images_are_checked(tmp_path):
  model = vit_jax.load(_save(tmp_path, _random(VIT)))
  with pytest.raises(UserError, match=r"\[3, 64, 64, 3\]; this model takes"):
    model(_images(64))
  with pytest.raises(UserError, match=r"uint8; give floats in \[-1, 1\]"):
    model(np.zeros((1, SIZE, SIZE, 3), np.uint8))


@pytest.mark.parametrize("variant", [VIT, "RNx1"])
def test_an_empty_batch_has_empty_logits(variant, tmp_path):
  params = _random(variant)
  make = file_formats.bit_npz if variant == "RNx1" else dict
  model = vit_jax.load(_save(tmp_path, make(params)))
  images = np.zeros((0, SIZE, SIZE, 3), np.float32)
  for found in (model(images), model.probabilities(images)):
    assert (found.shape, found.dtype) == ((0, 5), np.float32)
  width = params["head/kernel"].shape[0]
  assert model.features(images).shape == (0, width)


def test_normalization_is_folded_into_the_embedding():
  params = _random(VIT)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  weights = _weights()._replace(mean=mean, std=std)
  images = _images()
  expected = _vit_logits(
    params, ((images + 1) / 2 - np.array(mean)) / np.array(std)
  )
  model = pretrained.assemble(weights)
  _assert_logits(model(images), expected)


# --- writing ---


def _read_all(file):
  return {name: x.read() for name, x in archives.open_npz(file).items()}


_WRITTEN = [
  ("npz", VIT, {}),
  ("npz", VIT, {"classifier": "gap"}),
  ("npz", VIT, {"representation_size": 16}),
  ("npz", HYBRID, {}),
  ("npz", "RNx1", {}),
  ("big_vision", VIT, {}),
  ("big_vision", VIT, {"classifier": "gap", "pos_embedding": "sincos2d"}),
  ("big_vision", VIT, {"classifier": "map"}),
]


@pytest.mark.parametrize(
  ("case", "dtype"), covering.product(_WRITTEN, [np.float32, jnp.bfloat16])
)
def test_a_file_comes_out_as_it_went_in(tmp_path, case, dtype):
  to, variant, options = case
  layouts = {"npz": file_formats.published_npz, "RNx1": file_formats.bit_npz}
  layouts["big_vision"] = file_formats.big_vision_npz
  layout = layouts.get(variant, layouts[to])
  params = {
    name: x.astype(dtype) for name, x in _random(variant, **options).items()
  }
  arrays = layout(params)
  source = _save(tmp_path, arrays)
  out = tmp_path / "out.npz"
  assert pretrained.write(pretrained.read(source), str(out), to) == []
  found = _read_all(out)
  assert found.keys() == arrays.keys()
  for name, x in arrays.items():
    assert found[name].dtype == dtype
    assert found[name].tobytes() == x.tobytes(), name


def test_scanned_files_come_out_looped(tmp_path):
  arrays = file_formats.big_vision_npz(_random(VIT, classifier="gap"))
  source = _save(tmp_path, file_formats.scanned(arrays))
  out = tmp_path / "out.npz"
  pretrained.write(pretrained.read(source), str(out), "big_vision")
  found = _read_all(out)
  assert found.keys() == arrays.keys()
  for name, x in arrays.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_orbax_keeps_what_other_formats_cannot_say(tmp_path):
  options = {
    "pos_embedding": "2d",
    "pos_embedding_at": "every_layer",
    "activation": "gelu_erf",
    "layer_norm_epsilon": 1e-12,
  }
  params = _random(VIT, **options)
  weights = _weights(**options)._replace(
    class_names=list("abcde"), loss="sigmoid", resize="timm"
  )
  out = tmp_path / "out"
  pretrained.write(weights, str(out), "orbax")
  back = pretrained.read(str(out))
  for name in ("model", "image_size", "num_classes", "class_names", "loss"):
    assert getattr(back, name) == getattr(weights, name)
  assert back.resize == "timm"
  images = _images()
  _assert_logits(
    vit_jax.load(str(out))(images), _vit_logits(params, images, **options)
  )
  for path, x in params.items():
    np.testing.assert_array_equal(back.params[path].read(), x)


def test_orbax_has_the_pixels_of_the_file(tmp_path):
  weights = _weights()._replace(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
  notes = pretrained.write(weights, str(tmp_path / "out"), "orbax")
  assert any("mean and standard deviation" in note for note in notes)
  images = _images()
  _assert_logits(
    vit_jax.load(str(tmp_path / "out"))(images),
    np.asarray(pretrained.assemble(weights)(images)),
  )


@pytest.mark.parametrize(
  ("to", "variant", "options", "word"),
  [
    (
      *("npz", VIT, {"classifier": "map"}),
      "classifier 'map'; --to=orbax keeps everything",
    ),
    ("npz", VIT, {"pos_embedding": "sincos2d"}, "pos_embedding 'sincos2d'"),
    ("npz", VIT, {"activation": "gelu_erf"}, "activation 'gelu_erf'"),
    ("big_vision", VIT, {"layer_norm_epsilon": 1e-12}, "layer_norm_epsilon"),
    ("big_vision", VIT, {"pos_embedding": "relative"}, "'relative'"),
    ("big_vision", "RNx1", {}, "no ResNets"),
    ("nonsense", VIT, {}, "choose from npz"),
  ],
)
def test_what_a_format_cannot_say_is_named(
  tmp_path, to, variant, options, word
):
  weights = _weights(variant, **options)
  out = tmp_path / "out.npz"
  with pytest.raises(UserError, match=word) as error:
    pretrained.write(weights, str(out), to)
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


_AVERAGING = "resize(size, method='bicubic', antialias=True)"


@pytest.mark.parametrize(
  ("to", "changes", "lost"),
  [
    ("npz", {"preprocess": "resize_small(40)|central_crop(size)"}, "preproc"),
    ("npz", {"loss": "sigmoid"}, "loss; after conversion it is 'softmax'"),
    ("npz", {"class_names": list("abcde")}, "class names"),
    ("npz", {"resize": "timm"}, "position embeddings"),
    ("big_vision", {}, "preprocessing"),
    (
      "timm",
      {"loss": "sigmoid", "resize": "timm", "preprocess": _AVERAGING},
      "loss",
    ),
    ("hf", {"loss": "sigmoid", "preprocess": _AVERAGING}, "embeddings"),
    ("hf", {"resize": "huggingface"}, "method='bilinear', antialias=True)"),
    (
      "hf",
      {
        "class_names": list("abcde"),
        "resize": "huggingface",
        "preprocess": _AVERAGING,
      },
      None,
    ),
  ],
)
def test_what_a_format_does_not_keep_is_said(tmp_path, to, changes, lost):
  weights = _weights()._replace(**changes)
  notes = pretrained.write(weights, str(tmp_path / "out"), to)
  assert [lost for note in notes if lost in note] == [lost] * (lost is not None)
  assert len(notes) == (lost is not None)
  if to == "hf":
    assert vit_jax.load(str(tmp_path / "out")).config.loss == weights.loss


@pytest.mark.parametrize(
  ("to", "options", "extra", "word"),
  [
    ("npz", {}, ["Transformer/scale"], "Transformer/scale is not known"),
    # big_vision's files do not say the size that fixed waves are made for.
    ("big_vision", {"pos_embedding": "sincos2d"}, [], r"grid \(4, 4\) is read"),
  ],
)
def test_what_no_reader_knows_is_not_written(
  tmp_path, to, options, extra, word
):
  weights = _weights(**options)
  more = dict.fromkeys(extra, as_lazy(np.ones(3, np.float32)))
  weights = weights._replace(params={**weights.params, **more})
  with pytest.raises(UserError, match=word):
    pretrained.write(weights, str(tmp_path / "out"), to)
  assert not list(tmp_path.iterdir())


# --- refused ---


def _assert_refused(source, *words):
  with pytest.raises(UserError) as error:
    vit_jax.load(str(source))
  message = str(error.value)
  assert "\n" not in message
  for word in (str(source), *words):
    assert word in message


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_file(tmp_path, keep):
  source = _save(tmp_path, file_formats.published_npz(_random(VIT)))
  with open(source, "r+b") as f:
    f.truncate(int(f.seek(0, 2) * keep))
  _assert_refused(source, "fetch it again")


def test_a_flipped_bit(tmp_path):
  source = _save(tmp_path, file_formats.published_npz(_random(VIT)))
  with open(source, "r+b") as f:
    f.seek(5000)
    byte = f.read(1)[0]
    f.seek(5000)
    f.write(bytes([byte ^ 1]))
  _assert_refused(source, "is corrupt", "CRC")


def test_no_archive(tmp_path):
  file = tmp_path / "weights.npz"
  file.write_text("<html>404</html>")
  _assert_refused(file, "neither npz nor safetensors")
  file.write_bytes(pickle.dumps({"a": 1}))
  _assert_refused(file, "pickle")


class _Bomb:
  def __reduce__(self):
    raise AssertionError("this was pickled again")

  def __setstate__(self, state):
    raise AssertionError("this was unpickled")


def test_pickled_arrays_are_not_unpickled(tmp_path):
  arrays = file_formats.published_npz(_random(VIT))
  arrays["head/kernel"] = np.array([{"run": "me"}], dtype=object)
  _assert_refused(
    _save(tmp_path, arrays), "head/kernel.npy", "pickled", "never unpickled"
  )


def test_pytorch_archives_are_not_unpickled(tmp_path):
  file = tmp_path / "weights.pth"
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps({}))
  _assert_refused(file, "archive/data.pkl", "not supported")


def test_wrong_shapes(tmp_path):
  arrays = file_formats.published_npz(_random(VIT))
  name = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"
  arrays[name] = arrays[name][:, :-1]
  _assert_refused(_save(tmp_path, arrays), name, "16x23", "16x24")


def test_missing_and_extra_names(tmp_path):
  arrays = file_formats.published_npz(_random(VIT))
  arrays["Transformer/encoder_norm/scal"] = arrays.pop(
    "Transformer/encoder_norm/scale"
  )
  arrays["extra/kernel"] = np.zeros(3)
  _assert_refused(
    _save(tmp_path, arrays),
    "encoder_norm/scale is missing; did you mean "
    "'Transformer/encoder_norm/scal'?",
    "extra/kernel is not known",
  )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, value):
  arrays = file_formats.published_npz(_random(VIT))
  arrays["Transformer/encoder_norm/scale"][3] = value
  _assert_refused(
    _save(tmp_path, arrays), "Transformer/encoder_norm/scale", "not finite"
  )


def test_no_square_grid(tmp_path):
  arrays = file_formats.published_npz(_random(VIT))
  path = "Transformer/posembed_input/pos_embedding"
  arrays[path] = arrays[path][:, :-1]
  _assert_refused(_save(tmp_path, arrays), "15 patches", "not a square")


def test_another_kind_of_file(tmp_path):
  _assert_refused(
    _save(tmp_path, {"a": np.zeros(3)}), "of no known format", "a, ..."
  )


@pytest.mark.parametrize(
  ("names", "given"),
  [
    (["checkpoint-500", "checkpoint-1500"], "checkpoint-1500"),
    (["snapshots/0123", "snapshots/abcd"], "snapshots/0123"),  # of refs/main
    (["models--a--b/snapshots/0123"], "models--a--b/snapshots/0123"),
  ],
)
def test_a_folder_above_the_checkpoint(tmp_path, names, given):
  _assert_refused(tmp_path, "holds no safetensors files; give a run, a folder")
  for name in names:
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "model.safetensors").write_bytes(b"")
  (tmp_path / "refs").mkdir()
  (tmp_path / "refs" / "main").write_text("0123\n")
  _assert_refused(tmp_path, f"give {tmp_path / given}")


def test_unknown_hybrid(tmp_path):
  params = _random(HYBRID)
  arrays = file_formats.published_npz(params)
  arrays = {n: x for n, x in arrays.items() if not n.startswith("block2")}
  _assert_refused(_save(tmp_path, arrays), "a hybrid with (1,) units")
