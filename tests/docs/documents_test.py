"""The documents: no dead link, and every command is one that works.

A `vit-jax` in a block of a document, or of a configuration's docstring, is run
here (marked ci), or by other tests (`_ELSEWHERE`), or a comment says what it
takes, such as `# needs a download`: behind a command for that one, on a line of
its own for all that follow up to an empty line. Those are only parsed. Of
commands in sentences and in notebooks names and options are checked.
"""

import ast
import contextlib
import functools
import glob
import io
import itertools
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from random_models import random_weights

from vit_jax import __main__ as cli
from vit_jax import config, pretrained
from vit_jax.commands import flags
from vit_jax.pretrained import embedded

REPO = Path(__file__).parents[2]
_PAGES = sorted((REPO / "docs").glob("*.md"))
_CONFIGS = sorted((REPO / "configs").glob("*.py"))
_TEXTS = ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG", "RESULTS")
_DOCUMENTS = [
  *(REPO / f"{name}.md" for name in (*_TEXTS, "launch/README")),
  *_PAGES,
  *_CONFIGS,
  *sorted((REPO / "notebooks").glob("*.ipynb")),
]
_NEEDS = re.compile(
  r"# needs an? ((Google Cloud|Hugging Face) account|download|export|GPU|"
  r"TPU compiler|second machine)"
)

# What is added to a training so that it takes seconds.
_SHORT = (
  "--config.total_steps=2",
  "--config.schedule.warmup_steps=0",
  "--config.batch_size=32",
)
_DIGITS = (
  *_SHORT,
  "--config.model.variant=ViT-w32d1m64h2_8",
  "--config.eval.split=test[:40]",
)
_ADDED = {
  "vit-jax train --config=configs/quickstart_": _DIGITS,
  "vit-jax train --config=configs/photos.py:photos,ViT-N_8": _SHORT,
  "vit-jax train --workdir=runs/photos_adamw": _SHORT,
  "vit-jax train --config=configs/photos.py:photos ": (
    *_SHORT,
    "--config.model.variant=ViT-w32d1m64h2_16",
    "--config.model.dtype=float32",
    "--config.image_size=32",
  ),
  "vit-jax data build": ("--workers=1",),
}
# What all others need.
_SET_UP = (
  "vit-jax train --config=configs/quickstart_pretrain.py "
  "--workdir=runs/quickstart/pretrain --config.data_dir=runs/quickstart/data",
  "vit-jax train --config=configs/quickstart_finetune.py "
  "--workdir=runs/quickstart/finetune --config.data_dir=runs/quickstart/data "
  "--config.init_from=runs/quickstart/pretrain",
)
# Run although it says that it needs a download, since the weights lie there.
_ALSO = "vit-jax train --config=configs/photos.py:photos --workdir=runs/photos"
# What other tests run: of sweep, vtab, noisy_student, bench, demo, export,
# data_tasks.
_ELSEWHERE = (
  "vit-jax sweep ",
  "vit-jax vtab ",
  "vit-jax noisy-student ",
  "vit-jax bench ",
  "vit-jax demo ",
  "vit-jax export ",
  "vit-jax data check vtab:",
)


# --- what the documents have ---


class Command(NamedTuple):
  """A command, its document, and whether that says what it needs."""

  words: tuple[str, ...]
  place: str
  marked: bool

  @property
  def text(self) -> str:
    return " ".join(self.words)


@functools.cache
def _read(path: Path) -> str:
  """Returns the Markdown of a document, or that in a notebook or docstring."""
  text = path.read_text(encoding="utf-8")
  if path.suffix == ".ipynb":
    cells = json.loads(text)["cells"]
    markdown = (c["source"] for c in cells if c["cell_type"] == "markdown")
    return "\n\n".join("".join(source) for source in markdown)
  if path.suffix == ".py":
    text = ast.get_docstring(ast.parse(text))
    blocks = (
      f"```sh\n{textwrap.dedent(part)}\n```" if "  vit-jax " in part else part
      for part in text.split("\n\n")
    )
    return "\n\n".join(blocks)
  return text


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
    words = tuple(shlex.split(line, comments=True))
    needs = bool(_NEEDS.search(line))
    if words:
      yield Command(words, place, marked or needs)
    else:
      marked = bool(line.strip()) and (marked or needs)


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


