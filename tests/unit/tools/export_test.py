"""Exports: what they compute, run by others, and what cannot be exported."""

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import covering
import jax
import numpy as np
import pytest
from PIL import Image
from random_models import random_weights

import vit_jax
from vit_jax import models
from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.evaluation.predict import predict
from vit_jax.pretrained import Weights, runs
from vit_jax.pretrained.weights import as_lazy
from vit_jax.state import flatten
from vit_jax.tools.export import FORMATS, export

_VIT = "ViT-w16d2m24h2_8"
# Variant -> arguments of `models.create`, image size, preprocessing, loss.
_MODELS = {
  _VIT: (
    {},
    (32, 40),
    "resize_small(48, 'bicubic', antialias=True)|central_crop(size)",
    "softmax",
  ),
  "RN+ViT-w16d2m24h2_8": (
    {"classifier": "map", "scan": True, "remat": "full"},
    (24, 32),
    "resize(size)",
    "sigmoid",
  ),
  "RNx1": ({}, (33, 47), "resize_small(36)|central_crop(size)", "softmax"),
}


def _write_run(folder, variant, num_classes=5):
  """Writes a run folder with random weights and small logits."""
  options, size, preprocess, loss = _MODELS[variant]
  options = {"dtype": "float32", **options}
  weights = random_weights(variant, size, num_classes, **options)
  if num_classes:
    # Else probabilities are zeros and ones, and show little.
    kernel = weights.params["head/kernel"].read() / 4
    weights.params["head/kernel"] = as_lazy(kernel)
  names = list("abcde")[:num_classes] or None
  runs.write(
    weights._replace(class_names=names, preprocess=preprocess, loss=loss),
    folder,
  )
  return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  """{variant: run folder}."""
  folder = tmp_path_factory.mktemp("sources")
  return {v: _write_run(folder / v, v) for v in _MODELS}


# --- mistakes ---


def _fails(tmp_path, source, words, out="out", to="stablehlo", **options):
  with pytest.raises(UserError, match=words) as error:
    export(str(source), str(tmp_path / out), to, **options)
  assert "\n" not in str(error.value)
  assert not list(tmp_path.glob(".out.*"))


def test_mistakes_show_before_anything_is_read(tmp_path, monkeypatch):
  (tmp_path / "there").mkdir()
  (tmp_path / "file").touch()
  _fails(tmp_path, "unread", "nothing is overwritten", out="there")
  _fails(tmp_path, "unread", "written: Not a directory", out="file/out")
  _fails(tmp_path, "unread", "did you mean 'onnx'", to="onx")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  words = r"pip install 'vit_jax\[export\]'"
  _fails(tmp_path, "unread", words, to="onnx")


@pytest.mark.ci
def test_models_that_cannot_be_exported(tmp_path, sources, monkeypatch):
  _fails(tmp_path, sources[_VIT], "nearest valid: 32", image_size=33)
  monkeypatch.setattr("vit_jax.tools.export._LIMIT", 1000)
  _fails(tmp_path, sources[_VIT], "use --to=saved_model")
  headless = _write_run(tmp_path / "run", _VIT, num_classes=0)
  _fails(tmp_path, headless, "has no head")


@pytest.mark.ci
@pytest.mark.parametrize("shift", [1e-3, np.nan])
def test_nothing_is_left_that_computes_something_else(
  shift, tmp_path, sources, monkeypatch
):
  def read(folder):
    run = FORMATS["stablehlo"].read(folder)
    return lambda x: {"logits": run(x)["logits"] + shift}

  monkeypatch.setitem(
    FORMATS, "other", FORMATS["stablehlo"]._replace(read=read)
  )
  _fails(tmp_path, sources[_VIT], "gives other logits", to="other")
  assert not list(tmp_path.iterdir())


# --- run by others ---

_DOCUMENT = Path(__file__).parents[3] / "docs" / "export.md"
# After the document's program: the logits of images that are prepared already,
# and the probabilities of files.
_MORE = """
found = {f"p{i}": run(prepare(x)[None])["probabilities"][0]
         for i, x in enumerate(PICTURES)}
for count in (0, 1, 3, 33):
  found[f"l{count}"] = run(np.load("images.npy")[:count])["logits"]
np.savez("found.npz", **found)
assert "vit_jax" not in sys.modules
"""


def _run_document(folder, images, pictures):
  """Runs the program of docs/export.md on `folder`/digits, without our code."""
  (block,) = re.findall(r"```python\n(.*?)```", _DOCUMENT.read_text(), re.S)
  to = json.loads((folder / "digits/export.json").read_text())["format"]
  hide = "" if to == "stablehlo" else 'sys.modules["jax"] = None\n'
  np.save(folder / "images.npy", images)
  Image.new("RGB", (60, 50), "teal").save(folder / "image.png")
  more = _MORE.replace("PICTURES", repr(pictures))
  program = f"import sys\n{hide}{block}{more}"
  done = subprocess.run(
    [sys.executable, "-c", program, "digits", "image.png"],
    check=True,
    cwd=folder,
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    capture_output=True,
    text=True,
  )
  assert re.fullmatch(r"\d+\.\d\d% \w+\n", done.stdout)
  return np.load(folder / "found.npz")


