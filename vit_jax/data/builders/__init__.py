"""TFDS builders that come with the project: a module a data set.

`digits.py` holds the class `Digits` of the data set `digits`; to add one, add
a file.
"""

import importlib
import pkgutil


def names() -> list[str]:
  """Returns the names of the data sets that are built in."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str):
  """Imports the builder class of one of `names()`, which registers it."""
  module = importlib.import_module(f"{__name__}.{name}")
  return getattr(module, "".join(part.capitalize() for part in name.split("_")))
