"""Whole runs: what they leave, and what happens to them on the way.

Each is compared with one that was never interrupted. What is about processes
(signals, several of them, another number of devices) runs in processes; what is
about files runs in this one.
"""

import collections
import contextlib
import errno
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import crashes
import jax
import numpy as np
import pytest
from etils import epath
from mistakes import named
from PIL import Image
from record_batches import digests
from tiny_runs import (
  assert_same_run,
  best_step,
  read_batches,
  read_losses,
  read_metrics,
  read_state,
  saved_steps,
  snapshot,
  wait_until_gone,
)

import vit_jax
from vit_jax import checkpoint, data, train
from vit_jax import config as configuration
from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.training import inputs, metrics, profiler, run_folder

CONFIGS = Path(__file__).parents[2] / "configs"
TOTAL = 14  # steps, see tiny_config.py
DEVICES = 8  # of this process, see conftest.py
# A smaller run: with kill after kill, most of the time goes into starts.
SHORT = (
  "model.variant=ViT-w16d2m32h2_8",
  "total_steps=6",
  "eval_every=4",
  "keep_checkpoints=2",
)

# What a run of one process says, line by line; anything else is noise.
EXPECTED_LINES = (
  r"ViT-N_8: \d+\.\d\d M parameters .*, devices: 4, 14 steps of 16 images",
  r"step \d+/14  loss \d\.\d{4}  lr \S+  \d+ images/s \(\d+/device\)  ETA .*",
  r"evaluation at step \d+  examples 40  loss \d\.\d{4}  accuracy \d\.\d{4}  "
  r"accuracy@5 \d\.\d{4}",
  r"the run is complete: 14 steps in .*",
)


def test_a_run_says_what_matters_and_nothing_else(reference):
  lines = reference.stderr.splitlines()
  noise = [
    line
    for line in lines
    if not any(re.fullmatch(pattern, line) for pattern in EXPECTED_LINES)
  ]
  assert not noise
  assert "the run is complete: 14 steps" in lines[-1]


def test_a_run_leaves_what_the_readme_says(reference):
  files = {f.name for f in reference.workdir.iterdir()}
  assert files == {
    "best.json",
    "checkpoints",
    "config.json",
    "lock",
    "metrics.jsonl",
    "parameters.txt",
    "tensorboard",
  }
  metrics = read_metrics(reference.workdir)
  assert [m["step"] for m in metrics if "train/loss" in m] == [
    *range(1, TOTAL + 1)
  ]
  assert [m["step"] for m in metrics if "eval/loss" in m] == [6, 12, 14]
  best = max(
    (m for m in metrics if "eval/loss" in m), key=lambda m: m["eval/accuracy"]
  )
  assert best_step(reference.workdir) == best["step"]
  newest = [8, 10, 12, 14]
  assert saved_steps(reference.workdir) == sorted({best["step"], *newest})


@pytest.mark.ci
def test_a_complete_run_stays_as_it_is(runs, reference, tmp_path, caplog):
  workdir = shutil.copytree(reference.workdir, tmp_path / "run")
  before = snapshot(workdir)
  assert main(runs.train_args(workdir)) == 0
  assert "the run is complete: 14 steps" in caplog.messages[-1]
  after = snapshot(workdir)
  assert after.pop("lock")[0] == before.pop("lock")[0] == 0  # bytes
  assert after == before


# --- kills ---


@pytest.fixture(scope="module")
def whole(runs, sharing, tmp_path_factory):
  """(folder, moments) of a short run that is not interrupted."""
  root = tmp_path_factory.mktemp("whole")
  with crashes.watch(root / "run", root / "copies") as moments:
    assert main(runs.train_args(root / "run", *SHORT)) == 0
  return root / "run", moments


def mark_ci(*cases):
  return [pytest.param(case, marks=pytest.mark.ci) for case in cases]


