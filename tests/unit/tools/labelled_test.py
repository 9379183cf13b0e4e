"""A data set of one's own images: labels, parts, twins, mistakes."""

import fcntl
import json
import multiprocessing
import os
import re
import resource
import shutil
import tarfile

import data_build
import numpy as np
import pytest
import tensorflow as tf
from pictures import encode, smooth
from PIL import Image

from vit_jax import data
from vit_jax.__main__ import main
from vit_jax.data import ops, preprocess
from vit_jax.errors import RunStopped, UserError
from vit_jax.tools.build_data import labelled, near_duplicates, own_files


def _make(root, count, bad=()):
  """Writes images and labels; image i is "a/i.jpg", a cat if i is odd."""
  (root / "images" / "a").mkdir(parents=True)
  rows = ["image,label,confidence"]
  for i in range(count):
    smooth(i).save(root / "images" / "a" / f"{i}.jpg", quality=90)
    rows.append(f"a/{i}.jpg,{'cat' if i % 2 else 'dog'},0.9")
    rows.append(f"a/{i}.jpg,pet,{i / count}")
  for i in bad:
    (root / "images" / "a" / f"{i}.jpg").write_bytes(b"no image")
  (root / "labels.csv").write_text("\n".join(rows))


def _build(root, **options):
  options = {"workers": 1, "data_dir": str(root / "data")} | options
  return labelled.build(
    "mine",
    images=str(options.pop("images", root / "images")),
    labels=str(options.pop("labels", root / "labels.csv")),
    **options,
  )[1]


def _read_all(root, split="train"):
  """Returns [(image size, labels)] of all examples."""
  source = data.get_source("mine", split, str(root / "data"))
  found = []
  for i in range(source.num_examples):
    _, labels, pixels = source.check_example(i)
    found.append((pixels.shape[:2], labels))
  return source, found


def test_a_data_set_is_freed_of_test_images(tmp_path):
  """As ImageNet-21k is for the paper, with the labels that it has."""
  _make(tmp_path, 20)
  _build(tmp_path)
  first, examples = _read_all(tmp_path)
  again = {"data_dir": str(tmp_path / "data"), "against": ["mine:train[3:5]"]}
  again["workers"] = 1
  _, report = labelled.build("clean", images="tfds:mine:train", **again)
  assert [name for name, *_ in report["twins"]] == ["00000003", "00000004"]
  clean = data.get_source("clean", "train", str(tmp_path / "data"))
  assert clean.class_names == first.class_names
  kept = [clean.check_example(i) for i in range(18)]
  sizes = [(pixels.shape[:2], labels) for _, labels, pixels in kept]
  assert sorted(sizes) == sorted(examples[:3] + examples[5:])
  for options, words in (
    ({"images": "tfds:mine:train", "labels": "x.csv"}, "labels of its own"),
    ({"images": "tfds:mine"}, "give DATASET:SPLIT"),
    ({"images": "tfds:mine:tset"}, "split 'tset'"),
    ({"images": str(tmp_path / "images")}, "--labels is missing"),
  ):
    with pytest.raises(UserError, match=words):
      labelled.build("other", **options, **again)


def test_a_folder_becomes_a_data_set(tmp_path):
  _make(tmp_path, 30, bad=[7])
  folder = tmp_path / "images" / "a"
  (folder / "nobody.jpg").write_bytes(b"")
  (folder / "8.jpg").write_bytes((folder / "8.jpg").read_bytes()[:500])
  Image.new("1", (10_000, 10_000)).save(folder / "9.jpg", "PNG")
  report = _build(tmp_path, min_confidence=0.5, holdout=0.3)
  why = dict(report["unreadable"])
  assert sorted(why) == ["a/7.jpg", "a/8.jpg", "a/9.jpg"]
  assert "not a readable image (UnidentifiedImageError)" in why["a/7.jpg"]
  assert "too many pixels" in why["a/9.jpg"]
  assert report["without labels"] == ["a/nobody.jpg"]
  assert report["images"] == 31
  assert report["train"] + report["test"] == 27
  assert 2 <= report["test"] <= 16
  train, examples = _read_all(tmp_path)
  assert train.class_names == ["cat", "dog", "pet"]
  assert (train.multilabel, train.max_labels) == (True, 2)
  examples += _read_all(tmp_path, "test")[1]
  assert {size for size, _ in examples} == {(32, 40)}
  # Odd ones but the bad two are cats; half of all are sure to be pets.
  kinds = [tuple(labels) for _, labels in examples]
  assert sum(0 in k for k in kinds) == 13
  assert sum(1 in k for k in kinds) == 14
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
  file = other / "1.parquet"
  parquet.write_table(pyarrow.table(rows), file, row_group_size=2)
  found = own_files.list_images(str(other))
  assert [(name, own_files.read(place, None)[0]) for name, place in found] == [
    (f"a/{file.name}", file.read_bytes()) for file in files
  ]
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


