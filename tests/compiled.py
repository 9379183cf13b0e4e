"""One cache of compiled programs for all processes of a test run.

A tiny run is mostly compilation, and many tests have the same programs.
"""

import copy
import os
import tempfile
from pathlib import Path

# Kept from one run to the next; `make clean` removes it.
FOLDER = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
ENVIRONMENT = {
  "JAX_COMPILATION_CACHE_DIR": str(FOLDER),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def use() -> None:
  """Sets the variables that JAX reads when it is imported."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def write_whole() -> None:
  """Makes JAX write entries whole or not at all.

  It writes them in place: a process that is killed, or another one that reads
  at that moment, would find half of one.
  """
  from jax._src.lru_cache import LRUCache

  put = LRUCache.put

  def put_whole(self, key, value):
    with tempfile.TemporaryDirectory(dir=self.path) as folder:
      part = copy.copy(self)
      part.path = Path(folder)
      put(part, key, value)
      for file in part.path.iterdir():
        file.replace(self.path / file.name)

  LRUCache.put = put_whole
