"""What ends all processes of a run when one of them is lost.

Without it the others wait in a collective for one that never answers. Each
process keeps the connection to process 0 that it took at the roll. When a
process ends, its kernel closes the connection; when a machine vanishes, TCP's
keepalive goes unanswered. Kernels answer it, not programs: so this measures
whether a process is there, never how far it is, and one that is stopped, that
compiles or that saves for an hour is not taken for dead.

Process 0 decides, for all hear the same from it: who was lost, or whose error
came first. A thread prints that and ends its process, because the main thread
may wait for the lost one inside of JAX.
"""

import ctypes
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from vit_jax.errors import UserError
from vit_jax.training import hosts

LOST = 69  # the exit code: sysexits' "unavailable"
TIMEOUT = 60  # seconds
# Seconds. An error may be but the echo of a loss that is yet to be heard of.
_ECHO = 2
_DRAIN = 5
_SAYING = 5  # to look up what has been saved, on storage that may hang too


def hold(
  place: hosts.Place,
  start_timeout: float = hosts.START_TIMEOUT,
  timeout: float = TIMEOUT,
  say_saved: Callable[[], str] | None = None,
) -> "Lifeline | None":
  """Calls the roll and holds on to who came; None: there is nobody else.

  Args:
    place: of this process.
    start_timeout: seconds to wait for the others at the roll.
    timeout: seconds without an answer after which a machine has vanished.
    say_saved: says in a few words what a lost run has left.

  Raises:
    UserError: their versions differ.
    RunStopped: not all came in time.
  """
  facts = {"versions": hosts.read_versions()}
  everyone, connections = hosts.meet(place, facts, start_timeout)
  different = hosts.compare_versions(everyone)
  if different:
    raise UserError(different)
  if place.count == 1:
    return None
  names = [f"process {i} on {f['host']}" for i, f in enumerate(everyone)]
  return Lifeline(place.index, names, connections, timeout, say_saved)


