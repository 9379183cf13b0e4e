"""Sweeps: which runs, killed and resumed, one at a time in a folder."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import forks
import pytest
import stand_in
from tiny_runs import Process, snapshot

from vit_jax import checkpoint
from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.tools import jobs, sweep
from vit_jax.training import lock

_NAMES = [f"base_lr={x},seed={i}" for x in ("0.001", "0.003") for i in (0, 1)]


@pytest.fixture
def args(runs, tmp_path):
  """The command line of a sweep of four tiny runs."""
  first, *rest = runs.train_args(tmp_path / "sweep")
  assert first == "train"
  # No more steps than it takes to be killed among them.
  short = ["total_steps=6", "eval_every=0", "checkpoint_every=1"]
  overrides = [f"--config.{text}" for text in short]
  grid = "--grid=schedule.base_lr=0.001,0.003"
  return ["sweep", *rest, *overrides, grid, "--seeds=2"]


@pytest.fixture
def commands(monkeypatch):
  return stand_in.use(monkeypatch, jobs, sweep)


def _read(folder):
  return json.loads((folder / "sweep.json").read_text())


def _final_of(args):
  config = next(a for a in args if a.startswith("--config="))
  return f"--final={config.removeprefix('--config=')}"


def test_grids():
  crops = ["resize(8)|random_crop(size)", "inception_crop(size, 80)"]
  assert sweep.parse_grids(
    [
      "schedule.base_lr=1e-3, 0.003",
      f"train.preprocess={','.join(crops)}",
      "optimizer.lr_multipliers=('a=1','b,c=0'),()",
    ]
  ) == {
    "schedule.base_lr": ["1e-3", "0.003"],
    "train.preprocess": crops,
    "optimizer.lr_multipliers": ["('a=1','b,c=0')", "()"],
  }


@pytest.mark.parametrize(
  "grids", ["a", "a=1,,2", "seed=1,2", "a=1,1", "batch_size=8 batch_size=16"]
)
def test_grids_that_are_none(grids):
  with pytest.raises(UserError, match="--grid="):
    sweep.parse_grids(grids.split())


def test_names():
  setting = {"schedule.base_lr": "0.01", "train.mixup_alpha": "0.2"}
  assert sweep.make_name(setting) == "base_lr=0.01,mixup_alpha=0.2"
  assert sweep.make_name({"a.lr": "1", "b.lr": "2"}) == "a.lr=1,b.lr=2"
  odd = [sweep.make_name({"a": text}) for text in ("x/y", "x|y", "x" * 200)]
  assert len(set(odd)) == 3
  assert all("/" not in name and len(name) < 100 for name in odd)


def test_devices_are_divided():
  def divide(platform, count, parts, known=None):
    made = jobs.make_environments(platform, count, parts, known)
    return [x for environment in made for x in environment.values()]

  assert divide("cpu", 1, 3) == [None] * 3
  assert divide("gpu", 4, 2) == ["0,1", "2,3"]
  assert divide("gpu", 3, 2, "7,5,6") == ["7", "5"]
  assert divide("tpu", 4, 2) == [
    *("0,1", "1,2,1", "1,1,1"),
    *("2,3", "1,2,1", "1,1,1"),
  ]
  with pytest.raises(UserError, match="there are 1 devices"):
    divide("gpu", 1, 2)


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--grid=schedule.base_rl=1,2", "did you mean 'schedule.base_lr'?"),
    ("--grid=batch_size=8,many", "config.batch_size is int"),
    ("--config.schedule.base_lr=0.1", "is in --grid and in --config."),
    ("--config.eval.split=", "--config.eval.split"),
    ("--select=small/accuracy", "'small' is missing"),
    ("--seeds=0", "--seeds is 0"),
    ("--jobs=0", "--jobs is 0"),
    ("--config.train.dataset=jft_like", "data prepare jft_like"),
    ("--config.init_from=/no/such/run", "no checkpoint at /no/such/run"),
    ("--config.optimizer.momentum=0.5", "optimizer.name to be 'sgd'"),
    ("--final=configs/no_such.py", "no_such.py"),
    ("--executor=slrm", "did you mean 'slurm'?"),
    ("--executor=slurm", "--slurm=time=MINUTES"),
    ("--slurm=partition=gpu", "--executor=slurm"),
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
  with lock.hold(checkpoint.absolute(tmp_path / "sweep")):
    before = snapshot(tmp_path)
    assert main(args) == 2
    assert "in " + str(tmp_path / "sweep") in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_failures_are_reported_and_tried_again(
  args, commands, tmp_path, capsys, monkeypatch
):
  slots = [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(2)]
  monkeypatch.setattr(jobs, "divide_devices", lambda _: slots)
  folder = tmp_path / "sweep"
  failing = folder / _NAMES[2]
  failing.mkdir(parents=True)
  (failing / "fail").touch()
  assert main([*args, "--jobs=2"]) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert f"1 of 4 runs failed, the first is {failing} (unfinished" in line
  assert "error: it is told to" in line
  result = _read(folder)
  assert [row["metric"] for row in result["runs"]] == pytest.approx(
    [0.001, 0.101, None, 0.103]
  )
  assert result["best"] is None
  logs = [(folder / name / "log.txt").read_text() for name in _NAMES]
  assert {"begins 0", "begins 1"} == {log.splitlines()[0] for log in logs}

  (failing / "fail").unlink()
  del commands[:]
  assert main(args) == 0
  assert len(commands) == 1
  assert f"--workdir={failing}" in commands[0]
  best = _read(folder)["best"]
  assert best["setting"] == {"schedule.base_lr": "0.003"}
  assert best["mean"] == pytest.approx(0.053)
  assert best["spread"] == pytest.approx(0.1 / 2**0.5)
  out = capsys.readouterr().out
  assert out.splitlines()[2].split() == [
    "base_lr=0.003",
    "0.0530",
    "0.0707",
    "best",
  ]


def test_the_best_setting_is_trained_on_everything(
  args, commands, tmp_path, capsys
):
  """The paper's protocol: selection on one part, then the final runs."""
  args = [*args, _final_of(args), "--seeds=3"]
  folder = tmp_path / "sweep"
  assert main([*args, "--json"]) == 0
  result = json.loads(capsys.readouterr().out)
  assert result["select"] == _read(folder / "select")
  assert result["final"] == _read(folder / "final")
  assert [run["seed"] for run in result["select"]["runs"]] == [0, 0]
  best = {"schedule.base_lr": "0.003"}
  assert result["select"]["best"]["setting"] == best
  runs = [Path(run["workdir"]) for run in result["final"]["runs"]]
  assert runs == [folder / "final" / f"seed={i}" for i in range(3)]
  (entry,) = result["final"]["settings"]
  assert entry["setting"] == best
  assert entry["mean"] == pytest.approx(0.003 + 0.1)
  assert entry["spread"] == pytest.approx(0.1)
  assert len(commands) == 2 + 3
  assert main(args) == 0
  assert len(commands) == 2 + 3


