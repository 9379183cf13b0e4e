"""The lifeline: one process is lost, and the others say so and end."""

import contextlib
import functools
import json
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_runs import (
  REPO,
  assert_same_run,
  find_port,
  read_losses,
  read_metrics,
  read_state,
  saved_steps,
)

from vit_jax.__main__ import main
from vit_jax.training import lifeline

# A process of a run without JAX: it does what it is told, line by line.
_PROCESS = """
import socket, struct, sys, ctypes
from vit_jax.training import hosts, lifeline
port, index, count, timeout = map(int, sys.argv[1:5])
lifeline._ECHO = float(sys.argv[5])
place = hosts.Place(f"localhost:{port}", count, index)
line = lifeline.hold(place, 60, timeout, lambda: "saved last: step 7")
print("met", flush=True)
for words in sys.stdin:
  if words == "vanish\\n":
    # It asks no more, or it might find the others gone first, and say so.
    line._peers[0].setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    # A filter that drops all that comes, before TCP sees it (SO_ATTACH_FILTER).
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    filter_ = struct.pack("HL", 1, ctypes.addressof(code))
    line._peers[0].setsockopt(socket.SOL_SOCKET, 26, filter_)
    print("vanished", flush=True)
  elif words == "leave\\n":
    line.leave()
    sys.exit(0)
  elif words:
    text, code = words.rsplit(":", 1)
    line.fail(text, int(code))
    print("my own error", file=sys.stderr)
    line.end(int(code))
"""


@pytest.fixture
def start():
  """Starts processes that have met; what is left of them is killed."""
  with contextlib.ExitStack() as stack:

    def start_all(count, timeout=60, echo=lifeline._ECHO):
      port, options = find_port(), [str(count), str(timeout), str(echo)]
      processes = []
      for i in range(count):
        process = subprocess.Popen(
          [sys.executable, "-c", _PROCESS, str(port), str(i), *options],
          env={"PYTHONPATH": str(REPO)},
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
        stack.callback(process.communicate)
        stack.callback(process.kill)
        processes.append(process)
      for process in processes:
        assert process.stdout.readline() == "met\n", process.stderr.read()
      return processes

    yield start_all


def tell(process, words):
  process.stdin.write(f"{words}\n")
  process.stdin.flush()


def end(process):
  """Returns how it ended: (exit code, what it said)."""
  return process.wait(30), process.stderr.read()


def says_lost(index, why="killed or crashed; its own log may say more"):
  return (
    lifeline.LOST,
    f"stopped: process {index} on {socket.gethostname()} is gone ({why}); "
    "saved last: step 7; the same command goes on, also with another number of "
    "processes\n",
  )


@pytest.mark.parametrize("lost", [2, pytest.param(0, marks=pytest.mark.ci)])
def test_a_killed_process_ends_the_others_with_a_sentence(start, lost):
  processes = start(3)
  begin = time.monotonic()
  processes.pop(lost).kill()
  for process in processes:
    assert end(process) == says_lost(lost)
  assert time.monotonic() - begin < 5


@pytest.mark.ci
def test_an_error_of_one_is_told_by_all(start):
  first, second = start(2, echo=0.1)
  tell(second, "error: no such class:2")
  assert end(second) == (2, "my own error\n")
  code, said = end(first)
  assert code == 2
  assert f"process 1 on {socket.gethostname()} ended: error: no such" in said
  assert "mend that, then the same command goes on" in said


@pytest.mark.ci
def test_an_error_of_all_is_each_ones_own(start):
  processes = start(3)
  for process in processes:
    tell(process, "stopped: loss is nan:1")
  assert [end(p) for p in processes] == [(1, "my own error\n")] * 3


@pytest.mark.ci
def test_an_error_that_comes_of_a_loss_is_not_told(start):
  first, second, third = start(3)
  tell(second, "Gloo all-reduce failed:1")
  time.sleep(0.5)
  third.kill()
  assert end(first) == end(second) == says_lost(2)


@pytest.mark.ci
def test_goodbye_waits_for_all_and_tells_nothing(start):
  processes = start(3)
  for process in processes[:2]:
    tell(process, "leave")
  time.sleep(0.5)
  assert [p.poll() for p in processes] == [None] * 3
  tell(processes[2], "leave")
  assert [end(p) for p in processes] == [(0, "")] * 3


@pytest.mark.ci
def test_a_process_that_left_still_hears_of_a_loss(start):
  first, second, third = start(3)
  tell(first, "leave")
  tell(second, "leave")
  time.sleep(0.5)
  third.kill()
  assert end(first) == end(second) == says_lost(2)


@pytest.mark.ci
def test_a_stopped_process_is_not_lost(start):
  pairs = [start(2, timeout=2) for _ in range(2)]
  for stopped, pair in enumerate(pairs):
    pair[stopped].send_signal(signal.SIGSTOP)
  time.sleep(6)
  for stopped, pair in enumerate(pairs):
    assert pair[1 - stopped].poll() is None
    pair[stopped].send_signal(signal.SIGCONT)
    for process in pair:
      tell(process, "leave")
    assert [end(p) for p in pair] == [(0, "")] * 2


@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="needs socket filters")
def test_a_machine_that_vanishes_is_lost_in_time(start):
  first, second, third = start(3, timeout=2)
  tell(third, "vanish")
  assert third.stdout.readline() == "vanished\n"
  begin = time.monotonic()
  assert end(first) == end(second) == says_lost(2, "no answer for 2 s")
  assert 1 < time.monotonic() - begin < 10