@pytest.mark.parametrize(
  "operation",
  [
    "os.rename config.json.tmp config.json",
    "write checkpoints/6.orbax-checkpoint-tmp/",
    *mark_ci(
      "write config.json.tmp",
      "write metrics.jsonl",
      "os.rename best.json.tmp best.json",
      "os.rename checkpoints/4.orbax-checkpoint-tmp checkpoints/4",
      "os.remove checkpoints/2/",
    ),
  ],
)
def test_a_run_killed_here_ends_as_if_it_had_not_been(
  operation, runs, whole, tmp_path
):
  workdir, moments = whole
  found = [m for m in moments if m.is_before(operation)]
  resume(runs, found[len(found) // 2], tmp_path / "run", workdir)


@pytest.mark.nightly
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
  runs, whole, tmp_path
):
  """One moment of every kind, at any step."""
  workdir, moments = whole
  kinds = collections.defaultdict(list)
  for moment in moments:
    for operation in moment.next:
      if operation.startswith(("write", "os.rename", "os.remove")):
        top = "/".join(operation.split("/")[:2])
        kinds[re.sub(r"\d+", "#", top)].append(moment)
  assert len(kinds) > 12
  random_ = random.Random(0)
  for i, group in enumerate(kinds.values()):
    resume(runs, random_.choice(group), tmp_path / str(i), workdir)


def resume(runs, moment, workdir, whole):
  """Runs the same command again in a copy of what a kill left."""
  shutil.copytree(moment.folder, workdir)
  print("killed before", *moment.next, sep="\n")
  assert main(runs.train_args(workdir, *SHORT)) == 0
  assert not (workdir / "damaged").exists()
  assert_same_run(workdir, whole)


@pytest.mark.nightly
def test_three_real_kills_leave_no_trace(runs, sharing, tmp_path):
  longer = (*SHORT, "total_steps=40", "eval_every=16", "checkpoint_every=4")
  hits = kill_and_resume(
    runs, tmp_path / "run", *longer, kills=3, devices=DEVICES
  )
  assert hits == {"before the first save": 1, "training": 1, "saving": 1}
  assert main(runs.train_args(tmp_path / "whole", *longer)) == 0
  assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.nightly
def test_twenty_kills_leave_no_trace(runs, tmp_path):
  longer = ("total_steps=90", "eval_every=10")
  runs.train_to_end(tmp_path / "whole", *longer)
  hits = kill_and_resume(runs, tmp_path / "run", *longer, kills=20)
  assert sum(hits.values()) == 20
  assert hits["before the first save"] == 1
  assert min(hits[m] for m in ("training", "saving", "starting")) >= 4
  assert_same_run(tmp_path / "run", tmp_path / "whole")


def kill_and_resume(runs, workdir, *overrides, kills, seed=0, **kwargs):
  """Kills a run again and again, then lets it end; returns {moment: kills}."""
  random_ = random.Random(seed)
  moments = {
    "before the first save": lambda process: process.wait_until(
      (workdir / "config.json").exists
    ),
    "training": lambda process: wait_for_steps(process, random_),
    "saving": lambda process: process.wait_until(
      make_is_saving(workdir, time.time_ns())
    ),
    "starting": lambda process: process.wait_until(
      make_is_over(random_.uniform(0.1, 3))
    ),
  }
  hits = collections.Counter()
  for i in range(kills):
    # The first is before anything was saved; then each in turn.
    name = list(moments)[i if i < 4 else 1 + i % 3]
    process = runs.train(workdir, *overrides, **kwargs)
    assert moments[name](process), f"ended before {name}:\n{process.stderr()}"
    if name == "before the first save":
      assert not saved_steps(workdir)
    time.sleep(random_.uniform(0, 0.05) if i else 0)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr()
    hits[name] += 1
  runs.train_to_end(workdir, *overrides, **kwargs)
  return hits


def wait_for_steps(process, random_):
  count = random_.randint(1, 4)
  return process.wait_until(lambda: len(process.steps()) >= count)


def make_is_over(seconds):
  end = time.monotonic() + seconds
  return lambda: time.monotonic() > end


def make_is_saving(workdir, since):
  """Returns a function that sees a checkpoint being written since a time."""

  def is_saving():
    for folder in Path(workdir).glob("*/*.orbax-checkpoint-tmp"):
      with contextlib.suppress(FileNotFoundError):
        if folder.stat().st_ctime_ns > since:
          return True
    return False

  return is_saving


# --- signals, and other numbers of devices ---


@pytest.mark.parametrize(
  "number",
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.ci)],
)
def test_sigterm_and_ctrl_c_save_and_end_well(
  number, runs, whole, tmp_path, caplog, monkeypatch
):
  workdir = tmp_path / "run"
  write = metrics.MetricLog.write

  def write_and_signal(self, step, values):
    write(self, step, values)
    if step == 3:
      signal.raise_signal(number)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricLog, "write", write_and_signal)
    assert main(runs.train_args(workdir, *SHORT)) == 0
  stopped = saved_steps(workdir)[-1]
  assert 3 <= stopped < 6
  assert f"saved step {stopped}" in caplog.messages[-1]
  assert main(runs.train_args(workdir, *SHORT)) == 0
  assert_same_run(workdir, whole[0])


