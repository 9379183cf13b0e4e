"""Sweeps: which runs, killed and resumed, one at a time in a folder."""

import io
import json
import os
import re
import signal

import fake_runs
import forks
import pytest
import stand_in
from tiny_runs import Process, snapshot

from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.tools import jobs, sweep

LEARNING_RATES = "--grid=schedule.base_lr=0.001,0.003"


@pytest.fixture
def args(runs, tmp_path):
  """The command line of a sweep of four tiny runs."""
  first, *rest = runs.train_args(tmp_path / "sweep")
  assert first == "train"
  # No more steps than it takes to be killed among them.
  short = ["total_steps=6", "eval_every=0", "checkpoint_every=1"]
  overrides = [f"--config.{text}" for text in short]
  return ["sweep", *rest, *overrides, LEARNING_RATES, "--seeds=2"]


def test_grids():
  assert sweep.parse_grids(
    [
      "schedule.base_lr=1e-3, 0.003",
      "train.preprocess=resize(8)|random_crop(size),inception_crop(size, 80)",
      "optimizer.lr_multipliers=('a=1','b,c=0'),()",
    ]
  ) == {
    "schedule.base_lr": ["1e-3", "0.003"],
    "train.preprocess": [
      "resize(8)|random_crop(size)",
      "inception_crop(size, 80)",
    ],
    "optimizer.lr_multipliers": ["('a=1','b,c=0')", "()"],
  }


@pytest.mark.parametrize(
  ("grids", "words"),
  [
    (["schedule.base_lr"], "needs a key and values"),
    (["schedule.base_lr=1,,2"], "needs a key and values"),
    (["seed=1,2"], "--seeds=N"),
    (["schedule.base_lr=0.001,1e-3"], "given twice"),
    (["batch_size=8", "batch_size=16"], "given twice"),
  ],
)
def test_grids_that_are_none(grids, words):
  with pytest.raises(UserError, match=words):
    sweep.parse_grids(grids)


def test_names():
  assert sweep.make_name({}, 0) == "seed=0"
  setting = {"schedule.base_lr": "0.01", "train.mixup_alpha": "0.2"}
  assert sweep.make_name(setting, 3) == "base_lr=0.01,mixup_alpha=0.2,seed=3"
  alike = {"a.lr": "1", "b.lr": "2"}
  assert sweep.make_name(alike, 0) == "a.lr=1,b.lr=2,seed=0"
  odd = [sweep.make_name({"a": text}, 0) for text in ("x/y", "x|y", "x" * 200)]
  assert len(set(odd)) == 3
  assert all("/" not in name and len(name) < 100 for name in odd)


