"""Atomic writes and JSON files."""

import contextlib
import os
import pathlib
import re

import pytest
from etils import epath

from vit_jax import files
from vit_jax.errors import UserError

_each_kind = pytest.mark.parametrize("kind", [pathlib.Path, epath.Path])


@_each_kind
def test_a_failed_write_changes_nothing(kind, tmp_path):
  path = kind(tmp_path) / "x.json"
  files.write_json(path, {"a": 1})
  with contextlib.suppress(KeyError), files.atomic_file(path) as partial:
    partial.write_text("half")
    raise KeyError
  with contextlib.suppress(KeyError), files.atomic_folder(path) as partial:
    (partial / "half").write_text("half")
    raise KeyError
  assert [f.name for f in tmp_path.iterdir()] == ["x.json"]
  assert files.read_json(path) == {"a": 1}


@_each_kind
def test_contents_are_on_the_disk_before_the_name(kind, tmp_path, monkeypatch):
  """Else a machine that loses power may leave an empty file of that name."""
  seen = []
  monkeypatch.setattr(
    os, "fsync", lambda _: seen.append({*os.listdir(tmp_path)})
  )
  files.write_json(kind(tmp_path) / "x.json", {"a": 1})
  with files.atomic_folder(kind(tmp_path) / "y") as partial:
    (partial / "z").touch()
  assert seen == [{"x.json.tmp"}, {"x.json", ".y.partial"}]


@_each_kind
def test_a_folder_appears_whole_whatever_a_kill_has_left(kind, tmp_path):
  left = tmp_path / ".out.partial"
  left.mkdir()
  (left / "old").touch()
  with files.atomic_folder(kind(tmp_path) / "out") as partial:
    (partial / "new").touch()
    assert not (tmp_path / "out").exists()
  assert [f.name for f in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (None, "cannot be read: No such file or directory; mend it"),
    (b'{\n"a": }', r"is corrupt: Expecting value: line 2 column 6.*; mend it"),
    (b"\xff", "is corrupt: 'utf-8' codec can't decode.*; mend it"),
    (b"[1]", "is corrupt: it holds no JSON object; mend it"),
  ],
)
def test_json_that_cannot_be_read_is_one_line(content, words, tmp_path):
  file = tmp_path / "x.json"
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(UserError, match=f"^{re.escape(str(file))} {words}$"):
    files.read_json(file, "mend it")


def test_lines_that_are_corrupt_are_counted_and_a_torn_one_is_ignored(tmp_path):
  file = tmp_path / "metrics.jsonl"
  assert files.read_metrics(tmp_path) == ([], 0)
  file.write_bytes(
    b'{"step": 1}\n\xff{\n[1]\n{"a": 2}\n{"step": 2, "a": "b"}\n'
    b'{"step": 4, "a": NaN}\n{"step": 3}\n{"step": 5}'
  )
  lines, corrupt = files.read_metrics(tmp_path)
  assert [values["step"] for values in lines] == [1, 3, 4]
  assert corrupt == 4