@pytest.mark.ci
@pytest.mark.parametrize(
  ("at", "number", "saved"),
  [
    (4, signal.SIGHUP, 4),
    pytest.param(6, signal.SIGTERM, 6, marks=pytest.mark.ci),
    pytest.param(  # before the loop
      "read_batches", signal.SIGTERM, 0, marks=pytest.mark.ci
    ),
  ],
)
def test_a_stop_outside_the_steps_is_served_at_once(
  at, number, saved, runs, whole, tmp_path, caplog, monkeypatch
):
  """In an evaluation it drops that, which is made up for at the resume.

  A second signal and a Ctrl-C right behind the first change nothing.
  """
  workdir = tmp_path / "run"
  name = "run_evaluation" if isinstance(at, int) else at
  module = inputs if name == "read_batches" else train
  function = getattr(module, name)

  def signal_first(*args):
    if at in (name, args[-1]):
      for _ in range(2):
        signal.raise_signal(number)
      signal.raise_signal(signal.SIGINT)
    return function(*args)

  # Runs of equal configuration share their evaluators here, and with that the
  # signals that these look for; keep_checkpoints may change on resume.
  args = runs.train_args(workdir, *SHORT, f"keep_checkpoints={10 * saved + 5}")
  with monkeypatch.context() as patch:
    patch.setattr(module, name, signal_first)
    assert main([*args, "--stopped_exit_code=75"]) == 75
  assert saved_steps(workdir)[-1:] == [saved] * bool(saved)
  where = f"saved step {saved}" if saved else "before the first step"
  assert where in caplog.messages[-1]
  lines = read_metrics(workdir) if saved else []
  assert not [m for m in lines if m["step"] == saved and "eval/loss" in m]
  half_written = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
  half_written.mkdir(parents=True)  # by another that was killed
  args = runs.train_args(workdir, *SHORT, f"keep_checkpoints={10 * saved + 3}")
  assert main([*args, "--stopped_exit_code=75"]) == 0
  wait_until_gone(half_written)
  assert_same_run(workdir, whole[0])


@pytest.mark.ci
def test_a_signal_after_the_last_step_is_no_stop(
  runs, whole, tmp_path, monkeypatch
):
  """Launchers start a run again for ever that ends with the stopped code."""
  close = checkpoint.Checkpoints.close

  def signal_first(self):
    signal.raise_signal(signal.SIGTERM)
    close(self)

  monkeypatch.setattr(checkpoint.Checkpoints, "close", signal_first)
  args = runs.train_args(tmp_path / "run", *SHORT)
  assert main([*args, "--stopped_exit_code=75"]) == 0
  assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.ci
def test_an_evaluation_that_fails_costs_nothing(
  runs, whole, tmp_path, capsys, monkeypatch
):
  """The state is saved before it, and the same command evaluates it."""
  workdir = tmp_path / "run"
  evaluate = train.run_evaluation

  def fail(params):
    raise OSError("test/7.jpg is no image")

  def fail_at_the_end(evaluator, params, step):
    if step == 6:
      evaluator = evaluator._replace(run=fail)
    return evaluate(evaluator, params, step)

  with monkeypatch.context() as patch:
    patch.setattr(train, "run_evaluation", fail_at_the_end)
    assert main(runs.train_args(workdir, *SHORT)) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  folder = workdir / "checkpoints" / "6"
  for words in ("step 6", "test/7.jpg", f"the last checkpoint is {folder};"):
    assert words in line
  assert main(["evaluate", f"--checkpoint={folder}"]) == 0
  assert main(runs.train_args(workdir, *SHORT)) == 0
  assert_same_run(workdir, whole[0])


@pytest.mark.ci
def test_training_data_that_vanish_cost_nothing(
  runs, whole, tmp_path, capsys, monkeypatch
):
  """The state before them is saved, and the same command resumes."""
  workdir = tmp_path / "run"
  read_rows = inputs.read_rows

  def fail_after_five(*args):
    yield from itertools.islice(read_rows(*args), 5)
    raise UserError("train/7.jpg: cannot be read: No such file")

  with monkeypatch.context() as patch:
    patch.setattr(inputs, "read_rows", fail_after_five)
    assert main(runs.train_args(workdir, *SHORT)) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  words = "stopped: could not read the training data: train/7.jpg: cannot be"
  assert line.startswith(words)
  assert f"the last checkpoint is {workdir}/checkpoints/3;" in line
  assert main(runs.train_args(workdir, *SHORT)) == 0
  assert_same_run(workdir, whole[0])


@pytest.mark.ci
def test_an_exception_waits_for_the_save_in_flight(
  runs, whole, tmp_path, monkeypatch
):
  rename = os.rename

  def rename_late(*args, **kwargs):
    time.sleep(0.3)
    rename(*args, **kwargs)

  def fail_at_3(self, step, state):
    if step == 3:
      raise KeyError("a bug")

  with monkeypatch.context() as patch:
    patch.setattr(os, "rename", rename_late)
    patch.setattr(profiler.Profiler, "before", fail_at_3)
    with pytest.raises(KeyError, match="a bug"):
      main(runs.train_args(tmp_path / "run", *SHORT))
    assert saved_steps(tmp_path / "run") == [2]


