"""Who imports whom: the layers of ARCHITECTURE.md, read from the source."""

import ast
import functools
import graphlib
import pathlib
import subprocess
import sys

from vit_jax import __main__
from vit_jax.errors import EXTRAS

_PACKAGE = pathlib.Path(__file__).parents[2] / "vit_jax"

# A unit is a module directly in vit_jax, a room, or what is directly in one of
# the rooms in _BY_MODULE. It imports units of layers above its own line here,
# never one of its own line.
_BY_MODULE = {"training", "evaluation", "tools", "commands"}
_LAYERS = (
  ("errors",),
  (
    "files",
    "state",
    "distributed",
    "training.stop",
    "training.profiler",
    "training.losses",
    "training.lock",
  ),
  ("models", "data", "sharding", "training.optim"),
  (
    "training.steps",
    "training.lora",
    "training.teacher",
    "checkpoint",
    "config",
    "training.metrics",
    "training.wandb_run",
  ),
  ("pretrained", "training.masked", "training.inputs"),
  (
    "training.early",
    "training.objectives",
    "training.run_folder",
    "evaluation.devices",
    "evaluation.sums",
  ),
  (
    "evaluation.attention_maps",
    "evaluation.fewshot",
    "evaluation.predict",
  ),
  (
    "evaluation.evaluators",
    "evaluation.linear",
    "evaluation.embed",
    "evaluation.verify",
  ),
  ("train", "evaluation.evaluate"),
  # The tools: what the core never imports.
  ("tools.runs", "tools.text", "tools.build_data"),
  ("tools.paper", "tools.charts"),
  (
    "tools.figures",
    "tools.datasets",
    "tools.export",
    "tools.bench",
    "tools.plan",
    "tools.pseudo_label",
    "tools.report",
  ),
  # These run or read the tools of the line before.
  (
    "tools.quickstart",
    "tools.jobs",
    "tools.preflight",
    "tools.demo",
    "tools.noisy_student",
  ),
  ("tools.sweep",),
  ("tools.vtab",),
  # The command line: what neither the core nor the tools import.
  ("commands.flags",),
  ("commands.distributed",),
  ("commands.process",),
  tuple(
    f"commands.{module.__name__.rpartition('.')[2]}"
    for module, _ in __main__.COMMANDS.values()
  ),
  ("__main__",),
)
_LAYER_OF = {unit: i for i, layer in enumerate(_LAYERS) for unit in layer}
_MISSING = "give the new unit a line in _LAYERS, and in ARCHITECTURE.md"

# Heavy or changeable libraries, and the only units that may import them.
_CONTAINED = {
  "flax": {"models"},
  "tensorflow": {
    "data",
    "training.metrics",
    "tools.build_data",
    "tools.bench",
    "tools.export",  # writes its format
    "pretrained",  # reads its checkpoints, if asked to
  },
  "jax2onnx": {"tools.export"},
  "onnxruntime": {"tools.export"},
  "tensorflow_datasets": {"data", "tools.build_data", "tools.bench"},
  "array_record": {"data"},
  "sklearn": {"data"},
  "clu": {"training.run_folder"},
  "orbax": {"checkpoint"},
  "matplotlib": {"tools.charts", "tools.figures"},
  "jinja2": {"tools.report"},
  "torch": {"tools.bench"},  # in processes that run nothing else
  "timm": {"tools.bench"},
  "apache_beam": {"tools.build_data"},
  "gradio": {"tools.demo"},
  "submitit": {"tools.jobs"},
}

# What `pip install vit_jax` installs; and what users install by hand, for one
# option or file format.
_INSTALLED = {
  *("PIL", "etils", "flax", "jax", "ml_collections", "ml_dtypes", "numpy"),
  *("optax", "orbax", "safetensors"),
}
_BY_HAND = {"torch", "timm", "pyarrow"}

# A model and its step run on a bare accelerator machine with these alone.
_BARE = (
  "errors",
  "state",
  "models",
  "sharding",
  "training.lora",
  "training.losses",
  "training.masked",
  "training.objectives",
  "training.optim",
  "training.steps",
  "training.teacher",
)
_BARE_LIBRARIES = {"jax", "flax", "optax", "numpy"}

# Predicting must not wait for TensorFlow, nor need it.
_WITHOUT_TENSORFLOW = {
  *_BARE,
  "data.preprocess",
  "checkpoint",
  "evaluation.predict",
}


def _find_unit(dotted):
  """Returns the unit of a module, its name given without `vit_jax.`."""
  room, _, rest = dotted.partition(".")
  return f"{room}.{rest.split('.')[0]}" if room in _BY_MODULE and rest else room


