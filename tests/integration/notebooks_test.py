"""Notebooks: complete as files, and run from their beginning.

Each runs as on Colab: in an empty folder, with JAX and TensorFlow installed and
this package not.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from file_formats import published_npz
from random_models import random_params

from vit_jax import models
from vit_jax.pretrained import fetch
from vit_jax.pretrained.names import PUBLISHED
from vit_jax.state import flatten

_REPO = Path(__file__).parents[2]
_FOLDER = _REPO / "notebooks"
_NAMES = (
  "quickstart",
  "finetune_your_images",
  "high_resolution",
  "figures",
  "reproduce_tables",
  "plan_a_pod",
)
_COLAB = (
  "https://colab.research.google.com/github/vit-jax/vit_jax/blob/main/notebooks"
)
# Folders that there are on one machine and not on the next.
_ABSOLUTE = (
  r"(?<![\w.:/~-])/(tmp|home|root|usr|opt|var|mnt|work|content|Users)/"
)
# What a command of a cell says that fails; the cell does not.
_FAILURES = "Traceback|Warning|WARNING|error:|stopped: |not found"
each = pytest.mark.parametrize("name", _NAMES)


def _load(name):
  """Imports a script of notebooks/."""
  spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
  assert spec
  assert spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _read(name):
  """Returns the cells of a notebook, their sources and texts as one string."""
  notebook = json.loads((_FOLDER / f"{name}.ipynb").read_text())
  for cell in notebook["cells"]:
    cell["source"] = "".join(cell["source"])
    for output in cell.get("outputs", ()):
      output["text"] = "".join(output.get("text", ""))
  return notebook["cells"]


def _read_code(name):
  return [cell for cell in _read(name) if cell["cell_type"] == "code"]


def _count_pictures(cells):
  """Returns how many pictures each code cell shows."""
  return [
    sum("image/png" in output.get("data", ()) for output in cell["outputs"])
    for cell in cells
    if cell["cell_type"] == "code"
  ]


def _check_run(cells):
  """No failure was printed, and no folder that only this machine has."""
  for cell in cells:
    for output in cell.get("outputs", ()):
      assert output["output_type"] != "error"
      text = output.get("text", "")
      assert not re.search(_ABSOLUTE, text), text
      assert not re.search(_FAILURES, text), text


# --- the files ---


def test_these_are_all_there_are():
  assert {path.stem for path in _FOLDER.glob("*.ipynb")} == {*_NAMES}
  readme = (_REPO / "README.md").read_text()
  assert all(f"(notebooks/{name}.ipynb)" in readme for name in _NAMES)


@each
def test_begins_with_title_badge_and_install_cell(name):
  head, setup = (cell["source"] for cell in _read(name)[:2])
  assert re.match(r"# \w.+\n\n\[!\[Open in Colab\]\(", head)
  assert f"({_COLAB}/{name}.ipynb)" in head
  # They differ in the extras that they install, and in nothing else.
  first = _read_code("quickstart")[0]["source"]
  assert re.sub(r'(install\.py")(, "\w+")+', r"\1", setup) == first


@each
def test_code_compiles(name):
  for cell in _read_code(name):
    lines = cell["source"].replace("\\\n", "").splitlines()
    plain = ["pass" if line.startswith("!") else line for line in lines]
    compile("\n".join(plain), name, "exec")


@each
def test_keeps_the_outputs_of_one_run(name):
  cells = _read_code(name)
  counts = [cell["execution_count"] for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  _check_run(cells)
  for cell in _read(name):
    assert not re.search(_ABSOLUTE, cell["source"]), cell["source"]
  assert sum(_count_pictures(cells)) >= 1
  assert (_FOLDER / f"{name}.ipynb").stat().st_size < 1e6


# --- what is installed ---

_GIVEN = [
  "jax>=0.10",
  'libtpu>=0.0.50; sys_platform == "linux" and extra == "plan"',
  'tensorflow-cpu>=2.20; sys_platform != "none" and extra == "train"',
  'vit_jax[train]; extra == "plan"',
  'gradio>=6.0; extra == "demo"',
]


@pytest.mark.parametrize(
  ("installed", "extras", "wanted"),
  [
    # A new environment.
    ({"ipykernel"}, ["train"], ["jax>=0.10", "tensorflow-cpu>=2.20"]),
    # Colab with a GPU: the plug-in has to have the version of jax.
    (
      {"jax", "jax-cuda12-plugin", "tensorflow"},
      ["train"],
      ["jax[cuda12]>=0.10", "tensorflow>=2.20"],
    ),
    (
      {"jax", "libtpu"},
      ["train", "plan"],
      ["jax[tpu]>=0.10", "libtpu>=0.0.50", "tensorflow-cpu>=2.20"],
    ),
  ],
)
def test_what_a_runtime_has_is_left_alone(
  installed, extras, wanted, monkeypatch
):
  install = _load("install")
  monkeypatch.setattr(install.shutil, "which", lambda name: None)
  if sys.platform == "linux":
    assert install.list_requirements(_GIVEN, extras, installed) == wanted
  lines = "# a comment\njax==0.10.2\nimportlib-resources==7.1.0\nflax==0.12.8\n"
  left = install.choose_constraints(lines, {"jax", "importlib-resources"})
  assert left == "flax==0.12.8\n"


def _commit(folder):
  """Makes a git repository of a folder."""
  git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
  for command in ("init --quiet", "add --all", "commit --quiet --message=all"):
    subprocess.run([*git, *command.split()], cwd=folder, check=True)


def test_set_up_beside_the_package_alone_and_again_after_a_failure(tmp_path):
  source, content, site = (tmp_path / x for x in ("source", "content", "site"))
  files = {
    source / "vit_jax" / "__init__.py": "",
    source / "configs" / "common.py": "",
    source / "notebooks" / "install.py": (
      "import os, sys; sys.exit(not os.path.exists('network'))"
    ),
    site / "vit_jax" / "__init__.py": "",  # as pip installs it
  }
  for path, text in files.items():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  _commit(source)
  content.mkdir()
  setup = _read_code("plan_a_pod")[0]["source"]

  def run():
    command = [sys.executable, "-c", f"{setup}\nprint(os.getcwd())"]
    env = {"VIT_JAX_SOURCE": f"file://{source}", "PYTHONPATH": str(site)}
    return subprocess.run(
      command,
      cwd=content,
      env={**os.environ, **env},
      capture_output=True,
      text=True,
    )

  assert "install.py" in run().stderr.splitlines()[-1]
  (content / "network").touch()
  assert run().stdout == f"{content / 'vit_jax_source'}\n"


# --- execution ---


# Values of variables of the notebooks with which they take seconds.
_SMALL = {
  "finetune_your_images": {"steps": 20, "counts": {"train": 12, "test": 4}},
  "high_resolution": {"sixths": (4, 6)},
  "reproduce_tables": {"steps": 16},
  "plan_a_pod": {"config": "configs/finetune.py:ViT-N_8,cifar10,32"},
}
# One device, and unoptimised code, which is there sooner.
_XLA_FLAGS = "--xla_backend_optimization_level=0"
# Colab has most of what the package needs; this it has not.
_MISSING = re.compile(r"__editable__|(vit_jax|clu|libtpu)\b")


def _shorten(name, folder):
  """Writes a notebook with the values of `_SMALL`; returns the file."""
  notebook = json.loads((_FOLDER / f"{name}.ipynb").read_text())
  for variable, value in _SMALL.get(name, {}).items():
    replaced = 0
    for cell in notebook["cells"]:
      cell["source"], count = re.subn(
        rf"^{variable} = .*",
        f"{variable} = {value!r}",
        "".join(cell["source"]),
        flags=re.MULTILINE,
      )
      replaced += count
    assert replaced == 1, variable
  file = folder / f"{name}.ipynb"
  file.write_text(json.dumps(notebook))
  return file


class Runtime:
  """A new environment, which sees most packages of the one of the tests."""

  def __init__(self, folder: Path):
    self.content = folder / "content"
    self.content.mkdir()
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    self.bin = folder / "env" / "bin"
    (self.site,) = (folder / "env").glob("lib/python*/site-packages")
    preinstalled = folder / "preinstalled"
    preinstalled.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
      if not _MISSING.match(path.name):
        (preinstalled / path.name).symlink_to(path)
    # Packages outside of an environment's own folder are none that pip changes.
    (self.site / "preinstalled.pth").write_text(f"{preinstalled}\n")
    self.before = self.list_packages()
    self.source = _load("execute").copy_checkout(folder / "source")
    _commit(self.source)

  def list_packages(self) -> set[str]:
    """Returns the names of the packages in the environment's own folder."""
    files = self.site.glob("*.dist-info")
    return {file.name.partition("-")[0] for file in files}

  def uninstall(self) -> None:
    command = [self.bin / "python", "-I", "-m", "pip", "uninstall", "-qy"]
    subprocess.run([*command, "vit_jax"], check=True)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
  return Runtime(tmp_path_factory.mktemp("runtime"))


