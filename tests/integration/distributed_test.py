"""Runs of several processes: all come, or a line says so; one lost ends all."""

import functools
import json
import os
import random
import signal
import time

import forks
import numpy as np
import pytest
from tiny_runs import (
  REPO,
  Process,
  assert_same_run,
  find_port,
  read_both_states,
  read_losses,
  read_metrics,
  saved_steps,
)

from vit_jax.__main__ import main

ABORTED = -signal.SIGABRT  # which a shell calls 134

# It meets the others, and gathers for ever.
_PROCESS = """
import sys, time
import numpy as np
from jax.experimental import multihost_utils
from vit_jax.commands import distributed
port, index, count, lost_timeout = map(int, sys.argv[1:5])
distributed.start(f"localhost:{port}", count, index, 60, lost_timeout)
print("all are there", flush=True)
while True:
  multihost_utils.process_allgather(np.array(index))
  time.sleep(0.1)
"""


@pytest.mark.ci
@pytest.mark.parametrize(
  ("lost", "name"), [(2, "Task 2 heartbeat timeout"), (0, "leader task")]
)
def test_a_killed_process_ends_the_others(fork_server, lost, name):
  timeout, port = 5, find_port()
  environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
  processes = [
    Process(
      ["-c", _PROCESS, str(port), str(i), "3", str(timeout)],
      environment,
      forks.Fork,
    )
    for i in range(3)
  ]
  for process in processes:
    assert process.wait_until(process.stdout), process.stderr()
  time.sleep(1)
  processes.pop(lost).send(signal.SIGKILL)
  begin = time.monotonic()
  assert [p.wait() for p in processes] == [ABORTED] * 2
  assert time.monotonic() - begin < timeout + 5
  for process in processes:
    assert name in process.stderr()


@pytest.mark.ci
def test_a_missing_process_is_waited_for_until_the_time_out(runs, tmp_path):
  port = find_port()
  flags = [f"--coordinator=localhost:{port}", "--num_processes=3"]
  args = [*runs.train_args(tmp_path / "run"), *flags, "--start_timeout=5"]
  two = [runs.start([*args, f"--process_id={i}"]) for i in (0, 2)]
  assert [process.wait() for process in two] == [1, 1]
  for process in two:
    first, *_, last = process.stderr().splitlines()
    assert first.startswith("waiting up to 5 s for all 3 processes at ")
    assert last.startswith("stopped: waited 5 s for all 3 processes at ")
    assert "Check failure" not in process.stderr()
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--coordinator=here --num_processes=2 --process_id=0", "HOST:PORT"),
    ("--coordinator=here:1 --num_processes=2 --process_id=2", "from 0 to 1"),
  ],
)
def test_flags_that_make_no_sense(flags, message, capsys):
  assert main(["evaluate", "--workdir=/none", *flags.split()]) == 2
  assert message in capsys.readouterr().err


@pytest.mark.ci
@pytest.mark.usefixtures("fork_server")
def test_there_has_to_be_a_cluster_to_ask():
  # In another process: JAX may have begun to compute in this one.
  words = ["-m", "vit_jax", "evaluate", "--workdir=/none", "--distributed"]
  done = forks.run(words, cwd=REPO)
  assert done.returncode == 2
  assert "no TPU pod and no Slurm step" in done.stderr


# --- runs that train: 2 or 4 processes with a device each ---

_RUN = ("model.variant=ViT-w16d2m32h2_8", "total_steps=48", "eval_every=12")
_SOON = ("--start_timeout=30", "--lost_timeout=5")


@pytest.fixture(scope="module")
def train_together(runs):
  """Starts the processes of a run, with a device each."""

  def start(count, workdir, *flags):
    args = [*runs.train_args(workdir, *_RUN), *_SOON, *flags]
    return runs.start_together([args] * count, devices=1)

  return start


@pytest.fixture(scope="module")
def train_whole(runs, train_together):
  """Returns the folder of a run of some processes that nothing disturbed."""

  @functools.cache
  def train(count):
    workdir = runs.folder / f"whole{count}"
    processes = train_together(count, workdir)
    assert {p.wait() for p in processes} == {0}, processes[0].stderr()
    assert "stopped" not in "".join(p.stderr() for p in processes)
    return workdir

  return train


def lose_one(train_together, workdir, count, random_):
  """Kills one of the processes at any time; the others end."""
  before = saved_steps(workdir)[-1:]
  processes = train_together(count, workdir)
  lost, steps = random_.randrange(count), random_.randint(0, 5)
  if steps:
    assert processes[0].wait_until(lambda: len(processes[0].steps()) >= steps)
    time.sleep(random_.uniform(0, 0.3))
  else:  # while it starts
    time.sleep(random_.uniform(0, 6))
  processes[lost].send(signal.SIGKILL)
  codes = [p.wait() for p in processes]
  seen = processes[0].steps()
  assert codes.pop(lost) == -signal.SIGKILL
  # 1: it was lost before all had met.
  assert set(codes) in ([{ABORTED}] if steps else [{ABORTED}, {1}])
  assert not seen or seen[0] == 1 + (before[0] if before else 0)
  assert saved_steps(workdir)[-1:] >= before
  assert not (workdir / "damaged").exists()


def survive(train_together, workdir, kills, counts, seed=0):
  """Loses a process again and again, goes on each time, ends well."""
  random_ = random.Random(seed)
  for _ in range(kills):
    lose_one(train_together, workdir, random_.choice(counts), random_)
  processes = train_together(random_.choice(counts), workdir)
  assert {p.wait() for p in processes} == {0}, processes[0].stderr()


