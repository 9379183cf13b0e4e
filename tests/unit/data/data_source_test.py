"""Sources: TFDS data sets in ArrayRecord and folders of images."""

import io
import json
import os
import re
import resource
import shutil
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from pictures import encode as _encode
from PIL import Image
from sklearn import datasets as sklearn_datasets

from vit_jax import data
from vit_jax.data import max_labels, relabelled, shards
from vit_jax.data.builders import digits
from vit_jax.errors import UserError


class MaskedTags(tfds.core.GeneratorBasedBuilder):
  """Multi-label; a feature that is not asked for cannot be decoded."""

  name = "masked_tags"
  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [  # noqa: RUF012
    tfds.core.BuilderConfig(name="plain"),
    tfds.core.BuilderConfig(name="declared"),
  ]
  tags = ([2, 0], [], [1], [0, 1, 2])

  def _info(self):
    features = {
      "image": tfds.features.Image(encoding_format="jpeg"),
      "mask": tfds.features.Image(shape=(None, None, 1)),
      "labels": tfds.features.Sequence(
        tfds.features.ClassLabel(names=["sky", "sea", "sun"])
      ),
    }
    declared = self.builder_config.name == "declared"
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      metadata=tfds.core.MetadataDict(max_labels=5) if declared else None,
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i, tags in enumerate(self.tags * 3):
      pixels = np.full((4, 4, 3), i, np.uint8)
      jpeg = _encode(pixels, "JPEG", quality=100)
      example = {"image": io.BytesIO(jpeg), "labels": tags}
      yield i, example | {"mask": io.BytesIO(b"no image")}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """`digits` and `masked_tags`."""
  root = tmp_path_factory.mktemp("tfds")
  formats = {"file_format": "array_record"}
  digits.Digits(data_dir=root, **formats).download_and_prepare()
  for config in ("plain", "declared"):
    MaskedTags(data_dir=root, config=config, **formats).download_and_prepare()
  return str(root)


def _labels(source, indices=None):
  indices = np.arange(source.num_examples) if indices is None else indices
  return [source.parse(r)[1].numpy().tolist() for r in source.read(indices)]


# --- TFDS ---


def test_digits_are_those_of_scikit_learn(data_dir):
  real = sklearn_datasets.load_digits()
  expected = {
    (np.rint(x * 255 / 16).astype(np.uint8).tobytes(), int(y))
    for x, y in zip(real.images, real.target, strict=True)
  }
  found = []
  for split, size in (("train", 1000), ("test", 797)):
    source = data.get_source("digits", split, data_dir)
    assert source.num_examples == size
    assert source.num_classes == 10
    assert source.class_names == list("0123456789")
    assert (source.multilabel, source.max_labels) == (False, 1)
    records = tf.data.Dataset.from_tensor_slices(source.read(np.arange(size)))
    for encoded, labels in records.map(source.parse).as_numpy_iterator():
      pixels = np.asarray(Image.open(io.BytesIO(encoded)))
      assert pixels.shape == (8, 8)
      found.append((pixels.tobytes(), int(labels[0])))
  first = [label for _, label in found[:300]]
  assert np.bincount(first).tolist() == [30] * 10
  assert len(found) == 1797
  assert set(found) == expected


def test_digits_test_split_is_stratified_and_never_changes():
  labels = sklearn_datasets.load_digits().target
  in_test = digits.choose_test(labels)
  assert in_test.sum() == 797
  shares = np.bincount(labels[in_test]) - np.bincount(labels) * 797 / 1797
  assert np.abs(shares).max() < 1
  assert np.flatnonzero(in_test)[:12].tolist() == [
    *(3, 5, 7, 9, 13, 14, 16, 18, 19, 20, 22, 23)
  ]


@pytest.mark.parametrize(
  ("split", "parts"),
  [
    ("train[:98%]", [("train", 0, 980)]),
    ("train[98%:]", [("train", 980, 1000)]),
    ("train[:800]+test[:200]", [("train", 0, 800), ("test", 0, 200)]),
    ("test[-7:]+train[10:20]", [("test", 790, 797), ("train", 10, 20)]),
  ],
)
def test_sub_splits(data_dir, split, parts):
  source = data.get_source("digits", split, data_dir)
  whole = {
    name: data.get_source("digits", name, data_dir).read(np.arange(size))
    for name, size in (("train", 1000), ("test", 797))
  }
  expected = [r for name, start, stop in parts for r in whole[name][start:stop]]
  assert source.num_examples == len(expected)
  assert source.read(np.arange(len(expected))) == expected
  # Any order, with repetitions.
  some = np.array([5, len(expected) - 1, 5, 0])
  assert source.read(some) == [expected[i] for i in some]


