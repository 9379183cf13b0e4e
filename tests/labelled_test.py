"""A data set of one's own images: labels, parts, twins, mistakes."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image
from tiny_runs import REPO

from vit_jax import data, datasets
from vit_jax.data import labelled, near_duplicates
from vit_jax.errors import UserError


def _image(seed, size=(40, 32)):
  """A smooth random picture: no two are alike."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 255, (5, 5, 3)).astype(np.uint8)
  return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def _make(root, count, bad=()):
  """Writes images and labels; image i is "a/i.jpg", a cat if i is odd."""
  (root / "images" / "a").mkdir(parents=True)
  rows = ["image,label,confidence"]
  for i in range(count):
    _image(i).save(root / "images" / "a" / f"{i}.jpg", quality=90)
    rows.append(f"a/{i}.jpg,{'cat' if i % 2 else 'dog'},0.9")
    rows.append(f"a/{i}.jpg,pet,{i / count}")
  for i in bad:
    (root / "images" / "a" / f"{i}.jpg").write_bytes(b"no image")
  (root / "labels.csv").write_text("\n".join(rows))


def _build(root, **options):
  options = {"workers": 1, "data_dir": str(root / "data")} | options
  return datasets.build(
    "mine",
    images=str(options.pop("images", root / "images")),
    labels=str(options.pop("labels", root / "labels.csv")),
    **options,
  )


def _read_all(root, split="train"):
  """Returns [(image size, labels)] of all examples."""
  source = data.get_source("mine", split, str(root / "data"))
  found = []
  for i in range(source.num_examples):
    labels, size = source.check_example(i)
    found.append((size, labels))
  return source, found


def test_a_folder_becomes_a_data_set(tmp_path):
  _make(tmp_path, 30, bad=[7])
  (tmp_path / "images" / "a" / "nobody.jpg").write_bytes(b"")
  report = _build(tmp_path, min_confidence=0.5, holdout=0.3)
  assert report["unreadable"] == ["a/7.jpg"]
  assert report["without labels"] == ["a/nobody.jpg"]
  assert report["images"] == 31
  assert report["train"] + report["test"] == 29
  assert 2 <= report["test"] <= 16
  train, examples = _read_all(tmp_path)
  assert train.class_names == ["cat", "dog", "pet"]
  assert (train.multilabel, train.max_labels) == (True, 2)
  examples += _read_all(tmp_path, "test")[1]
  assert {size for size, _ in examples} == {(32, 40)}
  # Odd ones but the bad one are cats; half of all are sure to be pets.
  kinds = [tuple(labels) for _, labels in examples]
  assert sum(0 in k for k in kinds) == 14
  assert sum(1 in k for k in kinds) == 15
  assert sum(2 in k for k in kinds) == 15
  with pytest.raises(UserError, match="nothing is overwritten"):
    _build(tmp_path)


