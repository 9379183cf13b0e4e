"""Measurements in a child process."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from vit_jax.errors import one_line


def call(run: Callable[..., dict], spec: dict[str, Any]) -> dict[str, Any]:
  """Returns `run(**spec)` of a child process, or {"error": one line}."""
  # By default, JAX would use at most three quarters of a GPU's memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  context = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(1, mp_context=context) as pool:
    try:
      return pool.submit(_try, run, spec).result()
    except BrokenProcessPool:
      return {"error": "the process died"}


def _try(run, spec):
  try:
    return run(**spec)
  except Exception as e:  # of any library; some cannot be pickled
    if any(x in str(e) for x in ("out of memory", "RESOURCE_EXHAUSTED")):
      return {"error": "out of memory"}
    return {"error": one_line(e)}