def test_multilabel_is_padded_and_other_features_are_left_alone(data_dir):
  source = data.get_source("masked_tags/plain", "train", data_dir)
  assert source.multilabel
  assert source.max_labels == 3  # counted
  assert source.class_names == ["sky", "sea", "sun"]
  for record in source.read(np.arange(12)):
    encoded, labels = source.parse(record)
    i = Image.open(io.BytesIO(encoded.numpy())).getpixel((0, 0))[0]
    tags = MaskedTags.tags[i % 4]
    assert labels.numpy().tolist() == tags + [-1] * (3 - len(tags))
  declared = data.get_source("masked_tags/declared", "train", data_dir)
  assert declared.max_labels == len(_labels(declared, [0])[0]) == 5


@pytest.mark.parametrize(
  ("dataset", "split", "words"),
  [
    (
      "digits",
      "tset",
      r"Unknown split 'tset'; there are train \(1,000\), test",
    ),
    ("digits", "train[:0]", "no examples"),
    ("digits", "train[2000:]", "incompatible with 1000"),
    ("digits", "train[", "parsing split"),
    ("digits", "", "split ''"),
    ("digit", "train", r"did you mean 'digits'\?; built in: digits"),
    ("zzzzz", "train", r"unknown data set 'zzzzz'; built in: digits"),
    ("mnist", "train", "run `vit-jax data prepare mnist --data_dir="),
    ("mnist:9.9.9", "train", "cannot be loaded at version 9.9.9"),
    ("digits/tiny", "train", "tiny not found"),
    ("a/b/../c", "train", "Parsing builder name"),
  ],
)
def test_what_cannot_be_opened_is_explained(data_dir, dataset, split, words):
  with pytest.raises(UserError, match=words) as e:
    data.get_source(dataset, split, data_dir)
  assert "\n" not in str(e.value)


def test_examples_that_two_splits_share(data_dir, tmp_path):
  def share(dataset, split, other):
    sources = [data.get_source(dataset, s, data_dir) for s in (split, other)]
    return data.count_shared(*sources)

  assert share("digits", "train[:60%]", "train[50%:]") == 100
  assert share("digits", "train[:60%]", "train[60%:]") == 0
  assert share("digits", "train", "test") == 0
  assert share("digits", "train[:10]+test[:20]", "test[15:]+train[:1]") == 6
  folder = _make_folder(tmp_path, {"a": 50, "b": 50})
  assert share(folder, "train[:60]", "train[50:]+test") == 10


def test_identity_follows_the_examples_not_the_folder(data_dir, tmp_path):
  shutil.copytree(f"{data_dir}/digits", tmp_path / "digits")
  found = [
    data.get_source("digits", split, folder).identity()
    for folder in (data_dir, str(tmp_path))
    for split in ("train", "train[:9]", "test")
  ]
  assert found[:3] == found[3:]
  assert len({*found}) == 3
  assert all(text.startswith("digits/1.0.0 ") for text in found)


def test_limit_of_open_files_is_raised(data_dir, monkeypatch):
  now, asked = [1200, 2400], []
  monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
  monkeypatch.setattr(resource, "setrlimit", lambda _, new: asked.append(new))
  for _ in range(2):
    data.get_source("digits", "train", data_dir)
  assert asked == [(1201, 2400)] * 2
  now[1] = 100
  with pytest.raises(UserError, match=r"'digits' has 1 files.* may open 100,"):
    data.get_source("digits", "train", data_dir)


