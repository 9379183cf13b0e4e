"""The steps: gradients in pieces, averages, mixup, cutmix, sums, layouts."""

import dataclasses
import functools
import importlib.util
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf
from sklearn import metrics

from vit_jax import config as configuration
from vit_jax import models, sharding
from vit_jax.evaluation.sums import add_up
from vit_jax.state import TrainState, flatten
from vit_jax.training import losses, objectives, optim, steps

_CLASSES = 5


def _apply_linear(params, images, *, train=False, key=None):
  """A model that needs no compiler: logits of the mean colour."""
  return images.mean((1, 2)) @ params["kernel"] + params["bias"]


def _linear_params(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "kernel": jnp.asarray(rng.normal(size=(3, _CLASSES)), jnp.float32),
    "bias": jnp.asarray(rng.normal(size=_CLASSES), jnp.float32),
  }


def _make_batch(batch_size=24, labels=1, size=8, seed=0):
  rng = np.random.default_rng(seed)
  drawn = [rng.permutation(_CLASSES)[:labels] for _ in range(batch_size)]
  drawn = np.array(drawn, np.int32)
  if labels > 1:  # some images have fewer labels, one has none
    drawn[rng.uniform(size=drawn.shape) < 0.4] = -1
    drawn[0] = -1
  shape = (batch_size, size, size, 3)
  image = rng.integers(0, 256, shape).astype(np.uint8)
  return {"image": image, "labels": drawn}


def _make_state(params, optimizer, ema=False):
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=jax.jit(optimizer.init)(params),
    ema=params if ema else None,
    rng=jax.random.key_data(jax.random.key(42)),
  )


def _as_model(apply):
  return models.Model(lambda key: None, apply, (8, 8), (1, 1), 0)


def _make_objective(
  apply=_apply_linear, loss="softmax", mixup_alpha=0.0, cutmix_alpha=0.0
):
  return objectives.Classification(
    model=_as_model(apply),
    class_names=[str(k) for k in range(_CLASSES)],
    loss_fn=losses.get_loss(loss),
    mixup_alpha=mixup_alpha,
    cutmix_alpha=cutmix_alpha,
  )


def _make_step(
  optimizer,
  *,
  apply=_apply_linear,
  loss="softmax",
  mixup_alpha=0.0,
  cutmix_alpha=0.0,
  **kwargs,
):
  return jax.jit(
    functools.partial(
      steps.train_step,
      objective=_make_objective(apply, loss, mixup_alpha, cutmix_alpha),
      optimizer=optimizer,
      schedule=lambda step: 0.1 * step,
      **kwargs,
    )
  )


def _softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


# --- the training step ---


def test_normalize_maps_bytes_onto_minus_one_to_one():
  pixels = np.array([0, 51, 255], np.uint8)
  expected = np.array([-1, -0.6, 1], np.float32)
  np.testing.assert_allclose(steps.normalize(pixels), expected, rtol=1e-6)
  assert steps.normalize(pixels).dtype == jnp.float32


