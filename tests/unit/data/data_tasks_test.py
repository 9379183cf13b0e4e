"""Downstream tasks: splits, labels and augmentations, through TFDS's builders.

The examples are those of `tfds.testing.mock_data`; what is read is checked
against tables that are written here a second time.
"""

import hashlib
import io
import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax import data
from vit_jax.__main__ import main
from vit_jax.data import benchmarks, objectnet, relabelled
from vit_jax.data import preprocess as preprocessing
from vit_jax.data import tfds as tfds_source
from vit_jax.data.builders import mini_scenes, mini_tissue
from vit_jax.errors import UserError

# Examples of each split of the TFDS data sets: their published metadata, which
# TFDS's package does not contain.
_SIZES = {
  "caltech101": {"train": 3060, "test": 6084},
  "cifar10": {"train": 50_000, "test": 10_000},
  "cifar100": {"train": 50_000, "test": 10_000},
  "dtd": {"train": 1880, "validation": 1880, "test": 1880},
  "oxford_flowers102": {"train": 1020, "validation": 1020, "test": 6149},
  "oxford_iiit_pet": {"train": 3680, "test": 3669},
  "sun397": {"train": 76_128, "validation": 10_875, "test": 21_750},
  "svhn_cropped": {"train": 73_257, "test": 26_032, "extra": 531_131},
  "patch_camelyon": {"train": 262_144, "validation": 32_768, "test": 32_768},
  "eurosat": {"train": 27_000},
  "resisc45": {"train": 31_500},
  "diabetic_retinopathy_detection": {
    **{"sample": 10, "train": 35_126, "validation": 10_906, "test": 42_670},
  },
  "clevr": {"train": 70_000, "validation": 15_000, "test": 15_000},
  "dmlab": {"train": 65_550, "validation": 22_628, "test": 22_735},
  "dsprites": {"train": 737_280},
  "kitti": {"train": 6347, "validation": 423, "test": 711},
  "smallnorb": {"train": 24_300, "test": 24_300},
  "imagenet2012": {"train": 1_281_167, "validation": 50_000},
  "imagenet2012_real": {"validation": 50_000},
  "imagenet_v2": {"test": 10_000},
}

# Name, data set and configuration, classes, where the 200 validation and the
# test examples are, and which of crop and flip are done.
_TABLE = """
caltech101 caltech101 102 train:2754:2954 test:0:6084 cf
cifar100 cifar100 100 train:45000:45200 test:0:10000 cf
dtd dtd 47 validation:0:200 test:0:1880 cf
oxford_flowers102 oxford_flowers102 102 validation:0:200 test:0:6149 cf
oxford_iiit_pet oxford_iiit_pet 37 train:2944:3144 test:0:3669 cf
sun397 sun397/tfds 397 validation:0:200 test:0:21750 cf
svhn svhn_cropped 10 train:65931:66131 test:0:26032 cf
patch_camelyon patch_camelyon 2 validation:0:200 test:0:32768 cf
eurosat eurosat/rgb 10 train:16200:16400 train:21600:27000 cf
resisc45 resisc45 45 train:18900:19100 train:25200:31500 cf
diabetic_retinopathy diabetic_retinopathy_detection/btgraham-300 5 \
validation:0:200 test:0:42670 cf
clevr_count clevr 8 train:63000:63200 validation:0:15000 f
clevr_distance clevr 6 train:63000:63200 validation:0:15000 f
dmlab dmlab 6 validation:0:200 test:0:22735 f
dsprites_location dsprites 16 train:589824:590024 train:663552:737280 -
dsprites_orientation dsprites 16 train:589824:590024 train:663552:737280 c
kitti_distance kitti 4 validation:0:200 test:0:711 f
smallnorb_azimuth smallnorb 18 test:0:200 test:12150:24300 c
smallnorb_elevation smallnorb 9 test:0:200 test:12150:24300 cf
"""
_VTAB = {row.split()[0]: row.split()[1:] for row in _TABLE.split("\n")[1:-1]}
_PLAIN = {
  "imagenet2012": (1000, "validation", 50_000),
  "imagenet2012_real": (1000, "test", 50_000),
  "imagenet_v2": (1000, "test", 10_000),
  "cifar10": (10, "test", 10_000),
  "cifar100": (100, "test", 10_000),
  "oxford_iiit_pet": (37, "test", 3669),
  "oxford_flowers102": (102, "test", 6149),
}
_NUM_MOCKED = 5


# --- mocked data sets ---


