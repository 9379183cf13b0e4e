"""The documents: no dead link, and every command is one that works.

A command in a block of a document is run here (`_SET_UP`, `_RUN`, marked ci),
or by another test (`_TESTED`), or by CI, or a comment says what it takes, such
as `# needs a download`: behind a command for that one, on a line of its own for
all that follow up to an empty line. Such commands are only parsed, and so are
those in sentences and in the code of notebooks.
"""

import ast
import concurrent.futures
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import __main__ as cli
from vit_jax import config, models, pretrained
from vit_jax.commands import flags
from vit_jax.pretrained import fetch
from vit_jax.pretrained.names import PUBLISHED
from vit_jax.state import flatten

REPO = Path(__file__).parents[2]
_PAGES = sorted((REPO / "docs").glob("*.md"))
_DOCUMENTS = [
  *(
    REPO / name
    for name in (
      "README.md",
      "ARCHITECTURE.md",
      "CONTRIBUTING.md",
      "CHANGELOG.md",
      "RESULTS.md",
      "launch/README.md",
    )
  ),
  *_PAGES,
  *sorted((REPO / "notebooks").glob("*.ipynb")),
]
_NEEDS = re.compile(
  r"# needs an? ((Google Cloud|Hugging Face) account|download|export|GPU|"
  r"TPU compiler|second machine)"
)
# In a command that is not to be typed as it is.
_PLACEHOLDER = re.compile(r"\.\.\.|\{|(?<![\w-])[A-Z]+(?![\w-])")

