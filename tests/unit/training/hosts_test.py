"""The roll: everyone says who is missing, in the time that was stated."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from tiny_runs import find_port

from vit_jax.__main__ import main
from vit_jax.errors import RunStopped, UserError
from vit_jax.training import hosts


def call(port, indices, count, timeout=1.0, facts=None):
  """Calls the roll in threads; returns {index: facts of all, or an error}."""
  found = {}

  def report(key, index):
    place = hosts.Place(f"localhost:{port}", count, index)
    try:
      found[key] = hosts.call_roll(place, facts or {"is": index}, timeout)
    except (UserError, RunStopped) as e:
      found[key] = e

  threads = [
    threading.Thread(target=report, args=pair) for pair in enumerate(indices)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
  return found


def test_all_hear_of_all():
  found = call(find_port(), [2, 0, 1], 3, timeout=20)
  here = socket.gethostname()
  everyone = [{"host": here, "is": i} for i in range(3)]
  assert found == {0: everyone, 1: everyone, 2: everyone}


def test_who_is_missing_is_said_by_all_in_time():
  begin = time.monotonic()
  found = call(find_port(), [0, 2], 4)
  assert time.monotonic() - begin < 5
  for error in found.values():
    assert isinstance(error, RunStopped)
    assert "saw 2 of 4 hosts" in str(error)
    assert "missing 1, 3 after 1 s" in str(error)


def test_without_process_0():
  (error,) = call(find_port(), [1], 2).values()
  assert isinstance(error, RunStopped)
  assert "did not meet all others at process 0" in str(error)
  assert "refused" in str(error)


def test_two_that_say_they_are_the_same():
  found = call(find_port(), [0, 1, 1], 3, timeout=10)
  assert isinstance(found[0], UserError)
  assert "two processes say that they are process 1" in str(found[0])


def test_a_stranger_does_not_disturb():
  port = find_port()

  def disturb():
    for _ in range(100):
      address = ("localhost", port)
      with (
        contextlib.suppress(OSError),
        socket.create_connection(address, 1) as s,
      ):
        s.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return
      time.sleep(0.02)

  thread = threading.Thread(target=disturb)
  thread.start()
  found = call(port, [0, 1], 2, timeout=20)
  thread.join()
  assert [f["is"] for f in found[0]] == [0, 1]


def test_a_port_that_is_taken(monkeypatch):
  monkeypatch.setattr(hosts, "_REPEAT", 0.5)
  with socket.create_server(("", 0)) as other:
    (error,) = call(other.getsockname()[1], [0], 2).values()
  assert "cannot open port" in str(error)
  assert "older run" in str(error)


def test_other_versions_are_named():
  ours = {"python": "3.12.1", "jax": "0.10.2"}
  facts = [
    {"host": "a", "versions": ours},
    {"host": "b", "versions": ours | {"jax": "0.10.1"}},
  ]
  line = hosts.compare_versions(facts)
  assert line is not None
  assert "process 1 on b has jax 0.10.1 and not 0.10.2" in line
  assert hosts.compare_versions(facts[:1]) is None


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("here", 2, 0), "HOST:PORT"),
    (("here:1", 2, 2), "from 0 to 1"),
    ((None, None, None), "no TPU pod and no Slurm step"),
  ],
)
def test_places_that_make_no_sense(given, message):
  with pytest.raises(UserError, match=message):
    hosts.find_place(*given)


def test_slurm_says_who_is_who(monkeypatch):
  variables = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "node[007-009],other",
    "SLURM_NTASKS": "24",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
  }
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  # 4099 = 4096 + 3; JAX counts the ports from 65535 - 4095.
  assert hosts.find_place() == hosts.Place("node007:61443", 24, 9, [1])


@pytest.mark.ci
def test_two_of_three_processes_end_with_a_sentence(runs, tmp_path):
  port = find_port()
  flags = [f"--coordinator=localhost:{port}", "--num_processes=3"]
  args = [*runs.train_args(tmp_path / "run"), *flags, "--start_timeout=5"]
  two = [runs.start([*args, f"--process_id={i}"]) for i in (0, 2)]
  assert [process.wait() for process in two] == [1, 1]
  for process in two:
    line = process.stderr().splitlines()[-1]
    assert line.startswith("stopped: saw 2 of 3 hosts (0 on ")
    assert "missing 1 after 5 s" in line
  assert not (tmp_path / "run").exists()


@pytest.mark.ci
def test_preflight_of_several_processes(runs, tmp_path, capsys):
  args = ["preflight", *runs.train_args(tmp_path / "run")[1:]]
  for _ in range(5):
    flags = [f"--coordinator=localhost:{find_port()}", "--num_processes=2"]
    pair = [runs.start([*args, *flags, f"--process_id={i}"]) for i in range(2)]
    codes = [process.wait() for process in pair]
    # Another test that compiles for TPUs may hold libtpu's lock for a while.
    if "not ready: accelerator\n" not in pair[0].stderr():
      break
  assert codes == [0, 0], pair[0].stderr()
  lines = dict(line.split(maxsplit=1) for line in pair[0].stdout().splitlines())
  assert "saw 2 of 2 hosts" in lines["hosts"]
  assert lines["data"].startswith("ok")
  assert lines["workdir"].startswith("warning")  # a local path
  assert "images/s from 2 hosts" in lines["input"]
  assert not pair[1].stdout()  # one of them speaks
  assert not list(tmp_path.iterdir())
  assert main([*args, "--hosts=4"]) == 1
  assert "saw 1 of 4 hosts" in capsys.readouterr().err


def test_importing_it_loads_no_jax():
  # launch/tpu.py asks every worker for its versions so.
  code = "import sys, vit_jax.training.hosts; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ},
  )
  assert done.stdout == "False\n"
