"""Atomic writes, JSON files and run folders.

Paths are pathlib's, or epath's for buckets.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from vit_jax.errors import UserError, os_errors


@contextlib.contextmanager
def atomic_file(path) -> Iterator[Any]:
  """Yields a temporary path, whose file then replaces `path`.

  If the block raises, `path` stays as it was. For a file in a bucket the
  temporary path is local, and its file is uploaded.
  """
  if is_remote(path):
    with tempfile.TemporaryDirectory(prefix="vit_jax-") as folder:
      file = pathlib.Path(folder, path.name)
      yield file
      upload(file, path)
    return
  partial = path.with_name(path.name + ".tmp")
  try:
    yield partial
    _sync(partial)
    partial.replace(path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def atomic_folder(path) -> Iterator[Any]:
  """Yields a new folder beside `path`, which is then renamed to `path`.

  If the block raises, nothing is left. For a folder in a bucket it yields a
  local one, and uploads its files in the order in which they were written.
  Write last the file that marks the folder as complete.
  """
  if is_remote(path):
    with tempfile.TemporaryDirectory(prefix="vit_jax-") as folder:
      yield pathlib.Path(folder)
      upload(folder, path)
    return
  partial = path.with_name(f".{path.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)  # of a killed process
  partial.mkdir(parents=True)
  try:
    yield partial
    for file in pathlib.Path(partial).rglob("*"):  # epath's cannot
      if file.is_file():
        _sync(file)
    partial.replace(path)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def upload(source, target) -> None:
  """Copies a local file, or the files in a folder, to an epath in a bucket.

  Objects appear only when complete; the file written last is copied last.
  """
  inside = [p for p in pathlib.Path(source).rglob("*") if p.is_file()]
  for file in sorted(inside, key=lambda p: p.stat().st_mtime_ns) or [source]:
    name = file.relative_to(source)
    with os_errors(), open(file, "rb") as f, (target / name).open("wb") as out:
      out.write(b"")  # TensorFlow makes a file at the first write
      shutil.copyfileobj(f, out, 1 << 20)


def write_atomically(path, text: str) -> None:
  """Writes a UTF-8 file atomically."""
  with atomic_file(path) as partial:
    partial.write_text(text, encoding="utf-8")


def write_json(path, value) -> None:
  """Writes a value as JSON, see `write_atomically`."""
  write_atomically(path, json.dumps(value, indent=1) + "\n")


def read_json(path, advice: str = "restore it from a copy") -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    UserError: it cannot be read, or holds no JSON object. The message ends in
      `advice`.
  """
  try:
    with os_errors():
      value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as e:
    words = e.strerror or e
    raise UserError(f"{path} cannot be read: {words}; {advice}") from e
  except ValueError as e:  # which names line and column
    raise UserError(f"{path} is corrupt: {e}; {advice}") from e
  if not isinstance(value, dict):
    raise UserError(f"{path} is corrupt: it holds no JSON object; {advice}")
  return value


def open_parts(folder, about: dict[str, Any], what: str) -> None:
  """Makes the folder of a command's unfinished parts, or checks existing parts.

  Args:
    folder: beside the command's --out.
    about: the settings that the parts depend on, of JSON types.
    what: the content of the parts, for the message.

  Raises:
    UserError: it has parts with other settings.
  """
  file = folder / "about.json"
  if not file.exists():
    folder.mkdir(parents=True, exist_ok=True)
    if any(path.suffix == ".npz" for path in folder.iterdir()):
      raise UserError(
        f"{folder} has unfinished {what} without about.json, which describes "
        "them; remove the folder"
      )
    write_json(file, about)
  old = read_json(file, "remove the folder")
  other = [key for key in about if old.get(key) != about[key]]
  if other:
    raise UserError(
      f"{folder} has unfinished {what} with other {', '.join(other)}; finish "
      "them with the same command, remove the folder, or choose another --out"
    )


def has_run(folder) -> bool:
  """Returns whether a folder has a config.json, as run folders do.

  Raises:
    UserError: the folder cannot be read.
  """
  try:
    with os_errors():
      return (folder / "config.json").exists()
  except OSError as e:
    raise UserError(
      f"{folder} cannot be read: {e.strerror or e}; fix that, or choose "
      "another folder"
    ) from e


class NotOfARun(UserError):
  """A config.json that was not written by this package."""


def read_run(folder, advice: str = "restore it from a copy") -> dict[str, Any]:
  """Returns config.json of a run folder or of a converted checkpoint.

  Raises:
    NotOfARun: it has no configuration of a run.
    UserError: as `read_json`.
  """
  file = folder / "config.json"
  run = read_json(file, advice)
  if not isinstance(run.get("config"), dict):
    raise NotOfARun(f"{file} is not of a run of vit-jax; {advice}")
  return run


def read_metrics(folder) -> tuple[list[dict[str, Any]], int]:
  """Returns the lines of a run's metrics.jsonl, and how many are corrupt.

  Each line has numbers and an integer "step", by which they are sorted. A last
  line without a line break is ignored, because it is still being written or was
  cut off by a kill. A missing file has no lines.
  """
  file = folder / "metrics.jsonl"
  text = file.read_bytes().decode(errors="replace") if file.exists() else ""
  lines = text.split("\n")[:-1]
  found = []
  for line in lines:
    with contextlib.suppress(ValueError, AttributeError):
      values = json.loads(line)
      numbers = all(isinstance(x, int | float) for x in values.values())
      if numbers and isinstance(values.get("step"), int):
        found.append(values)
  found.sort(key=lambda values: values["step"])
  return found, len(lines) - len(found)


def walk(root: str) -> Iterator[str]:
  """Yields the paths of all files below a folder, without a stat of each.

  Raises:
    UserError: a folder that cannot be read, or a link to a folder around it.
  """

  def fail(error):
    raise UserError(
      f"{error.filename}: cannot be read: {error.strerror}"
    ) from error

  if is_remote(root):  # buckets have no links
    for folder, _, files in epath.Path(root).walk():
      yield from (str(folder / name) for name in files)
    return
  for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
    for name in folders:
      link = os.path.join(folder, name)
      if os.path.islink(link):
        target = pathlib.Path(link).resolve()
        around = (pathlib.Path(folder), *pathlib.Path(folder).parents)
        if any(path.resolve().is_relative_to(target) for path in around):
          raise UserError(f"{link}: a link to a folder around it; remove it")
    for name in files:
      yield os.path.join(folder, name)


def make_path(text: str) -> Any:
  """Returns a pathlib.Path, or the epath.Path of a bucket's address."""
  return epath.Path(text) if is_remote(text) else pathlib.Path(text)


def is_remote(path) -> bool:
  """Returns whether a path is in a bucket, such as gs://."""
  return "://" in str(path)


def _sync(file):
  """Flushes a local file to the disk, before it is renamed."""
  with open(file, "rb") as f:
    os.fsync(f.fileno())