@pytest.mark.parametrize(
  ("platform", "count", "parts", "known", "expected"),
  [
    ("cpu", 1, 3, "", [{}, {}, {}]),
    (
      "gpu",
      4,
      2,
      "",
      [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}],
    ),
    (
      "gpu",
      3,
      2,
      "7,5,6",
      [{"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "5"}],
    ),
  ],
)
def test_devices_are_divided(platform, count, parts, known, expected):
  environment = {"CUDA_VISIBLE_DEVICES": known}
  found = jobs.make_environments(platform, count, parts, environment)
  assert found == expected


def test_chips_are_divided():
  found = jobs.make_environments("tpu", 4, 2, {})
  assert [e["TPU_VISIBLE_CHIPS"] for e in found] == ["0,1", "2,3"]
  assert {e["TPU_CHIPS_PER_PROCESS_BOUNDS"] for e in found} == {"1,2,1"}
  with pytest.raises(UserError, match="there are 1 devices"):
    jobs.make_environments("gpu", 1, 2, {})


def test_the_best_setting():
  """By the mean of all seeds, of settings that have them all."""

  def choose(select, values):
    rows = [
      {"setting": {"a": str(i)}, "status": status, "metric": x, "select": "m"}
      for i, group in enumerate(values)
      for status, x in group
    ]
    return sweep.compare(rows, select)

  done = "finished"
  values = [
    [(done, 0.9), (done, 0.5)],
    [(done, 0.8), (done, 0.7)],
    [(done, 1.0), ("failed", None)],
  ]
  settings, best = choose("accuracy", values)
  assert best
  assert best["setting"] == {"a": "1"}
  assert best["mean"] == pytest.approx(0.75)
  assert best["spread"] == pytest.approx(0.1 / 2**0.5)
  assert [entry["runs"] for entry in settings] == [2, 2, 1]
  _, least = choose("loss", values)
  assert least
  assert least["setting"] == {"a": "0"}
  assert choose("accuracy", values[2:])[1] is None


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--grid=schedule.base_rl=1,2", "did you mean 'schedule.base_lr'?"),
    ("--grid=batch_size=8,many", "config.batch_size is int"),
    ("--grid=log_every=0", "log_every"),
    ("--config.schedule.base_lr=0.1", "is in --grid and in --config."),
    ("--config.eval.split=", "--config.eval.split"),
    ("--seeds=0", "--seeds is 0"),
    ("--jobs=0", "--jobs is 0"),
    ("--workdir=gs://bucket/sweep", "a local folder"),
    ("--config.train.dataset=jft_like", "data prepare jft_like"),
    ("--grid=eval.split=test[:40],tset", "split 'tset'"),
    ("--config.init_from=/no/such/run", "no checkpoint at /no/such/run"),
    ("--config.optimizer.momentum=0.5", "optimizer.name to be 'sgd'"),
  ],
)
def test_mistakes_leave_nothing_behind(argument, words, args, tmp_path, capsys):
  assert main([*args, argument]) == 2
  out, err = capsys.readouterr()
  assert not out
  (line,) = err.splitlines()
  assert words in line
  assert not list(tmp_path.iterdir())


def test_two_sweeps_on_one_folder(args, tmp_path, capsys):
  with jobs.lock(tmp_path / "sweep"):
    before = snapshot(tmp_path)
    assert main(args) == 2
    assert "another sweep (process " in capsys.readouterr().err
    assert snapshot(tmp_path) == before


_NAMES = [f"base_lr={x},seed={i}" for x in ("0.001", "0.003") for i in (0, 1)]


@pytest.fixture
def no_training(monkeypatch):
  stand_in.use(monkeypatch, jobs, sweep)


def _read(folder):
  return json.loads((folder / "sweep.json").read_text())


def test_failures_are_reported_and_tried_again(
  args, tmp_path, no_training, capsys, caplog, monkeypatch
):
  environments = [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(2)]
  monkeypatch.setattr(sweep, "divide_devices", lambda _: environments)
  folder = tmp_path / "sweep"
  (folder / _NAMES[2]).mkdir(parents=True)
  (folder / _NAMES[2] / "fail").touch()
  assert main([*args, "--jobs=2"]) == 1
  out, err = capsys.readouterr()
  assert f"FAILED {folder / _NAMES[2]}: error: it is told to" in out
  assert "1 of 4 runs failed" in err
  assert "3 of 4 runs finished" in caplog.text
  result = _read(folder)
  statuses = [row["status"] for row in result["runs"]]
  assert statuses == ["finished", "finished", "failed", "finished"]
  assert result["best"]["setting"] == {"schedule.base_lr": "0.001"}
  assert result["best"]["mean"] == pytest.approx(0.051)
  assert result["best"]["spread"] == pytest.approx(0.1 / 2**0.5)
  logs = [(folder / name / "log.txt").read_text() for name in _NAMES]
  assert {"begins 0", "begins 1"} == {log.splitlines()[0] for log in logs}

  (folder / _NAMES[2] / "fail").unlink()
  before = [snapshot(folder / name) for name in _NAMES]
  assert main(args) == 0
  after = [snapshot(folder / name) for name in _NAMES]
  assert [a == b for a, b in zip(before, after, strict=True)] == [
    True,
    True,
    False,
    True,
  ]
  result = _read(folder)
  assert result["best"]["setting"] == {"schedule.base_lr": "0.003"}
  recipe = result["runs"][0]["recipe"]
  assert recipe["eval_preprocess"] == recipe["train_preprocess"] == "p"


