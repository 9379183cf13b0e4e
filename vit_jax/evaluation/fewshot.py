"""Linear evaluation in closed form: a ridge regression on frozen features.

The paper's few-shot accuracy (its Section 4.1): regularised least squares from
the representation of an image to {-1, 1}^k. As in the published evaluation,
features are scaled to mean 0 and standard deviation 1, l2 is 2^10, and a
constant feature of 100 leaves the bias almost free of the penalty. With all
training labels this is a linear probe.

The features come from the devices; the rest is NumPy in float64, since the
normal equations square the condition number.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vit_jax import data, models
from vit_jax.errors import UserError
from vit_jax.evaluation.sums import fetch, make_sums
from vit_jax.training import steps

L2 = 2.0**10
_CONSTANT = 100.0  # the feature that stands for a bias
_EPSILON = 1e-5  # added to standard deviations
_CHUNK = 16_384  # examples that are in float64 at a time
_QUERIES = 1024  # images of one nearest-neighbour search


class Classifier(NamedTuple):
  """The solution of a regression.

  Attributes:
    mean, deviation: f64[d], the training features' mean and standard deviation.
    kernel: f64[d+1 k]; the last row belongs to the constant.
  """

  mean: np.ndarray
  deviation: np.ndarray
  kernel: np.ndarray

  def predict(self, features: np.ndarray) -> np.ndarray:
    """Returns the class int64[n] of features f32[n d]."""
    chunks = self._whiten(features)
    return np.concatenate([(x @ self.kernel).argmax(axis=1) for x in chunks])

  def _whiten(self, features) -> Iterator[np.ndarray]:
    """Yields f64[c d+1], some rows at a time."""
    for start in range(0, len(features), _CHUNK):
      x = features[start : start + _CHUNK].astype(np.float64)
      x = (x - self.mean) / self.deviation
      yield np.pad(x, ((0, 0), (0, 1)), constant_values=_CONSTANT)


def fit(
  features: np.ndarray, labels: np.ndarray, num_classes: int, l2: float = L2
) -> Classifier:
  """Solves min_W ||X W - Y||^2 + l2 ||W||^2, Y in {-1, 1}.

  In addition to the features, one chunk of X and Y is in memory.

  Args:
    features: f32[n d].
    labels: int[n].
    num_classes: k.
    l2: the penalty's factor.
  """
  mean = features.mean(axis=0, dtype=np.float64)
  squares = np.zeros_like(mean)
  for start in range(0, len(features), _CHUNK):
    squares += ((features[start : start + _CHUNK] - mean) ** 2).sum(axis=0)
  deviation = np.sqrt(squares / len(features)) + _EPSILON
  empty = Classifier(mean, deviation, np.empty((0, num_classes)))
  d = len(mean) + 1
  gram, moments = l2 * np.eye(d), np.zeros((d, num_classes))
  for i, x in enumerate(empty._whiten(features)):
    mine = labels[i * _CHUNK : (i + 1) * _CHUNK, None]
    gram += x.T @ x
    moments += x.T @ np.where(mine == np.arange(num_classes), 1.0, -1.0)
  return empty._replace(kernel=np.linalg.solve(gram, moments))


def sample(
  labels: np.ndarray, class_names: Sequence[str], shots: int, seed: int
) -> np.ndarray:
  """Returns the indices int64[shots * k] of `shots` examples of each class.

  With the same seed, more shots include the fewer.

  Raises:
    UserError: a class has fewer.
  """
  rng = np.random.default_rng(seed)
  chosen = []
  for label, name in enumerate(class_names):
    mine = rng.permutation(np.flatnonzero(labels == label))
    if len(mine) < shots:
      raise UserError(
        f"class {name!r} has {len(mine)} training images, fewer than "
        f"{shots} shots; take fewer shots or another train_split"
      )
    chosen.append(mine[:shots])
  return np.concatenate(chosen)


def make_evaluate(
  model: models.Model,
  train: data.Source,
  test: data.Source,
  shots: Sequence[int],
  **where,
) -> Callable:
  """Returns params -> iterator of ("5shot", accuracy) for each of `shots`.

  The examples are those of seed 0, the same in every evaluation.

  Args:
    model: the model; its head does not matter.
    train, test: sets of the same classes, one label an image.
    shots: training images of each class.
    **where: the other arguments of `make_sums`.

  Raises:
    UserError: different classes, several labels, fewer images than shots.
  """
  names = check_classes(train, test)
  extractors = [
    make_extract(model=model, source=source, **where)
    for source in (train, test)
  ]

  def run(params):
    train_set, test_set = (extract(params) for extract in extractors)
    yield "examples", len(test_set[1])
    for count in shots:
      accuracy = evaluate(train_set, test_set, names, shots=count, seed=0)
      yield f"{count}shot", accuracy

  return run


def check_classes(train: data.Source, test: data.Source) -> list[str]:
  """Returns the names of the classes, which both splits must share.

  Raises:
    UserError: they differ.
  """
  if train.class_names != test.class_names:
    raise UserError(
      f"{train.split} and {test.split} of {test.dataset} have other classes"
    )
  return train.class_names


def make_extract(
  *,
  model: models.Model,
  source: data.Source,
  what: str = "pooled",
  layers: Sequence[int] = (-1,),
  **where,
) -> Callable:
  """Returns params -> (features f32[n d], labels int32[n]) of all of `source`.

  Every image is in them once and in order, on any number of devices. Every
  process gets all of them.

  Args:
    model: the model; its head does not matter.
    source: its images.
    what, layers: which features, see `models.make_features`.
    **where: the other arguments of `make_sums`.

  Raises:
    UserError: images with several labels, a batch size that is not divisible,
      random preprocessing.
  """
  if source.multilabel:
    raise UserError(
      f"{source.dataset} has images with several labels; a linear evaluation "
      "takes sets with one label an image"
    )

  take = models.make_features(model, what, layers)

  def extract(params, batch):
    features = take(params, steps.normalize(batch["image"]))
    features = features.reshape(len(features), -1)
    return features, batch["labels"][:, 0], batch["mask"]

  batches = make_sums(extract, model=model, source=source, **where)

  def run(params):
    kept = [
      (features[mask], labels[mask])
      for features, labels, mask in fetch(batches(params))
    ]
    features, labels = zip(*kept, strict=True)
    return np.concatenate(features), np.concatenate(labels)

  return run


def evaluate(
  train: tuple[np.ndarray, np.ndarray],
  test: tuple[np.ndarray, np.ndarray],
  class_names: Sequence[str],
  *,
  shots: int | None,
  seed: int,
  l2: float = L2,
) -> float:
  """Returns the accuracy on `test` after a fit to `shots` of `train`.

  Args:
    train, test: (features f32[n d], labels int[n]).
    class_names: a name for each class.
    shots: training images of each class; None for all.
    seed: of their choice.
    l2: the penalty's factor.

  Raises:
    UserError: a class has fewer training images.
  """
  features, labels = train
  if shots is not None:
    chosen = sample(labels, class_names, shots, seed)
    features, labels = features[chosen], labels[chosen]
  classifier = fit(features, labels, len(class_names), l2)
  return float(np.mean(classifier.predict(test[0]) == test[1]))


def evaluate_neighbours(
  train: tuple[np.ndarray, np.ndarray],
  test: tuple[np.ndarray, np.ndarray],
  num_classes: int,
  *,
  count: int,
  temperature: float = 0.07,
) -> float:
  """Returns the accuracy of a weighted k-nearest-neighbour classifier.

  Each of the `count` nearest by cosine similarity s votes for its class with
  exp(s / temperature), as in the evaluations of DINO (arXiv 2104.14294).

  Args:
    train, test: (features f32[n d], labels int[n]).
    num_classes: k.
    count: k; at most all training images are used.
    temperature: see above.
  """
  keys, queries = (
    x / np.linalg.norm(x, axis=1, keepdims=True) for x, _ in (train, test)
  )
  count, correct = min(count, len(keys)), 0
  for start in range(0, len(queries), _QUERIES):
    rows = slice(start, start + _QUERIES)
    similarity = queries[rows] @ keys.T
    nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
    weights = np.take_along_axis(similarity, nearest, axis=1) / temperature
    votes = np.zeros((len(nearest), num_classes))
    row = np.arange(len(nearest))[:, None]
    np.add.at(votes, (row, train[1][nearest]), np.exp(weights))
    correct += np.sum(votes.argmax(axis=1) == test[1][rows])
  return float(correct / len(queries))
