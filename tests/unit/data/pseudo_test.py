"""Pseudo-labelled sets, opened and mixed; images without labels."""

import json
import runpy

import numpy as np
import pytest
from mistakes import named
from PIL import Image
from tiny_runs import REPO

from vit_jax import config as configuration
from vit_jax import data
from vit_jax.data import pseudo
from vit_jax.data.order import Shuffle
from vit_jax.training import inputs

_CLASSES = ["a", "b", "c"]
_POOL, _ROWS = 100, 150  # images without labels, and rows of the set


def _paint(file, *colour):
  file.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (8, 8), colour).save(file)


def _write(root, soft, split="train", seed=0):
  """Writes root/soft or root/hard, labels of root/pool; returns its arrays."""
  rng = np.random.default_rng(seed)
  images = data.get_source(f"images:{root}/pool", split)
  chosen = rng.choice(images.num_examples, 70, replace=False)
  more = rng.choice(chosen, _ROWS - len(chosen))
  index = np.sort(np.concatenate([chosen, more]))
  # The same for all rows of an image, and no two images alike.
  labels = np.argsort(rng.random((_POOL, 3)))[index, :2]
  low = rng.uniform(0.1, 0.3, _POOL)[index]
  values = np.float32(np.stack([0.4 + low, low], 1))
  about = {
    "dataset": f"images:{root}/pool",
    "split": split,
    "identity": images.identity(),
    "class_names": _CLASSES,
    "options": {"soft": soft},
  }
  folder = root / ("soft" if soft else "hard")
  if soft:
    pseudo.write(folder, about, index, labels, values)
  else:
    labels = labels[:, :1]
    pseudo.write(folder, about, index, labels)
  return index, labels, values