def test_slurms_time_limit_requeues_a_run_that_has_saved(tmp_path):
  """Slurm announces the limit by SIGUSR2, on which submitit requeues."""
  requeued = []
  with contextlib.ExitStack() as stack:
    for number in (signal.SIGTERM, signal.SIGUSR2):
      handler = signal.signal(number, lambda n, _: requeued.append(n))
      stack.callback(signal.signal, number, handler)
    command = [*stand_in.COMMAND, "--config=c", f"--workdir={tmp_path}"]
    command += ["--config.total_steps=3000", "--config.seed=0"]

    def announce():
      while not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGUSR2)

    thread = threading.Thread(target=announce)
    thread.start()
    assert jobs.TrainJob()(command, tmp_path, {}, None) == 0
    thread.join()
  assert requeued == [signal.SIGUSR2]
  (step,) = [int(f.name) for f in (tmp_path / "checkpoints").iterdir()]
  assert step < 3000


# --- with submitit ---

_SLURM = {
  "sbatch": """
id=$(($(ls $FAKE_SLURM | wc -l) + 1))
SLURM_JOB_ID=$id setsid bash "$1" &> $FAKE_SLURM.log &
echo $! > $FAKE_SLURM/$id
echo "Submitted batch job $id"
""",
  "srun": """
while [[ $1 == --* ]]; do shift $([[ $1 == --unbuffered ]] || echo 2); done
exec "$@"
""",
  "sacct": """
echo "JobID|State|NodeList"
for f in $FAKE_SLURM/*; do
  grep -qs . /proc/$(cat $f)/cmdline && state=RUNNING || state=FAILED
  echo "$(basename $f)|$state|localhost"
done
""",
}
_SWEEP = f"""
import sys
from vit_jax.tools import sweep
from vit_jax import checkpoint
from vit_jax.__main__ import main
sweep.TRAIN = {stand_in.COMMAND!r}
sweep.run_folder.check = lambda *_: False
sys.exit(main(sys.argv[1:]))
"""