def _make_infos(name, folder):
  """Makes a file a split; returns what TFDS knows of the splits, by name."""
  infos = {}
  for split, size in _SIZES[name].items():
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder,
      dataset_name=name,
      split=split,
      filetype_suffix="array_record",
    )
    template.sharded_filepath(shard_index=0, num_shards=1).touch()
    infos[split] = tfds.core.SplitInfo(
      name=split,
      shard_lengths=[size],
      num_bytes=0,
      filename_template=template,
    )
  return infos


class Mocked:
  """Folders as TFDS leaves them, of the real sizes, with mocked examples."""

  def __init__(self, root, monkeypatch):
    self.root = str(root)
    self._records = every = {}

    class Files:
      remote = False

      def __init__(self, dataset, shards):
        self._records = every[str(pathlib.Path(shards[0].filename).parent)]

      def read(self, indices):
        return [self._records[i % len(self._records)] for i in indices]

    monkeypatch.setattr(tfds_source, "Shards", Files)

  def prepare(self, name, overrides=()):
    """Makes the builder's folder; `overrides` go round the examples."""
    task = benchmarks.find_task(name)
    builder = tfds_source.find_builder(name, self.root, "array_record")
    with tfds.testing.mock_data(num_examples=_NUM_MOCKED):
      examples = list(tfds.as_numpy(builder.as_dataset(split="train")))
    for i, example in enumerate(examples if overrides else ()):
      example.update(overrides[i % len(overrides)])
    # Not all features: random boxes, say, are none.
    keys = ("image", task.feature)
    used = tfds.features.FeaturesDict(
      {k: builder.info.features[k] for k in keys}
    )
    folder = pathlib.Path(builder.data_path)
    folder.mkdir(parents=True, exist_ok=True)
    infos = _make_infos(builder.name, folder)
    builder.info.set_splits(tfds.core.splits.SplitDict(infos.values()))
    builder.info.write_to_directory(folder)
    self._records[str(folder)] = [
      used.serialize_example(used.encode_example({k: x[k] for k in keys}))
      for x in examples
    ]


@pytest.fixture
def mocked(tmp_path, monkeypatch):
  return Mocked(tmp_path, monkeypatch)


def _objects(depths):
  """Objects of CLEVR at these depths."""
  n = len(depths)
  places = np.zeros((n, 3), np.float32)
  places[:, 2] = depths
  classes = {
    k: np.zeros(n, np.int64) for k in ("color", "material", "shape", "size")
  }
  rotation = np.zeros(n, np.float32)
  return classes | {
    "rotation": rotation,
    "3d_coords": places[:, ::-1],
    "pixel_coords": places,
  }


# --- splits, classes, augmentations ---


def test_vtab_has_the_papers_19_tasks_in_its_order():
  assert [t.name for t in data.list_tasks("vtab:")] == [
    f"vtab:{name}" for name in _VTAB
  ]
  groups = [t.group for t in data.list_tasks("vtab:")]
  assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8


def _parse_part(text):
  split, start, stop = text.split(":")
  return split, int(start), int(stop)


@pytest.mark.parametrize("name", _VTAB)
def test_splits_and_classes_of_vtab(tmp_path, name):
  dataset, num_classes, val, test, done = _VTAB[name]
  train, val, test = map(_parse_part, ("train:0:800", val, test))
  name = f"vtab:{name}"
  task = data.find_task(name)
  assert task.dataset.partition(":")[0] == dataset
  builder = tfds_source.find_builder(name, str(tmp_path))
  infos = _make_infos(builder.name, tmp_path)
  for split, parts in (
    ("train800", [train]),
    ("val200", [val]),
    ("train800val200", [train, val]),
    ("test", [test]),
    ("val200+train[:3]", [val, ("train", 0, 3)]),
  ):
    assert tfds_source.resolve_split(infos, name, split)[1] == parts
  # The 1,000 examples and the test set share none.
  assert not any(
    a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
    for a, b in ((train, val), (train, test), (val, test))
  )
  features = builder.info.features
  *_, label = tfds_source._select_features(features, name, task)
  names = tfds_source._name_classes(label, name, task)
  assert len(names) == task.num_classes == int(num_classes)
  # Augmentation leaves the label alone.
  crops = "resize(448)|random_crop(size)" if "c" in done else "resize(size)"
  expected = crops + "|flip_lr" * ("f" in done)
  assert task.train_preprocess(384) == expected
  for size in (384, 48, (32, 96)):
    preprocessing.parse(task.train_preprocess(size), size)


