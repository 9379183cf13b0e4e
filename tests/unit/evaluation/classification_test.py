"""The evaluation of a whole test set: each image once, on any machine."""

import collections
import io
import types

import jax
import numpy as np
import pytest
import tensorflow as tf
from evaluating import evaluate
from PIL import Image
from sklearn import metrics

from vit_jax import data, models, sharding
from vit_jax.evaluation.sums import add_up
from vit_jax.tools.report import by_class
from vit_jax.training import losses
from vit_jax.training.objectives import Classification

_CLASSES = 4


class _Pictures(data.Source):
  """Plain pictures of one colour each, in memory."""

  def __init__(self, labels, colors):
    self.dataset, self.split = "pictures", "test"
    self.num_examples, self.num_classes = len(labels), _CLASSES
    self.class_names = list("abcd")
    self.multilabel = max(map(len, labels)) > 1
    self.max_labels = max(map(len, labels))
    self._labels = labels
    self._pngs = [self._encode(color) for color in colors]

  def _encode(self, color):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), tuple(map(int, color))).save(file, "png")
    return file.getvalue()

  def read(self, indices):
    return [
      bytes([len(self._labels[i]), *self._labels[i]]) + self._pngs[i]
      for i in indices
    ]

  def parse_labels(self, record):
    content = tf.io.decode_raw(record, tf.uint8)
    return tf.cast(content[1 : 1 + tf.cast(content[0], tf.int32)], tf.int32)

  def parse_image(self, record):
    count = tf.cast(tf.io.decode_raw(record, tf.uint8)[0], tf.int32)
    return tf.strings.substr(record, 1 + count, -1)


def _make_source(num_examples, multilabel):
  rng = np.random.default_rng(0)
  counts = (
    rng.integers(0, 4, num_examples) if multilabel else [1] * num_examples
  )
  labels = [rng.permutation(_CLASSES)[:n].tolist() for n in counts]
  colors = rng.integers(0, 256, (num_examples, 3))
  return _Pictures(labels, colors), labels, colors


_KERNEL = np.random.default_rng(1).normal(size=(3, _CLASSES)).astype(np.float32)


def _apply(params, images):
  return images.mean((1, 2)) @ params


_MODEL = models.Model(
  init=lambda key: _KERNEL,
  apply=_apply,
  image_size=(4, 4),
  grid=(1, 1),
  num_layers=0,
)


def _make_objective(source, loss):
  return Classification(
    model=_MODEL,
    class_names=source.class_names,
    loss_fn=losses.get_loss(loss),
  )


def _evaluate(source, devices, batch_size, loss="softmax"):
  objective = _make_objective(source, loss)
  return evaluate(objective, _KERNEL, source, devices, batch_size)


@pytest.mark.parametrize(
  ("num_examples", "machines"),  # devices and batch size
  [
    (1, ((3, 24),)),
    (24, ((1, 7), (8, 24))),
    (41, ((3, 24), (8, 64))),
  ],
)
def test_single_label_metrics_are_the_same_on_any_machine(
  num_examples, machines
):
  source, labels, colors = _make_source(num_examples, multilabel=False)
  logits = (colors / 127.5 - 1) @ _KERNEL.astype(float)
  labels = np.array(labels)[:, 0]
  shifted = logits - logits.max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  loss = -log_p[np.arange(num_examples), labels].mean()
  accuracy = (logits.argmax(-1) == labels).mean()
  for devices, batch_size in machines:
    found = _evaluate(source, devices, batch_size)
    assert found.keys() == {"examples", "loss", "accuracy"}
    assert found["examples"] == num_examples
    assert type(found["examples"]) is int
    # A ratio of two whole numbers: nothing to round.
    assert found["accuracy"] == accuracy
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)


@pytest.mark.ci
def test_multi_label_metrics_are_the_same_on_any_machine():
  source, labels, colors = _make_source(41, multilabel=True)
  assert source.multilabel
  logits = (colors / 127.5 - 1) @ _KERNEL.astype(float)
  targets = np.array([[c in row for c in range(_CLASSES)] for row in labels])
  labelled = targets.any(-1)
  assert 0 < labelled.sum() < 41, "some images have no label"
  top = targets[np.arange(41), logits.argmax(-1)][labelled]
  lrap = metrics.label_ranking_average_precision_score(
    targets[labelled], logits[labelled]
  )
  p = 1 / (1 + np.exp(-logits))
  loss = -np.log(np.where(targets, p, 1 - p)).sum(-1)[labelled].mean()
  for devices, batch_size in ((1, 10), (8, 16)):
    found = _evaluate(source, devices, batch_size, "sigmoid")
    names = {"examples", "labelled", "loss", "prec@1", "lrap"}
    assert found.keys() == names
    assert found["examples"] == 41
    assert found["labelled"] == labelled.sum()
    assert found["prec@1"] == top.mean()
    np.testing.assert_allclose(found["lrap"], lrap, rtol=1e-6)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)


