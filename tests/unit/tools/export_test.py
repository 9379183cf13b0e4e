"""Exports: what they compute, run by others, and what cannot be exported."""

import importlib.metadata
import json
import os
import resource
import subprocess
import sys

import covering
import jax
import numpy as np
import pytest
from PIL import Image
from random_models import random_images, random_params

import vit_jax
from vit_jax import models
from vit_jax.__main__ import main
from vit_jax.data.preprocess import preprocess_image
from vit_jax.errors import UserError
from vit_jax.evaluation.predict import predict
from vit_jax.pretrained import Weights, runs
from vit_jax.state import as_lazy, flatten
from vit_jax.tools.export import export, formats, lowering, pictures

_VIT = "ViT-w16d2m24h2_8"
# Variant -> arguments of `models.create`, image size, preprocessing, loss.
_MODELS = {
  _VIT: ({}, (32, 40), "resize_small(48)|central_crop(size)", "softmax"),
  "RN+ViT-w16d2m24h2_8": (
    {"classifier": "map", "scan": True, "remat": "full"},
    (24, 32),
    "resize(size)",
    "sigmoid",
  ),
  "RNx1": ({}, (33, 47), "resize_small(36)|central_crop(size)", "softmax"),
}
_CLASSES = 5


def _write_run(folder, variant):
  """Writes a run folder with random weights and small logits."""
  options, size, preprocess, loss = _MODELS[variant]
  options = {"variant": variant, "dtype": "float32", **options}
  model = models.create(num_classes=_CLASSES, image_size=size, **options)
  flat = flatten(random_params(model))
  # Else probabilities are zeros and ones, and show little.
  flat["head/kernel"] = flat["head/kernel"] / 4
  return _write(folder, options, size, preprocess, loss, flat)


def _write(folder, options, size, preprocess, loss, flat):
  params = {path: as_lazy(x) for path, x in flat.items()}
  weights = Weights(
    runs.ORIGIN,
    "random",
    options,
    size,
    len(flat["head/bias"]),
    params,
    class_names=list("abcde") if len(flat["head/bias"]) == 5 else None,
    preprocess=preprocess,
    loss=loss,
  )
  runs.write(weights, folder)
  return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  """{variant: run folder}."""
  folder = tmp_path_factory.mktemp("sources")
  return {v: _write_run(folder / v, v) for v in _MODELS}


# --- the graph of preprocessing, and that of jax2onnx ---


@pytest.mark.parametrize(
  ("text", "size"),
  [
    ("resize(size)", (16, 24)),
    # The crop is larger than what it is of.
    ("resize_small(20)|central_crop(size)", (24, 30)),
  ],
)
def test_graph_prepares_as_numpy(text, size):
  _compare_with_numpy(text, size, (50, 60), (7, 100))


def _compare_with_numpy(text, size, *shapes):
  prepare = jax.jit(lambda x: pictures.prepare(x, text, size))
  rng = np.random.default_rng(0)
  for shape in shapes:
    drawn = rng.integers(0, 256, (1, *shape, 3), np.uint8)
    expected = preprocess_image(drawn[0], text, size).astype(np.float32)
    difference = np.abs(prepare(drawn)[0] - expected)
    # A value between two levels may become either.
    assert difference.max() <= 1
    assert difference.mean() < 0.03


@pytest.mark.parametrize(
  ("text", "size"),
  [
    pytest.param(text, size, marks=mark)
    for text, size, mark in (
      ("resize((31, 33))|resize(size, 'area')", (16, 24), pytest.mark.ci),
      ("resize_small(20, 'bilinear')|resize(size)", (24, 30), pytest.mark.ci),
      ("central_crop(size)", (24, 30), pytest.mark.nightly),
      ("resize(size, 'area')", (24, 30), pytest.mark.nightly),
      (
        "resize_small(256)|central_crop(size)",
        (224, 224),
        pytest.mark.nightly,
      ),
    )
  ],
)
def test_graph_prepares_as_numpy_at_other_sizes(text, size):
  _compare_with_numpy(text, size, (24, 24), (33, 17), (200, 150), (512, 640))


def test_graph_says_what_it_cannot_prepare():
  with pytest.raises(UserError, match="--preprocess cannot resize by area"):
    pictures.prepare(
      np.zeros((1, 9, 9, 3), np.uint8),
      "resize_small(20)|resize(size, 'area')",
      (8, 8),
    )


@pytest.mark.nightly
@pytest.mark.parametrize("variant", ["RN+ViT-w16d2m24h2_8", "RNx1"])
def test_plain_operations_compute_the_same(variant):
  model = models.create(
    variant=variant, num_classes=5, image_size=(24, 40), dtype="float32"
  )
  params, images = random_params(model), random_images(model)

  def apply(images):
    return model.apply(params, images)

  (found,) = jax.jit(lowering.make_plain(apply, images))(images)
  expected = jax.jit(apply)(images)
  np.testing.assert_allclose(found, expected, atol=1e-4 * expected.std())


