"""The lock of a run folder, and what processes compare before they train."""

import json
import os
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils

from vit_jax import distributed
from vit_jax.errors import RunStopped, UserError
from vit_jax.training import lock


@pytest.fixture
def workdir(tmp_path):
  return epath.Path(tmp_path / "run")


@pytest.fixture
def quick(monkeypatch):
  """Makes heartbeats and the patience with them short."""
  monkeypatch.setattr(lock, "_BEAT", 0.05)
  monkeypatch.setattr(lock, "_PATIENCE", 0.5)
  sleep = lock.time.sleep
  monkeypatch.setattr(lock.time, "sleep", lambda seconds: sleep(seconds / 50))


@pytest.fixture
def no_flock(monkeypatch):
  """As on a bucket, or on a disk that two machines share."""

  def fail(*_):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(lock.fcntl, "flock", fail)


def _leave(workdir, **owner):
  """Writes the lock of an owner that writes nothing more."""
  workdir.mkdir(parents=True)
  owner = {
    "host": "elsewhere",
    "process": 7,
    "token": "old",
    "beat": 3,
    **owner,
  }
  (workdir / "lock").write_text(json.dumps(owner))


def test_a_second_owner_is_refused_and_named(workdir):
  with lock.hold(workdir) as first:
    assert lock.read_token(workdir) == first.token
    with (
      pytest.raises(
        UserError, match=f"process {os.getpid()} on {socket.gethostname()}"
      ),
      lock.hold(workdir),
    ):
      pass
    (workdir / "config.json").write_text("{}")
  with lock.hold(workdir) as second:
    assert second.token != first.token
  assert lock.read_owner(workdir / "lock") is None


def test_nothing_stays_of_a_run_that_did_not_begin(workdir):
  with pytest.raises(RuntimeError), lock.hold(workdir):
    raise RuntimeError
  assert not workdir.exists()


def test_a_killed_owner_holds_nothing(workdir):
  code = (
    "import os, signal; from etils import epath\n"
    "from vit_jax.training import lock\n"
    f"with lock.hold(epath.Path({str(workdir)!r})):\n"
    "  os.kill(os.getpid(), signal.SIGKILL)"
  )
  killed = subprocess.run([sys.executable, "-c", code], check=False)
  assert killed.returncode == -9
  assert lock.read_owner(workdir / "lock")
  with lock.hold(workdir):
    pass


def test_another_machines_owner_is_refused_while_its_heart_beats(
  workdir, quick, no_flock, monkeypatch
):
  names = {"main": "here"}
  monkeypatch.setattr(
    lock.socket,
    "gethostname",
    lambda: names.get(threading.current_thread().name, "elsewhere"),
  )
  entered, leave = threading.Event(), threading.Event()

  def own():
    with lock.hold(workdir):
      (workdir / "config.json").write_text("{}")
      entered.set()
      leave.wait()

  owner = threading.Thread(target=own)
  owner.start()
  entered.wait()
  names[threading.current_thread().name] = "here"
  with pytest.raises(UserError, match="on elsewhere"), lock.hold(workdir):
    pass
  leave.set()
  owner.join()
  with lock.hold(workdir):  # it has given it back
    pass


def test_another_machines_owner_without_a_heartbeat_has_died(
  workdir, quick, caplog
):
  caplog.set_level("INFO")
  _leave(workdir)
  with lock.hold(workdir) as mine:
    assert lock.read_token(workdir) == mine.token
  assert "process 7 on elsewhere" in caplog.text


def test_a_dead_process_of_this_machine_is_known_without_flock(
  workdir, no_flock, monkeypatch
):
  monkeypatch.setattr(
    lock, "_wait_for_heartbeat", lambda *_: pytest.fail("it waits")
  )
  dead = subprocess.Popen(["true"])
  dead.wait()
  _leave(workdir, host=socket.gethostname(), process=dead.pid)
  with lock.hold(workdir):
    pass


def test_an_owner_notices_that_it_was_taken_for_dead(workdir, quick):
  with lock.hold(workdir) as mine:
    mine.check()
    (workdir / "config.json").write_text("{}")
    owner = {"host": "elsewhere", "process": 7, "token": "other", "beat": 1}
    (workdir / "lock").write_text(json.dumps(owner))
    mine._thread.join(5)
    with pytest.raises(RunStopped, match="process 7 on elsewhere"):
      mine.check()
  assert lock.read_token(workdir) == "other"


def _play_two(monkeypatch, other):
  """Makes this process one of two; the second gives these facts."""
  theirs = json.dumps(["host-b", {k: repr(v) for k, v in other.items()}])

  def gather(x):
    data = np.frombuffer(theirs.encode(), np.uint8)
    if x.ndim == 0:
      return np.array([x, data.size])
    rows = np.zeros((2, len(x)), np.uint8)
    rows[0], rows[1, : data.size] = x, data
    return rows

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  monkeypatch.setattr(distributed.socket, "gethostname", lambda: "host-a")


def test_processes_with_the_same_facts_pass(monkeypatch):
  facts = {"batch_size": 16, "name": "ü" * 300, "schedule.base_lr": 0.1}
  _play_two(monkeypatch, facts)
  distributed.check_same(facts)


def test_a_process_that_differs_is_named_with_the_key(monkeypatch):
  facts = {"batch_size": 16, "seed": 0, "schedule.base_lr": 0.1}
  _play_two(monkeypatch, facts | {"batch_size": 32})
  with pytest.raises(UserError) as error:
    distributed.check_same(facts)
  for words in ("host-b", "host-a", "batch_size is 32 there and 16 here"):
    assert words in str(error.value)
  assert "seed" not in str(error.value)


def test_the_packages_digest_follows_its_files(tmp_path, monkeypatch):
  file = tmp_path / "distributed.py"
  file.write_text("a = 1\n")
  monkeypatch.setattr(distributed, "__file__", str(file))
  before = distributed.digest_package()
  assert distributed.digest_package() == before
  file.write_text("a = 2\n")
  assert distributed.digest_package() != before