# --- sums to metrics ---


def _sums(**kwargs):
  names = ("examples", "loss", "labelled", "correct", "ranking_precision")
  return {name: np.float32(kwargs.get(name, 0)) for name in names}


def _summarize(sums):
  objective = Classification(_MODEL, list("abcd"), losses.get_loss("softmax"))
  return dict(objective.summarize(add_up(sums), multilabel=False))


def test_summarize_counts_beyond_what_float32_can():
  # 2**24 + 1 is no float32: adding up on the device would lose images.
  sums = (_sums(examples=2**20, labelled=2**20, correct=1) for _ in range(17))
  sums = [*sums, _sums(examples=1, labelled=1, correct=1)]
  found = _summarize(sums)
  assert found["examples"] == 17 * 2**20 + 1
  assert found["accuracy"] == 18 / (17 * 2**20 + 1)


def test_summarize_without_labels_divides_by_nothing():
  sums = [_sums(examples=3)]
  assert _summarize(sums) == {
    "examples": 3,
    "loss": 0.0,
    "accuracy": 0.0,
  }
  assert _summarize([])["examples"] == 0


# --- by class ---


@pytest.fixture
def count(monkeypatch):
  """Counts (labels, colours, batch size) without a pipeline, which is slow."""

  def count_one(labels, colors, batch_size, kernel=_KERNEL, kept=6):
    padded = -(-len(labels) // batch_size) * batch_size
    most = max(map(len, labels))
    everything = {
      "image": np.zeros((padded, 4, 4, 3), np.uint8),
      "labels": np.full((padded, most), -1, np.int32),
      "mask": np.arange(padded) < len(labels),
      "index": np.arange(padded, dtype=np.int32),
    }
    everything["image"][: len(labels)] = np.array(colors)[:, None, None]
    for row, mine in zip(everything["labels"], labels, strict=False):
      row[: len(mine)] = mine

    def make_sums(look, **_):
      return lambda params: (
        jax.jit(look)(
          params, {k: x[i : i + batch_size] for k, x in everything.items()}
        )
        for i in range(0, padded, batch_size)
      )

    monkeypatch.setattr(by_class, "make_sums", make_sums)
    source = types.SimpleNamespace(multilabel=most > 1)
    return by_class.make_tally(
      model=_MODEL,
      to_probabilities=jax.nn.softmax,
      source=source,  # pyright: ignore[reportArgumentType]
      mesh=sharding.make_mesh(1, jax.devices()[:1]),
      batch_size=batch_size,
      preprocess="resize(size)",
      mistakes=kept,
    )(kernel)

  return count_one


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_the_tally_is_that_of_counting_one_by_one(
  count, multilabel, batch_size
):
  _, labels, colors = _make_source(43, multilabel)
  tally = count(labels, colors, batch_size)

  logits = (colors / 127.5 - 1) @ np.float64(_KERNEL)
  exp = np.exp(logits)
  probabilities = exp / exp.sum(1, keepdims=True)
  pairs, mistakes = collections.Counter(), []
  for i, (mine, row) in enumerate(zip(labels, probabilities, strict=True)):
    given = int(row.argmax())
    if not mine:
      continue
    if not multilabel:
      pairs[mine[0], given] += 1
    else:
      pairs[given if given in mine else -1, given] += 1
    if given not in mine:
      mistakes.append((-row[given], i, given, max(row[mine])))
  assert tally.labelled == pairs.total() == sum(map(bool, labels))
  assert tally.pairs == pairs
  mistakes = sorted(mistakes)[:6]
  assert len(tally.mistakes) == min(6, len(mistakes))
  for found, expected in zip(tally.mistakes, mistakes, strict=True):
    assert (found.index, found.given) == expected[1:3]
    assert found.labels == labels[found.index]
    assert found.probability == pytest.approx(-expected[0], rel=1e-5)
    assert found.label_probability == pytest.approx(expected[3], rel=1e-5)
    assert (found.pixels == colors[found.index]).all()
    assert found.pixels.shape == (4, 4, 3)


def test_mistakes_that_are_equally_sure_come_in_order(count):
  _, labels, colors = _make_source(7, False)
  always = np.zeros((3, _CLASSES), np.float32)  # of equal ones the first
  tally = count(labels, colors, 4, always, kept=7)
  expected = [i for i, mine in enumerate(labels) if mine != [0]]
  assert [m.index for m in tally.mistakes] == expected
  assert {m.probability for m in tally.mistakes} == {0.25}
  assert tally.correct == 7 - len(expected)
