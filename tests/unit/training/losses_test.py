"""Losses against float64 formulas and numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.training import losses
from vit_jax.training.objectives import Classification


def _random_case(seed, batch=6, classes=11):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(batch, classes)) * 4
  targets = (rng.random((batch, classes)) < 0.3).astype(np.float64)
  targets[:, 0] = 1  # at least one label
  return logits, targets


def _sigmoid_reference(logits, targets, smoothing):
  """-sum_k t log p + (1 - t) log(1 - p), on = 1 - s, off = s; float64."""
  on, off = 1 - smoothing, smoothing
  targets = targets * on + (1 - targets) * off
  p = 1 / (1 + np.exp(-logits))
  return -(targets * np.log(p) + (1 - targets) * np.log1p(-p)).sum(-1)


def _softmax_reference(logits, targets, smoothing):
  """-sum_k t log softmax_k, t the smoothed distribution; float64."""
  targets = targets / targets.sum(-1, keepdims=True)
  targets = (1 - smoothing) * targets + smoothing / logits.shape[-1]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -(targets * log_p).sum(-1)


_REFERENCES = {"sigmoid": _sigmoid_reference, "softmax": _softmax_reference}


@functools.cache
def _get_loss(name, smoothing=0.0):
  return jax.jit(losses.get_loss(name, smoothing))


@pytest.mark.parametrize("name", list(_REFERENCES))
@pytest.mark.parametrize("smoothing", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("kind", ["single", "multi", "soft"])
def test_loss_equals_float64_formula(name, smoothing, kind):
  logits, targets = _random_case(seed=0)
  if kind == "single":
    targets = np.eye(11)[[3, 0, 10, 5, 5, 1]]
  if kind == "soft":  # mixup with the batch rolled by one
    targets = 0.7 * targets + 0.3 * np.roll(targets, 1, axis=0)
  loss = _get_loss(name, smoothing)(np.float32(logits), np.float32(targets))
  expected = _REFERENCES[name](logits, targets, smoothing)
  assert loss.dtype == jnp.float32
  assert loss.shape == (6,)
  np.testing.assert_allclose(loss, expected, rtol=2e-6)


def test_numbers_by_hand():
  zeros = jnp.zeros((1, 4))
  one_label = jnp.array([[0.0, 1.0, 0.0, 0.0]])
  two_labels = jnp.array([[0.0, 1.0, 1.0, 0.0]])
  sigmoid, softmax = _get_loss("sigmoid"), _get_loss("softmax")
  # Four coins, each log 2; a uniform guess among four, log 4 for any target.
  np.testing.assert_allclose(sigmoid(zeros, one_label), [4 * np.log(2)])
  np.testing.assert_allclose(softmax(zeros, two_labels), [np.log(4)])
  # Half the target on each of two labels: (log p_1 + log p_2) / 2.
  logits = jnp.log(jnp.array([[0.1, 0.2, 0.4, 0.3]]))
  expected = -(np.log(0.2) + np.log(0.4)) / 2
  np.testing.assert_allclose(softmax(logits, two_labels), [expected], rtol=1e-6)


def test_sigmoid_keeps_the_tail_at_head_bias_minus_ten():
  # ImageNet-21k at initialisation: 21,843 logits of -10, one label. In float32
  # softplus(10) - 10 would be several per cent off.
  logits = jnp.full((1, 21_843), -10.0)
  targets = losses.multi_hot(jnp.array([[7]]), 21_843)
  expected = 10 + 21_843 * np.log1p(np.exp(-10.0))
  loss = jax.jit(losses.sigmoid_cross_entropy)(logits, targets)
  np.testing.assert_allclose(loss, [expected], rtol=1e-6)


@pytest.mark.parametrize("name", list(_REFERENCES))
def test_extreme_logits_stay_finite(name):
  logits = jnp.array([[1e4, -1e4, 0.0], [-1e38, 1e38, 0.0]])
  targets = jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
  loss = losses.get_loss(name)

  def total(x):
    each = loss(x, targets)
    return each.sum(), each

  grad, each = jax.jit(jax.grad(total, has_aux=True))(logits)
  assert np.isfinite(each).all()
  assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", list(_REFERENCES))
def test_bfloat16_logits_are_summed_in_float32(name):
  logits, targets = _random_case(seed=1)
  logits = jnp.array(logits, jnp.bfloat16)
  loss = _get_loss(name)(logits, jnp.array(targets, jnp.bfloat16))
  exact = _REFERENCES[name](np.array(logits, np.float64), targets, 0.0)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, exact, rtol=2e-6)


def test_softmax_of_an_image_without_labels_is_zero():
  logits = jnp.array([[1.0, 2.0], [1.0, 2.0]])
  targets = jnp.array([[0.0, 0.0], [1.0, 0.0]])

  def loss(x):
    each = losses.softmax_cross_entropy(x, targets, 0.1)
    return each.sum(), each

  grad, each = jax.jit(jax.grad(loss, has_aux=True))(logits)
  assert each[0] == 0
  assert each[1] > 0
  assert np.isfinite(grad).all()


def test_multi_hot():
  labels = jnp.array([[2, -1, -1], [0, 3, 0], [-1, -1, -1], [4, 1, 2]])
  expected = [
    [0, 0, 1, 0, 0],
    [1, 0, 0, 1, 0],
    [0, 0, 0, 0, 0],
    [0, 1, 1, 0, 1],
  ]
  targets = jax.jit(losses.multi_hot, static_argnums=1)(labels, 5)
  assert targets.dtype == jnp.float32
  np.testing.assert_array_equal(targets, expected)


@pytest.mark.parametrize(
  ("name", "smoothing", "message"),
  [
    ("sigmod", 0.0, "did you mean 'sigmoid'"),
    ("hinge", 0.0, "choose from sigmoid, softmax"),
    ("sigmoid", 0.5, r"label_smoothing 0.5 is not in \[0, 0.5\)"),
    ("softmax", -0.1, "label_smoothing -0.1"),
    ("softmax", float("nan"), "label_smoothing nan"),
  ],
)
def test_errors(name, smoothing, message):
  with pytest.raises(UserError, match=message):
    losses.get_loss(name, smoothing)


def _spread(labels, values, classes):
  """Soft targets, one number after the other."""
  rows = np.zeros((len(labels), classes))
  for row, ks, ps in zip(rows, labels, values, strict=True):
    known = {k: p for k, p in zip(ks, ps, strict=True) if k >= 0}
    rest = max(0, 1 - sum(known.values()))
    for k in range(classes):
      row[k] = known.get(k, rest / max(1, classes - len(known)))
  return rows


def test_soft_targets_spread_what_is_left():
  rng = np.random.default_rng(1)
  labels = np.argsort(rng.random((6, 11)))[:, :3]
  values = np.float32(rng.dirichlet([1] * 4, 6)[:, :3])
  labels[5, 2], values[5, 2] = -1, 0  # of a mixture with a longer set
  found = losses.soft_targets(labels, values, 11)
  expected = _spread(labels, values.astype(float), 11)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
  # All classes: exactly what is given.
  labels = np.argsort(rng.random((6, 3)))
  values = np.float32(rng.dirichlet([1] * 3, 6))
  found = np.take_along_axis(losses.soft_targets(labels, values, 3), labels, 1)
  np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("name", list(_REFERENCES))
def test_only_hard_labels_are_smoothed(name):
  """Also of mixup's neighbours, one of which may be soft."""
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(6, 11)) * 4
  labels = np.argsort(rng.random((6, 11)))[:, :2]
  values = np.float32(rng.dirichlet([1] * 3, 6)[:, :2])
  hard = [0, 3, 4]
  labels[hard, 1], values[hard] = -1, 0
  loss = {"name": name, "label_smoothing": 0.1}
  objective = Classification(
    model=None,
    class_names=[str(k) for k in range(11)],
    loss_fn=losses.get_loss(**loss),
    sharpen=functools.partial(losses.sharpen, **loss),
  )
  batch = {"image": np.zeros((6, 2, 2, 3), np.uint8), "labels": labels}
  key = jax.random.key(0)
  _, targets = objective.prepare({**batch, "probabilities": values}, key)
  smoothed = np.where(
    np.isin(np.arange(6), hard)[:, None],
    _smooth(name, np.eye(11)[labels[:, 0]], 0.1),
    _spread(labels, values.astype(float), 11),
  )
  for mixed, expected in (
    (targets, smoothed),
    (
      0.7 * targets + 0.3 * jnp.roll(targets, 1, 0),
      0.7 * smoothed + 0.3 * np.roll(smoothed, 1, 0),
    ),
  ):
    found = objective.loss_fn(np.float32(logits), mixed)
    expected = _REFERENCES[name](logits, expected, 0)
    np.testing.assert_allclose(found, expected, rtol=3e-6)
  # The step of a run without soft labels is what it was.
  _, targets = objective.prepare(batch, key)
  np.testing.assert_array_equal(targets, losses.multi_hot(labels, 11))


def _smooth(name, targets, s):
  if name == "sigmoid":
    return targets * (1 - s) + (1 - targets) * s
  return (1 - s) * targets + s / targets.shape[-1]