def test_missing_file_is_named(tmp_path):
  builder = digits.Digits(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  next(tmp_path.glob("digits/*/*train.array_record*")).unlink()
  with pytest.raises(UserError, match=r"1 of its files are missing.*digits-tr"):
    data.get_source("digits", "train", str(tmp_path))
  assert data.get_source("digits", "test", str(tmp_path)).num_examples == 797


# --- the most labels of one image, where it is not declared ---


@pytest.fixture
def tags_dir(data_dir, tmp_path, monkeypatch):
  """A copy of `masked_tags/plain`, of which nothing has been counted."""
  monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
  there = tmp_path / "data" / "masked_tags" / "plain" / "1.0.0"
  here = Path(data_dir, *there.parts[-3:])
  shutil.copytree(here, there, ignore=shutil.ignore_patterns(max_labels.FILE))
  return there


@pytest.fixture
def count_reads(tags_dir, monkeypatch):
  """Returns a function: split -> (max_labels, how many records were read)."""
  read, count = shards.Shards.read, []
  monkeypatch.setattr(
    shards.Shards,
    "read",
    lambda self, indices: count.append(len(indices)) or read(self, indices),
  )

  def open_split(split="train"):
    count.clear()
    root = str(tags_dir.parents[2])
    found = data.get_source("masked_tags/plain", split, root)
    return found.max_labels, sum(count)

  return open_split


def test_labels_are_counted_once(count_reads, tags_dir, caplog, monkeypatch):
  monkeypatch.setattr(max_labels, "_CHUNK", 5)
  monkeypatch.setattr(max_labels, "_REPORT_EVERY", 0)
  assert count_reads() == (3, 12)
  assert "the labels of all 12 examples are counted, once;" in caplog.text
  assert (
    f"check masked_tags/plain --data_dir={tags_dir.parents[2]}" in caplog.text
  )
  caplog.set_level("INFO")
  assert count_reads() == (3, 0)
  root = str(tags_dir.parents[2])
  for part in ("train[:1]", "train[1:3]"):
    source = data.get_source("masked_tags/plain", part, root)
    labels = [source.read_example(i)[1] for i in range(source.num_examples)]
    assert source.max_labels == max(1, *map(len, labels))
    assert count_reads(part) == (source.max_labels, 0)
  assert "counted the labels of 2 of 2 examples, at most" in caplog.text
  kept = json.loads((tags_dir / max_labels.FILE).read_text())
  assert len(kept) == 3
  # Other data, or a file that cannot be read: counted again.
  info = tags_dir / "dataset_info.json"
  info.write_text(info.read_text() + "\n")
  assert count_reads() == (3, 12)
  (tags_dir / max_labels.FILE).write_text("{")
  assert count_reads() == (3, 12)
  assert count_reads() == (3, 0)


def test_a_count_is_kept_elsewhere_if_it_has_to(
  count_reads, tags_dir, tmp_path, caplog
):
  (tags_dir / max_labels.FILE).mkdir()  # nothing can be written there
  assert count_reads() == (3, 12)
  file = tmp_path / "cache" / max_labels.FILE
  assert f"the count is in {file}: copy that file to {tags_dir}" in caplog.text
  assert count_reads() == (3, 0)
  # As the line says, for a machine with another cache.
  (tags_dir / max_labels.FILE).rmdir()
  file.rename(tags_dir / max_labels.FILE)
  assert count_reads() == (3, 0)


class _Tags:
  """5,000 examples, one of which has seven labels; a process a thread."""

  dataset, split, num_examples = "tags", "train", 5000

  def __init__(self, folder):
    folder.mkdir(exist_ok=True)
    (folder / "dataset_info.json").write_text("{}")
    self.folder, self.seen = folder, []

  def identity(self):
    return "tags"

  def read(self, indices):
    self.seen += indices.tolist()
    return [b"x" * (7 if i == 4321 else 1) for i in indices]

  def parse_labels(self, record):
    return tf.io.decode_raw(record, tf.uint8)


def _count_together(monkeypatch, sources):
  """Returns what each of several processes finds; threads stand in."""
  place, values = threading.local(), [None] * len(sources)
  barrier = threading.Barrier(len(sources), timeout=60)

  def gather(value):
    values[place.index] = value
    barrier.wait()
    found = list(values)
    barrier.wait()
    return found

  monkeypatch.setattr(max_labels, "_gather", gather)
  monkeypatch.setattr(
    max_labels, "_find_process", lambda: (place.index, len(sources))
  )

  def run(index):
    place.index = index
    source = sources[index]
    return max_labels.find_max_labels(source, source.folder, "a command")

  with ThreadPoolExecutor(len(sources)) as pool:
    return list(pool.map(run, range(len(sources))))


def test_processes_share_the_counting(monkeypatch, tmp_path):
  monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
  sources = [_Tags(tmp_path / str(i)) for i in range(3)]
  assert _count_together(monkeypatch, sources) == [7] * 3
  assert sorted(i for s in sources for i in s.seen) == [*range(5000)]
  assert max(len(source.seen) for source in sources) <= 2048
  # Kept by one of them alone, it is known to all.
  kept = [source.folder / max_labels.FILE for source in sources]
  assert [file.exists() for file in kept] == [True, False, False]
  kept[0].rename(kept[2])
  again = [_Tags(source.folder) for source in sources]
  assert _count_together(monkeypatch, again) == [7] * 3
  assert not any(source.seen for source in again)


# --- mixtures ---


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("digits", [("digits", 1.0)]),
    ("a=0.7,b=0.3", [("a", 0.7), ("b", 0.3)]),
    (" a/x:1.0.0=7, folder:/p=q=3 ", [("a/x:1.0.0", 7), ("folder:/p=q", 3)]),
    ("folder:/a,b/c", [("folder:/a,b/c", 1.0)]),
    ("folder:/a=0.5,b=2", [("folder:/a", 0.5), ("b", 2.0)]),
    ("a=2", [("a", 2.0)]),
  ],
)
def test_parse_mixture(text, expected):
  assert data.parse_mixture(text) == expected