def _list_sources():
  """Returns [(unit, path)] of the package, without vit_jax/__init__.py."""
  sources = []
  for path in sorted(_PACKAGE.rglob("*.py")):
    unit = _find_unit(_name_module(path).removeprefix("vit_jax."))
    if unit != "vit_jax" and unit not in _BY_MODULE:
      sources.append((unit, path))
  return sources


def _name_module(path):
  parts = path.relative_to(_PACKAGE.parent).with_suffix("").parts
  return ".".join(part for part in parts if part != "__init__")


@functools.cache
def _parse(path):
  """Returns all nodes of a file."""
  return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


@functools.cache
def _read_imports(path):
  """Returns the dotted names that a file imports anywhere in it."""
  names = set()
  for node in _parse(path):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path} has a relative import"
      # `from vit_jax import models` names a unit after the `import`.
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


_SOURCES = _list_sources()
_IMPORTS = [(unit, n) for unit, path in _SOURCES for n in _read_imports(path)]


def test_every_unit_has_a_layer():
  units = {unit for unit, _ in _SOURCES}
  assert _LAYER_OF.keys() >= units, _MISSING


def test_imports_go_down_the_layers():
  for unit, name in _IMPORTS:
    package, _, rest = name.partition(".")
    imported = _find_unit(rest)
    if package != "vit_jax" or imported in ("", unit, "__version__"):
      continue
    if imported in _BY_MODULE:
      continue  # `from vit_jax.tools import plan` stands there twice
    assert _LAYER_OF.keys() >= {unit, imported}, _MISSING
    assert _LAYER_OF[imported] < _LAYER_OF[unit], f"{unit} imports {name}"


def test_modules_do_not_import_in_a_circle():
  """Not inside functions either."""
  modules = {_name_module(path): path for path in _PACKAGE.rglob("*.py")}
  graph = {
    module: {
      name if name in modules else name.rpartition(".")[0]
      for name in _read_imports(path)
    }
    for module, path in modules.items()
  }
  graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError


def test_only_commands_read_flags_and_print():
  for unit, path in _SOURCES:
    if unit.startswith("commands."):
      continue
    assert "argparse" not in _read_imports(path), path
    for node in _parse(path):
      if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
        to = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert to.get("file") == "sys.stderr", f"{path}:{node.lineno}"


def test_functions_fit_on_a_screen():
  for _, path in _SOURCES:
    for node in _parse(path):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"


def test_the_top_level_is_small():
  entries = {path.name for path in _PACKAGE.iterdir()}
  assert len({name for name in entries if not name.startswith("__")}) <= 16


def test_libraries_stay_where_they_belong():
  known = _BARE_LIBRARIES | sys.stdlib_module_names | {"vit_jax"}
  for unit, name in _IMPORTS:
    library = name.split(".")[0]
    # Configs are read as files, whichever directory they are in.
    assert library != "configs", unit
    assert unit in _CONTAINED.get(library, {unit}), f"{unit} imports {library}"
    assert unit not in _BARE or library in known, f"{unit} imports {library}"


def test_every_library_is_of_the_package_or_of_an_extra():
  libraries = {name.split(".")[0] for _, name in _IMPORTS} - {"vit_jax"}
  found = libraries - sys.stdlib_module_names - _BY_HAND - _INSTALLED
  assert found <= EXTRAS.keys()


def test_packages_have_an_init():
  # Without one, setup.py does not find the package and does not install it.
  for _, path in _SOURCES:
    assert (path.parent / "__init__.py").exists(), path


def _list_loaded(*statements):
  """Returns the packages that are loaded after each statement, one by one."""
  code = "".join(f"{s}\nprint(*sys.modules)\n" for s in statements)
  lines = subprocess.run(
    [sys.executable, "-c", f"import sys\n{code}"],
    cwd=_PACKAGE.parent,
    check=True,
    capture_output=True,
    text=True,
  ).stdout.splitlines()
  return [{name.split(".")[0] for name in line.split()} for line in lines]


def test_imports_load_no_more_than_they_need():
  units = sorted(_WITHOUT_TENSORFLOW)
  package, parser, bench, predict = _list_loaded(
    "import vit_jax",
    "import vit_jax.__main__; vit_jax.__main__.make_parser()",
    "import vit_jax.tools.bench.step",
    "import " + ", ".join(f"vit_jax.{unit}" for unit in units),
  )
  # Neither waits for these, so `--help` is quick.
  assert not (package | parser) & {"jax", "flax", "tensorflow", "numpy"}
  # What a bare machine has.
  others = {*_CONTAINED, "ml_collections", "safetensors", "PIL", "jax"}
  assert bench & others == {"jax", "flax"}
  assert not predict & {"tensorflow", "tensorflow_datasets", "clu"}
