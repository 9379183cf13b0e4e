"""Pseudo-labels: scores of the teacher, which are kept, and resuming."""

import collections
import json
import shutil

import numpy as np
import pytest
from mistakes import named
from PIL import Image
from random_models import models_are_kept  # noqa: F401
from sklearn import datasets

import vit_jax
from vit_jax import data, pretrained
from vit_jax.data import preprocess
from vit_jax.tools import pseudo_label as pseudo_labels
from vit_jax.tools.pseudo_label import pseudo_label

_TEACHER = "ViT-N_8-digits"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """60 digits, some of them hard to read, in a folder for each."""
  folder = tmp_path_factory.mktemp("digits")
  found, rng = datasets.load_digits(), np.random.default_rng(0)
  # A nine is never shown.
  few = [i for i in range(70) if found.target[i] != 9][:60]
  for i in few:
    pixels = found.images[i] * 15 + rng.normal(0, i, (8, 8))
    file = folder / str(found.target[i]) / f"{i}.png"
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.uint8(pixels.clip(0, 255))).save(file)
  (folder / "9").mkdir()
  shutil.copy(folder / "8" / next((folder / "8").iterdir()), folder / "9")
  return folder


@pytest.fixture(scope="module")
def logits(digits):
  """What the teacher says of the images, one by one: f64[n k]."""
  model = vit_jax.load(_TEACHER)
  about = model.config
  source = data.get_source(f"images:{digits}", "train")
  pixels = [
    preprocess.preprocess_image(
      source.describe(i), about.preprocess, about.image_size
    )
    for i in range(source.num_examples)
  ]
  return np.float64(model(np.float32(pixels) / 127.5 - 1))


@pytest.fixture
def score(logits):
  """Its probabilities."""
  scores = np.exp(logits - logits.max(-1, keepdims=True))
  return scores / scores.sum(-1, keepdims=True)


def _select_slowly(labels, confidence, least, per_class, balance):
  """The selection with lists, one example after the other."""
  of_class = collections.defaultdict(list)
  for i, (label, p) in enumerate(zip(labels, confidence, strict=True)):
    if p >= least:
      of_class[label].append((-p, i))
  for found in of_class.values():
    found.sort()
    del found[per_class:]
  most = max(map(len, of_class.values()), default=0)
  chosen = []
  for found in of_class.values():
    wanted = most if balance else len(found)
    chosen += [found[rank % len(found)][1] for rank in range(wanted)]
  return sorted(chosen)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("per_class", [1, 7, 10_000])
def test_selection_equals_a_slow_one(balance, per_class):
  rng = np.random.default_rng(per_class)
  for size, classes, least in ((1, 3, 0.1), (300, 7, 0.3), (300, 40, 0.5)):
    labels = np.minimum(rng.geometric(0.2, size), classes) - 1  # a long tail
    # Few values: many are equally confident.
    confidence = np.float32(rng.integers(1, 9, size) / 8)
    confidence[0] = 0.5
    choice = {"per_class": per_class, "balance": balance}
    found = pseudo_labels.select(
      labels.astype(np.int32),
      confidence,
      classes,
      min_confidence=least,
      **choice,
    )
    assert found.dtype == np.int64
    expected = _select_slowly(
      labels.tolist(), confidence.tolist(), least, **choice
    )
    assert found.tolist() == expected
  found = pseudo_labels.select(
    np.zeros(4, np.int32), np.zeros(4), 2, min_confidence=0.1, **choice
  )
  assert found.tolist() == []


@pytest.mark.ci
@pytest.mark.parametrize("soft", [False, True])
def test_a_set_has_what_the_teacher_says(digits, score, tmp_path, soft):
  name, out = f"images:{digits}", str(tmp_path / "set")
  choice = {"min_confidence": 0.6, "per_class": 5}
  report = pseudo_label(
    _TEACHER, name, "train", out, soft=soft, batch_size=16, **choice
  )
  arrays = {f.stem: np.load(f) for f in (tmp_path / "set").glob("*.npy")}
  top = score.argmax(-1)
  index = arrays["index"]
  expected = _select_slowly(top.tolist(), score.max(-1).tolist(), 0.6, 5, True)
  assert index.tolist() == expected
  stored = 10 if soft else 1
  order = np.argsort(-score, axis=-1, kind="stable")[index, :stored]
  assert arrays["labels"].tolist() == order.tolist()
  if soft:
    np.testing.assert_allclose(
      arrays["probabilities"],
      np.take_along_axis(score[index], order, 1),
      atol=2e-6,
    )
  assert len(arrays) == 2 + soft
  distinct = sorted({*expected})
  counts = np.bincount(top[distinct], minlength=10)
  some = counts[counts > 0]
  assert report == {
    "examples": len(score),
    "confident": (score.max(-1) >= 0.6).sum(),
    "kept": len(expected),
    "distinct": len(distinct),
    "repeated": len(expected) - len(distinct),
    "mean_confidence": pytest.approx(score.max(-1)[expected].mean(), rel=1e-5),
    "classes": 10,
    "per_class": {
      "min": some.min(), "median": np.median(some), "max": some.max()
    },
    "largest": some.max(),
    "empty": [str(k) for k in np.flatnonzero(counts == 0)],
    "agreement": None,
  }  # fmt: skip
  assert report["repeated"] > 0
  source = data.get_source(f"pseudo:{out}", "train")
  assert source.num_examples == report["kept"]
  assert source.class_names == [str(k) for k in range(10)]
  assert source.max_labels == stored