@pytest.mark.nightly
def test_ten_losses_with_2_or_4_processes(
  train_together, train_whole, tmp_path
):
  survive(train_together, tmp_path / "run", 10, (2, 4))
  for path, *pair in read_both_states(tmp_path / "run", train_whole(4)):
    np.testing.assert_allclose(*pair, rtol=1e-3, atol=1e-4, err_msg=path)
  losses = read_losses(train_whole(4))
  assert read_losses(tmp_path / "run") == pytest.approx(losses, rel=1e-4)


@pytest.mark.nightly
def test_as_many_processes_end_with_the_same_bits(
  train_together, train_whole, tmp_path
):
  survive(train_together, tmp_path / "run", 1, (2,), seed=1)
  assert_same_run(tmp_path / "run", train_whole(2))


@pytest.mark.ci
def test_processes_that_differ_end_before_the_first_step(runs, tmp_path):
  """By a key of the configuration, and by a folder that they do not share."""

  def end_together(*commands):
    first, second = runs.start_together(commands, devices=1)
    assert [first.wait(), second.wait()] == [2, 2], first.stderr()
    assert not first.steps()
    return first.stderr().splitlines()[-1]

  args = [*runs.train_args(tmp_path / "run", *_RUN), _SOON[0]]
  line = end_together(args, [*args, "--config.batch_size=32"])
  assert "process 1 on" in line
  assert "batch_size is 32 there and 16 here" in line
  assert not (tmp_path / "run").exists()
  other = [*runs.train_args(tmp_path / "other", *_RUN), _SOON[0]]
  assert "other' there" in end_together(args, other)


@pytest.mark.ci
def test_an_error_of_one_process_keeps_its_exit_code(runs, tmp_path):
  """The other one is in a collective then, and is ended by JAX."""
  args = [*runs.train_args(tmp_path / "run", *_RUN), *_SOON]
  wrong = [a.replace(str(runs.data_dir), str(tmp_path)) for a in args]
  first, second = runs.start_together([args, wrong], devices=1)
  assert second.wait() == 2, second.stderr()
  assert first.wait() in (2, ABORTED)
  assert "error: " in second.stderr()


@pytest.mark.ci
def test_two_processes_count_each_test_example_once(train_whole, capsys):
  """Their numbers are those of one process with other devices."""
  workdir = train_whole(2)
  last = f"{workdir}/checkpoints/48"
  assert main(["evaluate", f"--checkpoint={last}", "--json"]) == 0
  results = json.loads(capsys.readouterr().out)
  found = read_metrics(workdir)[-1]
  assert found["eval/examples"] == results["examples"] == 40
  assert found["eval/accuracy"] == results["accuracy"]
  assert found["eval/loss"] == pytest.approx(results["loss"], rel=1e-5)


@pytest.mark.ci
def test_two_processes_pseudo_label_as_one(runs, tmp_path):
  def label(out, split="train[:100]"):
    flags = [f"--split={split}", f"--out={tmp_path / out}", "--batch_size=10"]
    where = [f"--data_dir={runs.data_dir}", "--soft", "--min_confidence=0.9"]
    model = "--checkpoint=ViT-N_8-digits"
    return ["pseudo-label", model, "--dataset=digits", *where, *flags]

  def read(out):
    return {f.name: f.read_bytes() for f in (tmp_path / out).iterdir()}

  one = runs.start(label("one"), devices=2)
  pair = runs.pair([*label("two"), *_SOON], devices=1)
  codes = [p.wait() for p in (one, *pair)]
  assert codes == [0, 0, 0], [p.stderr() for p in (one, *pair)]
  assert read("one") == read("two")
  assert "agree with the data set" in pair[0].stdout()
  assert "agree" not in pair[1].stdout()  # one of them speaks
  # What only the first process looks at is an error of both.
  pair = runs.pair([*label("two", "train[:90]"), *_SOON], devices=1)
  assert [p.wait() for p in pair] == [2, 2]
  for process in pair:
    assert "pseudo-labels with other split" in process.stderr()


@pytest.mark.nightly
def test_a_notice_during_a_save_stops_all_four(
  train_together, train_whole, tmp_path
):
  workdir = tmp_path / "run"
  processes = train_together(4, workdir, "--stopped_exit_code=75")
  folder = workdir / "checkpoints"
  assert processes[3].wait_until(
    lambda: any(not name.name.isdigit() for name in folder.glob("*"))
  )
  processes[3].send(signal.SIGTERM)
  assert [p.wait() for p in processes] == [75] * 4, processes[0].stderr()
  assert "stopping: saved step" in processes[0].stderr()
  stopped = saved_steps(workdir)[-1]
  assert stopped == processes[0].steps()[-1] < 48
  processes = train_together(4, workdir)
  assert [p.wait() for p in processes] == [0] * 4, processes[0].stderr()
  assert min(processes[0].steps()) == stopped + 1
  assert_same_run(workdir, train_whole(4))


@pytest.mark.ci
def test_preflight_of_several_processes(runs, tmp_path, capsys):
  args = ["preflight", *runs.train_args(tmp_path / "run")[1:]]
  pair = runs.pair(args)
  assert [p.wait() for p in pair] == [0, 0], pair[0].stderr()
  lines = dict(line.split(maxsplit=1) for line in pair[0].stdout().splitlines())
  assert lines["data"].startswith("ok")
  assert lines["workdir"].startswith("warning")  # a local path
  assert "images/s from 2 hosts" in lines["input"]
  assert "images/s" not in pair[1].stdout()  # one of them speaks
  assert not list(tmp_path.iterdir())
  assert main([*args, "--hosts=4"]) == 1
  assert "there are 1 of 4 processes" in capsys.readouterr().err
