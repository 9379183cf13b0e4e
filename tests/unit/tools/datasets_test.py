"""Data sets are listed, prepared, checked and shown."""

import re
import shutil
from collections import Counter

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import downloader

from vit_jax import data
from vit_jax.__main__ import main
from vit_jax.data.builders import digits
from vit_jax.errors import UserError
from vit_jax.tools import datasets


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  root = str(tmp_path_factory.mktemp("prepared"))
  data.prepare("digits", root)
  return root


def _files(folder):
  return sorted(f.name for f in folder.iterdir())


# --- prepare ---


def test_prepare_writes_array_record_once(data_dir, capsys):
  folder = data.prepare("digits", data_dir)
  assert folder.name == "1.0.0"
  before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
  assert any("train.array_record" in f.name for f in before)
  assert main(["data", "prepare", "digits", f"--data_dir={data_dir}"]) == 0
  assert f"digits is ready in {folder}\n" in capsys.readouterr().out
  assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before


def test_prepare_converts_tfrecord(tmp_path, data_dir):
  digits.Digits(data_dir=tmp_path).download_and_prepare()
  with pytest.raises(UserError, match="to convert it"):
    data.get_source("digits", "train", str(tmp_path))
  folder = data.prepare("digits", str(tmp_path))
  assert not [name for name in _files(folder) if "incomplete" in name]
  for split in ("train", "test"):
    converted = data.get_source("digits", split, str(tmp_path))
    generated = data.get_source("digits", split, data_dir)
    everything = np.arange(converted.num_examples)
    assert converted.read(everything) == generated.read(everything)
  before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
  assert data.prepare("digits", str(tmp_path)) == folder  # once is enough
  assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before
  # TFDS itself still reads the old files.
  assert len(tfds.load("digits", split="test", data_dir=tmp_path)) == 797


def test_interrupted_conversion_changes_nothing(tmp_path, monkeypatch):
  digits.Digits(data_dir=tmp_path).download_and_prepare()
  folder = tmp_path / "digits" / "1.0.0"
  before = _files(folder)
  summary = (folder / "dataset_info.json").read_bytes()
  train = next(folder.glob("*train.tfrecord*"))
  whole = train.read_bytes()
  train.write_bytes(whole[:-30])
  with pytest.raises(UserError, match=r"train\.tfrecord.* cannot be read"):
    data.prepare("digits", str(tmp_path))
  assert _files(folder) == before
  assert (folder / "dataset_info.json").read_bytes() == summary
  train.write_bytes(whole)
  data.prepare("digits", str(tmp_path))
  assert data.list_splits("digits", str(tmp_path))["train"] == 1000


def test_prepare_explains_what_it_cannot_do(tmp_path, monkeypatch):
  def fail(*_):
    raise ConnectionError("no route\nto host")

  monkeypatch.setattr(digits.Digits, "_split_generators", fail)
  for name, words in (
    ("digts", "did you mean 'digits'"),
    ("folder:/x", "needs no preparation"),
    ("digits", "could not be prepared: no route to host; check the network"),
  ):
    with pytest.raises(UserError, match=words) as e:
      data.prepare(name, str(tmp_path))
    assert "\n" not in str(e.value)
  assert not list(tmp_path.glob("*/*/dataset_info.json"))


# --- list ---


def test_list_tells_what_is_there(data_dir, tmp_path, capsys):
  assert main(["data", "list", f"--data_dir={data_dir}"]) == 0
  out = capsys.readouterr().out
  assert "digits:1.0.0  train 1,000, test 797" in out
  assert "built in: jft_like" in out
  assert "built in: digits" not in out
  digits.Digits(data_dir=tmp_path).download_and_prepare()
  assert main(["data", "list", f"--data_dir={tmp_path}"]) == 0
  assert "test 797  [tfrecord]" in capsys.readouterr().out