@pytest.mark.parametrize("name", _PLAIN)
def test_other_test_sets(tmp_path, name):
  num_classes, split, size = _PLAIN[name]
  builder = tfds_source.find_builder(name, str(tmp_path))
  _, parts = tfds_source.resolve_split(
    _make_infos(builder.name, tmp_path), name, split
  )
  assert [end - start for _, start, end in parts] == [size]
  task = data.find_task(name)
  features = builder.info.features
  *_, label = tfds_source._select_features(features, name, task)
  names = tfds_source._name_classes(label, name, task)
  assert len(names) == num_classes
  if num_classes == 1000:
    assert (names[0], names[999]) == ("n01440764", "n15075141")
    assert names == sorted(names)


def test_images_of_real_have_several_labels_or_none(mocked):
  labels = [{"real_label": [3, 999]}, {"real_label": []}]
  mocked.prepare("imagenet2012_real", labels)
  found = data.get_source("imagenet2012_real", "test", mocked.root)
  assert (found.multilabel, found.max_labels) == (True, 9)
  labels = [found.parse(r)[1].numpy().tolist() for r in found.read([0, 1])]
  assert labels == [[3, 999] + [-1] * 7, [-1] * 9]


def test_version_and_configuration_may_be_given():
  for name in ("imagenet_v2/topimages", "imagenet2012_real:1.0.0"):
    assert data.find_task(name).dataset == name
  assert (
    data.find_task("imagenet_v2").dataset == "imagenet_v2/matched-frequency"
  )
  for name in ("digits", "folder:/cifar10", "objectnet:/x", "mnist"):
    assert data.find_task(name) is None


# --- labels that are computed ---


def test_clevr_counts(mocked):
  counts = 3, 10, 4, 9, 6
  overrides = [{"objects": _objects([9] * count)} for count in counts]
  mocked.prepare("vtab:clevr_count", overrides)
  found = data.get_source("vtab:clevr_count", "test", mocked.root)
  for i, count in enumerate(counts):
    _, [label], _ = found.check_example(i)
    assert label == count - 3
    assert found.class_names[label] == f"{count} objects"


def _derive(name, objects):
  tensors = {k: tf.constant(v) for k, v in objects.items()}
  return int(data.find_task(name).derive(tensors))


@pytest.mark.parametrize(
  ("depths", "label"),
  [
    *(([0.01], 0), ([8.0], 0), ([8.01], 1), ([8.5], 1), ([8.51], 2)),
    *(([9.01], 3), ([9.51], 4), ([10.0], 4), ([10.01], 5), ([99.0], 5)),
    *(([12.0, 9.2, 15.0], 3), ([0.0], -1)),
  ],
)
def test_distance_of_the_closest_object(depths, label):
  assert _derive("vtab:clevr_distance", _objects(depths)) == label


@pytest.mark.parametrize(
  ("depths", "types", "label"),
  [
    *(([8.0], [0], 0), ([8.01], [0], 1), ([20.0], [1], 1), ([20.01], [2], 2)),
    *(([999.0], [0], 2), ([999.5], [0], 3), ([-4.0], [0], 0)),
    ([], [], 3),  # nothing at all
    ([5.0, 6.0], [3, 4], 3),  # people and the like only
    ([5.0, 30.0, 12.0], [3, 0, 1], 1),  # a nearer pedestrian
  ],
)
def test_distance_of_the_closest_vehicle(depths, types, label):
  places = np.zeros((len(depths), 3), np.float32)
  places[:, 2] = depths
  objects = {"location": places, "type": np.array(types, np.int64)}
  assert _derive("vtab:kitti_distance", objects) == label


def test_vehicles_are_kittis_first_types():
  features = tfds_source.find_builder("vtab:kitti_distance").info.features
  names = features["objects"].feature["type"].names
  assert names[: benchmarks._KITTI_VEHICLES] == ["Car", "Van", "Truck"]
  assert data.find_task("vtab:kitti_distance").class_names == (
    *("up to 8 m", "8 to 20 m", "over 20 m", "no vehicle"),
  )


def test_dsprites_merge_neighbouring_values():
  for name, values, width in (("location", 32, 2.0), ("orientation", 40, 2.5)):
    task = data.find_task(f"vtab:dsprites_{name}")
    labels = [int(task.derive(tf.constant(v))) for v in range(values)]
    assert labels == [int(np.floor(v / width)) for v in range(values)]
    assert set(labels) == set(range(16))
    assert len(task.class_names) == 16
  assert data.find_task("vtab:dsprites_orientation").class_names[:3] == (
    *("0 to 2", "3 to 4", "5 to 7"),
  )


