"""Linear evaluation: the solution, the draws, every image once, the command."""

import json
import tracemalloc

import jax
import numpy as np
import pytest
from random_models import random_params
from sklearn import neighbors
from sklearn.linear_model import Ridge

import vit_jax
from vit_jax import data, models, sharding
from vit_jax.__main__ import main
from vit_jax.data import preprocess
from vit_jax.errors import UserError
from vit_jax.evaluation import fewshot
from vit_jax.evaluation.devices import replicate
from vit_jax.training import steps

_NAMES = list("abc")


def _make_features(n, d, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, n)
  centers = np.random.default_rng(9).normal(size=(3, d))
  scale = np.linspace(0.1, 10, d)
  features = (centers[labels] + rng.normal(size=(n, d))) * scale + scale
  return features.astype(np.float32), labels


@pytest.mark.parametrize(("n", "d"), [(40, 7), (12, 30)], ids=str)
@pytest.mark.parametrize("l2", [2.0**10, 1.0])
def test_the_solution_is_that_of_scikit_learn(n, d, l2, monkeypatch):
  """Beside a solver of another method, with fewer rows than columns too."""
  monkeypatch.setattr(fewshot, "_CHUNK", 11)
  features, labels = _make_features(n, d)
  found = fewshot.fit(features, labels, 3, l2)
  x = features.astype(np.float64)
  x = (x - x.mean(0)) / (x.std(0) + 1e-5)
  x = np.hstack([x, np.full((n, 1), 100.0)])
  ridge = Ridge(alpha=l2, fit_intercept=False, solver="svd")
  ridge.fit(x, 2.0 * np.eye(3)[labels] - 1)
  np.testing.assert_allclose(found.kernel, ridge.coef_.T, rtol=1e-8, atol=1e-12)
  other, _ = _make_features(50, d, seed=1)
  scores = ridge.predict(
    np.hstack(
      [
        (other - found.mean) / found.deviation,
        np.full((50, 1), 100.0),
      ]
    )
  )
  np.testing.assert_array_equal(found.predict(other), scores.argmax(1))


def test_memory_does_not_grow_with_examples_times_classes(monkeypatch):
  monkeypatch.setattr(fewshot, "_CHUNK", 64)
  features = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
  labels = np.arange(5000) % 700
  tracemalloc.start()
  found = fewshot.fit(features, labels, 700)
  found.predict(features)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # The targets or the scores of all alone would be 28 MB.
  assert peak < 3e6