def test_the_best_setting_is_trained_on_everything(
  args, no_training, tmp_path, capsys
):
  """The paper's protocol: selection on one part, then the final runs."""
  config = next(a for a in args if a.startswith("--config="))
  final = f"--final={config.removeprefix('--config=')}"
  folder = tmp_path / "sweep"
  assert main([*args, final, "--seeds=3", "--json"]) == 0
  result = json.loads(capsys.readouterr().out)
  assert result["select"] == _read(folder / "select")
  assert result["final"] == _read(folder / "final")
  assert [run["seed"] for run in result["select"]["runs"]] == [0, 0]
  best = {"schedule.base_lr": "0.003"}
  assert result["select"]["best"]["setting"] == best
  assert sorted(p.name for p in (folder / "final").iterdir()) == [
    *(f"seed={i}" for i in range(3)),
    "sweep.json",
  ]
  (entry,) = result["final"]["settings"]
  assert entry["setting"] == best
  assert entry["mean"] == pytest.approx(0.003 + 0.1)
  assert entry["spread"] == pytest.approx(0.1)

  before = snapshot(folder / "final" / "seed=1")
  (folder / "select" / "base_lr=0.001,seed=0" / "fail").touch()
  assert main([*args, final, "--seeds=3"]) == 0
  assert snapshot(folder / "final" / "seed=1") == before
  assert capsys.readouterr().out.count("accuracy") == 2


@pytest.mark.parametrize(
  ("file", "words"),
  [
    ("fail", "it is told to"),
    ("stop", "unfinished: it stopped at step 0 of 6"),
  ],
)
def test_nothing_is_selected_among_failures(
  file, words, args, no_training, tmp_path, capsys
):
  config = next(a for a in args if a.startswith("--config="))
  final = f"--final={config.removeprefix('--config=')}"
  failing = tmp_path / "sweep" / "select" / "base_lr=0.001,seed=0"
  failing.mkdir(parents=True)
  (failing / file).touch()
  assert main([*args, final]) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert "1 of 2 runs failed" in line
  assert f"{failing} ({words}" in line.replace("error: ", "")
  assert not (tmp_path / "sweep" / "final").exists()


def test_a_run_is_finished_once_it_is_evaluated(tmp_path):
  """One may be told to stop between its last checkpoint and its evaluation."""
  keys = ["--config=a.py", f"--workdir={tmp_path}"]
  keys += ["--config.schedule.base_lr=0.1", "--config.seed=0"]
  stand_in.train(["train", *keys], {}, io.StringIO())
  run = jobs.Trial("r", tmp_path, "a.py", {}, {}, 0)
  assert jobs.inspect_trial(run)["status"] == "finished"
  file = tmp_path / "metrics.jsonl"
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  lines[2] |= {"eval/accuracy": 0.5}
  lines[-1] = {"step": 6, "train/loss": 1.0}
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  found = jobs.inspect_trial(run)
  assert (found["step"], found["status"]) == (6, "interrupted")


def test_a_mixture_is_evaluated_on_its_first_data_set(tmp_path):
  config = fake_runs.load(
    "quickstart_finetune.py", train__dataset="digits=0.7,jft_like=0.3"
  )
  fake_runs.write(tmp_path / "r", config, [], total_steps=6)
  trial = jobs.Trial("r", tmp_path / "r", "a.py", {}, {}, 0)
  recipe = jobs.inspect_trial(trial)["recipe"]
  assert recipe["eval"] == "digits test"
  assert recipe["train"] == "digits=0.7,jft_like=0.3 train[:300]"