class Lifeline:
  """One process's connections, watched by a thread until all are done."""

  def __init__(self, index, names, connections, timeout, say_saved=None):
    self._index, self._names, self._timeout = index, names, timeout
    self._say_saved = say_saved
    self._left: set[int] = set()  # who has said goodbye; process 0 counts
    self._failed: dict[int, dict] = {}  # whose error is known
    self._decide_at = float("inf")
    self._all_left, self._own_error = threading.Event(), threading.Event()
    # The main thread's line to this one. On process 0 it is like the others'.
    self._main, inbox = socket.socketpair()
    self._peers = connections
    self._ready = selectors.DefaultSelector()
    for i, connection in {**connections, index: inbox}.items():
      if connection is not inbox:
        _keep_alive(connection, timeout)
      connection.setblocking(True)
      self._ready.register(connection, selectors.EVENT_READ, (i, bytearray()))
    # JAX may notice a loss first and abort: not before this thread has had
    # some seconds for its line. abort() calls sleep(SIGABRT), then goes on.
    _handle_abort("sleep")
    threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

  # --- the main thread ---

  def leave(self) -> None:
    """Says goodbye at a good end; returns once all others have."""
    hosts.send(self._main, {"is": "goodbye"})
    self._all_left.wait()

  def fail(self, line: str, code: int) -> None:
    """Tells the others of an error here, and returns when it is the cause.

    If it comes from a loss elsewhere, that is said and the process ends.
    """
    hosts.send(self._main, {"is": "failed", "line": line, "code": code})
    # Longer than anything that can be the answer takes.
    self._own_error.wait(_ECHO + _DRAIN + self._timeout)

  def end(self, code: int) -> None:
    """Ends this process at once: JAX would wait for the others, and abort."""
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    os._exit(code)

  # --- the thread ---

  def _watch(self):
    while not self._all_left.is_set():
      wait = self._decide_at - time.monotonic()
      ready = self._ready.select(max(0, wait) if self._failed else None)
      if not ready and self._failed:
        self._decide(min(self._failed.values(), key=lambda f: f["order"]))
      for key, _ in ready:
        index, heard = key.data
        self._read(index, key.fileobj, heard)

  def _read(self, index, connection, heard):
    """Takes what has come from a process, its end included."""
    why = "killed or crashed; its own log may say more"
    try:
      new = connection.recv(2**16)
    except OSError as e:
      new = b""
      if not isinstance(e, ConnectionError):  # keepalive's: no answer, no way
        why = f"no answer for {self._timeout:g} s"
    heard += new
    while b"\n" in heard:
      line, _, rest = heard.partition(b"\n")
      heard[:] = rest
      self._hear(index, hosts.parse(line) or {"is": "noise"})
    if not new:
      self._ready.unregister(connection)
      if index not in self._left:
        self._decide({"index": index, "line": why, "code": LOST, "lost": True})

  def _hear(self, index, message):
    kind = message["is"]
    if kind == "verdict":
      self._end_by(message)
    elif kind == "done":
      self._left.update(self._peers)
      self._all_left.set()
    elif self._index:  # of its own main thread: process 0 decides
      hosts.send(self._peers[0], message)
    elif kind == "goodbye":
      self._left.add(index)
      if len(self._left) == len(self._names):
        self._tell({"is": "done"})
        self._all_left.set()
    elif kind == "failed" and index not in self._failed:
      order = len(self._failed)
      self._failed[index] = {**message, "index": index, "order": order}
      everyone = len(self._failed) + len(self._left) == len(self._names)
      self._decide_at = time.monotonic() + (0 if everyone else _ECHO)

  def _decide(self, verdict):
    """Ends the run; a process but 0 does so when it has lost process 0."""
    if self._index == 0:
      self._tell({**verdict, "is": "verdict", "failed": [*self._failed]})
      verdict = {**verdict, "failed": [*self._failed]}
    self._end_by(verdict)

  def _tell(self, message):
    for connection in self._peers.values():
      hosts.send(connection, message)

  def _end_by(self, verdict):
    """Says whose end this is and ends; unless it has to say so itself."""
    if not verdict.get("lost") and self._index in verdict.get("failed", []):
      if self._index == 0:
        self._drain()
      self._own_error.set()
      threading.Event().wait()  # for the main thread to end the process
    terminal = _silence_jax()
    name, line = self._names[verdict["index"]], verdict["line"]
    what = f"is gone ({line})" if verdict.get("lost") else f"ended: {line}"
    first = "mend that, then " if verdict["code"] == 2 else ""
    line = (
      f"stopped: {name} {what}; {self._look_up_saved()}{first}the same command "
      "goes on, also with another number of processes\n"
    )
    os.write(terminal, line.encode())
    if self._index == 0:
      self._drain()
    self.end(verdict["code"])

  def _look_up_saved(self) -> str:
    said: list[str] = []

    def look():
      assert self._say_saved
      said.append(f"{self._say_saved()}; ")

    if self._say_saved:
      thread = threading.Thread(target=look, daemon=True)
      thread.start()
      thread.join(_SAYING)
    return "".join(said)

  def _drain(self):
    """Lets the others end first: a reset could overtake what they were told."""
    end = time.monotonic() + _DRAIN
    for connection in self._peers.values():
      try:
        connection.settimeout(max(0.01, end - time.monotonic()))
        while connection.recv(2**16):
          connection.settimeout(max(0.01, end - time.monotonic()))
      except OSError:
        pass


def _silence_jax() -> int:
  """Keeps JAX from ending this process its way; returns where stderr went.

  When process 0 is lost, a thread of JAX's prints a trace of C++ and aborts. It
  cannot be told otherwise (JAX 0.10: its callback is not callable from Python),
  so its words go nowhere and in place of aborting it waits for the end.
  """
  terminal = os.dup(2)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  _handle_abort("pause")
  return terminal


def _handle_abort(name: str) -> None:
  """Has abort() call a function of the C library, with the signal's number."""
  library = ctypes.CDLL(None)
  function = ctypes.cast(library[name], ctypes.c_void_p)
  library.signal(ctypes.c_int(signal.SIGABRT), function)


def _keep_alive(connection, timeout):
  """Has the kernel ask every sixth of `timeout` whether the other is there."""
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  pause = max(1, round(timeout / 6))
  options = {
    "TCP_KEEPIDLE": pause,
    "TCP_KEEPINTVL": pause,
    "TCP_KEEPCNT": 5,
    # What was sent and not confirmed gives up as soon; in milliseconds.
    "TCP_USER_TIMEOUT": round(1000 * timeout),
  }
  for name, value in options.items():
    if hasattr(socket, name):  # not every system has all of them
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
