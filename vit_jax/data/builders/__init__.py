"""The project's TFDS builders, one module per data set.

`digits.py` has the class `Digits` of the data set `digits`; a new file adds a
data set.
"""

import importlib
import pkgutil


def names() -> list[str]:
  """Returns the names of the built-in data sets."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str):
  """Imports the builder class of one of `names()`, which registers it."""
  module = importlib.import_module(f"{__name__}.{name}")
  return getattr(module, "".join(part.capitalize() for part in name.split("_")))
