"""A measurement in a process of its own: arguments and result are JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vit_jax
from vit_jax.errors import UserError

# JAX takes three quarters of a GPU's memory for itself unless told otherwise.
_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}


def call(module: str, spec: dict[str, Any]) -> dict[str, Any]:
  """Runs `python -m module`; returns the JSON object that it prints last.

  Returns:
    What its `report` printed; {"error": one line} if something went wrong.
  """
  root = str(Path(vit_jax.__file__).parents[1])
  path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
  done = subprocess.run(
    [sys.executable, "-m", module, json.dumps(spec)],
    env={**_MEMORY, **os.environ, "PYTHONPATH": path},
    capture_output=True,
    text=True,
  )
  try:
    return json.loads(done.stdout.splitlines()[-1])
  except (IndexError, json.JSONDecodeError):
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"error": f"ended with code {done.returncode}: {last[:300]}"}


def report(run: Callable[..., dict[str, Any]]) -> None:
  """Is the main program of a process that `call` starts."""
  try:
    result = run(**json.loads(sys.argv[1]))
  except UserError as e:
    result = {"error": str(e)}
  except Exception as e:  # of any library; the other process has no traceback
    lines = str(e).strip().splitlines() or [type(e).__name__]
    result = {"error": f"{type(e).__name__}: {lines[0][:300]}"}
    if any(x in str(e) for x in ("out of memory", "RESOURCE_EXHAUSTED")):
      result = {"error": "out of memory"}
  print(json.dumps(result))