class Machine:
  """Starts sweeps by an executor, and kills them."""

  def __init__(self, folder, executor):
    self._args = [f"--executor={executor}"]
    # All that a sweep starts inherits the variable.
    self._environment = {**os.environ, "FAKE_SLURM": str(folder / "slurm")}
    if executor == "slurm":
      self._args += ["--slurm=time=60", "--slurm=partition=gpu", "--jobs=1"]
      for name, text in _SLURM.items():
        (folder / name).write_text("#!/bin/bash" + text)
        (folder / name).chmod(0o755)
      (folder / "slurm").mkdir()
      self._environment["PATH"] = f"{folder}:{os.environ['PATH']}"

  def start(self, args):
    words = ["-c", _SWEEP, *args, *self._args]
    return Process(words, self._environment, forks.Fork)

  def kill_all(self, process):
    """Kills a sweep, its jobs and their runs."""
    process.send(signal.SIGKILL)
    mark = f"FAKE_SLURM={self._environment['FAKE_SLURM']}".encode()
    for folder in Path("/proc").iterdir():
      with contextlib.suppress(OSError, ValueError):
        if mark in (folder / "environ").read_bytes().split(b"\0"):
          os.kill(int(folder.name), signal.SIGKILL)


@pytest.mark.ci
@pytest.mark.parametrize(
  ("executor", "how"),
  [
    pytest.param("local", "all", marks=pytest.mark.nightly),
    ("local", signal.SIGINT),
    pytest.param("slurm", "all", marks=pytest.mark.nightly),
    pytest.param("slurm", signal.SIGKILL, marks=pytest.mark.nightly),
  ],
)
def test_stopped_it_goes_on_without_repeating_a_run(
  executor, how, args, tmp_path
):
  (tmp_path / "machine").mkdir()
  machine = Machine(tmp_path / "machine", executor)
  folder = tmp_path / "sweep"
  args = [*args, "--config.total_steps=50"]
  process = machine.start(args)
  second = folder / _NAMES[1] / "metrics.jsonl"
  assert process.wait_until(lambda: second.exists() and second.read_text())
  machine.kill_all(process) if how == "all" else process.send(how)
  process.wait()
  finished = snapshot(folder / _NAMES[0])

  process = machine.start(args)
  assert process.wait() == 0, process.stderr()
  assert snapshot(folder / _NAMES[0]) == finished
  assert "4 of 4" in process.stderr()
  assert len(_read(folder)["settings"]) == 2
  logs = [(folder / name / "log.txt").read_text() for name in _NAMES]
  begun = [[int(x) for x in re.findall(r"from (\d+)", log)] for log in logs]
  assert [begun[i] for i in (0, 2, 3)] == [[0]] * 3
  devices = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit hides them
  assert {log.splitlines()[0] for log in logs} == {f"begins {devices}"}
  if how == "all":  # nothing has been saved
    assert begun[1] == [0, 0]
  elif executor == "slurm":  # the job has gone on
    assert begun[1] == [0]
  else:  # it has noticed the sweep's end, and has saved
    assert all(0 < step < 50 for step in begun[1][1:])