def test_folders_and_tar_files_name_classes(tmp_path):
  """As ImageNet-21k's archive unpacks: a tar file a class, without folders."""
  _make(tmp_path, 5)
  folder = tmp_path / "images" / "a"
  with tarfile.open(tmp_path / "images" / "n01.tar", "w") as archive:
    archive.add(folder / "0.jpg", "0.JPEG")
    archive.add(folder / "1.jpg", "./c/1.JPEG")
  (folder / "0.jpg").rename(tmp_path / "images" / "nowhere.jpg")
  report = _build(tmp_path, labels="folders")
  assert report["without labels"] == ["nowhere.jpg"]
  source, examples = _read_all(tmp_path)
  assert source.class_names == ["a", "c", "n01"]
  assert sorted(labels for _, labels in examples) == [[0]] * 4 + [[1], [2]]
  (tmp_path / "classes.txt").write_text("a\nn01\n")
  with pytest.raises(UserError, match=r"class 'c' of 'c/1.JPEG' is not"):
    _build(tmp_path, labels="folders", classes=str(tmp_path / "classes.txt"))


# --- odd files ---


def _turned():
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  return exif


_ODD = {
  "cmyk.jpg": lambda x: encode(x.convert("CMYK"), "JPEG", quality=95),
  "palette.png": lambda x: encode(
    x.quantize(32), "PNG", transparency=bytes(16) + b"\xff" * 16
  ),
  "moving.png": lambda x: encode(
    x, "GIF", save_all=True, append_images=[x.rotate(90)]
  ),
  "alpha.webp": lambda x: encode(x.convert("RGBA"), "WEBP", lossless=True),
  "turned.jpg": lambda x: encode(x, "JPEG", exif=_turned()),
  "phone.jpg": lambda x: encode(
    x, "MPO", save_all=True, append_images=[x.rotate(90)]
  ),
}


@pytest.mark.parametrize("name", _ODD)
def test_odd_files_are_read_as_training_reads_them(name):
  encoded = _ODD[name](smooth(1))
  kept, thumbnail = own_files.decode(encoded)
  decoded = ops.decode(tf.constant(kept), precise=True)
  expected = preprocess.decode_image(encoded)
  assert decoded.shape == ((40, 32, 3) if name == "turned.jpg" else (32, 40, 3))
  # TensorFlow's JPEG decoder and Pillow's round differently.
  difference = np.abs(decoded.numpy().astype(int) - expected)
  assert difference.max() <= (4 if kept[:2] == b"\xff\xd8" else 0)
  index = near_duplicates.Index.make(["it"], [thumbnail])
  [(twin, similarity)] = index.find(thumbnail[None])
  assert twin == "it"
  assert similarity > 0.999


# --- builds that are interrupted ---