def test_dsprites_are_white_on_black(mocked):
  name = "vtab:dsprites_location"
  sprite = np.zeros((64, 64, 1), np.uint8)
  sprite[10:20, 30:40] = 1
  mocked.prepare(name, [{"image": sprite, "label_x_position": 31}])
  found = data.get_source(name, "train800", mocked.root)
  encoded, labels = found.parse(found.read([0])[0])
  pixels = np.asarray(Image.open(io.BytesIO(encoded.numpy())))
  np.testing.assert_array_equal(pixels, sprite[..., 0] * 255)
  assert labels.numpy().tolist() == [15]


def test_unusable_derived_label_names_the_example(mocked):
  name = "vtab:clevr_count"
  mocked.prepare(name, [{"objects": _objects([9] * 11)}])
  found = data.get_source(name, "test", mocked.root)
  with pytest.raises(UserError, match="example 0 of vtab:clevr_count te"):
    found.check_example(0)


# --- the mini-VTAB ---


@pytest.fixture(scope="module")
def mini_dir(tmp_path_factory):
  root = str(tmp_path_factory.mktemp("mini"))
  for task in data.list_tasks("mini:"):
    data.prepare(task.name, root)
  return root


def test_mini_vtab_has_every_group_and_no_overlap(mini_dir):
  found = data.list_tasks("mini:")
  assert {t.group for t in found} == set(benchmarks.GROUPS)
  for task in found:
    sizes = [
      data.get_source(task.name, split, mini_dir).num_examples
      for split in ("train800", "val200", "train800val200", "test")
    ]
    assert sizes[:3] == [800, 200, 1000]
    assert sizes[3] in (797, 1000)
    test = data.get_source(task.name, "test", mini_dir)
    train = data.get_source(task.name, "train800val200", mini_dir)
    images = [test.read(np.arange(sizes[3])), train.read(np.arange(1000))]
    if task.name != "mini:digits":  # people wrote some of those alike
      assert not set(images[0]) & set(images[1])
    train.check_labels()


def test_mini_images_never_change():
  index = np.array([0, 1, 999, 1000, 1999])
  tissue, classes = mini_tissue.draw_images(index)
  scenes, counts, nears = mini_scenes.draw_images(index)
  # An image depends on its number alone.
  np.testing.assert_array_equal(
    tissue[2:3], mini_tissue.draw_images(index[2:3])[0]
  )
  np.testing.assert_array_equal(
    scenes[4:], mini_scenes.draw_images(index[4:])[0]
  )
  assert [
    hashlib.sha256(x.tobytes()).hexdigest()[:12]
    for x in (tissue, classes, scenes, counts, nears)
  ] == [
    *("5e747d739d59", "0602be7180ef", "90406fe12be0"),
    *("186dd9eb551f", "b3dccb707ce5"),
  ]


# --- ObjectNet ---


def _make_objectnet(root, leave_out=()):
  """Two images of each class, in a red frame, and a class that is none."""
  for label, name in enumerate([*objectnet.CLASSES, "air_freshener"]):
    if name in leave_out:
      continue
    (root / name).mkdir(parents=True)
    for i in range(2):
      pixels = np.full((12, 14, 3), (255, 0, 0), np.uint8)
      pixels[2:-2, 2:-2] = (label, i, 7)
      Image.fromarray(pixels).save(root / name / f"{i}.png")
  return f"objectnet:{root}"


def test_objectnet_maps_its_classes_and_loses_its_frame(tmp_path):
  name = _make_objectnet(tmp_path)
  found = data.get_source(name, "test")
  assert data.list_splits(name) == {"test": 226}
  assert (found.num_examples, found.num_classes) == (226, 1000)
  assert (found.multilabel, found.max_labels) == (True, 3)
  seen = []
  records = tf.data.Dataset.from_tensor_slices(found.read(np.arange(226)))
  for encoded, labels in records.map(found.parse).as_numpy_iterator():
    pixels = np.asarray(Image.open(io.BytesIO(encoded)))
    assert pixels.shape == (8, 10, 3)
    [colour] = np.unique(pixels.reshape(-1, 3), axis=0)
    folder = list(objectnet.CLASSES)[colour[0]]
    seen.append((folder, int(colour[1])))
    expected = objectnet.CLASSES[folder]
    assert labels.tolist() == [*expected, -1, -1][:3]
  assert len(set(seen)) == 226