def test_list_of_nothing(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nowhere"))
  assert main(["data", "list"]) == 0
  out = capsys.readouterr().out
  assert "nothing yet" in out
  assert "run `vit-jax data prepare digits`" in out


# --- check ---


def _check(name, *args, **kwargs):
  """Returns the summaries of all splits."""
  return [row for _, row in datasets.check(name, *args, **kwargs)]


def test_check_of_a_sample_and_a_part(data_dir, capsys):
  [part] = _check("digits", "train[:50%]", data_dir, num_examples=7)
  assert (part["examples"], part["checked"]) == (500, 7)
  assert part["label_counts"].sum() == 7
  assert part["height"] == part["width"] == (8, 8)
  given = [f"--data_dir={data_dir}", "--examples=30"]
  assert main(["data", "check", "digits", *given]) == 0
  out = capsys.readouterr().out
  assert "digits: 10 classes (0, 1, 2, 3, 4, ...)" in out
  assert "train: 1,000 examples, 30 checked and valid" in out


def test_check_finds_labels_out_of_range(data_dir, tmp_path):
  folder = tmp_path / "digits" / "1.0.0"
  shutil.copytree(f"{data_dir}/digits/1.0.0", folder)
  # TFDS writes no label that is out of range; the declaration is what is off.
  declared = (folder / "features.json").read_text()
  assert declared.count('"numClasses": "10"') == 1
  (folder / "features.json").write_text(declared.replace('"10"', '"8"'))
  (folder / "label.labels.txt").write_text("\n".join("01234567"))
  # The first 30 have each digit three times.
  [summary] = _check("digits", "train[:30]", str(tmp_path))
  assert summary["checked"] == 24
  assert len(summary["faults"]) == 6
  for fault in summary["faults"]:
    assert re.match(r"example \d+ of digits train\[:30\]: label [89] ", fault)


def test_check_lists_every_fault_and_counts_what_is_odd(tmp_path, capsys):
  rng = np.random.RandomState(0)
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    for i in range(10):
      pixels = rng.randint(0, 256, (20, 30, 4), np.uint8)
      file = tmp_path / name / f"{i}.png"
      exif = Image.Exif()
      exif[0x0112] = 6 if i < 2 else 1
      mode = Image.fromarray(pixels if i < 3 else pixels[..., :3])
      mode.save(file, exif=exif)
  (tmp_path / "a" / "8.heic").write_text("unread")
  dark = rng.randint(0, 4096, (9, 9)).astype("u2")
  Image.fromarray(dark).save(tmp_path / "b" / "dark.png")
  hidden = np.full((9, 9, 4), 255, np.uint8)
  hidden[..., 3] = np.arange(9)
  Image.fromarray(hidden).save(tmp_path / "b" / "white.png")
  name = f"folder:{tmp_path}"
  summaries = _check(name)
  traits = sum((s["traits"] for s in summaries), Counter())
  assert {trait.partition(" ")[0]: n for trait, n in traits.items()} == {
    "with": 7,
    "rotated": 4,
    "16-bit": 1,
    "of": 1,
  }
  assert main(["data", "check", name]) == 0
  out = capsys.readouterr().out
  assert "left out: 1 .heic, such as" in out
  assert "with transparency, put on white" in out
  for i in (4, 6):
    (tmp_path / "a" / f"{i}.png").write_text("no image")
  (tmp_path / "b" / "5.png").write_bytes(b"")
  assert main(["data", "check", name]) == 2
  out, err = capsys.readouterr()
  assert "3 examples are at fault" in err
  for file in ("a/4.png", "a/6.png", "b/5.png"):
    assert f"at fault: {tmp_path}/{file}: not a readable" in out


# --- show ---


def test_show_draws_what_training_sees(data_dir, tmp_path):
  file = datasets.show(
    "digits",
    "train[:100]",
    preprocess="resize(size)",
    image_size=48,
    output=str(tmp_path / "grid.png"),
    seed=4,
    data_dir=data_dir,
  )
  grid = np.asarray(Image.open(file))
  source = data.get_source("digits", "train[:100]", data_dir)
  [batch] = data.train_batches(
    [(source, 1.0)],
    seed=4,
    batch_size=24,
    rows=np.arange(24),
    preprocess="resize(size)",
    image_size=48,
    start_step=0,
    num_steps=1,
  )
  # Enlarged twice to 96 pixels, with a margin of 4 and a line of 14 for words.
  assert grid.shape == (4 * (96 + 18) + 4, 6 * (96 + 4) + 4, 3)
  first = grid[4:100:2, 4:100:2]
  np.testing.assert_array_equal(first, batch["image"][0])
  ninth = grid[118:214:2, 204:300:2]
  np.testing.assert_array_equal(ninth, batch["image"][8])
  assert grid[100:114].min() < 128  # words


def test_without_a_network_it_gives_up_soon(monkeypatch):
  pauses = []
  monkeypatch.setattr("time.sleep", pauses.append)
  with (
    pytest.raises(requests.ConnectionError),
    downloader._open_url("http://127.0.0.1:1/nothing"),
  ):
    pass
  # Seconds: it may be a moment's failure, but not 213.
  assert 5 < sum(pauses) < 20
