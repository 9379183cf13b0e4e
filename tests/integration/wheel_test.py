"""The wheel, installed in environments of its own, outside the checkout."""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import checkout
import pytest
from PIL import Image

from vit_jax.errors import EXTRAS

pytestmark = pytest.mark.ci


def _call(*command, cwd, code=0):
  """Runs a program without this project on its path; returns its output."""
  names = ("PYTHONPATH", "VIRTUAL_ENV")
  done = subprocess.run(
    list(map(str, command)),
    cwd=cwd,
    env={k: v for k, v in os.environ.items() if k not in names},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp("wheel")
  source = checkout.copy(folder / "source")
  pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
  _call(*pip, f"--wheel-dir={folder}", source, cwd=folder)
  (file,) = folder.glob("*.whl")
  return file


def _install(wheel, folder, *options):
  """Makes an environment with the wheel; returns its Python."""
  _call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
  python = folder / "bin" / "python"
  pip = [sys.executable, "-m", "pip", f"--python={python}", "install"]
  _call(*pip, "--quiet", *options, wheel, cwd=wheel.parent)
  return python


@pytest.fixture
def empty(tmp_path):
  """A folder that nothing is found in."""
  (tmp_path / "empty").mkdir()
  return tmp_path / "empty"


def test_without_extras(wheel, tmp_path, empty):
  """No TensorFlow: it predicts, inspects, converts and tabulates."""
  constraints = f"--constraint={checkout.REPO / 'constraints.txt'}"
  python = _install(wheel, tmp_path / "small", constraints)
  vit_jax = python.with_name("vit-jax")

  def run(*args, code=0):
    return _call(vit_jax, *args, cwd=empty, code=code)

  find = "import importlib.util as u; print([u.find_spec(x) for x in %r])"
  heavy = ["tensorflow", "clu", "matplotlib", "gradio", "huggingface_hub"]
  found = _call(python, "-c", find % heavy, cwd=empty)
  assert found == f"{[None] * len(heavy)}\n"
  model = "ViT-N_8-digits"
  Image.new("L", (8, 8)).save(empty / "digit.png")
  predict = ["predict", f"--checkpoint={model}", "digit.png"]
  predicted = run(*predict)
  assert predicted.count("%") == 5
  assert "823,946 parameters" in run("inspect", model)
  assert run("convert", model, "digits", "--to=timm").endswith(
    f"digits: {model} as timm\n"
  )
  predict[1] = "--checkpoint=digits"
  assert run(*predict) == predicted
  assert "ViT-B/16" in run("tables", "table5")
  load = "from vit_jax.config import load; print(load(%r).batch_size)"
  for name in ("finetune", "configs/finetune.py"):
    code = load % f"{name}:ViT-B_16,cifar100"
    assert _call(python, "-c", code, cwd=empty) == "512\n"
  train = ["train", "--config=quickstart_pretrain", "--workdir=run"]
  needs = ", which is not installed: pip install 'vit_jax[train]'\n"
  assert run(*train, code=2).endswith(needs)
  assert not (empty / "run").exists()
  assert "pip install 'vit_jax[figures]'" in run(
    "figures", f"--checkpoint={model}", "--out=figures", code=2
  )
  for name in ("ViT-B_16-augreg", "hf:google/vit-base-patch16-224"):
    assert "pip install 'vit_jax[hub]'" in run("inspect", name, code=2)
  (found,) = importlib.metadata.distributions(
    name="vit_jax", path=[str(p) for p in tmp_path.glob("small/lib/*/site-*")]
  )
  extras = found.metadata.get_all("Provides-Extra")
  assert {*EXTRAS.values()} <= {*(extras or [])}


@pytest.mark.nightly
def test_with_train(wheel, tmp_path, empty):
  """The libraries of the tests' environment, and this package of the wheel."""
  python = _install(wheel, tmp_path / "full", "--no-deps")
  (site,) = tmp_path.glob("full/lib/*/site-packages")
  (site / "others.pth").write_text(sysconfig.get_paths()["purelib"])
  code = "import vit_jax; print(vit_jax.__file__)"
  assert Path(_call(python, "-c", code, cwd=empty).strip()).is_relative_to(site)
  vit_jax = python.with_name("vit-jax")
  _call(vit_jax, "data", "prepare", "jft_like", "--data_dir=data", cwd=empty)
  short = ("total_steps=2", "schedule.warmup_steps=0", "batch_size=8")
  for config in ("quickstart_pretrain", "configs/quickstart_pretrain.py"):
    _call(
      *(vit_jax, "train", f"--config={config}", "--workdir=run"),
      *(f"--config.{text}" for text in (*short, "eval.split=test[:16]")),
      "--config.data_dir=data",
      cwd=empty,
    )
  lines = (empty / "run" / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[-1])["step"] == 2
