"""The lifeline: one process is lost, and the others say so and end."""

import contextlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from tiny_runs import REPO, find_port

from vit_jax import lifeline

# A process of a run without JAX: it does what it is told, line by line.
_PROCESS = """
import socket, struct, sys, ctypes
from vit_jax import hosts, lifeline
port, index, count, timeout = int(sys.argv[1]), *map(int, sys.argv[2:])
place = hosts.Place(f"localhost:{port}", count, index)
line = lifeline.hold(place, 60, timeout, lambda: "saved last: step 7")
print("met", flush=True)
for words in sys.stdin:
  if words == "vanish\\n":
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

    def start_all(count, timeout=60):
      port, options = find_port(), [str(count), str(timeout)]
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


@pytest.mark.parametrize("lost", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others_with_a_sentence(start, lost):
  processes = start(3)
  begin = time.monotonic()
  processes.pop(lost).kill()
  for process in processes:
    assert end(process) == says_lost(lost)
  assert time.monotonic() - begin < 5


def test_an_error_of_one_is_told_by_all(start):
  first, second = start(2)
  tell(second, "error: no such class:2")
  assert end(second) == (2, "my own error\n")
  code, said = end(first)
  assert code == 2
  assert f"process 1 on {socket.gethostname()} ended: error: no such" in said
  assert "mend that, then the same command goes on" in said


@pytest.mark.slow
def test_an_error_of_all_is_each_ones_own(start):
  processes = start(3)
  for process in processes:
    tell(process, "stopped: loss is nan:1")
  assert [end(p) for p in processes] == [(1, "my own error\n")] * 3


@pytest.mark.slow
def test_an_error_that_comes_of_a_loss_is_not_told(start):
  first, second, third = start(3)
  tell(second, "Gloo all-reduce failed:1")
  time.sleep(0.5)
  third.kill()
  assert end(first) == end(second) == says_lost(2)


@pytest.mark.slow
def test_goodbye_waits_for_all_and_tells_nothing(start):
  processes = start(3)
  for process in processes[:2]:
    tell(process, "leave")
  time.sleep(1)
  assert [p.poll() for p in processes] == [None] * 3
  tell(processes[2], "leave")
  assert [end(p) for p in processes] == [(0, "")] * 3


@pytest.mark.slow
def test_a_process_that_left_still_hears_of_a_loss(start):
  first, second, third = start(3)
  tell(first, "leave")
  tell(second, "leave")
  time.sleep(0.5)
  third.kill()
  assert end(first) == end(second) == says_lost(2)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_not_lost(start, stopped):
  processes = start(2, timeout=6)
  processes[stopped].send_signal(signal.SIGSTOP)
  time.sleep(15)
  assert processes[1 - stopped].poll() is None
  processes[stopped].send_signal(signal.SIGCONT)
  for process in processes:
    tell(process, "leave")
  assert [end(p) for p in processes] == [(0, "")] * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs socket filters")
def test_a_machine_that_vanishes_is_lost_in_time(start):
  first, second, third = start(3, timeout=6)
  tell(third, "vanish")
  assert third.stdout.readline() == "vanished\n"
  begin = time.monotonic()
  assert end(first) == end(second) == says_lost(2, "no answer for 6 s")
  assert 3 < time.monotonic() - begin < 12