def test_draws():
  labels = np.repeat([2, 0, 1], [20, 30, 25])
  ten = fewshot.sample(labels, _NAMES, 10, seed=1)
  assert np.bincount(labels[ten]).tolist() == [10, 10, 10]
  assert len(set(ten.tolist())) == 30
  five = fewshot.sample(labels, _NAMES, 5, seed=1)
  assert set(five.tolist()) < set(ten.tolist())
  assert set(fewshot.sample(labels, _NAMES, 10, seed=2)) != set(ten)
  # As published: one generator a seed permutes class after class.
  rng = np.random.default_rng(1)
  expected = [rng.permutation(np.where(labels == k)[0])[:10] for k in range(3)]
  np.testing.assert_array_equal(ten, np.concatenate(expected))
  with pytest.raises(UserError, match=r"class 'c' has 20 .* 21 shots"):
    fewshot.sample(labels, _NAMES, 21, seed=0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """Random weights with a tanh layer before the head, in a file."""
  from vit_jax import pretrained
  from vit_jax.pretrained.weights import Weights, as_lazy
  from vit_jax.state import flatten

  options = {"variant": "ViT-w32d1m64h2_8", "representation_size": 20}
  model = models.create(num_classes=4, image_size=16, **options)
  flat = flatten(random_params(model))
  path = tmp_path_factory.mktemp("weights") / "weights.npz"
  params = {name: as_lazy(x) for name, x in flat.items()}
  pretrained.write(
    Weights("test", "here", options, (16, 16), 4, params), str(path), "npz"
  )
  return path


def _extract(loaded, source, devices):
  mesh = sharding.make_mesh(1, jax.devices()[:devices])
  extract = fewshot.make_extract(
    model=loaded.model,
    source=source,
    mesh=mesh,
    batch_size=24,
    preprocess="resize(size)",
  )
  return extract(replicate(mesh, loaded.params))


@pytest.mark.ci
def test_any_number_of_devices_sees_every_image_once(weights, runs):
  source = data.get_source("digits", "test[:101]", str(runs.data_dir))
  loaded = vit_jax.load(str(weights))
  pictures = [
    preprocess.preprocess_image(source.parse(r)[0].numpy(), "resize(size)", 16)
    for r in source.read(np.arange(101))
  ]
  labels = [int(source.parse(r)[1][0]) for r in source.read(np.arange(101))]
  expected = loaded.features(steps.normalize(np.stack(pictures)))
  assert expected.shape == (101, 20)

  def evaluate(features):
    train, test = zip(
      *((x[:60], x[60:]) for x in (features, np.array(labels))), strict=True
    )
    return fewshot.evaluate(train, test, source.class_names, shots=2, seed=0)

  accuracy = evaluate(np.asarray(expected))
  assert accuracy > 0.15  # chance is 0.1
  for devices in (3, 8):
    features, found_labels = _extract(loaded, source, devices)
    assert found_labels.tolist() == labels
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert evaluate(features) == accuracy


def test_several_labels_an_image_are_refused(weights, runs):
  loaded = vit_jax.load(str(weights))
  source = data.get_source("digits", "test[:8]", str(runs.data_dir))
  source.multilabel = True
  with pytest.raises(UserError, match="several labels"):
    _extract(loaded, source, 1)


def _linear_args(weights, runs, *more):
  return [
    "linear",
    f"--checkpoint={weights}",
    "--dataset=digits",
    f"--data_dir={runs.data_dir}",
    "--train_split=train[:300]",
    "--test_split=test[:100]",
    *more,
  ]


@pytest.mark.ci
def test_the_command(weights, runs, capsys):
  args = _linear_args(weights, runs, "--shots=2,5,all")
  assert main([*args, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["features"] == 20
  assert found["preprocess"] == "resize(size)"
  assert (found["train_examples"], found["test_examples"]) == (300, 100)
  two, five, probe = found["results"]
  for row in (two, five):
    assert len(row["accuracies"]) == 3
    assert row["accuracy"] == pytest.approx(np.mean(row["accuracies"]))
    assert row["spread"] == pytest.approx(np.std(row["accuracies"], ddof=1))
  assert probe["shots"] == "all"
  assert len(probe["accuracies"]) == 1
  assert probe["accuracy"] > five["accuracy"] > two["accuracy"] > 0.15
  # A batch is rounded up to the devices, and all images are still there.
  assert main([*args, "--batch_size=37"]) == 0
  out = capsys.readouterr().out
  assert f"all shots {probe['accuracy']:8.2%}" in out
  assert "300 images of train[:300], 100 of test[:100]" in out


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--shots=40", "fewer than 40 shots"),
    ("--shots=five", "--shots is 'five'"),
    ("--shots=0", "must be 1 or more"),
    ("--l2=0", "--l2 is 0"),
    ("--batch_size=0", "batch_size is 0"),
    ("--image_size=20", "20 is not divisible by the patch size 8"),
  ],
)
def test_mistakes(argument, words, weights, runs, capsys):
  assert main(_linear_args(weights, runs, argument)) == 2
  out, err = capsys.readouterr()
  assert not out
  (line,) = err.splitlines()
  assert words in line


def test_neighbours_vote_as_in_scikit_learn():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 400)
  features = rng.normal(size=(400, 12)) + np.eye(12)[labels]
  train, test = slice(0, 300), slice(300, None)
  found = fewshot.evaluate_neighbours(
    (features[train], labels[train]),
    (features[test], labels[test]),
    4,
    count=15,
  )
  expected = neighbors.KNeighborsClassifier(
    15, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
  ).fit(features[train], labels[train])
  assert 0.3 < found < 0.9, "the comparison needs some mistakes"
  assert found == expected.score(features[test], labels[test])