@pytest.mark.nightly
def test_evaluations_of_three_kinds_at_their_own_intervals(
  runs, sharing, tmp_path, monkeypatch
):
  """A test set, few shots and another data set; stopped, and resumed."""
  photos = tmp_path / "photos"
  draw_folder(photos, ["1", "7"])  # two of the ten classes
  options = (
    *SHORT[:2],
    "eval_every=4",
    "evals.few.type=fewshot",
    "evals.few.train_split=train[:200]",
    "evals.few.shots=(1, 3)",
    "evals.few.every=3",
    f"evals.photos.dataset=folder:{photos}",
    "evals.photos.split=test",
    "evals.photos.every=2",
    "best_metric=few/3shot",
  )
  whole = tmp_path / "whole"
  assert main(runs.train_args(whole, *options)) == 0
  found = {}
  for line in read_metrics(whole):
    for key in line:
      found.setdefault(key, []).append(line["step"])
  assert found["eval/accuracy"] == [4, 6]
  assert found["few/1shot"] == found["few/3shot"] == [3, 6]
  assert found["photos/accuracy"] == [2, 4, 6]
  few = {x["step"]: x for x in read_metrics(whole) if "few/3shot" in x}
  best = max(few, key=lambda step: few[step]["few/3shot"])  # the first
  assert best_step(whole) == best
  line = few[6]
  args = [f"--checkpoint={whole}/checkpoints/6", "--dataset=digits", "--json"]
  shots = ["--shots=1,3", "--seeds=1", "--train_split=train[:200]"]
  shots += ["--test_split=test[:40]", f"--data_dir={runs.data_dir}"]
  with contextlib.redirect_stdout(io.StringIO()) as out:
    assert main(["linear", *args, *shots]) == 0
  expected = json.loads(out.getvalue())["results"]
  assert [line["few/1shot"], line["few/3shot"]] == [
    pytest.approx(x["accuracy"]) for x in expected
  ]

  evaluate = train.run_evaluation

  def stop_between(evaluator, params, step):
    results = evaluate(evaluator, params, step)
    if (evaluator.name, step) == ("eval", 4):  # the photos are still to come
      signal.raise_signal(signal.SIGTERM)
    return results

  with monkeypatch.context() as patch:
    patch.setattr(train, "run_evaluation", stop_between)
    assert main(runs.train_args(tmp_path / "run", *options)) == 0
  assert saved_steps(tmp_path / "run")[-1] == 4
  assert main(runs.train_args(tmp_path / "run", *options)) == 0
  assert_same_run(tmp_path / "run", whole)
  # Evaluations that pick nothing may change; they change no weights.
  for change, code in (
    ("evals.photos.every=3", 0),
    (f"evals.photos.dataset=folder:{photos}/", 0),
    ("evals.few.every=2", 0),
    ("evals.few.shots=(1, 2, 3)", 2),
  ):
    args = runs.train_args(tmp_path / "run", *options, change)
    assert main(args) == code, change


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["best_metric=eval/loss"], "'eval/loss'; choose from eval/accuracy"),
    (["best_metric=few/5shot"], "choose from eval/accuracy"),
    (["evals.few.type=shots"], "classification, fewshot"),
    (["evals.few.shot=3"], "did you mean"),
    (["evals.train.every=3"], "none of eval, train, speed"),
    (["evals.a.every=-2"], "every of 0 or more"),
    (["evals.a.type=fewshot", "evals.a.shots=()"], "shots of 1 or more"),
    (["evals.a.preprocess=flip_lr"], "random"),
    (["eval.split=", "evals.a.every=3"], "needs a split"),
  ],
)
def test_an_evaluation_that_cannot_be_is_named(
  options, words, runs, tmp_path, capsys
):
  assert main(runs.train_args(tmp_path / "run", *SHORT, *options)) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_one_line(
  number, tmp_path, monkeypatch
):
  def fail(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(run_folder.lock, "hold", fail)
  with (
    contextlib.ExitStack() as stack,
    pytest.raises(UserError, match=f"{tmp_path}.*{os.strerror(number)}"),
  ):
    run_folder.take(None, tmp_path, None, None, stack)


@pytest.mark.parametrize(
  ("start", "end", "traced"),
  [
    (1, 9, [("start", 3), ("stop", 6)]),
    (4, 9, [("start", 4), ("stop", 6)]),  # resumed inside the window
    (6, 9, []),  # and behind it
    (1, 4, [("start", 3), ("stop", 4)]),  # stopped inside it
  ],
)
def test_the_profiler_traces_what_is_left_of_its_window(
  start, end, traced, tmp_path, monkeypatch
):
  now, found = [0], []
  for name in ("start", "stop"):
    monkeypatch.setattr(
      jax.profiler,
      f"{name}_trace",
      lambda *_, name=name, **__: found.append((name, now[0])),
    )
  config = configuration.load(str(CONFIGS / "common.py"))
  with config.unlocked():
    config.profile_step, config.profile_steps = 3, 3
  window = profiler.Profiler(config, tmp_path)
  for now[0] in range(start, end):
    window.before(now[0], ())
  now[0] = end
  window.close((), end)
  assert found == traced


def test_the_profiler_leaves_new_threads_alone(tmp_path):
  config = configuration.load(str(CONFIGS / "common.py"), {"profile_step": "1"})
  window = profiler.Profiler(config, tmp_path)
  window.before(1, ())
  assert threading.getprofile() is None  # JAX's default hooks every thread
  window.close((), 2)
  assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_profiler_window_past_the_end_is_refused():
  config = configuration.load(
    str(CONFIGS / "common.py"), {"profile_step": "11"}
  )
  profiler.check_profile(config, 11)
  with pytest.raises(UserError, match=r"profile_step 11 .* last step, 10"):
    profiler.check_profile(config, 10)


def test_what_is_in_a_run_folder_is_named(tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path / "a run")
  workdir.mkdir()

  def load(steps):
    path = str(CONFIGS / "common.py")
    return configuration.load(path, {"total_steps": str(steps)})

  run = {"config": configuration.to_dict(load(10)), "total_steps": 7}
  (workdir / "config.json").write_text(json.dumps(run))
  assert run_folder.check(load(10), workdir) == run
  monkeypatch.setattr(run_folder, "check_data", lambda *_: None)
  opened = inputs.Inputs([], {})
  assert run_folder.count_steps(load(10), run, opened, workdir) == 7
  how = f"--config.init_from='{workdir}' starts it from these weights, without"
  with named("total_steps: 10 -> 20", "to train for longer", how):
    run_folder.check(load(20), workdir)
  (workdir / "config.json").write_text('{"model_type": "vit"}')
  with named("config.json is not of a run", "choose another --workdir"):
    run_folder.check(load(10), workdir)
  (workdir / "config.json").write_text('{"config": ')
  with named("config.json is corrupt", "choose another --workdir"):
    run_folder.check(load(10), workdir)
  (workdir / "config.json").unlink()
  (workdir / "checkpoints" / "5").mkdir(parents=True)
  with named("has checkpoints and no config.json", "choose another --workdir"):
    run_folder.check(load(10), workdir)


def draw_folder(root, classes, count=2):
  for split in ("train", "test"):
    for name in classes:
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(
          root / split / name / f"{i}.png"
        )


def check_folder(root, run):
  source = data.get_source(f"folder:{root}", "train", None)
  test = data.get_source(f"folder:{root}", "test", None)
  opened = inputs.Inputs([(source, 1)], {"eval": [test]})
  config = configuration.load(str(CONFIGS / "common.py"))
  run = run | {"config": configuration.to_dict(config)}
  run_folder.check_data(config, run, opened, "WORKDIR")


def test_other_data_are_named_at_a_resume(tmp_path):
  """A class renamed, one added, a picture exchanged, a test set that grew."""
  root = tmp_path / "photos"
  draw_folder(root, ["cat", "dog"])
  source = data.get_source(f"folder:{root}", "train", None)
  test = data.get_source(f"folder:{root}", "test", None)
  run = {
    "class_names": list(source.class_names),
    "data": inputs.Inputs([(source, 1)], {"eval": [test]}).describe(),
  }
  run = json.loads(json.dumps(run))
  check_folder(root, run)
  changes = {
    r"gone \['dog'\], new \['wolf'\]": lambda: [
      (root / split / "dog").rename(root / split / "wolf")
      for split in ("train", "test")
    ],
    r"gone \[\], new \['emu'\]": lambda: draw_folder(root, ["emu"]),
    r"\(train\) has changed .* had 4 examples": lambda: Image.new(
      "RGB", (9, 9)
    ).save(root / "train" / "cat" / "1.png"),
    r"\(eval\) has changed .* 4 examples .* has 5": lambda: Image.new(
      "RGB", (8, 8)
    ).save(root / "test" / "cat" / "9.png"),
  }
  for words, change in changes.items():
    shutil.rmtree(root)
    draw_folder(root, ["cat", "dog"])
    change()
    with pytest.raises(UserError, match=words):
      check_folder(root, run)


def test_a_test_set_may_lack_classes(tmp_path):
  draw_folder(tmp_path / "train", ["cat", "dog", "emu"])
  draw_folder(tmp_path / "some", ["dog", "emu"])
  draw_folder(tmp_path / "other", ["dog", "wolf"])

  def open_sources(name):
    overrides = {
      "train.dataset": f"folder:{tmp_path}/train",
      "eval.dataset": f"folder:{tmp_path}/{name}",
      "eval.split": "test",
      "loss.name": "softmax",
    }
    config = configuration.load(str(CONFIGS / "common.py"), overrides)
    return inputs.open_inputs(config).evals["eval"][0]

  found = open_sources("some")
  assert found.class_names == ["cat", "dog", "emu"]
  labels = [int(found.parse_labels(r)[0]) for r in found.read(range(4))]
  assert sorted(labels) == [1, 1, 2, 2]
  words = "2 classes, training 3; training has no 'wolf'; choose another"
  with pytest.raises(UserError, match=words):
    open_sources("other")


def read_stopped(process):
  line = process.stderr().splitlines()[-1]
  return int(re.fullmatch(r"stopping: saved step (\d+);.*", line)[1])


@pytest.mark.ci
def test_a_run_moves_to_another_number_of_devices(
  runs, reference, batches, tmp_path
):
  workdir, record = tmp_path / "run", tmp_path / "batches"
  process = runs.train(workdir, record=record, devices=8)
  assert process.wait_until(lambda: 3 in process.steps()), process.stderr()
  process.send(signal.SIGTERM)
  assert process.wait() == 0, process.stderr()
  stopped = read_stopped(process)
  assert saved_steps(workdir)[-1] == stopped
  process = runs.train_to_end(
    workdir, "optimizer.shard_state=2", record=record, devices=2
  )
  assert f"from step {stopped} of {TOTAL}" in process.stderr()
  assert read_batches(record) == batches
  assert_close_run(workdir, reference)


@pytest.mark.ci
def test_split_moments_resume_to_the_bit(runs, tmp_path):
  workdir = tmp_path / "run"
  options = (*SHORT, "optimizer.shard_state=2", "ema_decay=0.5")
  assert main(runs.train_args(workdir, *options)) == 0
  assert_last_steps_repeat(runs, workdir, tmp_path / "resumed", options)


def assert_last_steps_repeat(runs, workdir, resumed, options):
  """From step 4 to 6 again, in a copy, to the bit."""
  shutil.copytree(workdir, resumed)
  files = (resumed / "checkpoints" / "6").glob("state/d/*")
  os.truncate(max(files, key=lambda f: f.stat().st_size), 10)
  assert main(runs.train_args(resumed, *options)) == 0
  assert_same_run(resumed, workdir)


@pytest.fixture(scope="module")
def batches(runs):
  """{(step, row): digest} of the run on one host, from beginning to end."""
  config = configuration.load(str(runs.config))
  source = data.get_source(
    config.train.dataset, config.train.split, str(runs.data_dir)
  )
  stream = data.train_batches(
    [(source, 1.0)],
    seed=config.seed,
    batch_size=16,
    rows=np.arange(16),
    preprocess=config.train.preprocess,
    image_size=config.image_size,
    start_step=0,
    num_steps=TOTAL,
  )
  return {
    (step, row): digest
    for step, batch in enumerate(stream)
    for row, digest in enumerate(digests(batch))
  }


def assert_close_run(workdir, reference):
  """Losses equal but for rounding."""
  losses, expected = read_losses(workdir), read_losses(reference.workdir)
  assert list(losses) == list(expected) == [*range(1, TOTAL + 1)]
  np.testing.assert_allclose(
    list(losses.values()), list(expected.values()), rtol=1e-3
  )


# --- two processes ---


@pytest.mark.nightly
def test_two_processes_train_as_one(runs, reference, batches, tmp_path):
  """The state is split across both, which one process then takes over."""
  chain = [(["fsdp=2"], 1)]
  train_as_two(runs, reference, batches, tmp_path, devices=1, chain=chain)


@pytest.mark.nightly
def test_two_processes_go_on_where_two_stopped(
  runs, reference, batches, tmp_path
):
  chain = [([], 1), (["fsdp=8"], 0)]
  train_as_two(runs, reference, batches, tmp_path, devices=4, chain=chain)


def train_as_two(runs, reference, batches, tmp_path, *, devices, chain):
  """Runs pairs, each stopped after a while, then one process to the end.

  Args:
    runs, reference, batches, tmp_path: the fixtures.
    devices: of each process of a pair.
    chain: for each pair, its overrides and which of the two gets SIGTERM.
  """
  workdir, last = tmp_path / "run", 0
  records = [tmp_path / "batches0", tmp_path / "batches1"]
  for overrides, told in chain:
    args = runs.train_args(workdir, *overrides)
    pair = runs.pair(args, devices=devices, record=records)
    before, last = last, stop_pair(pair, last + 3, told)
    assert before < last < TOTAL
    assert saved_steps(workdir)[-1] == last
    # Only one of them writes; an evaluation at the last step was dropped.
    evaluations = len(read_metrics(workdir)) - last
    assert (last - 1) // 6 <= evaluations <= last // 6
  runs.train_to_end(workdir, record=records[0])
  both = tmp_path / "both"
  both.write_text("".join(r.read_text() for r in records))
  assert read_batches(both) == batches
  assert_close_run(workdir, reference)


def stop_pair(pair, step, told):
  """Sends SIGTERM to one of two after a step; returns the step of both."""
  leader, other = pair
  assert leader.wait_until(lambda: step in leader.steps()), leader.stderr()
  pair[told].send(signal.SIGTERM)
  for process in pair:
    assert process.wait() == 0, process.stderr()
  assert not other.steps()  # one of them speaks
  return read_stopped(leader)


@pytest.mark.nightly  # of a run's own evaluations: distributed_test.py
def test_two_processes_evaluate_each_example_once(runs, reference):
  args = ["evaluate", f"--workdir={reference.workdir}", "--json"]
  leader, other = runs.pair(args, devices=3)
  assert leader.wait() == other.wait() == 0, leader.stderr() + other.stderr()
  # What comes before is Gloo's, which connects the processes of a CPU run.
  results = json.loads(leader.stdout().splitlines()[-1])
  assert results["examples"] == 40
  assert_same_evaluation(results, reference.workdir)
  assert "{" not in other.stdout()


def assert_same_evaluation(results, workdir):
  """Compares with the line of metrics.jsonl from that checkpoint's step."""
  step = int(Path(results["checkpoint"]).name)
  expected = next(
    m for m in read_metrics(workdir) if m["step"] == step and "eval/loss" in m
  )
  assert results["accuracy"] == expected["eval/accuracy"]
  assert results["examples"] == expected["eval/examples"]
  assert results["loss"] == pytest.approx(expected["eval/loss"], rel=1e-5)


# --- damage ---


@pytest.mark.ci  # every file and kind of damage: checkpoint_test.py
def test_a_corrupt_checkpoint_is_skipped(runs, whole, tmp_path, caplog):
  workdir = shutil.copytree(whole[0], tmp_path / "run")
  folder = workdir / "checkpoints" / "6"
  file = max(folder.glob("state/d/*"), key=lambda f: f.stat().st_size)
  os.truncate(file, file.stat().st_size // 2)
  damaged = snapshot(folder)
  assert main(runs.train_args(workdir, *SHORT)) == 0
  said = "\n".join(caplog.messages)
  assert "checkpoint 6 is corrupt" in said
  assert "from step 4 of 6" in said
  # Nothing is deleted.
  assert snapshot(workdir / "damaged" / "checkpoints-6") == damaged
  assert_same_run(workdir, whole[0])


@pytest.mark.ci
def test_a_full_disk_stops_the_run(runs, whole, tmp_path):
  workdir, moments = whole
  saved = next(m for m in moments if saved_steps(m.folder) == [2])
  with disk_of_its_own(tmp_path / "disk") as (disk, resize):
    shutil.copytree(saved.folder, disk / "run")
    # Room for a resume's small files, and not for another checkpoint.
    resize(shutil.disk_usage(disk).used + 2**17)
    # In a process of its own: what Orbax leaves of a failed save stays in it.
    process = runs.train(disk / "run", *SHORT, devices=DEVICES)
    assert process.wait() == 1, process.stderr()
    line = process.stderr().splitlines()[-1]
    assert line.startswith("stopped: could not write a checkpoint")
    assert "No space left on device" in line
    assert "intact checkpoints: 2;" in line
    assert saved_steps(disk / "run") == [2]
    resize(2**28)
    assert main(runs.train_args(disk / "run", *SHORT)) == 0
    assert_same_run(disk / "run", workdir)


@contextlib.contextmanager
def disk_of_its_own(folder):
  """Yields a file system in memory, and what sets its size in bytes."""

  def mount(options, *args):
    command = ["mount", "-t", "tmpfs", "-o", options, *args, folder]
    return subprocess.run(command, capture_output=True, check=False).returncode

  def resize(size):
    assert mount(f"remount,size={size}") == 0

  folder.mkdir()
  if mount(f"size={2**28}", "tmpfs"):
    pytest.skip("needs the right to mount a tmpfs")
  try:
    yield folder, resize
  finally:
    subprocess.run(["umount", folder], check=True)


@pytest.mark.ci
def test_a_loss_that_is_not_finite_stops_the_run(runs, tmp_path, capsys):
  args = runs.train_args(tmp_path / "run", *SHORT, "schedule.base_lr=1e30")
  assert main(args) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  step = int(line.partition(" at step ")[2].partition(";")[0])
  assert line.startswith(("stopped: loss is ", "stopped: gradient_norm is "))
  saved = saved_steps(tmp_path / "run")[-1]
  assert saved < step
  assert f"{tmp_path}/run/checkpoints/{saved};" in line
  assert "schedule.base_lr" in line


# --- from one run to the next ---


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Noise in three classes, of several sizes and formats."""
  root = tmp_path_factory.mktemp("photos")
  generator = np.random.default_rng(0)
  for i in range(60):
    split, label = ("test", "train")[i >= 20], ("blue", "green", "red")[i % 3]
    folder = root / split / label
    folder.mkdir(parents=True, exist_ok=True)
    size = (*generator.integers(20, 50, 2), 3)
    image = Image.fromarray(generator.integers(0, 256, size, np.uint8))
    image.save(folder / f"{i}.{('jpg', 'png', 'webp')[i % 4 % 3]}")
  return root


@pytest.fixture(scope="module")
def tuned(runs, whole, photos, tmp_path_factory):
  """(workdir, log): the short run's weights at another size, other classes.

  With everything that changes how it is computed switched on.
  """
  workdir = tmp_path_factory.mktemp("tuned") / "run"
  lines = []
  handler = logging.Handler()
  handler.emit = lambda record: lines.extend(record.getMessage().splitlines())
  logging.getLogger("vit_jax").addHandler(handler)
  args = runs.train_args(
    workdir,
    *SHORT,
    f"init_from={whole[0]}",
    f"train.dataset=folder:{photos}",
    "train.split=train",
    "eval.split=test",
    "image_size=24",
    "eval_every=3",
    "fsdp=2",
    "micro_batches=2",
    "ema_decay=0.5",
    "train.mixup_alpha=0.2",
    "model.scan=False",
    "profile_step=3",
    "profile_steps=2",
  )
  assert main(args) == 0
  logging.getLogger("vit_jax").removeHandler(handler)
  return workdir, lines


@pytest.mark.ci
def test_fine_tuning_reports_what_it_took(whole, tuned):
  workdir, lines = tuned
  best = whole[0] / "checkpoints" / str(best_step(whole[0]))
  assert f"weights from {best}" in lines
  for line in (
    "resized: Transformer/posembed_input/pos_embedding 2x2 -> 3x3",
    "new: head/bias 3",
    "new: head/kernel 16x3",
    "dropped: head/bias 10",
    "dropped: head/kernel 16x10",
  ):
    assert line in lines
  # A new head is zero: the first loss is that of a guess.
  assert read_losses(workdir)[1] == pytest.approx(np.log(3), rel=1e-5)


@pytest.mark.nightly
def test_low_rank_updates_resume_and_are_merged(runs, whole, tmp_path, capsys):
  options = (
    *SHORT,
    f"init_from={whole[0]}",
    "fsdp=2",
    "micro_batches=2",
    "ema_decay=0.5",
    "lora.rank=2",
    "optimizer.layer_decay=0.8",
    "train.mixup_alpha=0.2",
    "train.cutmix_alpha=1.0",
  )
  workdir = tmp_path / "run"
  assert main(runs.train_args(workdir, *options)) == 0
  assert_last_steps_repeat(runs, workdir, tmp_path / "resumed", options)
  # Of the base nothing has moved.
  _, base = read_state(whole[0], best_step(whole[0]))
  _, found = read_state(workdir)
  block = "params/Transformer/encoderblock"
  assert (found[f"{block}/MultiHeadDotProductAttention_0/out/lora_b"]).any()
  for path, x in base.items():
    if path.startswith("params/") and "/head/" not in f"/{path}":
      assert found[path].tobytes() == x.tobytes(), path
  capsys.readouterr()
  # What reads it sees the plain model.
  assert main(["evaluate", f"--workdir={workdir}", "--json"]) == 0
  assert_same_evaluation(json.loads(capsys.readouterr().out), workdir)
  copy = tmp_path / "copy"
  assert main(["convert", str(workdir), str(copy), "--to=timm"]) == 0
  images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3))
  logits = [
    vit_jax.load(str(path))(images.astype("f4")) for path in (workdir, copy)
  ]
  np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-6)
  args = runs.train_args(tmp_path / "next", *SHORT, f"init_from={workdir}")
  assert main([*args, "--config.total_steps=2"]) == 0


@pytest.mark.ci
def test_the_profiler_window_is_written(tuned):
  workdir, lines = tuned
  assert any(x.startswith("profile of 2 steps") for x in lines)
  assert list((workdir / "profile").rglob("*.xplane.pb"))


@pytest.mark.ci
def test_evaluate_repeats_the_runs_own_numbers(tuned, capsys):
  workdir, _ = tuned
  assert main(["evaluate", f"--workdir={workdir}", "--json"]) == 0
  results = json.loads(capsys.readouterr().out)
  best = workdir / "checkpoints" / str(best_step(workdir))
  assert results["checkpoint"] == str(best)
  assert results["examples"] == 20
  assert_same_evaluation(results, workdir)
  last = f"{workdir}/checkpoints/6"
  assert main(["evaluate", f"--checkpoint={last}", "--json"]) == 0
  results = json.loads(capsys.readouterr().out)
  assert results["checkpoint"] == last
  assert_same_evaluation(results, workdir)


@pytest.mark.ci
def test_predict_agrees_with_evaluate(tuned, photos, capsys):
  workdir, _ = tuned
  files = sorted(map(str, (photos / "test").rglob("*.*")))
  command = ["predict", f"--checkpoint={workdir}/checkpoints/6", "--json"]
  assert main([*command, *files]) == 0
  results = json.loads(capsys.readouterr().out)
  assert [r["image"] for r in results] == files
  correct = 0
  for result in results:
    probabilities = [c["probability"] for c in result["classes"]]
    assert sorted(probabilities, reverse=True) == probabilities
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    names = [c["name"] for c in result["classes"]]
    assert sorted(names) == ["blue", "green", "red"]
    correct += names[0] == Path(result["image"]).parent.name
  assert correct / 20 == read_metrics(workdir)[-1]["eval/accuracy"]
