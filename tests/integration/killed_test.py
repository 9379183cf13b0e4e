"""What a kill leaves of files that appear whole or not at all: see crashes.py.

For checkpoints see checkpoint_test.py, for downloads fetch_test.py.
"""

import os
import shutil

import crashes
import pytest
from random_models import random_weights

from vit_jax import pretrained
from vit_jax.tools.export import export

_VARIANT = "ViT-w16d1m24h2_8"


def _read(path):
  """Returns {name: content} of a file or of a folder."""
  files = [path] if path.is_file() else path.rglob("*")
  return {f.relative_to(path): f.read_bytes() for f in files if f.is_file()}


def _kill_everywhere(tmp_path, write):
  """Returns what `write` makes of a path, and a folder left without it.

  Wherever it is killed, all of it is there or nothing.
  """
  root = tmp_path / "root"
  root.mkdir()
  with crashes.watch(root, tmp_path / "copies") as moments:
    write(str(root / "out"))
  expected = _read(root / "out")
  absent = [m for m in moments if not (m.folder / "out").exists()]
  assert len(absent) > 1
  for moment in moments:
    if moment not in absent:
      assert _read(moment.folder / "out") == expected, moment.next
  return expected, absent[-1].folder


@pytest.mark.parametrize("to", pretrained.FORMATS)
def test_weights_are_whole_or_not_there(to, tmp_path, monkeypatch):
  weights = random_weights(_VARIANT)
  expected, left = _kill_everywhere(
    tmp_path, lambda out: pretrained.write(weights, out, to)
  )
  if to != "orbax":  # there the next one stops at what is left
    root = tmp_path / "root"
    shutil.rmtree(root)
    shutil.copytree(left, root)
    monkeypatch.setattr(os, "getpid", lambda: 1)  # another process
    pretrained.write(weights, str(root / "out"), to)
    assert _read(root / "out") == expected


@pytest.mark.ci
def test_an_export_is_whole_or_not_there(tmp_path):
  source = tmp_path / "weights"
  pretrained.write(random_weights(_VARIANT), str(source), "orbax")
  expected, left = _kill_everywhere(
    tmp_path, lambda out: export(str(source), out, "stablehlo")
  )
  # What is left in the way of the next export, of whatever process.
  out = left / "out"
  export(str(source), str(out), "stablehlo")
  assert _read(out).keys() == expected.keys()
