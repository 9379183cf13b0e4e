"""Copies of a folder at every moment at which its program may be killed.

A program that is killed leaves its files as they are at that moment. Killing a
process takes seconds and hits a moment by chance; this module runs the program
once, inside the test, and copies its folder before each file operation:

  with crashes.watch(folder, tmp_path / "copies") as moments:
    main(["train", f"--workdir={folder}", ...])
  for moment in moments:
    workdir = shutil.copytree(moment.folder, ...)
    main(["train", f"--workdir={workdir}", ...])  # what a user does next

Python reports file operations to audit hooks (PEP 578). C++ code, such as that
of TensorStore and TensorFlow, does not; the files that it has written are in
the copies of later moments.
"""

import contextlib
import functools
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

# {event: how many of its first arguments are paths}
_EVENTS = {
  "open": 1,
  "os.link": 2,
  "os.mkdir": 1,
  "os.remove": 1,
  "os.rename": 2,  # also of os.replace
  "os.rmdir": 1,
  "os.symlink": 2,
  "os.truncate": 1,
}
# {event: which of its arguments is what its paths are relative to}
_FOLDERS = {
  "os.mkdir": (2,),
  "os.remove": (1,),
  "os.rename": (2, 3),
  "os.rmdir": (1,),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Moment(NamedTuple):
  """What a kill leaves.

  Attributes:
    folder: a copy of the watched folder; do not change it.
    next: the operations that the kill may prevent, such as "os.rename a.tmp a";
      "write NAME" of each file that is half-written; none at the end.
  """

  folder: Path
  next: list[str]

  def is_before(self, operation: str) -> bool:
    """Returns whether one of `next` starts with this."""
    return any(text.startswith(operation) for text in self.next)


@contextlib.contextmanager
def watch(folder, copies):
  """Yields a list that gets a Moment for each change of a folder.

  Before each operation that Python code does to files in the folder, from any
  thread, the folder is copied, unless nothing has changed since the last copy.
  Between two of these copies comes one more, if files were written meanwhile:
  with the first half of what each got.

  Args:
    folder: what to watch; need not exist yet.
    copies: a folder for the copies, not below `folder`.
  """
  watching = _Watch(Path(folder).absolute(), Path(copies).absolute())
  _install()
  _watches.append(watching)
  try:
    yield watching.moments
  finally:
    _watches.remove(watching)
    watching.take()
  assert not watching.errors, watching.errors


_watches = []


@functools.cache
def _install():
  sys.addaudithook(_notify)  # there is no way to remove one


def _notify(event, args):
  if _watches and event in _EVENTS:
    for watching in _watches:
      try:
        watching.notify(event, args)
      except Exception as e:  # would be one of the program
        watching.errors.append(e)


class _Watch:
  def __init__(self, folder, copies):
    self.folder, self.copies = folder, copies
    self.moments, self.errors = [], []
    self._listing = {}
    self._lock = threading.Lock()

  def notify(self, event, args):
    if event == "open" and not args[2] & _WRITES:
      return
    folders = [args[i] for i in _FOLDERS.get(event, ())] + [-1, -1]
    paths = map(_resolve, args[: _EVENTS[event]], folders)
    names = [os.path.relpath(path, self.folder) for path in paths if path]
    if any(name.split(os.sep)[0] != ".." for name in names):
      self.take(" ".join([event, *names]))

  def take(self, *operation):
    """Copies the folder as it is before an operation."""
    # Operations of other threads wait. One that has passed, or one of C++
    # code, may change the folder now; then the copy is made again.
    with self._lock:
      for _ in range(100):
        listing = _list(self.folder)
        if listing == self._listing:
          if self.moments:
            self.moments[-1].next.extend(operation)
          return
        target = self.copies / f"{len(self.moments):04d}"
        with contextlib.suppress(OSError, shutil.Error):
          shutil.copytree(self.folder, target, symlinks=True)
          if _list(self.folder) == listing:
            break
        shutil.rmtree(target, ignore_errors=True)
        time.sleep(0.002)
      else:  # it changes all the time
        return
      if self.moments:
        self._add_half(target)
      self._listing = listing
      self.moments.append(Moment(target, [*operation]))

  def _add_half(self, new):
    """Adds what a kill leaves while files are written, before a copy."""
    old = self.moments[-1].folder
    # A file that was renamed or copied has not been written.
    contents = {path.read_bytes() for path in _files(old)}
    written = {}
    for path in _files(new):
      content = path.read_bytes()
      if len(content) < 2 or content in contents:
        continue
      name = path.relative_to(new)
      before = old / name
      start = before.read_bytes() if before.is_file() else b""
      if start.startswith(content) and start:  # truncated
        continue
      if not content.startswith(start):
        start = b""
      written[name] = content[: (len(start) + len(content)) // 2]
    if not written:
      return
    target = new.with_name(new.name + "-half")
    shutil.copytree(old, target, symlinks=True)
    for name, content in written.items():
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      (target / name).write_bytes(content)
    names = [f"write {name}" for name in sorted(written)]
    self.moments.append(Moment(target, names))


def _resolve(path, folder):
  """Returns a path of an event as an absolute one, None if it has none."""
  if isinstance(path, int):
    return _read_link(path)
  path = os.fsdecode(path)
  if folder >= 0 and not os.path.isabs(path):
    parent = _read_link(folder)
    return parent and os.path.join(parent, path)
  return os.path.abspath(path)


def _read_link(descriptor):
  with contextlib.suppress(OSError):
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _files(folder):
  return [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]


def _list(folder):
  """Returns {path: what changes with it} of a folder and all below it."""
  listing, folders = {}, [folder]
  while folders:
    try:
      with os.scandir(folder := folders.pop()) as entries:
        listing[str(folder)] = True
        for entry in entries:
          stat = entry.stat(follow_symlinks=False)
          is_folder = entry.is_dir(follow_symlinks=False)
          listing[entry.path] = is_folder or (
            stat.st_ino,
            stat.st_size,
            stat.st_mtime_ns,
          )
          if is_folder:
            folders.append(entry.path)
    except FileNotFoundError:
      continue
  return listing