def _list_links():
  """Yields (document, link) of what is no address of the web."""
  for path in _DOCUMENTS:
    text = re.sub(r"`[^`\n]*`", "code", _drop_blocks(path))
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
      yield path, link


def test_links_lead_somewhere():
  for path, link in _list_links():
    file, _, anchor = link.partition("#")
    target = (path.parent / file).resolve() if file else path
    assert target.is_relative_to(REPO), f"{path.name}: {link}"
    assert target.exists(), f"{path.name}: {link}"
    assert not anchor or anchor in _list_anchors(target), f"{path.name}: {link}"


def test_named_tests_are_there():
  for path in _DOCUMENTS:
    for node in re.findall(r"tests/[\w/]+_test\.py(?:::\w+)?", _read(path)):
      file, _, test = node.partition("::")
      assert (REPO / file).is_file(), node
      assert f"def {test}" in (REPO / file).read_text(encoding="utf-8"), node


def test_every_configuration_is_in_the_reference():
  page = _read(REPO / "docs/config.md")
  assert all(f"}} ../configs/{path.name}\n" in page for path in _CONFIGS)


# --- commands ---


_make_parser = functools.cache(cli.make_parser)


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


_CHECKS = {
  "vit-jax": _check_vit_jax,
  "make": _check_make,
  "launch/tpu.sh": _check_launch,
  "sbatch": _check_sbatch,
  **dict.fromkeys(("sky", "kubectl", "xpk"), _check_cloud),
  "pip": _check_pip,
  "export": id,  # the shell's own
  "mkdir": id,
}


def _check(words):
  """Fails unless this is a command, and takes these words."""
  name, *rest = words
  assert name in _CHECKS, f"what is {name}? _CHECKS has what is known"
  _CHECKS[name](rest)


def test_commands_are_taken_by_their_parsers(capsys):
  assert len(_list_commands()) > 70
  for command in _list_commands():
    try:
      _check(command.words)
    except (SystemExit, Exception) as e:
      said = capsys.readouterr().err
      pytest.fail(f"{command.place}: {command.text}\n{said}{e!r}")


def _list_mentions(path):
  """Yields "vit-jax ..." and "make ..." of sentences and of notebooks' code."""
  yield from re.findall(r"`(vit-jax [^`]+|make [a-z-]+)`", _drop_blocks(path))
  if path.suffix == ".ipynb":
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
      code = re.sub(r"\\\n *", " ", "".join(cell["source"]))
      yield from re.findall(r"^!(vit-jax .+)$", code, re.M)


def _check_mention(text):
  """Fails unless such a command is there, with these options."""
  words = text.split()
  if words[0] == "make":
    _check_make(words[1:])
    return
  named = " ".join(itertools.takewhile(re.compile("[a-z-]+").fullmatch, words))
  names = [f"vit-jax {name}" for name in cli.COMMANDS]
  name = next(n for n in names if f"{n} ".startswith(f"{named} "))
  options = re.findall(r"(?<= )--(?!config\.)[\w-]+", text)
  if options:
    parser = flags.Parser()
    cli.COMMANDS[name.removeprefix("vit-jax ")][0].add_flags(parser)
    assert {*options, "--help"} <= {*parser._option_string_actions}, text


def test_commands_in_sentences_are_there():
  mentions = [(p, text) for p in _DOCUMENTS for text in _list_mentions(p)]
  assert len(mentions) > 80
  for path, text in mentions:
    try:
      _check_mention(text)
    except (AssertionError, StopIteration) as e:
      pytest.fail(f"{path.name}: {text}\n{e!r}")


@pytest.mark.parametrize(
  "text",
  [
    "vit-jux inspect",
    "vit-jax linear --shot=5",
    "vit-jax train --config=configs/masked.py --workdir=runs --config.size=9",
    "make tests",
    "launch/tpu.sh remove",
    "pip install '.[gpus]'",
  ],
)
def test_a_wrong_command_is_noticed(text):
  with pytest.raises((SystemExit, Exception)):
    _check(shlex.split(text))


def _list_run() -> list[str]:
  """Returns the commands that are run here: data first, then trainings."""
  texts = dict.fromkeys(
    command.text
    for command in _list_commands()
    if command.text == _ALSO or not command.marked
    if command.text.startswith("vit-jax ") and command.text not in _SET_UP
    if not command.text.startswith(_ELSEWHERE)
  )
  first = ("vit-jax data prepare", "vit-jax data build")
  first += ("vit-jax pseudo-label", "vit-jax train")
  return sorted(texts, key=lambda text: not text.startswith(first))


