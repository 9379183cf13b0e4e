"""The lock of a run folder: only one training may write to it at a time.

The file `lock` names the owner, and is empty when there is none. On a local
disk the owner also holds an flock, which ends with its process. The flock may
not be visible on other machines, and buckets have none. So the owner also
rewrites the file as a heartbeat; an owner without it is considered dead.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from vit_jax.errors import RunStopped, UserError, os_errors

log = logging.getLogger(__name__)

_BEAT = 15  # seconds between two heartbeats
_PATIENCE = 4 * _BEAT


@contextlib.contextmanager
def hold(workdir) -> Iterator["Lock"]:
  """Holds the lock of a run folder, an epath.Path; makes the folder.

  Raises:
    UserError: another process trains there.
    OSError: the folder cannot be made or written.
  """
  with os_errors():
    is_new = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    lock = Lock(workdir / "lock")
  try:
    yield lock
  finally:
    lock.release()
    if is_new and [f.name for f in workdir.iterdir()] == ["lock"]:
      workdir.rmtree()


class Lock:
  """A lock that is held; its heartbeat runs in a thread."""

  def __init__(self, file):
    """Takes the lock, or raises a UserError that names its owner."""
    self.token = uuid.uuid4().hex  # unique to this owner
    self._file, self._beats, self._taken_by = file, 0, None
    self._descriptor, is_flocked = None, False
    if "://" not in str(file):
      self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
      try:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_flocked = True
      except BlockingIOError:
        os.close(self._descriptor)
        raise _is_in_use(file, read_owner(file)) from None
      except OSError as e:  # not supported by this disk
        log.debug("no flock on %s: %s", file, e)
    if owner := read_owner(file):
      process = owner["process"]
      # On this machine the flock, or else the process ID, shows if it is alive.
      if owner["host"] != socket.gethostname() or not (
        is_flocked or process == os.getpid() or not is_alive(process)
      ):
        _wait_for_heartbeat(file, owner)
    self._write()
    self._released = threading.Event()
    self._thread = threading.Thread(target=self._beat, daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises a RunStopped if another process has taken over the lock."""
    if self._taken_by:
      raise RunStopped(
        f"{_describe(self._taken_by)} has taken over {self._file.parent}; this "
        "process has stopped writing there"
      )

  def release(self) -> None:
    self._released.set()
    self._thread.join()
    if not self._taken_by:
      with contextlib.suppress(OSError), os_errors():
        self._file.write_text("")
    if self._descriptor is not None:
      os.close(self._descriptor)

  def _write(self):
    self._beats += 1
    owner = {"host": socket.gethostname(), "process": os.getpid()}
    owner |= {"token": self.token, "beat": self._beats}
    if self._descriptor is None:
      self._file.write_text(json.dumps(owner))
    else:  # in place, of fixed length, so that no reader gets half of it
      os.pwrite(self._descriptor, json.dumps(owner).ljust(512).encode(), 0)

  def _beat(self):
    while not self._released.wait(_BEAT):
      try:
        owner = read_owner(self._file)
        if owner and owner["token"] != self.token:
          self._taken_by = owner
          return
        self._write()
      except Exception as e:  # storage may fail for a while
        log.debug("no heartbeat: %s", e)


def read_owner(file) -> dict | None:
  """Returns the present or past owner of this file's lock, or None."""
  try:
    return json.loads(file.read_text()) or None
  except (FileNotFoundError, ValueError):  # an empty one has no owner
    return None


def read_token(workdir) -> str | None:
  """Returns the token of the lock's owner, as seen from another process.

  None if there is no owner for half a minute, because file servers may be slow.
  """
  for _ in range(30):
    if owner := read_owner(workdir / "lock"):
      return owner["token"]
    time.sleep(1)
  return None


def _wait_for_heartbeat(file, owner):
  """Returns once an owner has missed its heartbeats; raises if it is alive."""
  log.info(
    f"{_describe(owner)} held {file.parent}: waiting up to {_PATIENCE} s for a "
    "heartbeat, in case it still runs"
  )
  end = time.monotonic() + _PATIENCE
  while time.monotonic() < end:
    time.sleep(1)
    found = read_owner(file)
    if found and found != owner:
      raise _is_in_use(file, found)


def _is_in_use(file, owner) -> UserError:
  return UserError(
    f"{_describe(owner)} trains in {file.parent}; wait for it, stop it, or "
    "choose another --workdir"
  )


def _describe(owner) -> str:
  if not owner:
    return "another process"
  return f"process {owner['process']} on {owner['host']}"


def is_alive(process: int) -> bool:
  """Returns whether a process of this machine runs."""
  try:
    os.kill(process, 0)
  except OSError as e:
    return isinstance(e, PermissionError)  # it runs as another user
  return True
