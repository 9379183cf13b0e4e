"""Checks that all processes of a run have the same settings, code and data.

Otherwise they would train a wrong model, or deadlock.
"""

import hashlib
import json
import pathlib
import platform
import socket
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.errors import UserError

_PACKAGES = ("vit_jax", "jax", "jaxlib", "libtpu", "flax", "optax")


def check_same(facts: dict[str, Any]) -> None:
  """Raises unless all processes pass the same facts; all must call it.

  `facts` are {name: value}, compared by their `repr`.

  Raises:
    UserError: on every process; names the first host that differs from
      process 0, and what differs there.
  """
  if jax.process_count() == 1:
    return
  mine = {name: repr(value) for name, value in facts.items()}
  hosts, everyone = zip(*gather([socket.gethostname(), mine]), strict=True)
  for i, other in enumerate(everyone):
    first = everyone[0]
    different = [
      f"{name} is {other.get(name)} there and {first.get(name)} here"
      for name in sorted(first.keys() | other.keys())
      if other.get(name) != first.get(name)
    ]
    if different:
      more = f" and {len(different) - 3} more" if different[3:] else ""
      raise UserError(
        f"process {i} on {hosts[i]} differs from process 0 on {hosts[0]}: "
        f"{'; '.join(different[:3])}{more}; start the same command with the "
        "same files on every host"
      )


def digest_package() -> str:
  """Returns a digest of the package's own source files."""
  folder = pathlib.Path(__file__).parent
  digest = hashlib.sha256()
  for file in sorted(folder.glob("**/*.py")):
    digest.update(str(file.relative_to(folder)).encode())
    digest.update(file.read_bytes())
  return digest.hexdigest()[:12]


def read_versions() -> dict[str, str]:
  """Returns {name: version} of Python and of `_PACKAGES`."""
  versions = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name] = "none"
  return versions


def gather(value) -> list:
  """All-gathers a value of JSON types; returns one for each process."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(data.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]