# --- mistakes ---


def _fails(tmp_path, source, words, out="out", to="stablehlo", **options):
  with pytest.raises(UserError, match=words) as error:
    export(str(source), str(tmp_path / out), to, **options)
  assert "\n" not in str(error.value)
  assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize(
  "to",
  [
    pytest.param(to, marks=pytest.mark.ci) if to == "onnx" else to
    for to in formats.FORMATS
  ],
)
def test_an_empty_batch_has_empty_outputs(to, tmp_path):
  """Of a model in miniature, with the reshapes that fail without rows."""
  kernel = np.arange(15, dtype=np.float32).reshape(3, 5)

  def apply(params, images):
    x = images.reshape(images.shape[0], -1, 3).mean(1)
    return {"logits": x @ params, "probabilities": jax.nn.softmax(x @ params)}

  graph = formats.Graph(apply, kernel, ("batch", 4, 4, 3), np.dtype(np.float32))
  form = formats.FORMATS[to]
  form.write(graph, tmp_path)
  run = form.read(tmp_path)
  images = np.random.default_rng(0).normal(size=(3, 4, 4, 3))
  images = images.astype(np.float32)
  for count in (0, 1, 3):
    found = run(images[:count])
    expected = images[:count].mean((1, 2)) @ kernel
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-4, atol=1e-5)
    assert found["probabilities"].shape == (count, 5)


def test_existing_folder(tmp_path):
  (tmp_path / "out").mkdir()
  _fails(tmp_path, "unread", "out exists; nothing is overwritten")
  assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").touch()
  _fails(
    tmp_path, "unread", "cannot be written: Not a directory", out="file/out"
  )


def test_unknown_format(tmp_path):
  _fails(tmp_path, "unread", "did you mean 'onnx'", to="onx")


def test_missing_extra(tmp_path, monkeypatch):
  find = importlib.metadata.version

  def version(name):
    if name == "jax":  # without which nothing is
      return find(name)
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  words = r"pip install 'vit_jax\[export\]'"
  _fails(tmp_path, "unread", words, to="onnx")


def test_address():
  with pytest.raises(UserError, match="no local folder"):
    export("unread", "gs://bucket/out", "stablehlo")


@pytest.mark.ci
def test_image_size_that_patches_do_not_fill(tmp_path, sources):
  _fails(tmp_path, sources[_VIT], "nearest valid: 32", image_size=33)


@pytest.mark.ci
@pytest.mark.parametrize("masked", [False, True])
def test_no_head(tmp_path, masked):
  options = {"variant": _VIT, "image_size": 16, "dtype": "float32"}
  if masked:
    model = models.create_masked(target="mean_colour", **options)
  else:
    model = models.create(num_classes=0, **options)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = {
    path: as_lazy(np.zeros(x.shape, np.float32))
    for path, x in flatten(shapes).items()
  }
  weights = Weights(runs.ORIGIN, "none", {"variant": _VIT}, (16, 16), 0, params)
  runs.write(weights, tmp_path / "run")
  words = "masked patches and knows no classes" if masked else "has no head"
  _fails(tmp_path, tmp_path / "run", words)


@pytest.mark.ci
def test_too_many_weights_for_one_file(tmp_path, sources, monkeypatch):
  form = formats.FORMATS["stablehlo"]._replace(limit=1000)
  monkeypatch.setitem(formats.FORMATS, "stablehlo", form)
  _fails(tmp_path, sources[_VIT], "use --to=saved_model")


@pytest.mark.ci
@pytest.mark.parametrize("what", ["a little", "no number"])
def test_nothing_is_left_that_computes_something_else(
  tmp_path, sources, monkeypatch, what
):
  def read(folder):
    run = formats.FORMATS["stablehlo"].read(folder)
    shift = 1e-3 if what == "a little" else np.nan
    return lambda x: {"logits": run(x)["logits"] + shift}

  form = formats.FORMATS["stablehlo"]._replace(read=read, name="other")
  monkeypatch.setitem(formats.FORMATS, "other", form)
  _fails(tmp_path, sources[_VIT], "gives other logits", to="other")
  assert not list(tmp_path.iterdir())


# --- run by others ---