@pytest.mark.parametrize("prefix", ["folder:", "objectnet:"])
def test_path_that_ends_like_a_weight(prefix, tmp_path):
  (tmp_path / "lr=3").mkdir()
  text = f"{prefix}{tmp_path}/lr=3"
  assert data.parse_mixture(text) == [(text, 1.0)]
  assert data.parse_mixture(text + "=2") == [(text, 2.0)]


def test_mixture_needs_the_same_classes_in_order(tmp_path):
  pets = _make_folder(tmp_path / "pets", {"cat": 3, "dog": 3})
  others = _make_folder(tmp_path / "others", {"aeroplane": 3, "zebra": 3})
  three = _make_folder(tmp_path / "three", {"cat": 2, "dog": 2, "eel": 2})
  pets, others, three = (
    data.get_source(name, "train") for name in (pets, others, three)
  )
  data.check_mixture([pets, pets])
  with pytest.raises(UserError, match=r"/pets' has no 'aeroplane', 'zebra'; "):
    data.check_mixture([pets, pets, others])
  with pytest.raises(UserError, match=r"three' has 3 classes, .*pets' 2;") as e:
    data.check_mixture([pets, three])
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "text",
  [
    *("", " ", "a,b", "a=1,b", "a=x,b=1", "a=0,b=1", "a=-1,b=1", "=1"),
    *("a=1,,b=1", "a=nan,b=1", "a=inf,b=1"),
  ],
)
def test_wrong_mixture(text):
  with pytest.raises(UserError, match=r"name|needs a name and a positive"):
    data.parse_mixture(text)


# --- folders ---


def _make_folder(root, counts, suffix="png", seed=0):
  rng = np.random.RandomState(seed)
  kinds = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "webp": "WEBP"}
  for name, count in counts.items():
    (root / name).mkdir(parents=True)
    for i in range(count):
      pixels = rng.randint(0, 256, (9, 12, 3), np.uint8)
      file = root / name / f"{i:03d}.{suffix}"
      file.write_bytes(_encode(pixels, kinds[suffix]))
  return f"folder:{root}"


def _names(source):
  return [source.describe(i) for i in range(source.num_examples)]


