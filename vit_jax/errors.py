"""The exceptions that become one clear line for the person at the terminal."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """Something the user gave cannot be used.

  The message is one line: what was given, what is needed, what to do. The
  command line prints it without a traceback and exits with code 2.
  """


class RunStopped(RuntimeError):
  """A run cannot go on: the loss is not finite, the disk is full, ...

  The message is one line as well: what happened, at which step, what is safe,
  what to do. The command line prints it and exits with code 1.
  """


def suggest(name: str, choices: Iterable[str]) -> str:
  """Returns "; did you mean 'x'?" for the closest choice, else ""."""
  matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
  return f"; did you mean {matches[0]!r}?" if matches else ""