def test_a_mistake_in_the_final_configuration_shows_first(
  args, tmp_path, capsys
):
  assert main([*args, "--final=configs/no_such.py"]) == 2
  assert "no_such.py" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_an_unknown_metric(args, no_training, capsys):
  assert main([*args, "--select=f1", "--seeds=1"]) == 2
  assert "--select is 'f1'; choose from accuracy" in capsys.readouterr().err


_SWEEP = f"""
import sys
from vit_jax.tools import jobs, sweep
from vit_jax.__main__ import main
jobs._CHILD = {stand_in.CHILD!r}
sweep.run_folder.check = lambda *_: False
sys.exit(main(sys.argv[1:]))
"""


def _start(args):
  return Process(["-c", _SWEEP, *args], dict(os.environ), forks.Fork)


@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_it_goes_on_without_repeating_a_run(number, args, tmp_path):
  folder = tmp_path / "sweep"
  args = [*args, "--config.total_steps=100"]
  process = _start(args)
  second = folder / _NAMES[1] / "metrics.jsonl"
  assert process.wait_until(lambda: second.exists() and second.read_text())
  process.send(number)
  code = process.wait()
  if number == signal.SIGINT:
    assert code == 0, process.stderr()
    assert "stopped; run it again to go on" in process.stderr()
    statuses = [row["status"] for row in _read(folder)["runs"]]
    assert statuses == ["finished", "interrupted", "waiting", "waiting"]
  finished = snapshot(folder / _NAMES[0])

  # The second run saves before the lock is free.
  process = _start(args)
  assert process.wait() == 0, process.stderr()
  assert snapshot(folder / _NAMES[0]) == finished
  assert {row["status"] for row in _read(folder)["runs"]} == {"finished"}
  froms = [
    [int(x) for x in re.findall(r"from (\d+)", log.read_text())]
    for log in (folder / name / "log.txt" for name in _NAMES)
  ]
  assert froms == [[0], [0, froms[1][1]], [0], [0]]
  assert 0 < froms[1][1] < 100


@pytest.mark.ci
def test_the_real_train_goes_on_too(args, runs, tmp_path):
  """As above with the real entry point: SIGKILL in the second run."""
  folder = tmp_path / "sweep"
  args = [*args, "--seeds=1"]
  names = _NAMES[::2]
  first = runs.start(args, devices=1)
  begun = folder / names[1] / "metrics.jsonl"
  assert first.wait_until(lambda: begun.exists() and begun.read_text())
  first.send(signal.SIGKILL)
  first.wait()
  finished = snapshot(folder / names[0])
  assert "checkpoints/6/files.json" in finished

  second = runs.start([*args, "--jobs=2", "--json"], devices=1)
  assert second.wait() == 0, second.stderr()
  assert snapshot(folder / names[0]) == finished
  logs = [(folder / name / "log.txt").read_text() for name in names]
  assert "".join(logs).count("the run is complete") == 2
  result = json.loads(second.stdout())
  assert {row["status"] for row in result["runs"]} == {"finished"}
  assert [entry["runs"] for entry in result["settings"]] == [1, 1]
  recipe = result["runs"][0]["recipe"]
  assert recipe["eval"] == "digits test[:40]"
  assert recipe["eval_preprocess"] == "resize(size)"


@pytest.mark.nightly
def test_ctrl_c_saves_the_runs(args, runs, tmp_path):
  folder = tmp_path / "sweep"
  process = runs.start([*args, "--config.total_steps=5000"], devices=1)
  begun = folder / "base_lr=0.001,seed=0" / "metrics.jsonl"
  assert process.wait_until(lambda: begun.exists() and begun.read_text())
  process.send(signal.SIGINT)
  assert process.wait() == 0, process.stderr()
  result = json.loads((folder / "sweep.json").read_text())
  first, *others = [row["status"] for row in result["runs"]]
  assert first == "interrupted"
  assert set(others) == {"waiting"}
  assert "run again to resume" in (begun.parent / "log.txt").read_text()
  assert "run it again to go on" in process.stderr()