# Programs of somebody who has the folder, none of our code, and JAX only where
# it is needed.
_OPEN = {
  "stablehlo": """
import jax
data = open(folder + "/model.stablehlo", "rb").read()
run = jax.export.deserialize(bytearray(data)).call
""",
  "saved_model": """
sys.modules["jax"] = None
import tensorflow as tf
loaded = tf.saved_model.load(folder)
run = lambda x: loaded.signatures["serving_default"](images=tf.constant(x))
""",
  "onnx": """
sys.modules["jax"] = None
import onnxruntime
session = onnxruntime.InferenceSession(folder + "/model.onnx")
names = [output.name for output in session.get_outputs()]
run = lambda x: dict(zip(names, session.run(names, {"images": x})))
""",
}
_CONSUMER = """
import os, sys
import numpy as np
from PIL import Image
for case in sys.argv[1:]:
  folder, result, *inputs = case.split(os.pathsep)
  {open}
  found = {{}}
  for i, file in enumerate(inputs):
    if file.endswith("npy"):
      x = np.load(file)
    else:
      x = np.array(Image.open(file))[None]
    for name, y in run(x).items():
      found[f"{{name}}{{i}}"] = np.asarray(y)
  np.savez(result, **found)
assert "vit_jax" not in sys.modules
"""


def _run_elsewhere(to, *cases):
  """Runs exports in a process that has none of our code.

  Args:
    to: their format.
    *cases: (folder, files of images) of each.

  Returns:
    The results of each.
  """
  code = _CONSUMER.format(open=_OPEN[to].strip().replace("\n", "\n  "))
  words = [
    os.pathsep.join(map(str, (folder, f"{folder}.npz", *inputs)))
    for folder, inputs in cases
  ]
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  subprocess.run(
    [sys.executable, "-c", code, *words],
    check=True,
    cwd=cases[0][0],
    env=environment,
  )
  return [np.load(f"{folder}.npz") for folder, _ in cases]


def _draw_images(folder, size):
  """Writes batches of 1, 3 and 33; returns them and their files."""
  rng = np.random.default_rng(3)
  batches = [
    rng.uniform(-1, 1, (b, *size, 3)).astype(np.float32) for b in (1, 3, 33)
  ]
  files = [folder / f"images{i}.npy" for i in range(3)]
  for file, batch in zip(files, batches, strict=True):
    np.save(file, batch)
  return batches, files


def _save_pictures(folder):
  """Writes photographs, as PNG and JPEG, of differing sizes."""
  from sklearn.datasets import load_sample_images

  files = []
  sizes = (None, (97, 211), (25, 31))
  for i, photograph in enumerate(load_sample_images().images):
    for j, size in enumerate(sizes):
      kind = "png" if (i + j) % 2 else "jpg"
      image = Image.fromarray(photograph)
      files.append(folder / f"{i}_{j}.{kind}")
      (image.resize(size) if size else image).save(files[-1])
  return files


# The ViT in each format, and each architecture in one.
@pytest.mark.parametrize(
  ("to", "variant"),
  [
    pytest.param(
      to,
      variant,
      marks=pytest.mark.ci
      if variant == _VIT or to == "onnx"
      else pytest.mark.nightly,
    )
    for to in formats.FORMATS
    for variant in _MODELS
  ],
)
def test_logits_and_classes_are_the_models(to, variant, sources, tmp_path):
  source, size = sources[variant], _MODELS[variant][1]
  plain, whole = tmp_path / "plain", tmp_path / "whole"
  about = export(source, str(plain), to)
  assert json.loads((plain / "export.json").read_text()) == about
  assert about["input"]["shape"] == ["batch", *size, 3]
  assert about["class_names"] == list("abcde")
  assert about["loss"] == _MODELS[variant][3]
  about = export(source, str(whole), to, preprocess=True)
  assert about["input"]["shape"] == ["batch", "height", "width", 3]
  assert "(size)" not in about["preprocessing"]["operations"]

  batches, files = _draw_images(tmp_path, size)
  files.append(tmp_path / "empty.npy")
  np.save(files[-1], batches[0][:0])
  pictures = _save_pictures(tmp_path)
  logits, classes = _run_elsewhere(to, (plain, files), (whole, pictures))
  assert logits["logits3"].shape == (0, 5)
  model = vit_jax.load(source)
  for i, batch in enumerate(batches):
    expected = np.asarray(model(batch))
    difference = np.abs(logits[f"logits{i}"] - expected).max()
    assert difference <= 1e-4 * expected.std()
    np.testing.assert_allclose(
      logits[f"probabilities{i}"], model.probabilities(batch), atol=1e-5
    )
  results = predict(source, list(map(str, pictures)))
  for i, result in enumerate(results):
    expected = {c["name"]: c["probability"] for c in result["classes"]}
    found = dict(zip("abcde", classes[f"probabilities{i}"][0], strict=True))
    assert found == pytest.approx(expected, abs=1e-3), pictures[i]


