"""VTAB: which tasks, one setting for all, the means; resumed like a sweep."""

import json

import numpy as np
import pytest
import stand_in
from random_models import random_weights

from vit_jax import data, pretrained
from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.tools import jobs, sweep, vtab

_VARIANT = "ViT-w32d1m64h2_8"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A folder with random weights of a small model."""
  there = random_weights(_VARIANT, num_classes=4, activation="gelu_erf")
  path = tmp_path_factory.mktemp("weights") / "weights"
  pretrained.write(there, str(path), "orbax")
  return path


@pytest.fixture
def args(weights, tmp_path):
  return [
    "vtab",
    f"--init_from={weights}",
    f"--workdir={tmp_path}/vtab",
    f"--config.data_dir={tmp_path}/data",
    "--config.total_steps=6",
  ]


@pytest.fixture
def commands(monkeypatch):
  # Data sets have tests of their own.
  monkeypatch.setattr(vtab.data, "prepare", lambda *_: None)
  monkeypatch.setattr(sweep, "check_sources", lambda *_: None)
  return stand_in.use(monkeypatch, jobs, sweep)


def test_tasks():
  assert len(vtab.parse_tasks("all")) == 19
  mini = vtab.parse_tasks("mini")
  assert len({task.group for task in mini}) == 3
  names = [t.name for t in vtab.parse_tasks("dtd, vtab:clevr_count")]
  assert names == ["vtab:dtd", "vtab:clevr_count"]
  for text, words in (
    ("dtt", "unknown task 'vtab:dtt'; did you mean 'vtab:dtd'"),
    ("", "unknown task"),
    ("dtd,vtab:dtd", "different tasks"),
    ("dtd,mini:count", "all of vtab or all of mini"),
    ("folder:x", "all of vtab or all of mini"),
  ):
    with pytest.raises(UserError, match=words):
      vtab.parse_tasks(text)


def test_one_setting_for_all_or_each_its_own():
  means = {"a": (0.9, 0.7, 0.1), "b": (0.2, 0.5, 0.6)}
  selected = {}
  for name, some in means.items():
    entries = [
      {"setting": {"lr": str(i)}, "mean": x} for i, x in enumerate(some)
    ]
    best = max(entries, key=lambda e: e["mean"])
    selected[name] = {"settings": entries, "best": best}
  together = vtab.choose(selected, per_task=False)
  assert together == {"a": {"lr": "1"}, "b": {"lr": "1"}}
  apart = vtab.choose(selected, per_task=True)
  assert apart == {"a": {"lr": "0"}, "b": {"lr": "2"}}


def test_the_mini_tasks(args, commands, tmp_path, capsys):
  """All of it but the training, which a stand-in does."""
  args += ["--tasks=mini", "--grid=schedule.base_lr=0.01,0.5,0.2", "--seeds=2"]
  code = main([*args, "--json"])
  out, err = capsys.readouterr()
  assert code == 0, err
  result = json.loads(out)
  assert result == json.loads((tmp_path / "vtab" / "vtab.json").read_text())
  expected = {}
  for row in result["tasks"]:
    base = 0.5 + len(row["task"]) / 1000
    assert row["setting"] == {"schedule.base_lr": "0.5"}
    assert row["validation"] == pytest.approx(base)
    assert row["accuracies"] == pytest.approx([base, base + 0.1])
    assert row["accuracy"] == pytest.approx(base + 0.05)
    assert row["spread"] == pytest.approx(0.1 / 2**0.5)
    expected.setdefault(row["group"], []).append(base + 0.05)
  assert result["groups"] == pytest.approx(
    {name: np.mean(some) for name, some in expected.items()}
  )
  assert list(result["groups"]) == ["natural", "specialized", "structured"]
  every = [x for some in expected.values() for x in some]
  assert result["mean"] == pytest.approx(np.mean(every))

  splits = [
    {word.partition("split=")[2] for word in command if ".split=" in word}
    for command in commands
  ]
  assert splits[: 4 * 3] == [{"train800", "val200"}] * 12
  assert splits[4 * 3 :] == [{"train800val200", "test"}] * 8
  for command in commands:  # the model is that of the weights
    assert "--config.model.activation=gelu_erf" in command
    assert any(f"vtab_mini.py:{_VARIANT},mini:" in word for word in command)
  assert main(args) == 0
  assert len(commands) == 4 * (3 + 2)
  assert "structured" in capsys.readouterr().out


def test_an_unfinished_trial_is_named(args, commands, tmp_path, capsys):
  run = tmp_path / "vtab/count/select/base_lr=0.02,seed=0"
  run.mkdir(parents=True)
  (run / "stop").touch()
  assert main([*args, "--tasks=mini:count"]) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert f"1 of 2 runs failed, the first is {run} (unfinished" in line
  assert not (tmp_path / "vtab/count/final").exists()


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--tasks=dtd", "run `vit-jax data prepare"),
    ("--config.eval.split=test", "is set by vtab"),
    ("--config.image_siz=32", "did you mean 'image_size'?"),
    ("--init_from=/no/such", "/no/such"),
    ("--jobs=0", "--jobs is 0"),
  ],
)
def test_mistakes_leave_nothing_behind(argument, words, args, tmp_path, capsys):
  tasks = [] if argument.startswith("--tasks") else ["--tasks=mini:count"]
  assert main([*args, *tasks, argument]) == 2
  out, err = capsys.readouterr()
  assert not out
  (line,) = err.splitlines()
  assert words in line
  assert not (tmp_path / "vtab").exists()


@pytest.mark.nightly
def test_two_tasks_with_the_real_train(args, tmp_path, capsys, monkeypatch):
  """Short trainings of a small model, two at once, through the command."""
  # Of the processes that it starts: one device compiles faster than eight.
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
  # What is given is not tried: four runs, not six.
  given = ["schedule.base_lr=0.05", "schedule.warmup_steps=1", "image_size=16"]
  short = [f"--config.{text}" for text in given]
  tasks = "mini:count", "mini:distance"
  words = [*args, f"--tasks={','.join(tasks)}", "--jobs=2", *short, "--json"]
  code = main(words)
  out, err = capsys.readouterr()
  assert code == 0, err
  rows = json.loads(out)["tasks"]
  for task, row in zip(tasks, rows, strict=True):
    test = data.get_source(task, "test", f"{tmp_path}/data")
    assert row["examples"] == test.num_examples
    assert 0 <= row["accuracy"] <= 1