# What is run here, in this order, and what is added so that it takes seconds.
_SHORT = (
  "--config.total_steps=2",
  "--config.schedule.warmup_steps=0",
  "--config.batch_size=8",
)
_TINY = (
  "--config.model.variant=ViT-w32d1m64h2_8",
  "--config.total_steps=2",
  "--config.schedule.warmup_steps=0",
  "--config.batch_size=8",
)
_DIGITS = (*_TINY, "--config.eval.split=test[:40]")
_SMALL = (
  *_TINY,
  "--config.model.variant=ViT-w32d1m64h2_16",
  "--config.model.dtype=float32",
  "--config.image_size=32",
)
# What all others need.
_SET_UP = (
  "vit-jax train --config=configs/quickstart_pretrain.py "
  "--workdir=runs/quickstart/pretrain --config.data_dir=runs/quickstart/data",
  "vit-jax train --config=configs/quickstart_finetune.py "
  "--workdir=runs/quickstart/finetune --config.data_dir=runs/quickstart/data "
  "--config.init_from=runs/quickstart/pretrain",
)
_RUN: dict[str, tuple[str, ...]] = {
  "vit-jax --help": (),
  "vit-jax inspect": (),
  "vit-jax inspect runs/quickstart/finetune": (),
  "vit-jax inspect ViT-B_16.npz": (),
  "vit-jax predict --checkpoint=runs/quickstart/finetune "
  "runs/quickstart/images/test_1.png --top=2": (),
  "vit-jax predict --checkpoint=runs/quickstart/finetune cat.jpg dog.png "
  "--top=3": (),
  "vit-jax predict --checkpoint=ViT-B_16.npz --class_names=names.txt "
  "cat.jpg": (),
  "vit-jax evaluate --workdir=runs/quickstart/finetune": (),
  "vit-jax convert runs/quickstart/finetune digits_timm --to=timm": (),
  "vit-jax convert ViT-B_16.npz out --to=hf": (),
  "vit-jax linear --checkpoint=runs/quickstart/pretrain --dataset=digits "
  "--data_dir=runs/quickstart/data --shots=5,10,all": (),
  "vit-jax data list": (),
  "vit-jax data list --data_dir=runs/quickstart/data": (),
  "vit-jax data prepare jft_like --data_dir=data": (),
  "vit-jax data check folder:photos --examples=0": (),
  "vit-jax data show folder:photos --image_size=224 --output=photos.png": (),
  "vit-jax data show folder:photos --image_size=224 --output=show.png": (),
  "vit-jax data build tagged --images=tagged_images --labels=tags.csv "
  "--holdout=0.1 --data_dir=data": ("--workers=1",),
  "vit-jax data check tagged --data_dir=data": (),
  "vit-jax preflight --config=configs/quickstart_pretrain.py "
  "--workdir=runs/preflighted --config.data_dir=runs/quickstart/data": (),
  "vit-jax train --config=configs/photos.py:photos "
  "--workdir=runs/photos": _SMALL,
  "vit-jax train --config=configs/photos.py:photos,ViT-N_8 "
  "--workdir=runs/photos_small": _SHORT,
  "vit-jax evaluate --workdir=runs/photos": (),
  "vit-jax predict --checkpoint=runs/photos cat.jpg --top=3": (),
  "vit-jax convert runs/photos photos_hf --to=hf": (),
  "vit-jax train --config=configs/quickstart_finetune.py "
  "--workdir=runs/digits96 --config.data_dir=runs/quickstart/data "
  "--config.image_size=96 --config.init_from=runs/quickstart/pretrain": _DIGITS,
  "vit-jax train --config=configs/quickstart_finetune.py "
  "--workdir=runs/frugal --config.data_dir=runs/quickstart/data "
  "--config.micro_batches=4 --config.model.remat=full": (
    *_DIGITS,
    "--config.batch_size=32",
  ),
  "vit-jax train --config=configs/quickstart_finetune.py "
  "--workdir=runs/frozen --config.data_dir=runs/quickstart/data "
  "--config.init_from=runs/quickstart/pretrain "
  "--config.optimizer.lr_multipliers=('head/.*=1', '.*=0')": _DIGITS,
  "vit-jax train --config=configs/quickstart_masked.py --workdir=runs/masked "
  "--config.data_dir=runs/quickstart/data": _DIGITS,
  "vit-jax train --config=configs/quickstart_finetune.py "
  "--workdir=runs/masked_digits --config.data_dir=runs/quickstart/data "
  "--config.init_from=runs/masked": _DIGITS,
  "vit-jax figures --checkpoint=runs/quickstart/finetune --out=figures "
  "runs/quickstart/images/*.png": (),
  "vit-jax figures --runs=runs --out=figures_of_runs": (),
  "vit-jax report runs/quickstart --out=report.html": (),
  "vit-jax tables": (),
  "vit-jax tables table5 --runs=runs": (),
  "vit-jax tables table5 --runs=runs --commands": (),
  "vit-jax tables table2 --runs=runs --commands": (),
  "vit-jax tables table6 --json": (),
  "vit-jax tables table5 --only=ViT-B/16, ImageNet-21k, CIFAR-100": (),
}
# What other tests run, in small or with what it needs played.
_TESTED = {
  "vit-jax sweep --config=configs/quickstart_finetune.py "
  "--workdir=runs/rates --config.data_dir=runs/quickstart/data "
  "--config.init_from=runs/quickstart/pretrain "
  "--grid=schedule.base_lr=0.02,0.05 --seeds=2": (
    "tests/unit/tools/sweep_test.py::test_the_real_train_goes_on_too"
  ),
  "vit-jax sweep --config=configs/photos.py:photos "
  "--workdir=runs/photos_rates --seeds=1 "
  "--grid=schedule.base_lr=0.001,0.003,0.01,0.03": (
    "tests/unit/tools/sweep_test.py::test_the_real_train_goes_on_too"
  ),
  "vit-jax data check vtab:resisc45 --data_dir=data": (
    "tests/unit/data/data_tasks_test.py::"
    "test_check_says_what_is_fetched_by_hand_and_where_it_goes"
  ),
  "vit-jax vtab --init_from=runs/quickstart/pretrain --workdir=runs/vtab_mini "
  "--tasks=mini --jobs=2 --config.data_dir=runs/quickstart/data": (
    "tests/unit/tools/vtab_test.py::test_two_tasks_with_the_real_train"
  ),
  "vit-jax bench step --variant=ViT-Ti_16 --batch_size=8 --image_size=64 "
  "--steps=3": "tests/unit/tools/bench_test.py::test_processes_end_to_end",
  "vit-jax bench input --needs=20000": (
    "tests/unit/tools/bench_test.py::test_input_of_what_is_made"
  ),
  "vit-jax demo --checkpoint=runs/quickstart/finetune": (
    "tests/unit/tools/demo_test.py::test_uploads_are_judged_as_by_predict"
  ),
  "vit-jax export runs/quickstart/finetune digits --to=onnx": (
    "tests/unit/tools/export_test.py::test_the_documents_command"
  ),
  "make quickstart": "tests/docs/documents_test.py::test_the_quickstart",
}
_BY_CI = {
  f"make {word}"
  for line in re.findall(
    r"^(?:exec )?make (.+)$", (REPO / ".ci" / "run").read_text(), re.MULTILINE
  )
  for word in line.split()
  if not word.startswith("-")
}


# --- what the documents have ---