def _save_pictures(folder):
  """Writes photographs, as transparent PNG and JPEG, of differing sizes."""
  from sklearn.datasets import load_sample_images

  files = []
  for i, photograph in enumerate(load_sample_images().images):
    for j, size in enumerate((None, (97, 211), (25, 31))):
      image = Image.fromarray(photograph)
      if (i + j) % 2:
        image.putalpha(image.getchannel("R"))
      files.append(folder / f"{i}_{j}.{'png' if (i + j) % 2 else 'jpg'}")
      (image.resize(size) if size else image).save(files[-1])
  return list(map(str, files))


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
    for to in FORMATS
    for variant in _MODELS
  ],
)
def test_logits_and_classes_are_the_models(to, variant, sources, tmp_path):
  source, (_, size, _, loss) = sources[variant], _MODELS[variant]
  about = export(source, str(tmp_path / "digits"), to)
  written = json.loads((tmp_path / "digits/export.json").read_text())
  assert written == json.loads(json.dumps(about))
  assert written["input"]["shape"] == ["batch", *size, 3]
  assert written["class_names"] == list("abcde")
  assert written["loss"] == loss
  if to == "onnx":
    import onnx

    model = onnx.load(tmp_path / "digits/model.onnx")
    kept = {x.key: x.value for x in model.metadata_props}
    assert json.loads(kept["input"]) == written["input"]
    assert json.loads(kept["preprocessing"]) == written["preprocessing"]
  rng = np.random.default_rng(3)
  images = rng.uniform(-1, 1, (33, *size, 3)).astype(np.float32)
  pictures = _save_pictures(tmp_path)
  found = _run_document(tmp_path, images, pictures)
  expected = np.asarray(vit_jax.load(source)(images))
  for count in (0, 1, 3, 33):
    atol = 1e-4 * expected.std()
    logits = found[f"l{count}"]
    assert logits.shape == (count, 5)
    np.testing.assert_allclose(logits, expected[:count], rtol=0, atol=atol)
  for i, result in enumerate(predict(source, pictures)):
    classes = {c["name"]: c["probability"] for c in result["classes"]}
    given = dict(zip("abcde", found[f"p{i}"], strict=True))
    assert given == pytest.approx(classes, abs=1e-3), pictures[i]


@pytest.mark.ci
def test_the_documents_command(tmp_path, sources, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Path("runs/quickstart").mkdir(parents=True)
  Path("runs/quickstart/finetune").symlink_to(sources[_VIT])
  command = ["export", "runs/quickstart/finetune", "digits", "--to=onnx"]
  assert main([*command, "--image_size=56"]) == 0
  about = json.loads(Path("digits/export.json").read_text())
  assert about["input"]["shape"] == ["batch", 56, 56, 3]
  # As much of the picture as at 32x40 pixels: 48 are 1.5 times the height.
  assert about["preprocessing"] == [
    {
      "op": "resize_small",
      "smaller_size": 84,
      "method": "bicubic",
      "antialias": True,
    },
    {"op": "central_crop", "size": [56, 56]},
  ]


@pytest.mark.parametrize(
  "options",
  [
    pytest.param(
      {"pos_embedding": "relative", "representation_size": 8},
      marks=pytest.mark.ci,
    ),
    *covering.nightly(
      {"activation": "gelu_erf", "classifier": "gap", "scan": True},
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


@pytest.mark.nightly
@pytest.mark.parametrize("to", FORMATS)
def test_vit_b_costs(to, tmp_path):
  """Prints the table of docs/export.md, with `pytest -s`."""
  options, size = {"variant": "ViT-B_16", "dtype": "float32"}, (224, 224)
  model = models.create(num_classes=1000, image_size=size, **options)
  flat = flatten(jax.jit(model.init)(jax.random.key(0)))
  rng = np.random.default_rng(0)  # because a new head is zero
  flat["head/kernel"] = rng.normal(0, 0.02, (768, 1000)).astype(np.float32)
  params = {path: as_lazy(np.asarray(x)) for path, x in flat.items()}
  source = tmp_path / "run"
  runs.write(Weights("test", "random", options, size, 1000, params), source)
  out = tmp_path / "out"
  # XLA_FLAGS of conftest.py has programs compiled without optimisations.
  done = subprocess.run(
    [sys.executable, "-m", "vit_jax", "export", source, out, f"--to={to}"],
    check=True,
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    capture_output=True,
    text=True,
  )
  seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
  parity = json.loads((out / "export.json").read_text())["parity"]
  off = parity["largest_difference"] / parity["standard_deviation_of_logits"]
  print(f"{done.stdout.strip()}; {seconds:.0f} s of CPU; off by {off:.0e}")
  assert off < 2e-5
  # 86,567,656 weights of four bytes; the program adds little, and zeros may be
  # written shorter.
  size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
  assert 0.99 < size / (4 * 86_567_656) < 1.02