def test_hold_out_is_a_stratified_tenth_the_same_anywhere(
  tmp_path, monkeypatch
):
  counts = {"cat": 40, "ant": 25, "bee": 3, "dog": 1}
  here = _make_folder(tmp_path / "here", counts)
  there = _make_folder(tmp_path / "there", counts, seed=1)
  train, test = (data.get_source(here, s) for s in ("train", "test"))
  assert train.class_names == ["ant", "bee", "cat", "dog"]
  # 2.5 rounds up, 0.3 is at least one, one image cannot be divided.
  assert np.bincount(np.ravel(_labels(test)), minlength=4).tolist() == [
    *(3, 1, 4, 0)
  ]
  assert np.bincount(np.ravel(_labels(train))).tolist() == [22, 2, 36, 1]
  assert not set(_names(train)) & set(_names(test))
  for source in (train, test):
    moved = [n.replace("here", "there") for n in _names(source)]
    assert _names(data.get_source(there, source.split)) == moved
  monkeypatch.chdir(tmp_path / "here")
  for at in (".", "../here/"):
    found = _names(data.get_source(f"folder:{at}", "train"))
    assert [*map(os.path.abspath, found)] == _names(train)
  # The order is no alphabet.
  assert _names(train) != sorted(_names(train))
  assert data.list_splits(here) == {"train": 61, "test": 8}
  part = data.get_source(here, "train[50:]+test[:2]")
  assert _names(part) == _names(train)[50:] + _names(test)[:2]
  with pytest.raises(UserError, match=r"'val'; there are train \(61\), test"):
    data.get_source(here, "val")


def test_folders_of_splits(tmp_path, caplog):
  for name, count in (("TRAIN", 4), ("Testing", 3), ("valid", 2), ("extra", 1)):
    _make_folder(tmp_path / name, {"a": count, "b": count})
  folder = f"folder:{tmp_path}"
  assert data.list_splits(folder) == {"train": 8, "test": 6, "valid": 4}
  source = data.get_source(folder, "valid")
  assert sorted(np.ravel(_labels(source)).tolist()) == [0, 0, 1, 1]
  assert f"left out: 1 folder, such as {tmp_path}/extra" in caplog.text
  (tmp_path / "extra").rename(tmp_path / "Training")
  with pytest.raises(UserError, match=r"TRAIN/ and Training/ mean the same"):
    data.get_source(folder, "train")


def test_links_in_a_folder(tmp_path):
  elsewhere = tmp_path / "elsewhere"
  _make_folder(elsewhere, {"a": 3, "more": 4})
  folder = _make_folder(tmp_path / "here", {"b": 2})
  (tmp_path / "here" / "a").symlink_to(elsewhere / "a")
  (elsewhere / "a" / "deep").symlink_to(elsewhere / "more")
  source = data.get_source(folder, "train+test")
  assert source.class_names == ["a", "b"]
  assert np.bincount(np.ravel(_labels(source))).tolist() == [7, 2]
  (elsewhere / "a" / "gone.png").symlink_to(elsewhere / "nothing.png")
  _assert_named(folder, "a/gone.png", "cannot be read: No such")
  (elsewhere / "a" / "gone.png").unlink()
  (elsewhere / "a" / "loop").symlink_to(elsewhere)
  with pytest.raises(UserError, match="loop: a link to a folder around it"):
    data.get_source(folder, "train")


def test_names_that_are_not_utf_8(tmp_path, caplog):
  folder = _make_folder(tmp_path, {"a": 3, "b": 3})
  odd = tmp_path / "a" / os.fsdecode(b"caf\xe9.png")
  (tmp_path / "a" / "000.png").rename(odd)
  source = data.get_source(folder, "train+test")
  assert str(odd) in _names(source)
  assert len(source.identity()) == 16
  (tmp_path / "a").rename(tmp_path / os.fsdecode(b"caf\xe9"))
  with pytest.raises(UserError, match=r"'caf\\udce9' .* UTF-8; rename"):
    data.get_source(folder, "train")


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp"])
def test_files_of_a_folder_come_as_they_are(tmp_path, suffix):
  folder = _make_folder(tmp_path, {"a": 2, "b": 2}, suffix)
  source = data.get_source(folder, "train+test")
  for i, record in enumerate(source.read(np.arange(4))):
    encoded, labels = source.parse(record)
    path = source.describe(i)
    with open(path, "rb") as f:
      assert encoded.numpy() == f.read()
    assert labels.numpy().tolist() == [0 if "/a/" in path else 1]


