"""ImageNet-21k's builder, on archives that are made here, of a few synsets."""

import concurrent.futures
import gzip
import hashlib
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from pictures import encode as _encode
from PIL import Image

from vit_jax import data
from vit_jax.data import ops
from vit_jax.data.builders import imagenet21k
from vit_jax.errors import UserError

_GOOGLE, _FALL = "imagenet21k", "imagenet21k/classes_21841"

# Their labels in either map. The first are WordNet's oldest nouns; tench and
# toilet tissue are ImageNet's first and last of the 1,000. The published
# heads have no images of n03931044 and n09859684, which are before some.
_LABELS = {
  "n00004475": (0, 0),  # organism
  "n00007846": (4, 4),  # person
  "n01440764": (359, 359),  # tench
  "n15075141": (21_817, 21_815),  # toilet tissue
}
_GOOGLE_ONLY = {"n03931044": 9205, "n09859684": 15_027}


def _draw(seed, size=(24, 20)):
  """A picture without sharp edges, which JPEG keeps within a few levels."""
  small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
  return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)


def _make_images():
  """Returns {synset: {file name: bytes}}: two good ones each, and odd ones."""
  images = {
    synset: {
      f"{synset}_{i}.JPEG": _encode(_draw(10 * k + i), "JPEG", quality=95)
      for i in range(2)
    }
    for k, synset in enumerate(_LABELS)
  }
  tench, good = images["n01440764"], _encode(_draw(5, (99, 98)), "JPEG")
  tench["n01440764_cmyk.JPEG"] = _encode(_draw(6).convert("CMYK"), "JPEG")
  tench["n01440764_png.JPEG"] = _encode(_draw(7), "PNG")
  tench["n01440764_gif.JPEG"] = _encode(_draw(8), "GIF")
  tench["n01440764_grey.JPEG"] = _encode(_draw(9).convert("L"), "JPEG")
  tench["n01440764_cut.JPEG"] = good[: len(good) // 2]
  tench["n01440764_html.JPEG"] = b"<html>not found</html>"
  tench["n01440764_empty.JPEG"] = b""
  return images


def _pack(files, folder=""):
  """Returns a tar file of {name: bytes}."""
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w") as tar:
    for name, content in files.items():
      member = tarfile.TarInfo(folder + name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return out.getvalue()


def _manual(root):
  folder = root / "downloads" / "manual"
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def _tars(images):
  return {f"{synset}.tar": _pack(files) for synset, files in images.items()}


@pytest.fixture(scope="module")
def images():
  return _make_images()


@pytest.fixture(scope="module")
def prepared(images, tmp_path_factory):
  """A folder with both configurations made from one archive."""
  root = tmp_path_factory.mktemp("imagenet21k")
  (_manual(root) / "fall11_whole.tar").write_bytes(_pack(_tars(images)))
  for name in (_GOOGLE, _FALL):
    data.prepare(name, str(root))
  return root


def _read(name, root):
  """Returns {file name: (bytes, label)}, in the order that they have."""
  found = data.get_source(name, "train", str(root))
  feature = tfds.features.FeaturesDict({"file_name": tfds.features.Text()})
  rows = {}
  for record in found.read(np.arange(found.num_examples)):
    file_name = feature.deserialize_example_np(record)["file_name"].decode()
    encoded, labels = (x.numpy() for x in found.parse(record))
    assert file_name not in rows
    rows[file_name] = encoded, int(labels[0])
  return rows


# --- the classes ---


def test_the_maps_are_sorted_and_differ_in_two_ids():
  google = imagenet21k.read_ids(imagenet21k.GOOGLE)
  fall = imagenet21k.read_ids(imagenet21k.FALL_2011)
  assert (len(google), len(fall)) == (21_843, 21_841)
  for ids in (google, fall):
    assert list(ids) == sorted(set(ids))
  assert {i: google.index(i) for i in set(google) - set(fall)} == _GOOGLE_ONLY
  assert set(fall) < set(google)
  for synset, labels in _LABELS.items():
    assert (google.index(synset), fall.index(synset)) == labels
  # The list as it was published, a line an id.
  digest = hashlib.sha256("".join(f"{i}\n" for i in google).encode())
  assert digest.hexdigest()[:12] == "66362bdedf36"


# --- the images ---


@pytest.mark.parametrize("name", [_GOOGLE, _FALL])
def test_every_image_is_read_back_with_its_label(prepared, images, name):
  found = data.get_source(name, "train", str(prepared))
  assert found.num_classes == (21_841 if name == _FALL else 21_843)
  assert not found.multilabel
  assert data.list_splits(name, str(prepared)) == {"train": 12}
  rows = _read(name, prepared)
  for synset, files in images.items():
    label = _LABELS[synset][name == _FALL]
    assert found.class_names[label] == synset
    for file, encoded in files.items():
      if file.rpartition("_")[2] in ("cut.JPEG", "html.JPEG", "empty.JPEG"):
        assert f"{synset}/{file}" not in rows
        continue
      stored, stored_label = rows[f"{synset}/{file}"]
      assert stored_label == label
      anew = "cmyk" in file or "gif" in file
      assert (stored == encoded) != anew
      pixels = ops.decode(tf.constant(stored), precise=True)
      wanted = Image.open(io.BytesIO(encoded)).convert("RGB")
      difference = np.asarray(wanted, int) - pixels.numpy()
      assert np.abs(difference).max() <= 2, file


def test_what_was_left_out_is_listed(prepared):
  folder = pathlib.Path(data.find_needs(_GOOGLE, str(prepared)).folder)
  report = json.loads((folder / "metadata.json").read_text())
  assert report["archive"] == "fall11_whole.tar"
  assert report["unreadable"] == [
    f"n01440764/n01440764_{x}.JPEG" for x in ("cut", "html", "empty")
  ]
  assert report["encoded_anew"] == [
    f"n01440764/n01440764_{x}.JPEG" for x in ("cmyk", "gif")
  ]
  empty = report["classes_without_images"]
  assert len(empty) == 21_843 - 4
  assert set(_GOOGLE_ONLY) < set(empty)


def test_the_order_is_random_and_every_form_of_archive_gives_it(
  prepared, images, tmp_path
):
  expected = _read(_GOOGLE, prepared)
  assert list(expected) != sorted(expected)
  unpacked = {
    f"{synset}/{name}": content
    for synset, files in images.items()
    for name, content in files.items()
  }
  for kind in ("packed", "tars", "folders"):
    root = tmp_path / kind
    if kind == "packed":
      # As winter21 is: compressed, in a folder, and not only tar files.
      content = {"README": b"", ".n00004475.tar": b"", **_tars(images)}
      archive = gzip.compress(_pack(content, "winter21_whole/"))
      (_manual(root) / "winter21_whole.tar.gz").write_bytes(archive)
    else:
      files = _tars(images) if kind == "tars" else unpacked
      for name, content in files.items():
        path = _manual(root) / "fall11_whole" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
      (_manual(root) / "fall11_whole" / ".DS_Store").write_bytes(b"x")
    data.prepare(_GOOGLE, str(root))
    assert list(_read(_GOOGLE, root).items()) == list(expected.items())


def test_memory_is_bounded_by_reading_only_a_little_ahead():
  started = []

  def items():
    for i in range(10_000):
      started.append(i)
      yield i

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    ahead = imagenet21k.map_ahead(pool, lambda x: -x, items())
    assert [next(ahead) for _ in range(300)] == [-i for i in range(300)]
  assert len(started) <= 300 + 4 * imagenet21k.NUM_THREADS


# --- what is missing, and mistakes ---

_CUT = r"cannot be read, in or after n\d{8} \(.*\); fetch it again"


def test_bad_archives_are_explained(images, tmp_path):
  tars = _tars(images)
  whole = _pack(tars)
  image = next(iter(images["n00004475"].values()))
  for content, words in (
    (b"", "cannot be read"),
    (b"<html>", "cannot be read"),
    (whole[: len(whole) // 2], _CUT),
    (gzip.compress(whole)[:-2000], _CUT),  # read as what it is
    (_pack({"n1.tar": b"x"}), "has no synset"),
    (_pack({"n01440764.tar": b"x" * 2000}), "read, in or after n01440764"),
    (
      _pack({"n00004475.tar": tars["n00004475.tar"], "n99999999.tar": b"x"}),
      "has n99999999, which is not a class",
    ),
  ):
    (_manual(tmp_path) / "fall11_whole.tar").write_bytes(content)
    with pytest.raises(UserError, match=words) as e:
      data.prepare(_GOOGLE, str(tmp_path))
    assert "\n" not in str(e.value)
    assert data.find_needs(_GOOGLE, str(tmp_path)).state == "missing"
  (_manual(tmp_path) / "fall11_whole.tar").unlink()
  for name in ("n00004475", "n99999999"):
    (_manual(tmp_path) / "fall11_whole" / name).mkdir(parents=True)
    (_manual(tmp_path) / "fall11_whole" / name / "a.JPEG").write_bytes(image)
  known = imagenet21k.read_ids(imagenet21k.GOOGLE)
  read = imagenet21k.read_images(_manual(tmp_path) / "fall11_whole", known)
  with pytest.raises(UserError, match="n99999999"):
    next(read)  # before the first image