def test_tar_and_parquet_and_json_lines(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  _make(tmp_path, 6)
  other = tmp_path / "other"
  other.mkdir()
  files = sorted((tmp_path / "images" / "a").iterdir())
  with tarfile.open(other / "0.tar", "w") as archive:
    for file in files[:3]:
      archive.add(file, f"a/{file.name}")
  rows = {
    "name": [f"a/{file.name}" for file in files[3:]],
    "image": [file.read_bytes() for file in files[3:]],
  }
  parquet.write_table(pyarrow.table(rows), other / "1.parquet")
  labels = tmp_path / "labels.jsonl"
  labels.write_text(
    "\n".join(
      json.dumps({"image": f"a/{i}.jpg", "labels": ["x", f"y{i}"]})
      for i in range(6)
    )
  )
  report = _build(tmp_path, images=other, labels=labels)
  assert report["train"] == 6
  source, examples = _read_all(tmp_path)
  assert source.class_names == ["x", *(f"y{i}" for i in range(6))]
  assert sorted(labels for _, labels in examples) == [
    [0, i + 1] for i in range(6)
  ]


def test_webp_is_encoded_anew_without_loss(tmp_path):
  (tmp_path / "images").mkdir()
  picture = _image(1)
  picture.save(tmp_path / "images" / "1.webp", lossless=True)
  (tmp_path / "labels.csv").write_text("image,label\n1.webp,x\n")
  _build(tmp_path)
  source = data.get_source("mine", "train", str(tmp_path / "data"))
  encoded = source.parse_image(source.read([0])[0]).numpy()
  found = Image.open(io.BytesIO(encoded))
  assert found.format == "PNG"
  np.testing.assert_array_equal(np.asarray(found), np.asarray(picture))


# --- twins ---


def _encode(image, quality=60):
  out = io.BytesIO()
  image.save(out, "JPEG", quality=quality)
  return Image.open(io.BytesIO(out.getvalue()))


_CHANGES = {
  "the same": lambda x: x,
  "smaller": lambda x: x.resize((x.width * 2 // 3, x.height * 2 // 3)),
  "larger": lambda x: x.resize((x.width * 2, x.height * 2)),
  "encoded anew": _encode,
  "mirrored": lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
  "cropped": lambda x: x.crop((3, 2, x.width - 1, x.height - 3)),
  "darker": lambda x: x.point(lambda v: int(0.7 * v)),
  "all of it": lambda x: _encode(
    x.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((2, 0, x.width, x.height))
  ),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_twins_are_found(change):
  tests = [(str(i), _image(i, (96, 80))) for i in range(40)]
  index = near_duplicates.Index(tests)
  twins = [index.find(_CHANGES[change](image)) for _, image in tests]
  found = [
    twin is not None and twin.name == name
    for twin, (name, _) in zip(twins, tests, strict=True)
  ]
  assert sum(found) >= 39


def test_others_are_no_twins():
  index = near_duplicates.Index((str(i), _image(i)) for i in range(100))
  assert not any(index.find(_image(i)) for i in range(1000, 1200))
  assert near_duplicates.Index([]).find(_image(0)) is None
  flat = Image.new("RGB", (40, 32), (90, 90, 90))
  assert index.find(flat) is None


def test_a_build_leaves_twins_out(tmp_path):
  data.prepare("digits", str(tmp_path / "data"))
  source = data.get_source("digits", "test[:3]", str(tmp_path / "data"))
  _make(tmp_path, 5)
  for i in range(2):
    encoded = source.parse_image(source.read([i])[0]).numpy()
    digit = Image.open(io.BytesIO(encoded)).convert("RGB").resize((64, 64))
    digit.save(tmp_path / "images" / "a" / f"{i}.jpg", quality=80)
  report = _build(tmp_path, against=["digits:test[:3]"])
  assert [(name, twin) for name, twin, _ in report["twins"]] == [
    ("a/0.jpg", "digits:test[:3]:0"),
    ("a/1.jpg", "digits:test[:3]:1"),
  ]
  assert report["train"] == 3


# --- going on, and mistakes ---


def test_a_killed_build_goes_on(tmp_path, monkeypatch):
  count = 2400
  _make(tmp_path, count)
  command = [sys.executable, "-m", "vit_jax", "data", "build", "mine"]
  command += [f"--images={tmp_path}/images", f"--labels={tmp_path}/labels.csv"]
  command += [f"--data_dir={tmp_path}/data", "--workers=1"]
  environment = os.environ | {"PYTHONPATH": str(REPO)}
  process = subprocess.Popen(
    command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
  )
  partial = tmp_path / "data" / "mine" / "1.0.0.building"
  deadline = time.monotonic() + 120
  while not list(partial.glob("part-*.json")):
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.05)
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  done = {file: file.stat().st_mtime_ns for file in partial.glob("*.json")}
  assert 0 < len(done) < 3
  with pytest.raises(UserError, match="a build of other images"):
    _build(tmp_path, holdout=0.5)
  written = []
  write_part = labelled._write_part
  monkeypatch.setattr(
    labelled,
    "_run_parts",
    lambda plan, data_dir, parts, workers: (
      labelled._start_worker(plan, near_duplicates.Index([])),
      [written.append(p.number) or write_part(p) for p in parts],
    ),
  )
  report = _build(tmp_path)
  assert len(written) == 3 - len(done)
  assert report["train"] == count
  assert not partial.exists()
  assert data.get_source("mine", "train", str(tmp_path / "data")).num_examples


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("image,class\na.jpg,x\n", "must name the columns image, label"),
    ("image,label\na.jpg,\n", "line 2: a field is empty"),
    ("image,label,confidence\na.jpg,x,much\n", "'much' is no number"),
    ("image,label\na.jpg,dgo\n", "unknown class 'dgo'; did you mean 'dog'"),
    ("image,label\n", "has no labels"),
  ],
)
def test_bad_labels(tmp_path, text, words):
  (tmp_path / "classes.txt").write_text("cat\ndog\nx\n")
  file = tmp_path / "labels.csv"
  file.write_text(text)
  with pytest.raises(UserError, match=words) as error:
    labelled.read_labels(file, str(tmp_path / "classes.txt"), 0.0)
  assert str(file) in str(error.value)


def test_other_mistakes(tmp_path):
  _make(tmp_path, 3)
  (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
  for options, words in (
    ({"classes": str(tmp_path / "classes.txt")}, "'cat' is there twice"),
    ({"images": tmp_path / "no"}, "does not exist"),
    ({"images": tmp_path / "labels.csv"}, "has no images"),
    ({"labels": tmp_path / "no.csv"}, "cannot be read"),
    ({"against": ["digits"]}, "give DATASET:SPLIT"),
    ({"holdout": 1.5}, "--holdout is 1.5"),
  ):
    with pytest.raises(UserError, match=words):
      _build(tmp_path, **options)
  assert not (tmp_path / "data").exists()
  (tmp_path / "labels.csv").write_text("image,label\nother.jpg,x\n")
  with pytest.raises(UserError, match="3 have no labels"):
    _build(tmp_path)