def test_other_files_are_no_images(tmp_path, caplog):
  folder = _make_folder(tmp_path, {"a": 5, "b": 5, ".cache": 1})
  (tmp_path / "readme.txt").write_text("hello")
  (tmp_path / "a" / "notes.txt").write_text("hello")
  (tmp_path / "a" / "._000.png").write_text("of another system")
  (tmp_path / "b" / "more").mkdir()
  (tmp_path / "b" / "more" / "deep.png").write_bytes(
    (tmp_path / "b" / "000.png").read_bytes()
  )
  assert data.list_splits(folder) == {"train": 9, "test": 2}
  (tmp_path / "a" / "phone.HEIC").write_text("unread")
  (tmp_path / "loose.png").write_text("in no class")
  assert data.get_source(folder, "train").num_classes == 2
  assert "left out: 2 .txt, 1 .heic, 1 .png, such as " in caplog.text


def _assert_named(folder, file, words):
  """An image is named when it is read, and left out by `data check`."""
  source = data.get_source(folder, "train+test")
  (index,) = [i for i, x in enumerate(_names(source)) if x.endswith(file)]
  with pytest.raises(UserError, match=rf"{file}: {words}") as e:
    source.check_example(index)
  assert str(e.value).endswith(
    f"`vit-jax data check {folder}` lists all such files"
  )
  faults = []
  rest = data.get_source(folder, "train+test", faults=faults)
  assert rest.num_examples == source.num_examples - 1
  assert len(faults) == 1
  assert re.search(rf"{file}: {words}", faults[0])