def test_a_full_disk_stops_a_build(tmp_path):
  _make(tmp_path, 10)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
  try:
    with pytest.raises(RunStopped, match="nothing is kept"):
      _build(tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  with pytest.raises(UserError):  # nothing partial is read
    data.get_source("mine", "train", str(tmp_path / "data"))
  assert _build(tmp_path)["train"] == 10


def _end(images, examine=own_files.examine, **kwargs):
  if multiprocessing.parent_process():
    os._exit(9)
  return examine(images, **kwargs)


@pytest.mark.ci
def test_a_worker_that_dies_and_two_that_do_not(tmp_path, monkeypatch):
  _make(tmp_path, 40)
  one = _read_records(tmp_path, workers=1)
  with monkeypatch.context() as patch:
    patch.setattr(own_files, "examine", _end)
    with pytest.raises(RunStopped, match="a worker died"):
      _build(tmp_path, workers=2)
  assert _read_records(tmp_path, workers=2) == one


def test_what_a_killed_build_has_left_goes(tmp_path):
  _make(tmp_path, 3)
  folder = tmp_path / "data" / "mine"
  (folder / "incomplete.ABCDEF_1.0.0" / "work").mkdir(parents=True)
  descriptor = os.open(folder, os.O_RDONLY)
  fcntl.flock(descriptor, fcntl.LOCK_EX)
  with pytest.raises(UserError, match=r"another process writes to .*mine"):
    _build(tmp_path)
  assert [*folder.iterdir()] == [folder / "incomplete.ABCDEF_1.0.0"]
  os.close(descriptor)
  assert _build(tmp_path)["train"] == 3
  assert [*folder.iterdir()] == [folder / "1.0.0"]
  assert not (folder / "1.0.0" / "work").exists()


def _read_records(root, **options):
  """Returns the records of a build, which is then removed."""
  _build(root, **options)
  source = data.get_source("mine", "train", str(root / "data"))
  records = source.read(np.arange(source.num_examples))
  shutil.rmtree(root / "data")
  return records


@pytest.mark.nightly
def test_the_documented_figures_in_small(tmp_path):
  """`python benchmarks/data_build.py` makes those of docs/your_images.md."""
  found = data_build.measure(tmp_path, 3000, tests=200, workers=2)
  assert found["listed"] == found["ruined"] == found["unreadable"] == 10
  for kind, (right, count) in found["found"].items():
    assert right >= 0.9 * count, kind
  assert found["false"] <= 3
  assert found["strangers"] > 2800
  wrong, digits = found["digits"]
  assert wrong < 0.1 * digits
  assert "10 of 10" in data_build.format_tables(found)


# --- mistakes ---


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("image,class\na.jpg,x\n", "missing in {'image': 'a.jpg', 'class': 'x'}"),
    ("image,label\na.jpg,\n", "missing in {'image': 'a.jpg', 'label': ''}"),
    ("image,label,confidence\na.jpg,x,nan\n", "missing in .* None}"),
    ("image,label,weight\na.jpg,x,0.1\n", "needs a column confidence"),
    ("image,label,confidence\na.jpg,x,much\n", "invalid value 'much'"),
    ("image,label\na.jpg,dgo\n", "class 'dgo' of 'a.jpg' is not one of"),
    ("image,label\na, b.jpg,x\n", "Expected 2 columns, got 3: a, b.jpg,x"),
    ('image,label\n"a.jpg,x\n', "Expected 2 columns, got 1"),
    ('{"image": "a.jpg", "labels": "x"}', "changed from array to string"),
    ("\n{", "JSON parse error"),
    ('{"image": "a", "labels": ["x"], "confidences": [1, 2]}', "longer than"),
  ],
)
def test_bad_labels(tmp_path, text, words):
  (tmp_path / "classes.txt").write_text("cat\ndog\nx\n")
  file = tmp_path / ("labels.csv" if text[0] in "i" else "labels.jsonl")
  file.write_text(text)
  least = 0.5 if "weight" in text else 0.0
  with pytest.raises(UserError, match=words) as error:
    own_files.read_labels(file, str(tmp_path / "classes.txt"), least)
  assert str(file) in str(error.value)
  assert "\n" not in str(error.value)


def test_labels_have_confidences(tmp_path):
  file, classes = tmp_path / "labels.csv", tmp_path / "classes.txt"
  # As a spreadsheet writes it: a byte order mark, two characters a line end.
  text = "image,label,confidence\r\na.jpg,x,0.2\r\n'b.jpg', y ,7\r\nb.jpg,x,1"
  file.write_bytes(text.replace("'", '"').encode("utf-8-sig"))
  expected = {"a.jpg": [], "b.jpg": [1, 0]}
  assert own_files.read_labels(file, None, 0.5) == (["x", "y"], expected)
  classes.write_bytes("x\ny \nz".encode("utf-8-sig"))
  found = own_files.read_labels(file, str(classes), 0.5)
  assert found == (["x", "y", "z"], expected)