@pytest.fixture
def root(tmp_path):
  """A folder `labelled` of 25 images, and `pool` of 100 without labels."""
  for i in range(25):
    _paint(tmp_path / "labelled" / _CLASSES[i % 3] / f"{i}.png", i, 0, 77)
  for i in range(_POOL):
    _paint(tmp_path / "pool" / str(i // 40) / "deep" / f"{i:03}.png", i, 1, 77)
  (tmp_path / "pool" / "notes.txt").write_text("no image")
  return tmp_path


def _mix(root, which="soft"):
  """The mixture labelled=1, pseudo=3, opened."""
  text = f"folder:{root}/labelled=1,pseudo:{root}/{which}=3"
  return [
    (data.get_source(name, "train+test" if i == 0 else "unused"), weight)
    for i, (name, weight) in enumerate(data.parse_mixture(text))
  ]


def _train(mixture, rows=range(20), **options):
  defaults = {
    **{"seed": 3, "batch_size": 20, "preprocess": "resize(size)"},
    **{"image_size": 8, "start_step": 0, "num_steps": 8},
  }
  return [
    *data.train_batches(mixture, rows=np.array(rows), **defaults | options)
  ]


def _join(batches, name):
  return np.concatenate([batch[name] for batch in batches])


def _assert_right(batches, arrays):
  """Checks that each image has its own labels and probabilities."""
  of_image = {
    i: (x.tolist(), y.tolist()) for i, x, y in zip(*arrays, strict=True)
  }
  names = ("image", "labels", "probabilities")
  for image, *found in zip(*(_join(batches, x) for x in names), strict=True):
    i, is_pool, _ = image[0, 0].tolist()
    labels, values = [x.tolist() for x in found]
    assert (labels, values) == (
      of_image[i] if is_pool else ([i % 3, -1], [0, 0])
    )


@pytest.mark.ci
def test_a_mixture_has_its_proportions_and_probabilities(root):
  arrays = _write(root, soft=True)
  batches = _train(_mix(root), range(500), batch_size=500, num_steps=20)
  assert batches[0]["probabilities"].dtype == np.float32
  assert batches[0]["labels"].dtype == np.int32
  _assert_right(batches, arrays)
  colours = _join(batches, "image")[:, 0, 0]
  # 2,500 of 25 images; 7,500 of 150 rows: 50 epochs, repeated images in each.
  own, pool = (colours[colours[:, 1] == k, 0] for k in (0, 1))
  assert np.bincount(own).tolist() == [100] * 25
  expected = 50 * np.bincount(arrays[0], minlength=_POOL)
  assert np.bincount(pool, minlength=_POOL).tolist() == expected.tolist()


@pytest.mark.ci
@pytest.mark.parametrize(
  "shuffle",
  [
    Shuffle(),
    pytest.param(
      Shuffle(blocks=[3, 7], window=2, streams=4), marks=pytest.mark.ci
    ),
  ],
)
def test_hosts_recombine_and_bad_images_are_replaced(root, shuffle, caplog):
  # Before it is labelled: the set is of these files.
  (root / "pool" / "1" / "deep" / "060.png").write_bytes(b"no")
  arrays = _write(root, soft=True)
  assert {60, 61} < {*arrays[0].tolist()}
  options = {"shuffle": shuffle, "on_bad_example": "replace"}
  whole = _train(_mix(root), **options)
  _assert_right(whole, arrays)
  assert _join(whole, "replaced").sum() > 0
  assert "060.png: not a readable image" in caplog.text
  for rows in (range(5), range(5, 20)):
    part = _train(_mix(root), rows, **options, start_step=6, num_steps=2)
    for ours, batch in zip(part, whole[6:], strict=True):
      assert ours.keys() == batch.keys()
      for name, x in batch.items():
        np.testing.assert_array_equal(ours[name], x[list(rows)])


def test_hard_labels_have_no_probabilities(root):
  index, labels, _ = _write(root, soft=False)
  source = data.get_source(f"pseudo:{root}/hard", "train")
  assert (source.num_examples, source.max_labels) == (_ROWS, 1)
  batches = _train(_mix(root, "hard"))
  assert batches[0].keys() == {"image", "labels"}
  of_image = dict(zip(index.tolist(), labels[:, 0].tolist(), strict=True))
  for image, [label] in zip(
    _join(batches, "image"), _join(batches, "labels").tolist(), strict=True
  ):
    i, is_pool, _ = image[0, 0].tolist()
    assert label == (of_image[i] if is_pool else i % 3)


def test_an_evaluation_takes_the_likeliest_class(root):
  index, labels, _ = _write(root, soft=True)
  source = data.get_source(f"pseudo:{root}/soft", "test")
  options = {"rows": np.arange(40), "preprocess": "resize(size)"}
  batches = [*data.eval_batches(source, batch_size=40, image_size=8, **options)]
  found = _join(batches, "labels")[: len(index)]
  assert found.tolist() == labels[:, :1].tolist()
  last = data.eval_batches(
    source, batch_size=40, image_size=8, start_step=3, **options
  )
  [batch] = last
  for name, x in batches[3].items():
    np.testing.assert_array_equal(batch[name], x)


def test_a_bucket_is_asked_for_neighbours(root):
  """And for the records between them, which cost less than a request."""
  index, _, _ = _write(root, soft=True)
  source = data.get_source(f"pseudo:{root}/soft", "train")
  expected = source.read(np.arange(_ROWS))
  asked, read = [], source._images.read
  source._images.read = lambda x: asked.append(x.tolist()) or read(x)
  source.remote, pseudo_gap = True, pseudo._GAP
  rows = np.array([0, 1, 2, 149, 60, 60])
  assert source.read(rows) == [expected[i] for i in rows]
  [wanted] = asked
  near = np.unique(index[[0, 1, 2]])
  assert near[-1] - near[0] <= pseudo_gap < index[60] - near[-1]
  assert wanted == [*range(near[0], near[-1] + 1), index[60], index[149]]


def test_what_a_set_is_told_from(root):
  _write(root, soft=True)
  first = data.get_source(f"pseudo:{root}/soft", "train")
  assert first.describe(0).endswith(f"{first._index[0]:03}.png")
  assert data.count_shared(
    first, data.get_source(f"images:{root}/pool", "train")
  )
  (root / "soft").rename(root / "other")
  _write(root, soft=True, seed=1)
  second = data.get_source(f"pseudo:{root}/soft", "train")
  third = data.get_source(f"pseudo:{root}/other", "train")
  assert first.identity() == third.identity() != second.identity()
  assert data.list_splits(f"pseudo:{root}/soft") == {"train": _ROWS}


def _get_config(root, dataset):
  config = runpy.run_path(str(REPO / "configs/common.py"))["get_config"]()
  config.train.dataset = dataset
  return config


def test_images_without_labels(root, tmp_path):
  name = f"images:{root}/pool"
  source = data.get_source(name, "train[:30%]")
  assert source.num_examples == 30
  assert source.class_names == []
  assert [path.name for path in source.left_out] == ["notes.txt"]
  [batch] = data.eval_batches(
    source,
    **{"batch_size": 30, "rows": np.arange(30), "image_size": 8},
    preprocess="resize(size)",
  )
  assert batch["image"][:, 0, 0, 0].tolist() == [*range(30)]
  assert (batch["labels"] == -1).all()
  assert data.list_splits(name) == {"train": _POOL}
  for on_bad_example in ("stop", "replace"):
    config = _get_config(root, name)
    config.train.on_bad_example = on_bad_example
    with named(name, "has no labels", "vit-jax pseudo-label"):
      inputs.open_inputs(config)
  with named("nothing' has no images"):
    (root / "nothing").mkdir()
    data.get_source(f"images:{root}/nothing", "train")
  with named("nowhere is not a folder"):
    data.get_source(f"images:{root}/nowhere", "train")
  with named("no_such", "there are train (100)"):
    data.get_source(name, "no_such")
  whole = data.get_source(name, "train").identity()
  (root / "pool").rename(tmp_path / "moved")
  moved = data.get_source(f"images:{tmp_path}/moved", "train")
  assert moved.identity() == whole


def test_the_test_set_is_not_the_pseudo_labelled_one(root):
  for text in (
    f"pseudo:{root}/soft=14,digits=1",
    f"digits=1,pseudo:{root}/x=2",
  ):
    config = _get_config(root, text)
    assert configuration.find_test_set(config) == "digits"
  _write(root, soft=True)
  config = _get_config(root, f"pseudo:{root}/soft")
  assert configuration.find_test_set(config) == ""
  with named("pseudo-labelled", "set config.eval.dataset"):
    inputs.open_inputs(config)


def test_what_cannot_be_opened_is_explained(root):
  name, folder = f"pseudo:{root}/soft", root / "soft"
  with named(str(folder / "about.json"), "vit-jax pseudo-label"):
    data.get_source(name, "train")
  _write(root, soft=True)
  pool = root / "pool"
  pool.rename(root / "away")
  with named(name, f"{pool} is not a folder"):
    data.get_source(name, "train")
  (root / "away").rename(pool)
  file = pool / "0" / "deep" / "007.png"
  content = file.read_bytes()
  file.write_bytes(content + b" ")
  with named(name, "has labels of other images", "label it again"):
    data.get_source(name, "train")
  file.write_bytes(content)
  about = json.loads((folder / "about.json").read_text())
  array = (folder / "labels.npy").read_bytes()
  (folder / "labels.npy").write_bytes(array[:-8])
  with named("labels.npy cannot be read"):
    data.get_source(name, "train")
  np.save(folder / "labels.npy", np.zeros((9, 2), np.int32))
  with named(name, "is corrupt"):
    data.get_source(name, "train")
  (folder / "labels.npy").write_bytes(b"")
  with named("labels.npy cannot be read"):
    data.get_source(name, "train")
  np.save(folder / "labels.npy", np.zeros(100, np.int32))
  with named(name, "is corrupt"):
    data.get_source(name, "train")
  (folder / "labels.npy").write_bytes(array)
  (folder / "about.json").write_text(json.dumps({"split": about["split"]}))
  with named("about.json is not of pseudo-labels"):
    data.get_source(name, "train")
