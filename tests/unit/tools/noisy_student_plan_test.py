"""Noisy Student's loop before it trains: stages, mixtures, paths; the table."""

import shutil
from pathlib import Path

import pytest

from vit_jax import data
from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.tools import noisy_student

_REPO = Path(__file__).parents[3]
# A configuration file; {} becomes what the loop says otherwise.
_CONFIG = """
from tiny_config import get_config as get_tiny_config
import ml_collections

LOOP = dict(
  stages=("teacher", "student1", "student2", "finetune"), dataset="digits",
  split="train[100:]", soft=True, min_confidence=0.3, per_class=50,
  balance=True, ratio=3.0,
)


def get_config(arg):
  prefix, _, stage = arg.rpartition(",")
  if stage == "loop":
    return ml_collections.ConfigDict({{**LOOP, **dict({})}})
  config = get_tiny_config()
  config.train.split = prefix or "train[:50]"
  if stage == "student2":
    config.init_from = "elsewhere"
  return config
"""


@pytest.fixture
def write(tmp_path):
  """Returns a function that writes the configuration file."""
  shutil.copy(_REPO / "configs" / "common.py", tmp_path)
  shutil.copy(_REPO / "tests" / "tiny_config.py", tmp_path)

  def write(text=""):
    path = tmp_path / "loop.py"
    path.write_text(_CONFIG.format(text))
    return str(path)

  return write


@pytest.mark.parametrize("name", ["digits", "tissue"])
def test_the_quickstart_is_such_a_loop(name, tmp_path):
  config = _REPO / "configs" / "quickstart_noisy_student.py"
  loop, configs = noisy_student.load(f"{config}:{name}", {})
  stages = noisy_student.plan(loop, configs, tmp_path)
  assert [stage.name for stage in stages] == ["teacher", "student1", "student2"]
  assert stages[0].config.train.dataset == loop.dataset
  labelled = {stage.config.train.split for stage in stages}
  assert (labelled, loop.split) == ({"train[:50]"}, "train[250:]")


def test_stages_get_their_data_and_weights(write, tmp_path):
  overrides = {"ratio": "14", "seed": "3"}
  loop, configs = noisy_student.load(f"{write()}:train[:40]", overrides)
  stages = noisy_student.plan(loop, configs, tmp_path / "a=b")
  assert [
    (stage.name, stage.config.train.dataset, stage.config.init_from)
    for stage in stages
  ] == [
    ("teacher", "digits", None),
    (
      "student1",
      f"digits=1,pseudo:{tmp_path}/a=b/labels_student1=14.0",
      None,
    ),
    (
      "student2",
      f"digits=1,pseudo:{tmp_path}/a=b/labels_student2=14.0",
      "elsewhere",
    ),
    ("finetune", "digits", f"{tmp_path}/a=b/student2"),
  ]
  assert data.parse_mixture(stages[1].config.train.dataset) == [
    ("digits", 1.0),
    (f"pseudo:{tmp_path}/a=b/labels_student1", 14.0),
  ]
  assert [stage.teacher for stage in stages] == [
    None,
    *(tmp_path / "a=b" / name for name in ("teacher", "student1", "student2")),
  ]
  for stage in stages:
    assert stage.config.seed == 3
    assert stage.config.train.split == "train[:40]"


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ("stages=()", "stages are none; they must be teacher, student1"),
    ("stages=('teacher',)", "stages are teacher; they must"),
    ("stages=('teacher', 'student2')", "stages are teacher, student2; they"),
    ("stages=('teacher', 'student1', 'last')", "student1, last; they must"),
    ("ratio=0.0", "a ratio above 0"),
    ("min_confidence=1.5", "min_confidence is 1.5; it must be from 0 to 1"),
    ("ratio=(1.0,)", "there are 2 students; give one number"),
  ],
)
def test_a_loop_that_cannot_be(change, words, write, tmp_path):
  def plan():
    loop, configs = noisy_student.load(write(change), {})
    noisy_student.plan(loop, configs, tmp_path)

  with pytest.raises(UserError, match=words):
    plan()


def test_each_student_has_its_ratio(write, tmp_path):
  loop, configs = noisy_student.load(write("ratio=(14, 28.5)"), {})
  _, *students, _ = noisy_student.plan(loop, configs, tmp_path)
  weights = [
    data.parse_mixture(stage.config.train.dataset)[1][1] for stage in students
  ]
  assert weights == [14, 28.5]


def test_paths_that_no_mixture_has(write, tmp_path):
  loop, configs = noisy_student.load(write(), {})
  with pytest.raises(UserError, match="no comma in its name or in --workdir"):
    noisy_student.plan(loop, configs, tmp_path / "a=1,b")
  loop, configs = noisy_student.load(write(), {"train.dataset": "a=1,b=2"})
  with pytest.raises(UserError, match="needs one data set"):
    noisy_student.plan(loop, configs, tmp_path)


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--config=photos:digits"], "loop"),
    (["--config=quickstart_finetune"], "TypeError"),
    (["--config.per_class=many"], "config.per_class is int"),
    (["--config.schedule.base_lr=x"], "config.schedule.base_lr is float"),
    (["--config.model.variant=ViT"], "unknown model variant 'ViT'"),
  ],
)
def test_mistakes_are_one_line(args, words, write, tmp_path, capsys):
  config = f"--config={write()}"
  workdir = tmp_path / "run"
  assert main(["noisy-student", config, *args, f"--workdir={workdir}"]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert words in line
  assert not workdir.exists()


def test_table():
  pseudo = {"distinct": 1234, "examples": 5000, "agreement": 0.75}
  results = {"examples": 797, "loss": 0.5, "accuracy": 0.8125}
  shared = {"model": "ViT-N_8", "labelled": 50, "results": results}
  result = {
    "stages": [
      {**shared, "stage": "teacher", "image_size": [24, 24], "pseudo": None},
      {**shared, "stage": "student1", "image_size": [24, 32], "pseudo": pseudo},
    ]
  }
  assert noisy_student.format_table(result).splitlines() == [
    "stage     model     size  labelled   pseudo-labels  right    loss  "
    "accuracy  test images",
    "teacher   ViT-N_8     24        50               -      -  0.5000    "
    "0.8125          797",
    "student1  ViT-N_8  24x32        50  1,234 of 5,000  75.0%  0.5000    "
    "0.8125          797",
  ]
