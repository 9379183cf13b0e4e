"""Measurements in a child process."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from vit_jax.errors import one_line


def call(
  run: Callable[..., dict], spec: dict[str, Any], timeout: float | None = None
) -> dict[str, Any]:
  """Returns `run(**spec)` of a child process, or {"error": one line}.

  The process is killed after `timeout` seconds; None: never.
  """
  # By default, JAX would use at most three quarters of a GPU's memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=_send, args=(sender, run, spec))
  process.start()
  sender.close()  # otherwise a dead process causes no EOFError
  try:
    if not receiver.poll(timeout):
      return {"error": f"killed after {timeout:.0f} s"}
    return receiver.recv()
  except EOFError:
    return {"error": "the process died"}
  finally:
    process.kill()
    process.join()
    receiver.close()


def _send(sender, run, spec):
  sender.send(_try(run, spec))


def _try(run, spec):
  try:
    return run(**spec)
  except Exception as e:  # of any library; some cannot be pickled
    if any(x in str(e) for x in ("out of memory", "RESOURCE_EXHAUSTED")):
      return {"error": "out of memory"}
    return {"error": one_line(e)}