def test_objectnets_map_names_the_same_things():
  names = data.find_task("imagenet2012")
  wnids = tfds_source.find_builder(names.dataset).info.features["label"].names
  # Of WordNet: banana, lemon, teapot, umbrella, wok, clocks, pens, skirts.
  for folder, expected in (
    ("banana", ["n07753592"]),
    ("lemon", ["n07749582"]),
    ("teapot", ["n04398044"]),
    ("umbrella", ["n04507155"]),
    ("wok", ["n04596742"]),
    ("alarm_clock", ["n02708093", "n03196217"]),
    ("pen", ["n02783161", "n04033901", "n03388183"]),
    ("skirt", ["n03534580", "n03770439", "n03866082"]),
  ):
    assert [wnids[k] for k in objectnet.CLASSES[folder]] == expected
  classes = [k for ks in objectnet.CLASSES.values() for k in ks]
  assert (len(objectnet.CLASSES), len(classes), len(set(classes))) == (
    *(113, 125, 125),
  )


# --- the data command ---


def test_check_says_what_is_fetched_by_hand_and_where_it_goes(tmp_path, capsys):
  root = str(tmp_path)
  for name, files in (
    ("imagenet2012", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]),
    ("imagenet2012_real", ["ILSVRC2012_img_val.tar"]),
    ("vtab:resisc45", ["NWPU-RESISC45"]),
    ("vtab:diabetic_retinopathy", ["train", "test", "trainLabels.csv"]),
  ):
    assert main(["data", "check", name, f"--data_dir={root}"]) == 2
    out, err = capsys.readouterr()
    assert f"run `vit-jax data prepare {name} " in err
    manual = tmp_path / "downloads" / "manual"
    assert f"fetched by hand, into {manual}:" in out
    assert all(f"{file}  missing" in out for file in files)
    with pytest.raises(UserError, match=f"put .*{files[0]}.* into {manual}"):
      data.prepare(name, root)
  (tmp_path / "downloads" / "manual" / "NWPU-RESISC45").mkdir(parents=True)
  needs = data.find_needs("vtab:resisc45", root)
  assert needs.manual_files == {"NWPU-RESISC45": True}
  assert needs.state == "missing"


def test_list_has_the_tasks_by_group(mocked, capsys):
  mocked.prepare("vtab:dtd")
  assert main(["data", "list", f"--data_dir={mocked.root}"]) == 0
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  for words in (
    "natural vtab:dtd ready",
    "structured vtab:dmlab to download",
    "specialized vtab:resisc45 by hand:",
    "natural mini:digits run",
  ):
    assert any(line[: len(words.split())] == words.split() for line in lines)
  for name in (*(f"vtab:{n}" for n in _VTAB), *_PLAIN):
    assert sum(name in line for line in lines) == 1


# --- mistakes ---


def test_what_is_no_task_or_split_is_explained(mocked):
  mocked.prepare("vtab:dtd")
  for name, split, words in (
    ("vtab:clevr_coutn", "test", r"did you mean 'vtab:clevr_count'\?; there"),
    ("vtab:", "test", "unknown task 'vtab:'.*; there are vtab:caltech101, "),
    ("clevr_count", "test", "did you mean 'vtab:clevr_count'"),
    ("vtab:dtd", "trian800", "Unknown split 'trian800'; there are train800, v"),
    ("vtab:dmlab", "test", "run `vit-jax data prepare vtab:dmlab --data_dir"),
  ):
    with pytest.raises(UserError, match=words) as e:
      data.get_source(name, split, mocked.root)
    assert "\n" not in str(e.value)


def test_another_number_of_classes_is_explained(mocked, monkeypatch):
  mocked.prepare("vtab:dtd")
  folder = next(pathlib.Path(mocked.root).glob("dtd/*/features.json"))
  features = json.loads(folder.read_text())
  label = features["featuresDict"]["features"]["label"]["classLabel"]
  label["numClasses"] = "46"
  folder.write_text(json.dumps(features))
  (folder.parent / "label.labels.txt").write_text(
    "\n".join(f"c{k}" for k in range(46))
  )
  with pytest.raises(UserError, match=r"has 46 classes .* not the 47 of DTD"):
    data.get_source("vtab:dtd", "test", mocked.root)


def test_a_task_of_other_classes_is_not_evaluated(mini_dir):
  class Weights:
    class_names, num_classes, run = tuple("ab"), 2, {}
    source = "runs/x"

  test = data.get_source("mini:count", "test", mini_dir)
  words = (
    "'mini:count' has 6 classes, the checkpoint 2; the checkpoint has no '"
  )
  with pytest.raises(UserError, match=words):
    relabelled.match_classes(Weights, test)