@pytest.mark.ci
def test_other_resolution(sources, tmp_path):
  out = tmp_path / "out"
  about = export(sources[_VIT], str(out), "stablehlo", image_size=56)
  # As much of the picture as at 32x40 pixels: 48 are 1.5 times the height.
  assert about["preprocessing"]["operations"] == (
    "resize_small(smaller_size=84)|central_crop(size=(56, 56))"
  )
  batches, files = _draw_images(tmp_path, (56, 56))
  (found,) = _run_elsewhere("stablehlo", (out, files))
  logits = np.asarray(vit_jax.load(sources[_VIT], image_size=56)(batches[1]))
  difference = np.abs(found["logits1"] - logits).max()
  assert difference <= 1e-4 * logits.std()


@pytest.mark.parametrize(
  ("command", "shape", "size"),
  [
    pytest.param(
      "export runs/quickstart/finetune digits --to=onnx",
      ["batch", *_MODELS[_VIT][1], 3],
      _MODELS[_VIT][1],
      marks=pytest.mark.nightly,
    ),
    pytest.param(
      "export runs/quickstart/finetune digits_96 --to=onnx --preprocess "
      "--image_size=96",
      ["batch", "height", "width", 3],
      (96, 96),
      marks=pytest.mark.ci,
    ),
  ],
)
def test_the_documents_commands(command, shape, size, tmp_path, monkeypatch):
  (tmp_path / "runs/quickstart").mkdir(parents=True)
  _write_run(tmp_path / "runs/quickstart/finetune", _VIT)
  monkeypatch.chdir(tmp_path)
  words = command.split()
  assert main(words) == 0
  about = json.loads((tmp_path / words[2] / "export.json").read_text())
  assert about["input"]["shape"] == shape
  operations = about["preprocessing"]["operations"]
  assert operations.endswith(f"central_crop(size={size})")


@pytest.mark.parametrize(
  "options",
  [
    pytest.param(
      {"pos_embedding": "relative", "representation_size": 8},
      marks=pytest.mark.ci,
    ),
    pytest.param(
      {"activation": "gelu_erf", "classifier": "gap", "scan": True},
      marks=pytest.mark.ci,
    ),
    *covering.nightly(
      {"pos_embedding": "sincos2d", "classifier": "gap"},
      {"pos_embedding": "2d", "pos_embedding_at": "every_layer"},
      {"activation": "gelu_erf", "classifier": "map", "scan": True},
    ),
  ],
  ids=str,
)
def test_other_models_as_onnx(options, tmp_path, monkeypatch):
  monkeypatch.setitem(_MODELS, _VIT, (options, *_MODELS[_VIT][1:]))
  source = _write_run(tmp_path / "source", _VIT)
  # It raises where logits differ. The other formats have JAX's own operations.
  about = export(source, str(tmp_path / "out"), "onnx")
  assert about["parity"]["standard_deviation_of_logits"] > 0.01


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory):
  """A run folder with new weights of ViT-B_16, and a head that is not zero."""
  folder = tmp_path_factory.mktemp("vit_b") / "run"
  options = {"variant": "ViT-B_16", "dtype": "float32"}
  model = models.create(num_classes=1000, image_size=224, **options)
  flat = flatten(jax.jit(model.init)(jax.random.key(0)))
  flat = {path: np.asarray(x) for path, x in flat.items()}
  rng = np.random.default_rng(0)
  flat["head/kernel"] = rng.normal(0, 0.02, (768, 1000)).astype(np.float32)
  preprocess = "resize_small(256)|central_crop(size)"
  return _write(folder, options, (224, 224), preprocess, "softmax", flat)


@pytest.mark.nightly
@pytest.mark.parametrize("to", formats.FORMATS)
def test_vit_b_costs(to, vit_b, tmp_path):
  """Prints README's table, with `pytest -s`."""
  out = tmp_path / "out"
  command = [
    sys.executable,
    "-m",
    "vit_jax",
    "export",
    vit_b,
    out,
    f"--to={to}",
  ]
  # Of conftest.py, for tests: it has programs compiled without optimisations.
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = subprocess.run(
    list(map(str, command)),
    check=True,
    env=environment,
    capture_output=True,
    text=True,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  parity = json.loads((out / "export.json").read_text())["parity"]
  off = parity["largest_difference"] / parity["standard_deviation_of_logits"]
  print(f"{done.stdout.strip()}; {seconds:.0f} s of CPU; off by {off:.0e}")
  assert off < 2e-5
  # 86,567,656 weights of four bytes; the program adds little, and zeros may be
  # written shorter.
  size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
  assert 0.99 < size / (4 * 86_567_656) < 1.02
