"""Exceptions whose message is one line for the user, and checks of input."""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator


class UserError(ValueError):
  """Invalid input from the user; commands exit with code 2.

  The message is one line: what was given, what is needed, what to do.
  """


class RunStopped(RuntimeError):
  """A run cannot continue, as on a full disk; commands exit with code 1.

  The message is one line: what happened, when, what is safe, what to do.
  """


# Library -> the extra of setup.py that installs it.
EXTRAS = {
  **dict.fromkeys(
    ("array_record", "clu", "sklearn", "tensorflow", "tensorflow_datasets"),
    "train",
  ),
  "google.cloud.storage": "gcs",
  **dict.fromkeys(("huggingface_hub", "pooch", "requests"), "hub"),
  **dict.fromkeys(("jinja2", "matplotlib"), "figures"),
  "apache_beam": "beam",
  "gradio": "demo",
  "submitit": "sweep",
  **dict.fromkeys(("flatbuffers", "jax2onnx", "onnx", "onnxruntime"), "export"),
  "libtpu": "plan",
  "wandb": "wandb",
  "gcsfs": "train",  # TensorFlow also reads buckets
}


def needs_extra(what: str, library: str, extra: str | None = None) -> UserError:
  """Returns the error for a library of `EXTRAS` that is not installed.

  `extra` installs it and all else that `what` needs; default: see `EXTRAS`.
  """
  return UserError(
    f"{what} needs {library}, which is not installed: "
    f"pip install 'vit_jax[{extra or EXTRAS[library]}]'"
  )


def check_free(path) -> None:
  """Raises a UserError if an output path exists already."""
  if os.path.islink(path) and not os.path.exists(path):
    raise UserError(
      f"{path} is a link to {os.readlink(path)}, which does not exist; remove "
      "the link, or choose another"
    )
  # Paths in buckets are epath.Paths.
  if os.path.lexists(path) or ("://" in str(path) and path.exists()):
    raise UserError(f"{path} exists; nothing is overwritten, choose another")


def check_folder(path, option: str = "--workdir") -> None:
  """Raises a UserError if a local path cannot be or become a folder."""
  for part in (path, *path.parents):
    if os.path.lexists(part) and not os.path.isdir(part):
      what = "broken link" if os.path.islink(part) else "file"
      raise UserError(
        f"{part} is a {what}, not a folder; choose another {option}"
      )


def check_choice(what: str, value, choices: Iterable[str]) -> None:
  """Raises a UserError unless `what`, such as "--to", is one of the choices."""
  choices = list(choices)
  if value not in choices:
    raise UserError(
      f"{what} is {value!r}; choose from {', '.join(choices)}"
      f"{suggest(str(value), choices)}"
    )


def suggest(name: str, choices: Iterable[str]) -> str:
  """Returns "; did you mean 'x'?" for the closest choice, else ""."""
  matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
  return f"; did you mean {matches[0]!r}?" if matches else ""


def one_line(error: BaseException, limit: int = 200) -> str:
  """Returns an exception's message as one line of at most `limit` characters.

  Long messages lose their middle, where paths usually are.
  """
  words = " ".join(str(error).split()) or type(error).__name__
  if len(words) <= limit:
    return words
  half = (limit - 5) // 2
  return f"{words[:half]} ... {words[-half:]}"


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
  """Converts TensorFlow's errors, which paths in buckets raise, to OSErrors."""
  try:
    yield
  except Exception as e:
    if "OpError" not in [base.__name__ for base in type(e).__mro__]:
      raise
    raise OSError(one_line(e)) from e
