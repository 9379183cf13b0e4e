"""Noisy Student's loop: stopped in each stage it ends the same, to the bit."""

import json
import shutil
import signal

import numpy as np
import pytest
from tiny_runs import assert_same_run, read_metrics, snapshot

from vit_jax import train
from vit_jax.__main__ import main
from vit_jax.tools import noisy_student

pytestmark = pytest.mark.ci

_CONFIG = """
import ml_collections
from tiny_config import get_config as get_tiny_config

STAGES = ("teacher", "student1", "finetune")


def get_config(stage):
  if stage == "loop":
    return ml_collections.ConfigDict(
      dict(
        stages=STAGES, dataset="digits", split="train[200:400]", soft=True,
        min_confidence=0.0, per_class=30, balance=True, ratio=2.0,
      )
    )
  config = get_tiny_config()
  config.model.variant = "ViT-w16d2m32h2_8"
  config.total_steps = 6
  config.eval_every = 0
  if stage != "teacher":  # noise
    config.model.stochastic_depth_rate = 0.2
  if stage == "finetune":
    config.total_steps = 4
  return config
"""
_STAGES = {"teacher": 6, "student1": 6, "finetune": 4}
_LABELS = "labels_student1"


class _Killed(BaseException):
  """In place of a kill: nobody catches it."""


@pytest.fixture(scope="module")
def args(runs):
  """Returns the words of the command, less --workdir."""
  path = runs.config.with_name("noisy_student.py")
  path.write_text(_CONFIG)
  return [
    "noisy-student",
    f"--config={path}",
    f"--config.data_dir={runs.data_dir}",
  ]


@pytest.fixture(scope="module")
def whole(args, sharing, tmp_path_factory):
  """The folder of a loop that nobody disturbed."""
  workdir = tmp_path_factory.mktemp("whole") / "loop"
  assert main([*args, f"--workdir={workdir}"]) == 0
  return workdir


def _read_labels(folder):
  return {f.name: np.load(f).tobytes() for f in sorted(folder.glob("*.npy"))}


def test_the_loop_is_what_it_says(whole):
  stages = json.loads((whole / noisy_student.REPORT).read_text())["stages"]
  assert [row["stage"] for row in stages] == [*_STAGES]
  for row, pseudo in zip(stages, (None, _LABELS, None), strict=True):
    run = json.loads((whole / row["stage"] / "config.json").read_text())
    assert run["total_steps"] == _STAGES[row["stage"]]
    last = read_metrics(whole / row["stage"])[-1]
    for name, x in row["results"].items():
      assert last[f"eval/{name}"] == x
    trained = [entry["dataset"] for entry in run["data"]["train"]]
    assert trained == ["digits"] + [f"pseudo:{whole}/{pseudo}"] * bool(pseudo)
    init_from = run["config"]["init_from"]
    is_last = row["stage"] == "finetune"
    assert init_from == (str(whole / "student1") if is_last else None)
    if pseudo:
      assert row["pseudo"]["examples"] == 200
      about = json.loads((whole / pseudo / "about.json").read_text())
      assert about["teacher"].startswith(str(whole / "teacher"))
      labels = np.load(whole / pseudo / "labels.npy")
      assert len(labels) == row["pseudo"]["kept"]


def test_a_complete_loop_stays_as_it_is(args, whole, capsys, monkeypatch):
  before = snapshot(whole)
  report = (whole / noisy_student.REPORT).read_text()

  def score(*_, **__):
    raise AssertionError("labelled again")

  monkeypatch.setattr("vit_jax.tools.pseudo_label._score", score)
  assert main([*args, f"--workdir={whole}", "--json"]) == 0
  assert json.loads(capsys.readouterr().out) == json.loads(report)
  after = snapshot(whole)
  changing = {noisy_student.REPORT, *(n for n in after if n.endswith("lock"))}
  assert {n for n in after if after[n] != before.get(n)} <= changing


def test_images_that_are_not_there_are_noticed_first(args, tmp_path, capsys):
  workdir = tmp_path / "loop"
  words = [*args, f"--workdir={workdir}", "--config.split=others"]
  assert main(words) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert "others" in line
  assert not workdir.exists()


@pytest.mark.nightly
def test_stopped_in_each_stage_it_ends_the_same(
  args, runs, whole, tmp_path, monkeypatch, capsys
):
  """A chain: each link is stopped in a later stage than the one before."""
  workdir = tmp_path / "loop"
  args = [*args, f"--workdir={workdir}"]
  evaluate, check = train.Loop.evaluate, noisy_student.StopSignal.check
  calls = []

  def kill_at_step(name, step):
    def evaluate_or_kill(self, done):
      if (self.checkpoints.workdir.name, self.step) == (name, step):
        raise _Killed
      evaluate(self, done)

    return train.Loop, "evaluate", evaluate_or_kill

  def check_or_kill(self):
    # Also between trainings; in pseudo-labelling, once for each batch.
    if workdir.joinpath(f"{_LABELS}.parts").exists():
      calls.append(1)
      if len(calls) == 2:
        raise _Killed
    check(self)

  def kill(patched, done):
    with monkeypatch.context() as patch:
      patch.setattr(*patched)
      with pytest.raises(_Killed):
        main(args)
    assert {f.name for f in workdir.iterdir()} == {*done, "lock"}

  def stop_a_process():
    process = runs.start([*args, "--stopped_exit_code=75"], devices=8)
    assert process.wait_until(lambda: "M parameters" in process.stderr())
    process.send(signal.SIGTERM)
    assert process.wait() == 75, process.stderr()
    assert not process.stdout()
    assert {f.name for f in workdir.iterdir()} >= {"student1", _LABELS}

  kill(kill_at_step("teacher", 3), ["teacher"])
  kill(
    (noisy_student.StopSignal, "check", check_or_kill),
    ["teacher", f"{_LABELS}.parts"],
  )
  stop_a_process()
  kill(
    kill_at_step("finetune", 3),
    [*_STAGES, _LABELS],
  )
  assert not (workdir / noisy_student.REPORT).exists()
  capsys.readouterr()
  assert main(args) == 0
  assert "finetune" in capsys.readouterr().out
  for stage in _STAGES:
    assert_same_run(workdir / stage, whole / stage)
  assert _read_labels(workdir / _LABELS) == _read_labels(whole / _LABELS)
  shutil.rmtree(workdir)
