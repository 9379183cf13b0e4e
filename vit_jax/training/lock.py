"""The lock of a run folder: only one training may write to it at a time.

The file `lock` names the owner, and is empty when there is none. The owner also
holds an flock, which ends with its process: a second run is refused. Where
there is no flock, in a bucket and on some disks that machines share, nothing
tells an owner that lives from one that was killed. There the later run takes
over, and the earlier one stops before it saves again.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator

from vit_jax.errors import RunStopped, UserError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(workdir) -> Iterator["Lock"]:
  """Holds the lock of a run folder, an epath.Path; makes the folder.

  Raises:
    UserError: another process trains there.
    OSError: the folder cannot be made or written.
  """
  is_new = not workdir.exists()
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    if "://" not in str(workdir):
      file = stack.enter_context((workdir / "lock").open("a"))
      _flock(file.fileno(), workdir)
    lock = Lock(workdir / "lock")
    try:
      yield lock
    finally:
      lock.release()
      if is_new and [f.name for f in workdir.iterdir()] == ["lock"]:
        workdir.rmtree()


def _flock(descriptor, workdir):
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    owner = _describe(read_owner(workdir / "lock"))
    raise UserError(
      f"{owner} trains in {workdir}; wait for it, stop it, or choose another "
      "--workdir"
    ) from None
  except OSError as e:
    log.debug("no flock in %s: %s", workdir, e)


class Lock:
  """A lock that is held.

  Attributes:
    token: a text that no other owner of any lock has.
  """

  def __init__(self, file):
    """Writes the owner's name."""
    self.token = uuid.uuid4().hex
    self._file = file
    owner = {"host": socket.gethostname(), "process": os.getpid()}
    file.write_text(json.dumps(owner | {"token": self.token}))

  def check(self) -> None:
    """Raises a RunStopped if another process has taken the lock."""
    owner = read_owner(self._file)
    if owner and owner["token"] != self.token:
      raise RunStopped(
        f"{_describe(owner)} has taken over {self._file.parent}; this process "
        "has stopped writing there"
      )

  def release(self) -> None:
    """Gives the lock back, unless another process has taken it."""
    with contextlib.suppress(OSError, RunStopped):
      self.check()
      self._file.write_text("")


def read_owner(file) -> dict | None:
  """Returns who holds or held the lock of this file, None for nobody."""
  try:
    return json.loads(file.read_text()) or None
  except (FileNotFoundError, ValueError):  # an empty one names nobody
    return None


def read_token(workdir) -> str | None:
  """Returns the token of the lock's owner, as seen from another process.

  None if there is none for half a minute: file servers are not always quick.
  """
  for _ in range(30):
    owner = read_owner(workdir / "lock")
    if owner:
      return owner["token"]
    time.sleep(1)
  return None


def _describe(owner) -> str:
  if owner is None:
    return "another process"
  return f"process {owner['process']} on {owner['host']}"
