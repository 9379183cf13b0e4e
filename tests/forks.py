"""Starts Python programs by forking a process that has imported the libraries.

Importing JAX, TensorFlow and Orbax takes five seconds of CPU time, for every
command that a test starts. One server of a test run imports them once:

  python forks.py ADDRESS PID

listens on a Unix socket until the process PID is gone. `Fork` asks it for a
program, and `python forks.py -m MODULE ...` does so for shell scripts. A fork
is a process like any other: it has its own arguments, environment, files,
limits and signals, and no JAX backend exists before the fork.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection, reduction
from pathlib import Path

_ENVIRONMENT = "VIT_JAX_TESTS_FORKS"  # the address


class Fork:
  """A program that runs; the interface is that of subprocess.Popen."""

  def __init__(self, args, *, env, cwd, stdout, stderr):
    """Starts `python *args`.

    Args:
      args: as for the interpreter: -c CODE, -m MODULE or a file, then sys.argv.
      env: all variables of the program.
      cwd: where it starts.
      stdout, stderr: open files.
    """
    self._connection = connection.Client(os.environ[_ENVIRONMENT])
    self._connection.send(([*map(str, args)], {**env}, str(cwd)))
    for file in (stdout, stderr):
      reduction.send_handle(self._connection, file.fileno(), None)
    self.pid = self._connection.recv()
    self.returncode = None

  def poll(self):
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.wait(0)
    return self.returncode

  def wait(self, timeout=None):
    if self.returncode is None:
      if not self._connection.poll(timeout):
        raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
      self.returncode = self._connection.recv()
      self._connection.close()
    return self.returncode

  def send_signal(self, number):
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    self.send_signal(signal.SIGKILL)


def run(args, *, env=None, cwd):
  """Runs `python *args` as a fork; returns a subprocess.CompletedProcess."""
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    fork = Fork(args, env=env or os.environ, cwd=cwd, stdout=out, stderr=err)
    try:
      code = fork.wait(300)
    finally:
      fork.kill()
    return subprocess.CompletedProcess(args, code, read_log(out), read_log(err))


def read_log(file) -> str:
  """Returns all that a program has written to a file so far."""
  return os.pread(file.fileno(), 2**24, 0).decode(errors="replace")


def start_server(folder: Path) -> None:
  """Starts the server of this test run, or finds it, and remembers where it is.

  Args:
    folder: shared by all workers of the run, which wait for each other.
  """
  address = str(folder / "forks")
  with locked(folder / "forks.lock"):
    if not Path(address).exists():
      environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
      environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # as a user has it
      with open(folder / "forks.log", "w") as log:
        subprocess.Popen(
          [sys.executable, __file__, address, str(_find_run())],
          env=environment,
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=log,
          start_new_session=True,
        )
      deadline = time.monotonic() + 120
      while not Path(address).exists():
        assert time.monotonic() < deadline, (folder / "forks.log").read_text()
        time.sleep(0.02)
  os.environ[_ENVIRONMENT] = address


def _find_run():
  """Returns the process whose end is that of the test run."""
  is_worker = "PYTEST_XDIST_WORKER" in os.environ
  return os.getppid() if is_worker else os.getpid()


@contextlib.contextmanager
def locked(path):
  """Holds a lock that the workers of a test run share."""
  import fcntl

  with open(path, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


# --- the server ---


def _serve(address, run):
  """Forks for each program; returns in the fork that becomes it."""
  import compiled

  compiled.write_whole()
  # What takes long; none of it makes a backend of JAX.
  import orbax.checkpoint
  import tensorflow_datasets

  import vit_jax.train

  assert orbax.checkpoint, tensorflow_datasets
  assert vit_jax.train
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave no zombies
  listener = socket.socket(socket.AF_UNIX)
  listener.bind(address + ".new")
  listener.listen(64)
  os.rename(address + ".new", address)
  over = os.pidfd_open(int(run))
  while over not in connection.wait([listener, over]):
    asked, _ = listener.accept()
    if not os.fork():
      listener.close()
      return _keep(connection.Connection(asked.detach()))
    asked.close()
  os._exit(0)


def _keep(test):
  """Forks again, for the program itself; the test learns how it ends."""
  request = test.recv()
  files = [reduction.recv_handle(test) for _ in range(2)]
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  pid = os.fork()
  if not pid:
    test.close()
    return *request, files
  for file in files:
    os.close(file)
  test.send(pid)
  ended = os.pidfd_open(pid)
  if ended not in connection.wait([test, ended]):
    os.kill(pid, signal.SIGKILL)  # the test is gone
  code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  with contextlib.suppress(OSError):
    test.send(code)
  os._exit(0)


def _become(args, environment, folder, files):
  """Makes a fork what was asked for, and runs it."""
  import logging

  import jax

  for i, file in enumerate(files, 1):
    os.dup2(file, i)
    os.close(file)
  logging.getLogger().handlers.clear()  # a command sets up its own
  before = dict(os.environ)
  os.environ.clear()
  os.environ.update(environment)
  os.chdir(folder)
  for name, text in environment.items():
    # JAX has read its variables already.
    if name.startswith("JAX_") and before.get(name) != text:
      value = json.loads(text) if text[:1].isdigit() else text
      jax.config.update(name.lower(), value)
  kind, *words = args
  if kind == "-c":
    code, *words = words
    sys.argv = ["-c", *words]
    sys.path.insert(0, "")
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
  elif kind == "-m":
    sys.path.insert(0, folder)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
  else:
    sys.path.insert(0, str(Path(kind).parent.absolute()))
    sys.argv = [kind, *words]
    runpy.run_path(kind, run_name="__main__")


def _stand_in(args):
  """Stands in for a fork where a process has to be started by a shell."""
  out, err = sys.stdout, sys.stderr
  fork = Fork(args, env=os.environ, cwd=os.getcwd(), stdout=out, stderr=err)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: fork.send_signal(number))
  code = fork.wait()
  if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
  return code


if __name__ == "__main__":
  if sys.argv[1].startswith("-"):
    sys.exit(_stand_in(sys.argv[1:]))
  _become(*_serve(*sys.argv[1:]))
