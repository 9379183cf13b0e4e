"""Starts commands again and again, without importing again what all import.

`python forker.py FOLDER` reads a command's arguments a line, as JSON, forks it,
and prints its process id. FOLDER/PID.log has what it says, FOLDER/PID.code how
it ended. It is a process like any other, for the kernel and for its run.
"""

import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path


def main(folder):
  # What takes long; no backend of JAX is there before the fork.
  from vit_jax import data, train  # noqa: F401
  from vit_jax.__main__ import main as run

  signal.signal(signal.SIGCHLD, lambda *_: reap(folder))
  for line in sys.stdin:
    pid = os.fork()
    if pid:
      print(pid, flush=True)
      continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(folder / f"{os.getpid()}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.getLogger().handlers.clear()  # a command sets up its own
    sys.exit(run(json.loads(line)))


def reap(folder):
  """Writes down how those that have ended did."""
  with contextlib.suppress(ChildProcessError):
    while (ended := os.waitpid(-1, os.WNOHANG))[0]:
      file = folder / f"{ended[0]}.tmp"
      file.write_text(str(os.waitstatus_to_exitcode(ended[1])))
      file.rename(file.with_suffix(".code"))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