class Command(NamedTuple):
  """A command of a document.

  Attributes:
    words: as a shell would split it.
    place: the document, for messages.
    marked: whether it says what it needs.
  """

  words: tuple[str, ...]
  place: str
  marked: bool

  @property
  def text(self) -> str:
    return " ".join(self.words)


@functools.cache
def _read(path: Path) -> str:
  """Returns a document's Markdown, its generated parts and all."""
  text = path.read_text(encoding="utf-8")
  if path.suffix == ".ipynb":
    cells = json.loads(text)["cells"]
    markdown = (c["source"] for c in cells if c["cell_type"] == "markdown")
    return "\n\n".join("".join(source) for source in markdown)
  return _load("docs/reference.py").fill(text)


@functools.cache
def _load(file):
  """Returns a module that is a file of its own."""
  spec = importlib.util.spec_from_file_location("loaded_file", REPO / file)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _list_blocks(path, language):
  """Returns [(what stands before it, text)] of a document's blocks."""
  parts = re.split(
    rf"^```{language}\n(.*?)^```$", _read(path), flags=re.MULTILINE | re.DOTALL
  )
  return list(zip(parts[0::2], parts[1::2], strict=False))


@functools.cache
def _list_commands() -> tuple[Command, ...]:
  return tuple(
    command
    for path in _DOCUMENTS
    for _, block in _list_blocks(path, "sh")
    for command in _split(block, str(path.relative_to(REPO)))
  )


def _split(block, place):
  marked = False
  for line in re.sub(r"\\\n *", " ", block).splitlines():
    if not line.strip():
      marked = False
    words = tuple(shlex.split(line, comments=True))
    if not words:
      marked = marked or bool(_NEEDS.search(line))
      continue
    yield Command(words, place, marked or bool(_NEEDS.search(line)))


@functools.cache
def _list_mentions() -> tuple[Command, ...]:
  """Returns the commands in sentences, and those of notebooks' code."""
  return tuple(
    Command(words, str(path.relative_to(REPO)), True)
    for path in _DOCUMENTS
    for words in (*_split_sentences(path), *_split_cells(path))
  )


def _split_sentences(path):
  for code in re.findall(r"`([^`]+)`", _drop_blocks(path)):
    words = code.split()
    if words[1:] and words[0].removeprefix(".venv/bin/") in _CHECKS:
      yield tuple(shlex.split(code))


def _split_cells(path):
  if path.suffix != ".ipynb":
    return
  for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
    code = re.sub(r"\\\n *", " ", "".join(cell["source"]))
    if cell["cell_type"] == "code":
      for line in re.findall(r"^!(.*)$", code, re.M):
        yield tuple(
          itertools.takewhile(
            lambda word: word not in {"|", ">", "2>", "2>&1"}, shlex.split(line)
          )
        )


def _drop_blocks(path):
  return re.sub(r"^```.*?^```$", "", _read(path), flags=re.M | re.S)


# --- links ---


def _list_anchors(path):
  """Returns the anchors of a document's headings, as GitHub makes them."""
  anchors, seen = set(), {}
  for title in re.findall(r"^#+ +(.+?) *$", _drop_blocks(path), re.M):
    shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
    anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
    count = seen[anchor] = seen.get(anchor, -1) + 1
    anchors.add(f"{anchor}-{count}" if count else anchor)
  return anchors