def test_a_folder_with_links_and_names_of_any_bytes(tmp_path):
  _make(tmp_path, 3)
  odd = os.fsdecode(b"caf\xe9.jpg")
  folder = tmp_path / "images" / "a"
  (folder / "0.jpg").rename(folder / odd)
  folder.rename(tmp_path / "elsewhere")
  folder.symlink_to(tmp_path / "elsewhere")
  names = [name for name, _ in own_files.list_images(str(tmp_path / "images"))]
  assert sorted(names) == sorted(["a/1.jpg", "a/2.jpg", f"a/{odd}"])
  (folder / "again").symlink_to(tmp_path / "images")
  with pytest.raises(UserError, match="again: a link to a folder around it"):
    own_files.list_images(str(tmp_path / "images"))
  (folder / "again").unlink()
  rows = "".join(f"a/{i}.jpg,x\n" for i in (1, 2))
  text = f"image,label\n{rows}"
  (tmp_path / "labels.csv").write_text(text)
  report = _build(tmp_path, holdout=0.0)
  assert report["train"] == 2
  assert report["without labels"] == [f"a/{odd}"]


def test_names_in_labels_that_no_image_has(tmp_path, capsys):
  _make(tmp_path, 4)
  labels = tmp_path / "labels.csv"
  text = labels.read_text()
  labels.write_text(text.replace("a/2.jpg", "a/2.jpeg"))
  given = [f"--images={tmp_path}/images", f"--labels={labels}", "--workers=1"]
  command = ["data", "build", "mine", *given, f"--data_dir={tmp_path}/data"]
  assert main(command) == 0
  report = json.loads((tmp_path / "data/mine/1.0.0/report.json").read_text())
  assert report["labels of no image"] == ["a/2.jpeg"]
  assert report["without labels"] == ["a/2.jpg"]
  assert re.search(r"labels of no image +1\n", capsys.readouterr().out)
  labels.write_text(text.replace("a/", "b/"))
  elsewhere = {"data_dir": str(tmp_path / "other")}
  with pytest.raises(UserError, match=r"as \['b/0.jpg'\], .* as 'a/0.jpg'"):
    _build(tmp_path, **elsewhere)
  with pytest.raises(UserError, match="label of confidence 2 or more"):
    _build(tmp_path, min_confidence=2, **elsewhere)
  assert not (tmp_path / "other").exists()


def test_a_name_twice_names_both_places(tmp_path):
  _make(tmp_path, 1)
  file = tmp_path / "images" / "a" / "0.jpg"
  for shard in ("0.tar", "1.tar"):
    with tarfile.open(tmp_path / "images" / shard, "w") as archive:
      archive.add(file, "./b/0.jpg")
  with pytest.raises(UserError, match=r"'b/0.jpg', .*0.tar .*1.tar"):
    own_files.list_images(str(tmp_path / "images"))
  for name in ("0.tar", "0.parquet"):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
      own_files.list_images(str(tmp_path / name))


def test_other_mistakes(tmp_path):
  _make(tmp_path, 3)
  (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
  for options, words in (
    ({"classes": str(tmp_path / "classes.txt")}, "per line, each of them once"),
    ({"images": tmp_path / "no"}, "/no does not exist or has no images"),
    ({"images": tmp_path / "labels.csv"}, "has no images"),
    ({"labels": tmp_path / "no.csv"}, "cannot be read"),
    ({"against": ["digits"]}, "give DATASET:SPLIT"),
    ({"holdout": 1.5}, "--holdout is 1.5"),
    ({"workers": 0}, "--workers is 0"),
    ({"beam_options": "a=b"}, "--beam_options needs a --beam_runner"),
    ({"beam_runner": "DirectRunner"}, "1 or more, none with Beam"),
  ):
    with pytest.raises(UserError, match=words):
      _build(tmp_path, **options)
  assert not (tmp_path / "data").exists()
  for i in range(3):
    (tmp_path / "images" / "a" / f"{i}.jpg").write_bytes(b"")
  with pytest.raises(RunStopped, match=r"no image of a split .*readable': 3"):
    _build(tmp_path)