def _read(folder):
  return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.ci
def test_a_killed_command_resumes(digits, tmp_path, monkeypatch):
  """With the same arrays; and with another choice from the same scores."""
  monkeypatch.setattr(pseudo_labels, "_PART", 8)  # a batch
  name = f"folder:{digits}"
  where = {"soft": True, "batch_size": 8}

  def label(out, split="train+test", **options):
    found = tmp_path / out
    pseudo_label(_TEACHER, name, split, str(found), **where | options)
    return _read(found)

  whole = label("whole")
  calls = []

  def kill_at(count):
    def before_batch():
      calls.append(1)
      if len(calls) == count:
        raise KeyboardInterrupt

    return before_batch

  parts, done = tmp_path / "killed.parts", []
  for count in (1, 7, 6):
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
      label("killed", before_batch=kill_at(count))
    assert not (tmp_path / "killed").exists()
    done.append(len([*parts.glob("*.npz")]))
  assert done == [0, 2, 3], "of those before it four are under way"
  with named("killed.parts", "other images_a_part"):
    label("killed", batch_size=32)
  with named("killed.parts", "other soft"):
    label("killed", soft=False)
  with named("killed.parts", "other split, identity"):
    label("killed", split="test")
  with named("none of the 61 images", "highest is 0.9", "--min_confidence"):
    label("killed", min_confidence=1)
  calls.clear()
  assert label("killed", before_batch=kill_at(0)) == whole
  assert not calls, "all scores were there"
  assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]
  before = (tmp_path / "killed" / "about.json").stat()
  assert label("killed", before_batch=kill_at(1)) == whole
  assert (tmp_path / "killed" / "about.json").stat() == before
  with named("killed has pseudo-labels with other", "per_class, balance"):
    label("killed", per_class=2, balance=False)
  with named("killed has pseudo-labels with other split, identity"):
    label("killed", split="test")


@pytest.mark.ci
def test_agreement_is_of_labels_with_the_same_names(digits, score, tmp_path):
  name = f"folder:{digits}"
  report = pseudo_label(
    *(_TEACHER, name, "train+test", str(tmp_path / "a")), min_confidence=0.5
  )
  source = data.get_source(name, "train+test")
  own = [source.read_example(i)[1][0] for i in range(source.num_examples)]
  about = json.loads((tmp_path / "a" / "about.json").read_text())
  assert about["report"] == report
  index = np.load(tmp_path / "a" / "index.npy")
  labels = np.load(tmp_path / "a" / "labels.npy")[:, 0]
  rows = {i: own[i] == k for i, k in zip(index, labels, strict=True)}
  assert report["agreement"] == pytest.approx(np.mean([*rows.values()]))
  assert 0.5 < report["agreement"] < 1  # the image in 9/ is no nine
  assert score.shape[0] == len(own)
  # The images of a set that a model has labelled can be labelled again.
  again = pseudo_label(
    _TEACHER, f"pseudo:{tmp_path}/a", "train", str(tmp_path / "b")
  )
  assert again["agreement"] == 1


@pytest.mark.ci
def test_sigmoids_are_divided_by_their_sum(
  digits, logits, tmp_path, monkeypatch
):
  weights = pretrained.read(_TEACHER)._replace(loss="sigmoid")
  monkeypatch.setattr(pretrained, "read", lambda source: weights)
  pseudo_label(
    *(_TEACHER, f"images:{digits}", "train[:20]", str(tmp_path / "set")),
    **{"soft": True, "min_confidence": 0, "balance": False},
  )
  scores = 1 / (1 + np.exp(-logits[:20]))
  scores /= scores.sum(-1, keepdims=True)
  found = np.load(tmp_path / "set" / "probabilities.npy")
  np.testing.assert_allclose(found, -np.sort(-scores), atol=2e-6)


def test_mistakes_are_named(digits, tmp_path, monkeypatch):
  name, out = f"images:{digits}", tmp_path / "set"
  weights = pretrained.read(_TEACHER)

  def label(images=name, **options):
    return pseudo_label(_TEACHER, images, "train", str(out), **options)

  def give(**changes):
    changed = weights._replace(**changes)
    monkeypatch.setattr(pretrained, "read", lambda source: changed)

  with named("min_confidence is 1.5", "from 0 to 1"):
    label(min_confidence=1.5)
  with named("per_class is 0"):
    label(per_class=0)
  with named("batch_size is 0"):
    label(batch_size=0)
  give(class_names=None)
  with named(_TEACHER, "does not name its 10 classes"):
    label()
  give(num_classes=0)
  with named(_TEACHER, "has 0 classes", "2 or more"):
    label()
  bias = weights.params["head/bias"]
  broken = bias._replace(read=lambda: np.full(10, np.nan, np.float32))
  give(params={**weights.params, "head/bias": broken})
  with named(_TEACHER, "not finite"):
    label()
  assert not [*(tmp_path / "set.parts").glob("*.npz")]
  out.write_text("a file")
  with named(str(out), "nothing is overwritten"):
    label()