@pytest.mark.ci
@each
def test_runs_as_on_colab(name, runtime, tmp_path):
  """The first one installs the package, and so does one with an extra."""
  extras = {"plan_a_pod": {"libtpu"}}.get(name, set())
  if extras and "vit_jax" in runtime.list_packages():
    runtime.uninstall()
  path = os.environ["PATH"].split(os.pathsep)
  own = str(Path(sys.executable).parent)
  ran = _load("execute").execute(
    _shorten(name, tmp_path),
    runtime.content,
    python=str(runtime.bin / "python"),
    env={
      "VIT_JAX_SOURCE": f"file://{runtime.source}",
      "PATH": os.pathsep.join(x for x in path if x != own),
      "PYTHONPATH": "",
      "XLA_FLAGS": _XLA_FLAGS,
      "TFDS_DATA_DIR": str(runtime.content.parent / "data"),
      # Programs for TPUs can be written to it, and not read: JAX warns.
      "JAX_ENABLE_COMPILATION_CACHE": str(name != "plan_a_pod").lower(),
    },
  )
  _check_run(ran.cells)
  # As many pictures as the file has: it is of this code.
  assert _count_pictures(ran.cells) == _count_pictures(_read(name))
  # What was missing came, in the tested version, and nothing else.
  added = runtime.list_packages() - runtime.before
  assert added - {"libtpu"} == {"vit_jax", "clu"}
  assert extras <= added
  constraints = (_REPO / "constraints.txt").read_text()
  (clu,) = runtime.site.glob("clu-*.dist-info")
  assert clu.stem.replace("-", "==") in constraints.splitlines()
  python = [runtime.bin / "python", "-I", "-c"]
  said = subprocess.check_output(
    [*python, "import vit_jax; print(vit_jax.__file__)"], text=True
  )
  assert Path(said).is_relative_to(runtime.content / "vit_jax_source")