def test_the_commands_that_come_first_are_documented():
  assert {command.text for command in _list_commands()} >= {*_SET_UP, _ALSO}


# --- Python ---

_PYTHON = {
  f"{path.stem}-{i}": found
  for path in [REPO / "README.md", *_PAGES]
  for i, found in enumerate(_list_blocks(path, "python"))
}


def test_python_compiles():
  for name, (_, block) in _PYTHON.items():
    compile(block, name, "exec")


# --- run ---


def _call(*words):
  """Runs vit-jax in this process, where starting is paid for once.

  `*` in a word stands for files, as in a shell. Returns what it printed.
  """
  files = [[] if word[0] == "-" else sorted(glob.glob(word)) for word in words]
  expanded = [w for word, found in zip(words, files) for w in found or [word]]  # noqa: B905
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    try:
      code = cli.main(expanded)
    except SystemExit as e:  # --help
      code = e.code
  assert not code, f"{words}\n{said.getvalue()}"
  return said.getvalue()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
  """Works in a folder as the documents expect it, small."""
  folder = tmp_path_factory.mktemp("project")
  with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(folder / "data"))
    patch.setenv("PYTHONPATH", str(REPO))  # of processes that are started
    # To draw all takes half a minute.
    few = {"train": 400, "test": 100}
    patch.setattr("vit_jax.data.builders.jft_like.JftLike.SIZES", few)
    # In place of a download.
    weights = folder / "ViT-B_16.npz"
    patch.setitem(embedded.MODELS, "ViT-Ti_16-augreg", weights)
    shutil.copytree(REPO / "configs", "configs")
    _draw_images(folder)
    made = random_weights("ViT-w32d1m64h2_16", image_size=224)
    pretrained.write(made, str(weights), "npz")
    names = "".join(f"name {i}\n" for i in range(10))
    (folder / "names.txt").write_text(names)
    for name in ("jft_like", "digits"):
      _call("data", "prepare", name, "--data_dir=data")
    shutil.copytree("data", "runs/quickstart/data")
    for text in _SET_UP:
      _call(*text.split()[1:], *_DIGITS)
    yield folder


def _draw_images(folder):
  """Writes the files that the documents call photos, cat.jpg and so on."""
  levels = {"cat.jpg": 80, "dog.png": 170}
  levels |= {f"runs/quickstart/images/test_{i}.png": 80 for i in range(2)}
  labels = "image,label\n"
  for name, level in (("cat", 80), ("dog", 170)):
    for i in range(12):
      levels[f"photos/{name}/{i}.jpg"] = level
      levels[f"tagged_images/{name}{i}.jpg"] = level
      labels += f"{name}{i}.jpg,{name}\n"
  (folder / "tags.csv").write_text(labels)
  rng = np.random.default_rng(0)
  for file, level in levels.items():
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(rng.normal(level, 30, (40, 48, 3)), 0, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    image.resize((160, 120)).save(folder / file)


@pytest.mark.ci
@pytest.mark.parametrize("text", _list_run())
@pytest.mark.usefixtures("project")
def test_a_command_runs(text):
  command = next(c for c in _list_commands() if c.text == text)
  added = [_ADDED[begin] for begin in _ADDED if text.startswith(begin)]
  _call(*command.words[1:], *(added[-1] if added else ()))


@pytest.mark.ci
@pytest.mark.parametrize(
  "name",
  [n for n in _PYTHON if not n.startswith("extending")],  # extending_test.py
)
@pytest.mark.usefixtures("project")
def test_python_runs(name):
  before, block = _PYTHON[name]
  if _NEEDS.search(block) or before.endswith(".py`:\n\n"):
    pytest.skip("it says what it needs, or is a file")
  exec(compile(block, name, "exec"), {})


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
    with open(f"configs/quickstart_{half}.py", "a") as f:
      f.write(_SHORTER)
  shutil.copytree("runs/quickstart/data", "anew/data")
  assert "from pre-training" in _call("quickstart", "--workdir=anew")
  assert json.loads((project / "anew/report.json").read_text())