@pytest.mark.parametrize(
  "suffix",
  ["jpg", *(pytest.param(x, marks=pytest.mark.ci) for x in ("png", "webp"))],
)
def test_unreadable_image_is_named(tmp_path, suffix, recwarn):
  folder = _make_folder(tmp_path, {"a": 4, "b": 4}, suffix)
  file = tmp_path / "b" / f"002.{suffix}"
  whole = file.read_bytes()
  for broken in (b"not an image", whole[: len(whole) // 2], b""):
    file.write_bytes(broken)
    _assert_named(folder, f"b/002.{suffix}", "not a readable")
    source = data.get_source(folder, "train+test")
    with pytest.raises(UserError, match=rf"b/002\.{suffix}: not a readable"):
      next(
        data.train_batches(
          [(source, 1.0)],
          seed=0,
          batch_size=8,
          rows=np.arange(8),
          preprocess="resize(size)",
          image_size=8,
          start_step=0,
          num_steps=1,
        )
      )
  Image.new("1", (10_000, 10_000)).save(file, "PNG")
  faults = []
  data.get_source(folder, "train+test", faults=faults)
  assert re.search(rf"b/002\.{suffix}: .*too many pixels", faults[0])
  assert not recwarn.list


def test_a_folder_is_opened_without_reading_a_file(tmp_path):
  """50,000 images, of which none is one."""
  (tmp_path / "image").write_bytes(b"not an image")
  for label in range(50):
    (tmp_path / "images" / f"{label}").mkdir(parents=True)
    for i in range(1000):
      os.link(tmp_path / "image", tmp_path / "images" / f"{label}" / f"{i}.jpg")
  before = time.process_time()
  source = data.get_source(f"folder:{tmp_path}/images", "train")
  assert time.process_time() - before < 2
  assert source.num_examples == 45_000


def test_folder_that_is_none_is_explained(tmp_path):
  with pytest.raises(UserError, match="is not a folder"):
    data.get_source(f"folder:{tmp_path}/nowhere", "train")
  with pytest.raises(UserError, match="no folder of images"):
    data.get_source(f"folder:{tmp_path}", "train")
  _make_folder(tmp_path, {"a": 3})
  with pytest.raises(UserError, match=r"found 1 class, 'a'; .* at least 2"):
    data.get_source(f"folder:{tmp_path}", "train")
  for split, other in (("test", "train"), ("Train", "test")):
    _make_folder(tmp_path / "one" / split / split, {"a": 1, "b": 1})
    with pytest.raises(UserError, match=f", or {other}/ beside {split}/"):
      data.get_source(f"folder:{tmp_path}/one/{split}", "test")
  (tmp_path / "b").mkdir()
  with pytest.raises(UserError, match=r"b: class 'b' has no images \(\.jpg"):
    data.get_source(f"folder:{tmp_path}", "train")


def test_split_folders_have_classes_of_the_training_images(tmp_path):
  """Some of them are enough."""
  _make_folder(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
  _make_folder(tmp_path / "val", {"b": 1, "c": 1})
  _make_folder(tmp_path / "test", {"c": 3})
  for split, labels in (("val", [1, 2]), ("test", [2, 2, 2])):
    source = data.get_source(f"folder:{tmp_path}", split)
    assert source.class_names == ["a", "b", "c"]
    records = source.read(range(len(labels)))
    found = [struct.unpack("<i", record[:4])[0] for record in records]
    assert sorted(found) == labels
  _make_folder(tmp_path / "test", {"d": 1})
  with pytest.raises(UserError, match=r"test: .* no class 'd'"):
    data.get_source(f"folder:{tmp_path}", "train")


def test_labels_in_another_order_of_names(tmp_path):
  _make_folder(tmp_path, {"b": 2, "c": 2})
  source = data.get_source(f"folder:{tmp_path}", "train+test")
  assert relabelled.relabel(source, ["b", "c"]) is source
  assert relabelled.relabel(source, ["b", "a"]) is None
  found = relabelled.relabel(source, ["c", "a", "b"])
  assert found.num_classes == 3
  assert found.identity() == source.identity()
  records = [tf.constant(record) for record in source.read(range(4))]
  old = [int(source.parse_labels(record)[0]) for record in records]
  new = [int(found.parse_labels(record)[0]) for record in records]
  assert [{0: 2, 1: 0}[label] for label in old] == new


@pytest.mark.parametrize(
  ("split", "words"),
  [
    ("test[-0.01%:]", r"0\.01% of 797 examples rounds to 0"),
    ("train[:50]+test[:99.95%]", r"99\.95% of 797 examples rounds to 797"),
    ("test[0.05%:50%]", r"0\.05% of 797 examples rounds to 0"),
  ],
)
def test_percentage_that_rounds_to_nothing(data_dir, split, words):
  with pytest.raises(UserError, match=words):
    data.get_source("digits", split, data_dir)
  for sound in ("test[0%:100%]", "test[:99.9%]", "test[-1%:]"):
    data.get_source("digits", sound, data_dir)


def test_folders_that_are_no_classes(tmp_path):
  for fold in ("fold1", "fold2", "fold3"):
    _make_folder(tmp_path / fold, {"a": 2, "b": 2})
  with pytest.raises(UserError, match=r"fold1, .* same sub-folders, a, b"):
    data.get_source(f"folder:{tmp_path}", "train")
  # As Tiny ImageNet has it: what is called the same has one thing in it.
  for fold in ("fold1", "fold2", "fold3"):
    shutil.rmtree(tmp_path / fold / "b")
  assert data.get_source(f"folder:{tmp_path}", "train").num_classes == 3


def test_data_dir_with_brackets_is_explained(tmp_path):
  folder = str(tmp_path / "a [1]")
  for call in (
    lambda: data.get_source("digits", "train", folder),
    lambda: data.prepare("digits", folder),
  ):
    with pytest.raises(UserError, match=r"a \[1\]': TFDS finds nothing"):
      call()


def test_commands_in_messages_are_quoted(tmp_path):
  folder = f"{tmp_path}/my data"
  with pytest.raises(UserError) as e:
    data.get_source("digits", "train", folder)
  assert f"prepare digits --data_dir='{folder}'`" in str(e.value)


def test_data_dir_may_start_at_home(data_dir, monkeypatch):
  monkeypatch.setenv("HOME", data_dir)
  assert data.list_splits("digits", "~/") == {"train": 1000, "test": 797}


@pytest.mark.parametrize(
  ("train", "held_out", "split"),
  [
    ("train", "test", "test"),
    ("train", "val", "val"),
    ("train", "Validation", "validation"),
    ("train", "valid", "valid"),
    ("TRAIN", "eval", "eval"),
    ("Training", "Testing", "test"),
  ],
)
def test_split_folders(tmp_path, train, held_out, split):
  _make_folder(tmp_path / train, {"a": 4, "b": 5})
  _make_folder(tmp_path / held_out, {"a": 2, "b": 1})
  folder = f"folder:{tmp_path}"
  assert data.list_splits(folder) == {"train": 9, split: 3}
  source = data.get_source(folder, split)
  assert sorted(np.ravel(_labels(source)).tolist()) == [0, 0, 1]