# --- runs that train: 2 or 4 processes with a device each ---

_RUN = ("model.variant=ViT-w16d2m32h2_8", "total_steps=48", "eval_every=12")


@pytest.fixture(scope="module")
def train_together(runs):
  """Starts the processes of a run, with a device each."""

  def start(count, workdir, *flags):
    args = [
      *runs.train_args(workdir, *_RUN),
      *(f"--coordinator=localhost:{find_port()}", f"--num_processes={count}"),
      *("--start_timeout=30", *flags),
    ]
    return [
      runs.start([*args, f"--process_id={i}"], devices=1) for i in range(count)
    ]

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
  """Kills one of the processes at any time; returns how long it took."""
  before = saved_steps(workdir)[-1:]
  processes = train_together(count, workdir)
  lost, steps = random_.randrange(count), random_.randint(0, 5)
  if steps:
    assert processes[0].wait_until(lambda: len(processes[0].steps()) >= steps)
    time.sleep(random_.uniform(0, 0.3))
  else:  # while it starts
    time.sleep(random_.uniform(0, 6))
  begin = time.monotonic()
  processes[lost].send(signal.SIGKILL)
  codes = [p.wait() for p in processes]
  took = time.monotonic() - begin
  print(f"{count} processes, {lost} killed, {took:.1f} s, {codes}, {before}")
  for i, process in enumerate(processes):
    said = process.stderr().splitlines()
    if i == lost:
      assert codes[i] == -signal.SIGKILL
    elif codes[i] == 1:  # it came before the roll
      assert not processes[0].steps()
      assert f"missing {lost}" in said[-1] or "did not meet" in said[-1]
    else:
      assert codes[i] == lifeline.LOST, process.stderr()
      assert f"stopped: process {lost} on" in said[-1]
      # JAX may notice the loss of process 0 first, and says it in its way.
      assert not lost or "*** Check failure" not in process.stderr()
  seen = processes[0].steps()
  assert not seen or seen[0] == 1 + (before[0] if before else 0)
  assert saved_steps(workdir)[-1:] >= before
  assert not (workdir / "damaged").exists()
  return took


def survive(train_together, workdir, kills, counts, seed=0):
  """Loses a process again and again, goes on each time, ends well."""
  print(f"seed {seed}")
  random_ = random.Random(seed)
  for _ in range(kills):
    count = random_.choice(counts)
    assert lose_one(train_together, workdir, count, random_) < lifeline.TIMEOUT
  processes = train_together(random_.choice(counts), workdir)
  assert {p.wait() for p in processes} == {0}, processes[0].stderr()


@pytest.mark.nightly
def test_ten_losses_with_2_or_4_processes(
  train_together, train_whole, tmp_path
):
  survive(train_together, tmp_path / "run", 10, (2, 4))
  for kind in ("checkpoints", "best"):
    step, arrays = read_state(tmp_path / "run", kind)
    expected_step, expected = read_state(train_whole(4), kind)
    assert step == expected_step
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
      np.testing.assert_allclose(
        array, expected[path], rtol=1e-3, atol=1e-4, err_msg=path
      )
  losses = read_losses(train_whole(4))
  assert read_losses(tmp_path / "run") == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
  ("count", "losses"),
  [
    pytest.param(2, 1, marks=pytest.mark.ci),
    pytest.param(4, 3, marks=pytest.mark.nightly),
  ],
)
def test_as_many_processes_end_with_the_same_bits(
  count, losses, train_together, train_whole, tmp_path
):
  survive(train_together, tmp_path / "run", losses, (count,), seed=1)
  assert_same_run(tmp_path / "run", train_whole(count))


@pytest.mark.ci
def test_processes_that_differ_end_before_the_first_step(runs, tmp_path):
  """By a key of the configuration, and by a folder that they do not share."""

  def end_together(first, second):
    rest = [
      f"--coordinator=localhost:{find_port()}",
      *("--num_processes=2", "--start_timeout=30"),
    ]
    started = [
      runs.start([*args, *rest, f"--process_id={i}"], devices=1)
      for i, args in enumerate((first, second))
    ]
    assert [p.wait() for p in started] == [2, 2], started[0].stderr()
    assert not started[0].steps()
    return started[0].stderr().splitlines()[-1]

  args = runs.train_args(tmp_path / "run", *_RUN)
  line = end_together(args, [*args, "--config.batch_size=32"])
  assert "process 1 on" in line
  assert "batch_size is 32 there and 16 here" in line
  assert not (tmp_path / "run").exists()
  line = end_together(args, runs.train_args(tmp_path / "other", *_RUN))
  assert "other' there" in line


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