def _list_links(path):
  text = re.sub(r"`[^`\n]*`", "code", _drop_blocks(path))
  links = re.findall(r"\]\(([^)\s]+)\)", text)
  return [link for link in links if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("path", _DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
  for link in _list_links(path):
    file, _, anchor = link.partition("#")
    target = (path.parent / file).resolve() if file else path
    assert target.is_relative_to(REPO), link
    assert target.exists(), f"{path.name}: {link}"
    if anchor:
      assert anchor in _list_anchors(target), f"{path.name}: {link}"


def test_every_page_is_in_the_table_of_contents():
  trees = _list_blocks(REPO / "docs/index.md", r"\{toctree\}")
  lines = "\n".join(block for _, block in trees).split("\n")
  listed = [line for line in lines if line and not line.startswith(":")]
  assert sorted([*listed, "index"]) == sorted(page.stem for page in _PAGES)


@functools.cache
def _list_tests(file):
  text = (REPO / file).read_text(encoding="utf-8")
  return set(re.findall(r"^def (test_\w+)", text, re.M))


def _read_test(node):
  """Returns a test's code, with all of its file that is not another test."""
  file, _, test = node.partition("::")
  parts = ast.parse((REPO / file).read_text(encoding="utf-8")).body
  names = [getattr(part, "name", test) for part in parts]
  return "\n".join(
    ast.unparse(part)
    for part, name in zip(parts, names, strict=True)
    if name == test or not name.startswith("test_")
  )


@pytest.mark.parametrize("text", _TESTED)
def test_named_tests_run_with_the_same_options(text):
  code = _read_test(_TESTED[text])
  # tests/tiny_runs.py gives --workdir to trainings.
  for option in set(re.findall(r" (--\w+)", text)) - {"--workdir"}:
    assert option in code, f"{_TESTED[text]} has no {option}"


def test_named_tests_are_there():
  named = set(_TESTED.values())
  for path in _DOCUMENTS:
    named |= set(re.findall(r"tests/[\w/]+_test\.py(?:::\w+)?", _read(path)))
  for node in sorted(named):
    file, _, test = node.partition("::")
    assert (REPO / file).is_file(), node
    assert not test or test in _list_tests(file), node


# --- what is generated ---


def test_every_command_and_option_is_in_the_reference():
  text = _read(REPO / "docs/commands.md")
  assert len(_list_parsers()) > 15
  for parser in _list_parsers():
    section = text.split(f"\n## {parser.prog}\n")[1].split("\n## ")[0]
    for action in parser._actions[1:]:
      for name in action.option_strings or [action.metavar or action.dest]:
        assert f"`{name}" in section, f"{parser.prog} {name}"


def test_every_key_is_in_the_reference_with_its_default_and_meaning():
  rows = re.findall(
    r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.+) \|$",
    _read(REPO / "docs/config.md"),
    re.M,
  )
  known = config.flatten(config.load(str(REPO / "configs/common.py")))
  assert sorted(key for key, *_ in rows) == sorted(known)
  for key, _, default, _ in rows:
    shown = default.strip("`").replace(r"\|", "|")
    value = None if shown == "unset" else ast.literal_eval(shown)
    assert value == known[key], key


def test_every_published_name_is_in_its_list():
  text = _read(REPO / "docs/published.md")
  for name, published in PUBLISHED.items():
    assert f"| `{name}` | `{published.address}` |" in text


# --- commands ---


_make_parser = functools.cache(cli.make_parser)


@functools.cache
def _list_parsers():
  return _load("docs/reference.py").list_parsers(_make_parser())


def _check_vit_jax(words):
  """Fails unless the command line takes these words; runs nothing."""
  with_names = [w for w in words if w != "--help"]
  if not with_names:
    return
  args = flags.parse(_make_parser(), with_names)
  overrides = dict(getattr(args, "overrides", {}))
  specs = getattr(args, "config", None) or []
  specs = [specs] if isinstance(specs, str) else specs
  for grid in getattr(args, "grid", []):
    key, _, values = grid.partition("=")
    overrides[key] = values.split(",")[0]
  specs = [*specs, *filter(None, [getattr(args, "final", None)])]
  if overrides and not specs:
    specs = ["configs/common.py"]
  for spec in specs:
    config.load(spec, overrides)


def _check_make(words):
  makefile = (REPO / "Makefile").read_text()
  for target in words:
    assert re.search(rf"^{target}:.*## ", makefile, re.M), target


def _check_launch(words):
  script = (REPO / "launch" / "tpu.sh").read_text()
  assert re.search(rf"^{words[0]}\)", script, re.M), words[0]
  if words[0] == "run":
    _check_vit_jax(words[1:])


def _check_sbatch(words):
  assert (REPO / words[0]).is_file(), words[0]
  _check_vit_jax(["train", *words[1:]])


def _check_cloud(words):
  """Of others' commands: their files are there."""
  for word in words:
    assert not word.startswith("launch/") or (REPO / word).is_file(), word


def _check_pip(words):
  """Fails unless the extras that are to be installed are some."""
  assert words[0] == "install", words
  for extras in re.findall(r"(?:\.|vit_jax)\[([\w,]+)\]", " ".join(words)):
    for extra in extras.split(","):
      assert f'"{extra}": [' in (REPO / "setup.py").read_text(), extra


def _check_python(words):
  if words[:2] == ["-m", "vit_jax"]:
    _check_vit_jax(words[2:])
  for word in words:
    assert not word.endswith(".py") or (REPO / word).is_file(), word


def _check_nothing(words):
  """Of the shell's own commands: they are no matter of this project."""


_CHECKS = {
  "vit-jax": _check_vit_jax,
  "make": _check_make,
  "launch/tpu.sh": _check_launch,
  "sbatch": _check_sbatch,
  **dict.fromkeys(("sky", "kubectl", "xpk"), _check_cloud),
  "pip": _check_pip,
  "python": _check_python,
  "pytest": _check_python,
  "export": _check_nothing,
  "mkdir": _check_nothing,
}


def _check(words):
  """Fails unless this is a command, and takes these words."""
  name, *rest = words
  name = name.removeprefix(".venv/bin/")
  assert name in _CHECKS, f"what is {name}? _CHECKS has what is known"
  _CHECKS[name](rest)


def _check_beginning(words):
  """Fails unless such a command of ours is there, with these options."""
  names = itertools.takewhile(re.compile("[a-z-]+").fullmatch, words)
  begin = f"{' '.join(names)} "
  parser = next(p for p in _list_parsers() if f"{p.prog} ".startswith(begin))
  for option in re.findall(r"(?<= )--(?!config\.)\w+", " ".join(words)):
    assert option in parser._option_string_actions, option


def _check_mention(words):
  """As `_check`, of what may be but a command's name, or have placeholders."""
  text = " ".join(words)
  if words[0] == "vit-jax":
    _check_beginning(words)
  names = any(text == parser.prog for parser in _list_parsers())
  if not names and not _PLACEHOLDER.search(text):
    _check(words)


def test_commands_are_taken_by_their_parsers(capsys):
  for check, commands, at_least in (
    (_check, _list_commands(), 70),
    (_check_mention, _list_mentions(), 80),
  ):
    assert len(commands) > at_least
    for command in commands:
      try:
        check(command.words)
      except (SystemExit, Exception) as e:
        said = capsys.readouterr().err
        pytest.fail(f"{command.place}: {command.text}\n{said}{e!r}")


@pytest.mark.parametrize(
  "text",
  [
    "vit-jux inspect",
    "vit-jax inspekt",
    "vit-jax linear --shot=5",
    "vit-jax predict --class_name=FILE",
    "vit-jax train --config=configs/masked.py --workdir=runs --config.size=9",
    "make tests",
    "launch/tpu.sh remove",
    "pip install '.[gpus]'",
    ".venv/bin/python benchmarks/nothing.py",
    "python -m vit_jax inspekt",
  ],
)
def test_a_wrong_command_is_noticed(text):
  with pytest.raises((SystemExit, Exception)):
    _check_mention(shlex.split(text))


def test_commands_are_run_or_say_what_they_need():
  loose = [
    f"{command.place}: {command.text}"
    for command in _list_commands()
    if not command.marked
    and not command.text.startswith("pip install -e ")
    and command.text not in {*_SET_UP, *_RUN, *_TESTED, *_BY_CI, "make hooks"}
  ]
  assert not loose, "add them to _RUN, or say above them what they need"
  documented = {command.text for command in _list_commands()}
  gone = {*_SET_UP, *_RUN, *_TESTED} - documented
  assert not gone, "no document has these any more"


# --- Python ---

_PYTHON = [
  pytest.param(before, block, id=f"{path.stem}-{i}")
  for path in [REPO / "README.md", *_PAGES]
  for i, (before, block) in enumerate(_list_blocks(path, "python"))
]


@pytest.mark.parametrize(("before", "block"), _PYTHON)
def test_python_compiles(before, block):
  compile(block, "document", "exec")


# --- run ---


class Project:
  """A folder as the documents expect it, small."""

  def __init__(self, folder: Path):
    self.folder = folder
    shutil.copytree(REPO / "configs", folder / "configs")
    self.cache = folder / "cache"
    self.environment = {
      "PYTHONPATH": str(REPO),  # of what a sweep starts
      "TFDS_DATA_DIR": str(folder / "data"),
      "VIT_JAX_CACHE": str(self.cache),
    }

  @contextlib.contextmanager
  def entered(self):
    """Works in the folder, with its environment."""
    with contextlib.chdir(self.folder), pytest.MonkeyPatch.context() as patch:
      for name, value in self.environment.items():
        patch.setenv(name, value)
      yield

  def call(self, *words):
    """Runs vit-jax in this process, where starting is paid for once.

    `*` in a word stands for files, as in a shell. Returns what it printed.
    """
    expanded = []
    for word in words:
      pattern = "*" in word and not word.startswith("-")
      files = self.folder.glob(word) if pattern else ()
      expanded += sorted(map(str, files)) or [word]
    said = io.StringIO()
    with self.entered(), contextlib.redirect_stdout(said):
      try:
        code = cli.main(expanded)
      except SystemExit as e:  # --help
        code = e.code
    assert not code, f"{words}\n{said.getvalue()}"
    return said.getvalue()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
  project = Project(tmp_path_factory.mktemp("project"))
  _draw_images(project.folder)
  _lay_out_weights(project)
  with pytest.MonkeyPatch.context() as patch:
    # To draw all takes half a minute.
    few = {"train": 400, "test": 100}
    patch.setattr("vit_jax.data.builders.jft_like.JftLike.SIZES", few)
    for name in ("jft_like", "digits"):
      project.call("data", "prepare", name, "--data_dir=data")
  shutil.copytree(
    project.folder / "data", project.folder / "runs/quickstart/data"
  )
  for text in _SET_UP:
    project.call(*text.split()[1:], *_DIGITS)
  return project


def _draw_images(folder):
  """Writes the files that the documents call photos, cat.jpg and so on."""
  rng = np.random.default_rng(0)

  def write(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(rng.normal(level, 30, (40, 48, 3)), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).resize((160, 120)).save(path)

  labels = ["image,label"]
  for name, level in (("cat", 80), ("dog", 170)):
    for i in range(12):
      write(folder / "photos" / name / f"{i}.jpg", level)
      write(folder / "tagged_images" / f"{name}{i}.jpg", level)
      labels.append(f"{name}{i}.jpg,{name}")
  write(folder / "cat.jpg", 80)
  write(folder / "dog.png", 170)
  for i in range(2):
    write(folder / f"runs/quickstart/images/test_{i}.png", 80)
  (folder / "tags.csv").write_text("\n".join(labels) + "\n")


def _lay_out_weights(project):
  """Writes random weights where a published file would have been loaded."""
  model = models.create(
    variant="ViT-w32d1m64h2_16", num_classes=10, image_size=224
  )
  rng = np.random.default_rng(0)
  shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
  arrays = {
    path: rng.normal(0, 0.02, x.shape).astype(np.float32)
    for path, x in shapes.items()
  }
  file = io.BytesIO()
  np.savez(file, **arrays)
  url = fetch._make_url(PUBLISHED["ViT-Ti_16-augreg"].address)
  cached = fetch._cached_path(url, project.cache)
  cached.parent.mkdir(parents=True)
  for path in (cached, project.folder / "ViT-B_16.npz"):
    path.write_bytes(file.getvalue())
  assert pretrained.read(str(cached)).num_classes == 10
  names = "\n".join(f"name {i}" for i in range(10))
  (project.folder / "names.txt").write_text(names + "\n")


def _start_threads(count, mp_context, **options):
  """A pool of threads: a process would import TensorFlow first."""
  return concurrent.futures.ThreadPoolExecutor(count, **options)


@pytest.mark.ci
@pytest.mark.parametrize("text", _RUN, ids=str)
def test_a_command_runs(text, project, monkeypatch):
  monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", _start_threads)
  command = next(c for c in _list_commands() if c.text == text)
  project.call(*command.words[1:], *_RUN[text])


@pytest.mark.ci
@pytest.mark.parametrize(
  ("before", "block"),
  [p for p in _PYTHON if "extending" not in str(p.id)],  # extending_test.py
)
def test_python_runs(before, block, project):
  if _NEEDS.search(block) or before.endswith(".py`:\n\n"):
    pytest.skip("it says what it needs, or is a file")
  with project.entered():
    exec(compile(block, "document", "exec"), {})


_SHORTER = """

_get_config = get_config


def get_config():
  config = _get_config()
  with config.unlocked():
    config.model.variant = "ViT-w32d1m64h2_8"
    config.total_steps = 2
    config.schedule.warmup_steps = 0
    config.batch_size = 8
    config.eval.split = "test[:40]"
  return config
"""


@pytest.mark.ci
def test_the_quickstart(project, monkeypatch):
  monkeypatch.setattr("vit_jax.tools.quickstart.PRIOR_EXAMPLES", 200)
  for half in ("pretrain", "finetune"):
    with open(project.folder / f"configs/quickstart_{half}.py", "a") as f:
      f.write(_SHORTER)
  (project.folder / "anew").mkdir()
  shutil.copytree(
    project.folder / "runs/quickstart/data", project.folder / "anew/data"
  )
  said = project.call("quickstart", "--workdir=anew")
  assert "from pre-training" in said
  assert json.loads((project.folder / "anew/report.json").read_text())