def test_a_step_equals_its_formula():
  params, batch = _linear_params(), _make_batch()
  optimizer = optax.sgd(0.5)
  state = _make_state(params, optimizer)
  step = _make_step(optimizer)
  state, _ = step(state, batch)
  state, values = step(state, batch)

  x = (batch["image"].astype(float) / 127.5 - 1).mean((1, 2))
  kernel, bias = (np.asarray(params[n], float) for n in ("kernel", "bias"))
  targets = np.eye(_CLASSES)[batch["labels"][:, 0]]
  for _ in range(2):
    probabilities = _softmax(x @ kernel + bias)
    loss = -np.log(probabilities[targets > 0]).mean()
    gradient = (probabilities - targets) / len(x)
    norm = np.sqrt(((x.T @ gradient) ** 2).sum() + (gradient.sum(0) ** 2).sum())
    kernel = kernel - 0.5 * x.T @ gradient
    bias = bias - 0.5 * gradient.sum(0)
  np.testing.assert_allclose(state.params["kernel"], kernel, rtol=1e-5)
  np.testing.assert_allclose(state.params["bias"], bias, rtol=1e-5)
  np.testing.assert_allclose(values["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(values["gradient_norm"], norm, rtol=1e-5)
  # The rate of the update that was done, not of the next one.
  np.testing.assert_allclose(values["learning_rate"], 0.1)
  assert int(state.step) == 2


@pytest.mark.parametrize(
  ("count", "loss", "alphas"),
  [
    (3, "softmax", (0.0, 0.0)),
    pytest.param(24, "sigmoid", (0.4, 1.0), marks=pytest.mark.ci),
  ],
)
def test_micro_batches_give_the_update_of_the_large_batch(count, loss, alphas):
  optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
  batch = _make_batch(labels=3)
  whole = pieces = _make_state(_linear_params(), optimizer)
  options = {"loss": loss, "mixup_alpha": alphas[0], "cutmix_alpha": alphas[1]}
  step = _make_step(optimizer, **options)
  step_in_pieces = _make_step(optimizer, micro_batches=count, **options)
  for _ in range(3):
    whole, expected = step(whole, batch)
    pieces, values = step_in_pieces(pieces, batch)
    for name, x in expected.items():
      np.testing.assert_allclose(values[name], x, rtol=1e-5, err_msg=name)
  for path, x in flatten(whole.params).items():
    np.testing.assert_allclose(
      flatten(pieces.params)[path], x, rtol=1e-4, atol=1e-6, err_msg=path
    )


@pytest.mark.parametrize("count", [1, 3])
def test_frozen_parameters_get_no_gradient(count):
  """The others are updated as ever; the norm is theirs."""
  optimizer = optax.partition(
    {"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()},
    {"kernel": "frozen", "bias": "trained"},
  )
  state, batch = _make_state(_linear_params(), optimizer), _make_batch()
  expected, _ = _make_step(optimizer)(state, batch)
  step = _make_step(
    optimizer, micro_batches=count, frozen=frozenset({"kernel"})
  )
  found, values = step(state, batch)
  np.testing.assert_array_equal(found.params["kernel"], state.params["kernel"])
  np.testing.assert_allclose(
    found.params["bias"], expected.params["bias"], rtol=1e-5
  )
  moved = (state.params["bias"] - expected.params["bias"]) / 0.1
  np.testing.assert_allclose(
    values["gradient_norm"], np.linalg.norm(moved), rtol=1e-4
  )


@pytest.mark.parametrize("count", [1, 3])
def test_running_statistics_are_replaced_averaged_and_not_trained(count):
  """A linear model of centred colours; decay touches all that it may."""

  def apply(params, images, *, train=False, key=None, statistics=False):
    x = images.mean((1, 2))
    mean = x.mean(0) if train else params["norm"]["mean"]
    logits = (x - mean) @ params["kernel"] + params["bias"]
    new = {"norm/mean": 0.9 * params["norm"]["mean"] + 0.1 * mean}
    return (logits, new) if statistics else logits

  old = np.array([0.1, 0.2, 0.3], np.float32)
  params = {**_linear_params(), "norm": {"mean": jnp.asarray(old)}}
  batch, model = _make_batch(), _as_model(apply)
  options = {
    **configuration.load("common").optimizer,
    **{"name": "sgd", "weight_decay": 0.1, "weight_decay_params": ".*"},
  }
  optimizer = optim.make_optimizer(
    **options, schedule=lambda step: 0.1, base_lr=0.1, params=params
  )
  state = _make_state(params, optimizer, ema=True)
  step = functools.partial(
    steps.train_step,
    objective=dataclasses.replace(
      _make_objective(), model=model._replace(has_statistics=True)
    ),
    optimizer=optimizer,
    schedule=lambda step: 0.1,
    micro_batches=count,
    ema_decay=0.8,
    frozen=optim.list_frozen(params, **options),
  )
  found, _ = jax.jit(step)(state, batch)

  colours = (batch["image"].astype(float) / 127.5 - 1).mean((1, 2))
  mean = 0.9 * old + 0.1 * colours.mean(0)  # micro-batches are of one size
  np.testing.assert_allclose(found.params["norm"]["mean"], mean, rtol=1e-5)
  ema = 0.8 * old + 0.2 * mean
  np.testing.assert_allclose(found.ema["norm"]["mean"], ema, rtol=1e-5)
  assert not any(path.endswith("mean") for path in flatten(found.opt_state))
  assert np.abs(found.params["kernel"] - params["kernel"]).max() > 0.01
  images = steps.normalize(batch["image"])
  np.testing.assert_allclose(  # an evaluation has the running statistics
    apply(found.params, images),
    (colours - mean) @ found.params["kernel"] + found.params["bias"],
    rtol=1e-4,
  )


def test_micro_batches_hold_each_row_once():
  x = jnp.arange(24).reshape(12, 2)
  pieces = steps.split_micro_batches({"x": x}, 3)["x"]
  assert pieces.shape == (3, 4, 2)
  np.testing.assert_array_equal(pieces[1], x[1::3])


def test_micro_batches_draw_different_dropout():
  seen = []

  def apply(params, images, *, train, key):
    noise = jax.random.normal(key, ())
    jax.debug.callback(lambda x: seen.append(float(x)), noise)
    return _apply_linear(params, images)

  optimizer = optax.sgd(0.1)
  step = _make_step(optimizer, apply=apply, micro_batches=4)
  state, _ = step(_make_state(_linear_params(), optimizer), _make_batch())
  jax.effects_barrier()
  assert len(set(seen)) == 4
  step(state, _make_batch())
  jax.effects_barrier()
  assert len(set(seen)) == 8, "the next step draws anew"


def test_polyak_average_equals_its_formula():
  optimizer = optax.sgd(0.5)
  state = _make_state(_linear_params(), optimizer, ema=True)
  step = _make_step(optimizer, ema_decay=0.8)
  expected = {n: np.asarray(x, float) for n, x in state.params.items()}
  for i in range(5):
    state, _ = step(state, _make_batch(seed=i))
    for name, x in state.params.items():
      expected[name] = 0.8 * expected[name] + 0.2 * np.asarray(x, float)
      np.testing.assert_allclose(state.ema[name], expected[name], rtol=1e-5)


def test_average_that_warms_up_equals_tensorflows():
  """tf.train.ExponentialMovingAverage with `num_updates`."""
  optimizer = optax.sgd(0.5)
  state = _make_state(_linear_params(), optimizer, ema=True)
  step = _make_step(optimizer, ema_decay=0.4, ema_warmup=True)
  count = tf.Variable(0.0)
  average = tf.train.ExponentialMovingAverage(0.4, num_updates=count)
  variables = {n: tf.Variable(x) for n, x in state.params.items()}
  average.apply(variables.values())  # begins with the first values
  for i in range(8):  # of which the sixth has 7 / 16 > 0.4
    state, _ = step(state, _make_batch(seed=i))
    count.assign_add(1)
    for name, x in state.params.items():
      variables[name].assign(x)
    average.apply(variables.values())
    for name, x in variables.items():
      np.testing.assert_allclose(
        state.ema[name], average.average(x), rtol=1e-5, atol=1e-7
      )


def test_randomness_is_a_function_of_key_and_step():
  def apply(params, images, *, train, key):
    logits = _apply_linear(params, images)
    return logits + jax.random.normal(key, logits.shape)

  optimizer = optax.sgd(0.0)
  step = _make_step(optimizer, apply=apply, mixup_alpha=1.0)
  state = _make_state(_linear_params(), optimizer)
  batch = _make_batch()

  def run(number, key=42):
    """The loss of one step, with a rate of 0: only randomness differs."""
    rng = jax.random.key_data(jax.random.key(key))
    given = state._replace(step=jnp.int32(number), rng=rng)
    new, values = step(given, batch)
    np.testing.assert_array_equal(new.rng, rng)
    return float(values["loss"])

  assert run(3) == run(3)
  assert len({run(3), run(4), run(3, key=1)}) == 3


# --- mixup ---


@pytest.mark.parametrize("shift", [1, 3])
def test_mixup_mixes_each_row_with_its_neighbour(shift):
  batch = _make_batch()
  images = np.asarray(steps.normalize(batch["image"]))
  targets = np.asarray(losses.multi_hot(batch["labels"], _CLASSES))
  options = {"alpha": 0.4, "shift": shift}
  mix = jax.jit(functools.partial(steps.mixup, **options))
  weights = []
  for i in range(40):
    mixed, mixed_targets = mix(jax.random.key(i), images, targets)
    # a x0 + (1 - a) x1, so a follows from any pixel; it is one a batch.
    x0, x1 = images, np.roll(images, shift, axis=0)
    a = float(((mixed - x1) * (x0 - x1)).sum() / ((x0 - x1) ** 2).sum())
    weights.append(a)
    np.testing.assert_allclose(mixed, a * x0 + (1 - a) * x1, atol=1e-5)
    np.testing.assert_allclose(
      mixed_targets,
      a * targets + (1 - a) * np.roll(targets, shift, axis=0),
      atol=1e-5,
    )
    np.testing.assert_allclose(mixed_targets.sum(-1), 1, rtol=1e-6)
  assert min(weights) >= 0.5 - 1e-6
  assert max(weights) <= 1 + 1e-6
  assert np.std(weights) > 0.1
  assert len(set(weights)) == 40


@pytest.mark.ci
def test_mixup_weights_follow_the_beta_distribution():
  images, targets = jnp.eye(2)[:, None, None], jnp.eye(2)
  keys = jax.random.split(jax.random.key(0), 4000)
  mix = jax.vmap(lambda key: steps.mixup(key, images, targets, 0.2)[1][0, 0])
  weights = np.asarray(jax.jit(mix)(keys))
  # max(a, 1 - a) of a ~ Beta(0.2, 0.2), by drawing in NumPy.
  drawn = np.random.default_rng(0).beta(0.2, 0.2, 400_000)
  drawn = np.maximum(drawn, 1 - drawn)
  for q in (0.1, 0.25, 0.5):
    np.testing.assert_allclose(
      np.quantile(weights, q), np.quantile(drawn, q), atol=0.02
    )


def test_cutmix_pastes_a_box_and_mixes_targets_by_its_area():
  """Each pixel is of one of two images; the targets are their shares."""
  batch = _make_batch(6, size=16)
  images = np.asarray(steps.normalize(batch["image"]))
  targets = np.asarray(losses.multi_hot(batch["labels"], _CLASSES))
  other = np.roll(images, 1, axis=0)
  mix = jax.jit(functools.partial(steps.cutmix, alpha=1.0))
  areas = []
  for i in range(40):
    mixed, mixed_targets = map(
      np.asarray, mix(jax.random.key(i), images, targets)
    )
    pasted = (mixed != images).any(-1)
    np.testing.assert_array_equal(mixed[pasted], other[pasted])
    np.testing.assert_array_equal(pasted, pasted[:1].repeat(6, 0))
    rows, columns = pasted[0].any(1), pasted[0].any(0)
    np.testing.assert_array_equal(pasted[0], np.outer(rows, columns))
    for line in (rows, columns):  # without a gap
      assert np.diff(np.flatnonzero(line)).max(initial=1) == 1
    area = pasted[0].mean()
    areas.append(area)
    expected = (1 - area) * targets + area * np.roll(targets, 1, axis=0)
    np.testing.assert_allclose(mixed_targets, expected, rtol=1e-6)
  assert 0 <= min(areas) < 0.1 < 0.5 < max(areas) <= 1


@pytest.mark.parametrize("mix", ["mixup_alpha", "cutmix_alpha"])
def test_repeats_are_mixed_with_other_images(mix):
  """Not with another view of the same one, of which the next rows are."""
  batch = {
    "image": np.arange(12, dtype="uint8")[:, None, None, None].repeat(3, -1),
    "labels": np.arange(12, dtype="int32").repeat(3)[:12, None] % 4,
  }
  batch["image"] = batch["image"].repeat(8, 1).repeat(8, 2)
  objective = dataclasses.replace(
    _make_objective(**{mix: 1.0}), repeats=3, class_names=list("0123")
  )
  _, targets = jax.jit(objective.prepare)(batch, jax.random.key(0))
  for i, row in enumerate(targets):
    assert set(np.flatnonzero(row)) == {i // 3, (i // 3 - 1) % 4}


@pytest.mark.ci
def test_cutmix_boxes_are_distributed_as_timms():
  images, targets = jnp.zeros((2, 32, 48, 3)), jnp.eye(2)
  mix = jax.vmap(lambda key: steps.cutmix(key, images, targets, 1.0)[1][0, 0])
  kept = np.asarray(jax.jit(mix)(jax.random.split(jax.random.key(0), 4000)))
  # All of timm would take seconds.
  [folder] = importlib.util.find_spec("timm").submodule_search_locations
  draw_box = runpy.run_path(f"{folder}/data/mixup.py")["cutmix_bbox_and_lam"]
  np.random.seed(0)  # timm draws from the global generator
  expected = [
    draw_box((3, 32, 48), np.random.beta(1, 1))[1] for _ in range(20_000)
  ]
  for q in (0.1, 0.25, 0.5, 0.75, 0.9):
    np.testing.assert_allclose(
      np.quantile(kept, q), np.quantile(expected, q), atol=0.025
    )


@pytest.mark.ci
def test_half_of_the_batches_get_mixup_half_cutmix():
  batch = _make_batch(size=8)
  images = np.asarray(steps.normalize(batch["image"]))
  other = np.roll(images, 1, axis=0)
  objective = _make_objective(mixup_alpha=5.0, cutmix_alpha=5.0)
  prepare = jax.jit(objective.prepare)
  pasted = 0
  for i in range(200):
    mixed, targets = prepare(batch, jax.random.key(i))
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    distance = np.minimum(abs(mixed - images), abs(mixed - other))
    pasted += distance.max() < 1e-5
  assert 75 < pasted < 125


# --- the evaluation step ---


@functools.cache
def _make_eval_step(loss):
  return jax.jit(_make_objective(loss=loss).eval_step)


def _eval_sums(batch, loss="softmax"):
  return jax.device_get(_make_eval_step(loss)(_linear_params(), batch))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("labels", [1, 3])
def test_evaluation_sums_equal_numpy_and_sklearn(labels, loss):
  batch = _make_batch(labels=labels)
  mask = np.arange(24) % 4 != 3
  found = _eval_sums(batch | {"mask": mask}, loss)

  params = {n: np.asarray(x, float) for n, x in _linear_params().items()}
  x = (batch["image"].astype(float) / 127.5 - 1).mean((1, 2))[mask]
  logits = x @ params["kernel"] + params["bias"]
  rows = batch["labels"][mask]
  targets = np.array([[c in row for c in range(_CLASSES)] for row in rows])
  labelled = targets.any(-1)
  if loss == "softmax":
    share = targets / np.maximum(targets.sum(-1, keepdims=True), 1)
    each = -(share * np.log(_softmax(logits))).sum(-1)
  else:
    p = 1 / (1 + np.exp(-logits))
    each = -np.where(targets, np.log(p), np.log(1 - p)).sum(-1)
  top = targets[np.arange(len(x)), logits.argmax(-1)]
  lrap = metrics.label_ranking_average_precision_score(
    targets[labelled], logits[labelled]
  )
  assert found["examples"] == 18
  assert found["labelled"] == labelled.sum()
  assert found["labelled"] == (18 if labels == 1 else 17)
  assert found["correct"] == top[labelled].sum()
  np.testing.assert_allclose(found["loss"], each[labelled].sum(), rtol=1e-5)
  np.testing.assert_allclose(
    found["ranking_precision"], lrap * labelled.sum(), rtol=1e-5
  )


def test_top_5_accuracy_equals_sklearn():
  rng = np.random.default_rng(0)
  params = {
    "kernel": rng.normal(size=(3, 12)).astype(np.float32),
    "bias": np.zeros(12, np.float32),
  }
  batch = _make_batch(100)
  batch["labels"] = rng.integers(0, 12, (100, 1), np.int32)
  batch["labels"][3] = -1  # no label
  batch["mask"] = np.arange(100) < 90
  objective = objectives.Classification(
    model=_as_model(_apply_linear),
    class_names=[str(k) for k in range(12)],
    loss_fn=losses.get_loss("softmax"),
  )
  found = jax.jit(objective.eval_step)(params, batch)
  results = dict(objective.summarize(add_up([found]), multilabel=False))
  counts = batch["mask"] & (batch["labels"][:, 0] >= 0)
  x = (batch["image"].astype(float) / 127.5 - 1).mean((1, 2))[counts]
  expected = metrics.top_k_accuracy_score(
    batch["labels"][counts, 0], x @ params["kernel"], k=5, labels=range(12)
  )
  assert results["accuracy@5"] == expected
  assert list(results) == ["examples", "loss", "accuracy", "accuracy@5"]
  assert results["accuracy"] < expected < 1
  # Images with several labels have none, nor have five classes.
  several = {**batch, "labels": np.repeat(batch["labels"], 2, 1)}
  assert "correct@5" not in jax.eval_shape(objective.eval_step, params, several)
  five = _make_batch() | {"mask": np.ones(24, bool)}
  assert "correct@5" not in _eval_sums(five)


_ranking_precision = jax.jit(objectives.ranking_precision)


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_precision_equals_sklearn(ties):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(200, 7)).astype(np.float32)
  if ties:
    logits = np.round(logits)
  targets = rng.uniform(size=(200, 7)) < 0.4
  targets[np.arange(200), rng.integers(7, size=200)] = True
  labels = np.full((200, 7), -1, np.int32)
  for row, present in zip(labels, targets, strict=True):
    ids = np.flatnonzero(present)
    row[: len(ids)] = rng.permutation(ids)
  found = _ranking_precision(logits, labels)
  for i in range(200):
    expected = metrics.label_ranking_average_precision_score(
      targets[i : i + 1], logits[i : i + 1]
    )
    np.testing.assert_allclose(found[i], expected, rtol=1e-6)


# --- layouts ---


def _train_vit(devices, fsdp, shard_state=1, *, scan, dtype="float32"):
  """Returns the losses and parameters of four steps of a tiny ViT."""
  model = models.create(
    variant="ViT-w16d2m32h2_4",
    num_classes=_CLASSES,
    image_size=8,
    dtype=dtype,
    scan=scan,
    stochastic_depth_rate=0.2,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    # A large epsilon: a bias of the keys has no gradient but rounding errors
    # (softmax ignores it), which Adam would blow up to whole steps.
    optax.scale_by_adam(eps=1e-2),
    optax.scale(-0.03),
  )
  train_step = functools.partial(
    steps.train_step,
    objective=_make_objective(model.apply, "sigmoid"),
    optimizer=optimizer,
    schedule=lambda step: 0.1,
    ema_decay=0.9,
  )

  shapes = jax.eval_shape(model.init, jax.random.key(0))
  draw = np.random.default_rng(0).normal
  params = jax.tree.map(lambda x: np.float32(draw(0, 0.3, x.shape)), shapes)
  init_state = _make_state(params, optimizer, ema=True)
  mesh = sharding.make_mesh(fsdp, jax.devices()[:devices], shard_state)
  layout = sharding.tree_shardings(mesh, init_state)
  state = jax.device_put(init_state, layout)
  step = sharding.jit_train_step(mesh, train_step, layout)
  history, batch = [], _make_batch(16, labels=3)
  for _ in range(4):
    state, values = step(state, sharding.put_batch(mesh, batch, 16))
    history.append(float(values["loss"]))
  for path, x in flatten(state).items():
    assert x.sharding == flatten(layout)[path], path
  return history, jax.device_get(flatten(state))


@pytest.mark.parametrize(
  ("scan", "layouts"),
  [
    pytest.param(True, [(8, 2)], marks=pytest.mark.ci),
    pytest.param(False, [(8, 1, 4)], marks=pytest.mark.ci),
    pytest.param(False, [(8, 1), (8, 8), (2, 1)], marks=pytest.mark.nightly),
  ],
)
def test_layouts_agree(scan, layouts):
  expected, arrays = _train_vit(1, 1, scan=scan)
  assert expected[-1] < 0.99 * expected[0], "it learns the batch by heart"
  for layout in layouts:
    found, other = _train_vit(*layout, scan=scan)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for path, x in arrays.items():
      np.testing.assert_allclose(
        other[path], x, rtol=1e-4, atol=1e-5, err_msg=path
      )


@pytest.mark.ci
def test_split_moments_agree_in_bfloat16():
  """One step's rounding apart: sums over devices are in bfloat16 as well."""
  expected, arrays = _train_vit(8, 1, scan=False, dtype="bfloat16")
  found, other = _train_vit(8, 1, 8, scan=False, dtype="bfloat16")
  np.testing.assert_allclose(found, expected, rtol=1e-3)
  for path, x in arrays.items():
    if path.startswith("params/"):
      np.testing.assert_allclose(other[path], x, atol=0.01, err_msg=path)
