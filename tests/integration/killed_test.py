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


@pytest.mark.parametrize("to", pretrained.FORMATS)
def test_weights_are_whole_or_not_there(to, tmp_path, monkeypatch):
  weights = random_weights(_VARIANT)
  root = tmp_path / "root"
  root.mkdir()
  with crashes.watch(root, tmp_path / "copies") as moments:
    pretrained.write(weights, str(root / "out"), to)
  expected = _read(root / "out")
  absent = [m for m in moments if not (m.folder / "out").exists()]
  assert len(absent) > 1
  for moment in moments:
    if moment not in absent:
      assert _read(moment.folder / "out") == expected, moment.next
  if to != "orbax":  # there the next one stops at what is left
    shutil.rmtree(root)
    shutil.copytree(absent[-1].folder, root)
    monkeypatch.setattr(os, "getpid", lambda: 1)  # another process
    pretrained.write(weights, str(root / "out"), to)
    assert _read(root / "out") == expected


@pytest.mark.ci
def test_an_export_is_whole_or_not_there(tmp_path):
  source, root = tmp_path / "weights", tmp_path / "root"
  pretrained.write(random_weights(_VARIANT), str(source), "orbax")
  root.mkdir()
  with crashes.watch(root, tmp_path / "copies") as moments:
    export(str(source), str(root / "out"), "stablehlo")
  expected = _read(root / "out")
  absent = [m for m in moments if not (m.folder / "out").exists()]
  assert len(absent) > 1
  for moment in moments:
    if moment not in absent:
      assert _read(moment.folder / "out") == expected, moment.next
  # What is left in the way of the next export, of whatever process.
  out = absent[-1].folder / "out"
  export(str(source), str(out), "stablehlo")
  assert _read(out).keys() == expected.keys()
