"""TFDS builders that come with the project: a module a data set.

`digits.py` holds the class `Digits` of the data set `digits`; to add one, add
a file.
"""

import importlib
import pkgutil

from vit_jax.errors import UserError, suggest


def names() -> list[str]:
  """Returns the names of the data sets that are built in."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str):
  """Imports the builder class of `name`, which also makes TFDS know it.

  Raises:
    UserError: there is no such module.
  """
  if name not in names():
    raise UserError(
      f"unknown built-in data set {name!r}{suggest(name, names())}; "
      f"there are {', '.join(names())}"
    )
  module = importlib.import_module(f"{__name__}.{name}")
  return getattr(module, "".join(part.capitalize() for part in name.split("_")))