@pytest.mark.ci
def test_runs_in_a_checkout_with_published_weights(tmp_path):
  """They are in the cache, of a smaller model; the names of classes are not."""
  weights = PUBLISHED["ViT-B_16-augreg-imagenet2012-224"]
  url = fetch._make_url(weights.address)
  file = fetch._cached_path(url, tmp_path / "cache")
  file.parent.mkdir(parents=True)
  model = models.create(
    variant="ViT-Ti_16", num_classes=1000, image_size=224, classifier="token"
  )
  np.savez(file, **published_npz(flatten(random_params(model))))
  # Whatever is asked for a connection seems to have one.
  (tmp_path / "sitecustomize.py").write_text(
    "import socket\n"
    "socket.create_connection = lambda *_, **__: socket.socket()\n"
  )
  execute = _load("execute")
  checkout = execute.copy_checkout(tmp_path / "vit_jax")
  ran = execute.execute(
    _FOLDER / "quickstart.ipynb",
    checkout / "notebooks",
    env={
      "PYTHONPATH": f"{checkout}{os.pathsep}{tmp_path}",
      "VIT_JAX_CACHE": str(tmp_path / "cache"),
      "XLA_FLAGS": _XLA_FLAGS,
    },
  )
  _check_run(ran.cells)
  texts = [x.get("text", "") for c in ran.cells for x in c.get("outputs", ())]
  assert not any("No download possible" in text for text in texts)
  assert sum(_count_pictures(ran.cells)) >= 1
