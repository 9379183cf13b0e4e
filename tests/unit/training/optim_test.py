"""Schedules and optimizers, step by step, against NumPy in float64 and others'.

RMSProp and the exponential decay are TensorFlow 1's.
"""

import importlib.util
import itertools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.state import flatten, unflatten
from vit_jax.training import optim

_SHAPES = {
  "cls": (1, 1, 4),
  "Transformer/encoderblock_0/LayerNorm_0/scale": (4,),
  "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel": (4, 6),
  "Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias": (6,),
  "Transformer/encoderblock_1/LayerNorm_0/scale": (4,),
  "Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel": (4, 6),
  "Transformer/encoderblock_1/MlpBlock_0/Dense_0/bias": (6,),
  "head/kernel": (4, 3),
  "head/bias": (3,),
}
_STEPS = 25

_SCHEDULE = {
  "base_lr": 0.03,
  "decay": "cosine",
  "warmup_steps": 5,
  "linear_end": 1e-5,
  "rsqrt_timescale": 7,
  "exponential_rate": 0.9,
  "exponential_steps": 3,
  "cooldown_steps": 0,
  "total_steps": _STEPS,
}
_OPTIMIZER = {
  "name": "adam",
  "b1": 0.9,
  "b2": 0.999,
  "eps": 1e-8,
  "momentum": 0.9,
  "accumulator_dtype": "float32",
  "weight_decay": 0.0,
  "weight_decay_scaling": "lr",
  "weight_decay_params": ".*/kernel",
  "clip_norm": 0.0,
  "lr_multipliers": (),
  "layer_decay": 1.0,
  "freeze_blocks": 0,
}


# --- schedules ---


def _schedule_reference(step, c):
  """The learning rate of one step, in Python's float64."""
  t, w, total = step, c["warmup_steps"], c["total_steps"]
  p = min(max((t - w) / max(1, total - w), 0), 1)
  base, end = c["base_lr"], c["linear_end"]
  lr = {
    "linear": end + (base - end) * (1 - p),
    "cosine": base * 0.5 * (1 + np.cos(np.pi * p)),
    "rsqrt": base / np.sqrt(1 + max(0, t - w) / c["rsqrt_timescale"]),
    "constant": base,
  }[c["decay"]]
  if w:
    lr *= min(1, t / w)
  if c["cooldown_steps"]:
    lr *= min(1, (total - t) / c["cooldown_steps"])
  return lr


@pytest.mark.parametrize("decay", ["linear", "cosine", "rsqrt", "constant"])
@pytest.mark.parametrize("warmup", [0, 5, 40])
@pytest.mark.parametrize("cooldown", [0, 6])
def test_schedule_equals_formula_at_every_step(decay, warmup, cooldown):
  changes = {"decay": decay, "warmup_steps": warmup, "cooldown_steps": cooldown}
  c = _SCHEDULE | changes | {"total_steps": 46}
  schedule = optim.make_schedule(**c)
  got = [schedule(t) for t in range(46)]
  expected = [_schedule_reference(t, c) for t in range(46)]
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9)
  # Traced int32 steps, all at once, are the same numbers.
  traced = jax.jit(jax.vmap(schedule))(jnp.arange(46))
  assert traced.dtype == jnp.float32
  np.testing.assert_allclose(traced, got, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
  ("warmup", "steps", "ts"),
  [
    (0, 3, range(46)),
    (5, 3, range(46)),  # down while it warms up, which only shows later
    (7, 4.7, range(46)),
    # Down at the very step, however many there are.
    (12_000, 2401, [2401 * k + i for k in range(140) for i in (-1, 0)][1:]),
  ],
)
def test_exponential_decay_is_tensorflows_with_efficientnets_warmup(
  warmup, steps, ts
):
  c = {"decay": "exponential", "warmup_steps": warmup, "total_steps": 400_000}
  c |= {"exponential_rate": 0.97, "exponential_steps": steps}
  schedule = optim.make_schedule(**_SCHEDULE | c)
  found = jax.jit(jax.vmap(schedule))(jnp.array(ts))
  expected = [
    0.03 * t / warmup
    if t < warmup
    else tf.compat.v1.train.exponential_decay(
      0.03, t, steps, 0.97, staircase=True
    )()
    for t in ts
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"decay": "cosin"}, "decay is 'cosin'.*did you mean 'cosine'"),
    ({"warmup_steps": 26}, "warmup_steps 26 .*25 steps"),
    ({"cooldown_steps": 21}, "warmup_steps 5 and cooldown_steps 21"),
    ({"decay": "linear", "linear_end": 0.1}, "linear_end 0.1 is above base_lr"),
  ],
)
def test_schedule_errors(changes, message):
  with pytest.raises(UserError, match=message) as e:
    optim.make_schedule(**_SCHEDULE | changes)
  assert "\n" not in str(e.value)


# --- optimizers ---


def _make(params, schedule_changes=(), **changes):
  c = _SCHEDULE | dict(schedule_changes)
  return optim.make_optimizer(
    **_OPTIMIZER | changes,
    schedule=optim.make_schedule(**c),
    base_lr=c["base_lr"],
    params=params,
  )


def _params(seed=0):
  rng = np.random.default_rng(seed)
  return {path: rng.normal(size=shape) for path, shape in _SHAPES.items()}


def _grads(step):
  """Gradients of changing size: norms from about 0.1 to about 8."""
  rng = np.random.default_rng(1000 + step)
  size = 0.02 + 1.2 * rng.random()
  return {p: size * rng.normal(size=shape) for p, shape in _SHAPES.items()}


def _to_tree(flat):
  return unflatten({p: x.astype(np.float32) for p, x in flat.items()})


def _init(optimizer, params):
  """Returns the first state, of one program."""
  return jax.jit(optimizer.init)(params)


def _run(optimizer, steps=_STEPS):
  """Returns {path: parameter} after each step, and the last state."""
  params = _to_tree(_params())
  state = _init(optimizer, params)

  @jax.jit
  def update(grads, state, params):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  trajectory = []
  for step in range(steps):
    params, state = update(_to_tree(_grads(step)), state, params)
    trajectory.append({p: np.asarray(x) for p, x in flatten(params).items()})
  return trajectory, state


def _reference(steps=_STEPS, factor=lambda path: 1.0, **changes):
  """The same in float64, written per parameter from the formulas."""
  c = _OPTIMIZER | changes
  params = _params()
  m = {p: np.zeros_like(x) for p, x in params.items()}
  v = {p: np.zeros_like(x) for p, x in params.items()}
  trajectory = []
  for step in range(steps):
    grads = {p: g for p, g in _grads(step).items() if factor(p)}
    decayed = {p for p in grads if re.fullmatch(c["weight_decay_params"], p)}
    scaling = c["weight_decay_scaling"]
    if scaling == "gradient":
      for p in decayed:
        grads[p] = grads[p] + c["weight_decay"] * params[p]
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    lr = _schedule_reference(step, _SCHEDULE)
    for p, g in grads.items():
      if c["clip_norm"] and norm > c["clip_norm"]:
        g = g * c["clip_norm"] / norm
      decay = 0.0
      if p in decayed and scaling != "gradient":
        decay = c["weight_decay"] * params[p]
        decay /= _SCHEDULE["base_lr"] if scaling == "schedule" else 1
      if c["name"] in ("adam", "lamb"):
        m[p] = c["b1"] * m[p] + (1 - c["b1"]) * g
        v[p] = c["b2"] * v[p] + (1 - c["b2"]) * g**2
        m_hat = m[p] / (1 - c["b1"] ** (step + 1))
        v_hat = v[p] / (1 - c["b2"] ** (step + 1))
        delta = m_hat / (np.sqrt(v_hat) + c["eps"]) + decay
        if c["name"] == "lamb" and p in decayed:
          # Algorithm 2 of the paper, phi the identity.
          delta *= np.linalg.norm(params[p]) / np.linalg.norm(delta)
        delta *= lr
      elif c["name"] == "rmsprop":
        v[p] = c["b2"] * (v[p] if step else 1) + (1 - c["b2"]) * g**2
        m[p] = c["momentum"] * m[p] + lr * g / np.sqrt(v[p] + c["eps"])
        delta = m[p] + lr * decay
      else:
        m[p] = c["momentum"] * m[p] + g
        delta = lr * (m[p] + decay)
      params[p] = params[p] - factor(p) * delta
    trajectory.append(dict(params))
  return trajectory


def _assert_same(trajectory, expected, **tolerance):
  assert len(trajectory) == len(expected)
  for step, (got, want) in enumerate(zip(trajectory, expected, strict=True)):
    assert got.keys() == want.keys()
    for p in want:
      np.testing.assert_allclose(
        got[p], want[p], err_msg=f"{p} after step {step}", **tolerance
      )


_CASES = {
  "plain": {"name": "adam"},
  "clip sometimes active": {"name": "sgd", "clip_norm": 3.0},
  "decay like the paper": {
    "name": "adam",
    "weight_decay": 0.3,
    "clip_norm": 1.0,
  },
  "decay like big_vision": {
    "name": "sgd",
    "weight_decay": 0.01,
    "weight_decay_scaling": "schedule",
    "clip_norm": 1.0,
  },
  "decay everything": {
    "name": "adam",
    "weight_decay": 0.3,
    "weight_decay_params": ".*",
  },
  "RMSProp": {"name": "rmsprop", "b2": 0.9, "eps": 1e-3, "clip_norm": 1.0},
  "RMSProp, decoupled decay": {
    "name": "rmsprop",
    "b2": 0.9,
    "weight_decay": 0.01,
    "weight_decay_scaling": "schedule",
  },
  "RMSProp, L2": {
    "name": "rmsprop",
    "b2": 0.9,
    "weight_decay": 0.3,
    "weight_decay_scaling": "gradient",
    "clip_norm": 1.0,
  },
  "LAMB": {"name": "lamb", "weight_decay": 0.3, "clip_norm": 1.0},
}


@pytest.mark.parametrize("changes", _CASES.values(), ids=_CASES)
def test_optimizer_equals_formula_at_every_step(changes):
  trajectory, _ = _run(_make(_to_tree(_params()), **changes))
  _assert_same(trajectory, _reference(**changes), rtol=2e-5, atol=2e-6)


def test_rmsprop_equals_tensorflows():
  numbers = {"momentum": 0.8, "eps": 1e-3}
  trajectory, _ = _run(
    _make(_to_tree(_params()), name="rmsprop", b2=0.9, **numbers)
  )
  step = 0
  theirs = tf.compat.v1.train.RMSPropOptimizer(
    lambda: _schedule_reference(step, _SCHEDULE),
    decay=0.9,
    momentum=numbers["momentum"],
    epsilon=numbers["eps"],
  )
  params = {p: tf.Variable(x, dtype="float32") for p, x in _params().items()}
  expected = []
  for step in range(_STEPS):
    grads = _grads(step)
    theirs.apply_gradients(
      [(tf.constant(grads[p], "float32"), x) for p, x in params.items()]
    )
    expected.append({p: x.numpy() for p, x in params.items()})
  _assert_same(trajectory, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.ci
def test_lamb_equals_timms(monkeypatch):
  from torch import from_numpy

  # All of timm would take seconds.
  [folder] = importlib.util.find_spec("timm").submodule_search_locations
  package = types.ModuleType("timm_optim")
  package.__path__ = [f"{folder}/optim"]
  monkeypatch.setitem(sys.modules, "timm_optim", package)
  lamb = importlib.import_module("timm_optim.lamb")

  trajectory, _ = _run(
    _make(
      _to_tree(_params()),
      **{"name": "lamb", "eps": 1e-6, "weight_decay": 0.05, "clip_norm": 1.0},
    )
  )
  params = {p: from_numpy(x) for p, x in _params().items()}
  kernels = [x for p, x in params.items() if p.endswith("/kernel")]
  others = [x for p, x in params.items() if not p.endswith("/kernel")]
  optimizer = lamb.Lamb(
    [
      {"params": kernels, "weight_decay": 0.05},
      {"params": others, "weight_decay": 0.0},
    ]
  )
  expected = []
  for step in range(_STEPS):
    for p, x in _grads(step).items():
      params[p].grad = from_numpy(x)
    for group in optimizer.param_groups:
      group["lr"] = _schedule_reference(step, _SCHEDULE)
    optimizer.step()
    expected.append({p: x.numpy().copy() for p, x in params.items()})
  _assert_same(trajectory, expected, rtol=2e-5, atol=2e-6)


def test_lamb_changes_what_is_zero():
  params = {"kernel": jnp.zeros(3), "other": {"kernel": jnp.full(4, 2.0)}}
  optimizer = _make(
    params,
    {"decay": "constant", "warmup_steps": 0},
    **{"name": "lamb", "weight_decay": 0.1, "weight_decay_params": ".*kernel"},
  )
  grads = {"kernel": jnp.ones(3), "other": {"kernel": jnp.full(4, 5.0)}}
  state = _init(optimizer, params)
  updates, _ = jax.jit(optimizer.update)(grads, state, params)
  # Adam's first step is 1 everywhere, and |p| / |1.2| is 2 / 1.2.
  np.testing.assert_allclose(updates["kernel"], -0.03, rtol=1e-5)
  np.testing.assert_allclose(updates["other"]["kernel"], -0.06, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop"])
def test_l2_is_part_of_the_loss(name):
  """As without decay and with decay / 2 |p|^2 added to the loss."""
  options = {"name": name, "clip_norm": 1.0}
  plain = _make(_to_tree(_params()), **options)
  options |= {"weight_decay": 0.3, "weight_decay_scaling": "gradient"}
  trajectory, _ = _run(_make(_to_tree(_params()), **options))

  def loss(params, grads):  # linear, with the gradients that `_run` has
    total = sum(jnp.vdot(grads[p], x) for p, x in params.items())
    kernels = [x for p, x in params.items() if p.endswith("/kernel")]
    return total + 0.3 / 2 * sum(jnp.vdot(x, x) for x in kernels)

  params = flatten(_to_tree(_params()))
  state = _init(plain, unflatten(params))

  @jax.jit
  def update(grads, state, params):
    grads = unflatten(jax.grad(loss)(params, grads))
    updates, state = plain.update(grads, state, unflatten(params))
    return flatten(optax.apply_updates(unflatten(params), updates)), state

  expected = []
  for step in range(_STEPS):
    params, state = update(flatten(_to_tree(_grads(step))), state, params)
    expected.append(params)
  _assert_same(trajectory, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop", "lamb"])
def test_bfloat16_accumulators(name):
  changes = {"name": name, "accumulator_dtype": "bfloat16", "clip_norm": 1.0}
  changes["weight_decay"] = 0.1
  trajectory, state = _run(_make(_to_tree(_params()), **changes))
  exact = _reference(**changes)
  # bf16 rounds by up to 2^-9 of a moment, forgotten within about ten steps;
  # what the parameters move by is right to about a per cent.
  moved = np.concatenate(
    [(trajectory[-1][p] - _params()[p]).ravel() for p in _SHAPES]
  )
  want = np.concatenate(
    [(exact[-1][p] - _params()[p]).ravel() for p in _SHAPES]
  )
  error = np.linalg.norm(moved - want) / np.linalg.norm(want)
  assert 0 < error < 0.012
  dtypes = {
    path: leaf.dtype for path, leaf in flatten(state).items() if leaf.ndim
  }
  bf16 = [p for p, dtype in dtypes.items() if dtype == jnp.bfloat16]
  f32 = [p for p, dtype in dtypes.items() if dtype == jnp.float32]
  assert len(bf16) == len(_SHAPES)
  assert len(f32) == (0 if name == "sgd" else len(_SHAPES))


def test_first_update_of_a_warmup_changes_nothing():
  trajectory, _ = _run(_make(_to_tree(_params()), weight_decay=0.3), steps=2)
  for p, start in _params().items():
    np.testing.assert_array_equal(trajectory[0][p], start.astype(np.float32))
    assert (trajectory[1][p] != trajectory[0][p]).any()


def test_schedule_decay_does_not_depend_on_base_lr():
  # big_vision: sched(t) * wd * p, with sched at most 1; no gradient here.
  params = {"kernel": jnp.ones(3)}
  for base_lr in (1e-3, 0.5):
    optimizer = _make(
      params,
      {"base_lr": base_lr, "decay": "constant", "warmup_steps": 0},
      weight_decay=0.01,
      weight_decay_scaling="schedule",
      weight_decay_params="kernel",
    )
    state = _init(optimizer, params)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, state, params)
    np.testing.assert_allclose(updates["kernel"], -0.01, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_multipliers_first_match_wins(name):
  def factor(path):
    if path == "head/bias":
      return 0.5
    return 10.0 if path.startswith("head/") else 1.0

  changes = {"name": name, "weight_decay": 0.3, "clip_norm": 1.0}
  rules = ("head/bias=0.5", "head/.*=10")
  optimizer = _make(_to_tree(_params()), lr_multipliers=rules, **changes)
  trajectory, _ = _run(optimizer)
  _assert_same(
    trajectory, _reference(factor=factor, **changes), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_freezing_equals_not_having_the_parameters(name):
  def factor(path):
    return 0.0 if path.startswith("Transformer/") else 2.0

  changes = {
    "name": name,
    "weight_decay": 0.3,
    "weight_decay_params": ".*",
    "clip_norm": 1.0,
  }
  rules = ("Transformer/.*=0", ".*=2")
  optimizer = _make(_to_tree(_params()), lr_multipliers=rules, **changes)
  trajectory, state = _run(optimizer)
  _assert_same(
    trajectory, _reference(factor=factor, **changes), rtol=1e-4, atol=1e-5
  )
  # Frozen to the bit, and no moments kept for them.
  for p, start in _params().items():
    if not factor(p):
      np.testing.assert_array_equal(trajectory[-1][p], start.astype("f4"))
  assert not [p for p in flatten(state) if "Transformer" in p]
  assert [p for p in flatten(state) if p.endswith("head/kernel")]


def test_frozen_gradients_may_be_anything():
  params = _to_tree(_params())
  optimizer = _make(params, lr_multipliers=("cls=0",), clip_norm=1.0)
  grads = _to_tree(_grads(0))
  grads["cls"] = np.full_like(grads["cls"], np.nan)
  state = _init(optimizer, params)
  updates, _ = jax.jit(optimizer.update)(grads, state, params)
  assert all(np.isfinite(x).all() for x in flatten(updates).values())


def _stack_blocks(flat):
  """{path: array} of two unrolled blocks -> of stacked ones."""
  first, second = "encoderblock_0/", "encoderblock_1/"
  stacked = {}
  for path, x in flat.items():
    if first in path:
      pair = (x, flat[path.replace(first, second)])
      stacked[path.replace(first, "encoderblock/")] = np.stack(pair)
    elif second not in path:
      stacked[path] = x
  return stacked


# By hand, for two blocks and a decay of 0.65: decay^(blocks + 1 - depth).
_BY_DEPTH = {
  "cls": 0.65**3,
  "Transformer/encoderblock_0/": 0.65**2,
  "Transformer/encoderblock_1/": 0.65,
  "head/": 1.0,
}


@pytest.mark.parametrize(
  ("name", "layer_decay", "frozen"),
  [
    *itertools.product(("adam", "sgd"), (0.65, 1.0), (1,)),
    *(("adam", 0.65, 0), ("sgd", 0.65, 0), ("adam", 1.0, 2), ("sgd", 1.0, 2)),
    *(("rmsprop", 0.65, 1), ("lamb", 0.65, 1)),
  ],
)
def test_layers_learn_by_depth_or_not_at_all(name, layer_decay, frozen):
  """Unrolled as the formula, stacked as unrolled."""

  def factor(path):
    depth = [path.startswith(start) for start in _BY_DEPTH].index(True)
    if depth <= frozen and frozen:
      return 0.0
    by_depth = [*_BY_DEPTH.values()][depth] if layer_decay < 1 else 1.0
    return by_depth * (0.5 if path == "head/bias" else 1.0)

  options = {"name": name, "weight_decay": 0.3, "clip_norm": 1.0}
  expected = _reference(factor=factor, **options)
  rules = ("head/bias=0.5",)
  options |= {"lr_multipliers": rules, "layer_decay": layer_decay}
  options |= {"freeze_blocks": frozen}
  params = _params()
  optimizer = _make(_to_tree(params), **options)
  trajectory, state = _run(optimizer)
  _assert_same(trajectory, expected, rtol=1e-4, atol=1e-5)
  # Frozen to the bit, and no moments kept for them.
  for p, start in params.items():
    moments = [x for x in flatten(state) if x.endswith(f"/{p}")]
    assert bool(moments) == bool(factor(p))
    if not factor(p):
      np.testing.assert_array_equal(trajectory[-1][p], start.astype("f4"))

  stacked = _to_tree(_stack_blocks(params))
  optimizer = _make(stacked, **options)
  state = _init(optimizer, stacked)
  update = jax.jit(optimizer.update)
  for step in range(_STEPS):
    grads = _stack_blocks(_grads(step))
    if frozen:  # of what is frozen anything may be
      for p, x in grads.items():
        if "encoderblock" in p:
          x[:frozen] = np.nan
    updates, state = update(_to_tree(grads), state, stacked)
    stacked = optax.apply_updates(stacked, updates)
  found, expected = flatten(stacked), _stack_blocks(trajectory[-1])
  for p, x in expected.items():
    np.testing.assert_allclose(found[p], x, rtol=1e-5, atol=1e-6, err_msg=p)
    if "encoderblock" in p:
      start = _stack_blocks(params)[p][:frozen].astype("f4")
      np.testing.assert_array_equal(found[p][:frozen], start)


def test_every_parameter_has_the_depth_of_its_place():
  options = {"variant": "ViT-w16d2m32h2_4", "num_classes": 3, "image_size": 8}
  more = {"pre_norm": True, "registers": 2, "representation_size": -1}
  for changes in (
    {"classifier": "token", "distillation_token": True, **more},
    {"classifier": "gap", "final_norm": "pooled", "class_token": True, **more},
    {"classifier": "map", "projection_size": 8, **more},
  ):
    model = models.create(**options, **changes)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    factors = optim.find_factors(shapes, (), 0.5, 0)
    before = {path for path, x in factors.items() if x == 0.5**3}
    position = "Transformer/posembed_input/pos_embedding"
    norm = {f"Transformer/pre_norm/{name}" for name in ("scale", "bias")}
    start = {"embedding/kernel", "embedding/bias", "registers", position, *norm}
    assert before - {"cls", "dist"} == start
    assert before >= {"cls", "dist"} & flatten(shapes).keys()
    blocks = {path for path in factors if "/encoderblock_" in path}
    after = {path for path, x in factors.items() if x == 1}
    assert after == factors.keys() - before - blocks
    assert "head/kernel" in after


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"layer_decay": 0.0}, r"layer_decay 0.0 is not in \(0, 1\]"),
    ({"layer_decay": 1.5}, "layer_decay 1.5"),
    ({"name": "lamb"}, "'lamb' adapts what is decayed, and weight_decay is 0"),
    ({"freeze_blocks": 3}, "freeze_blocks 3, but this model has 2 blocks"),
    (
      {"weight_decay": 0.1, "weight_decay_params": "kernel"},
      "weight_decay_params 'kernel' matches no parameter",
    ),
    (
      {"weight_decay": 0.1, "weight_decay_params": "(kernel"},
      "weight_decay_params .* is not a regular expression",
    ),
    ({"lr_multipliers": ("head=0.1",)}, "lr_multipliers 'head' matches no"),
    ({"lr_multipliers": ("hed/kernel=1",)}, "did you mean 'head/kernel'"),
    ({"lr_multipliers": ("head/.*=nan",)}, "is not 'regex=factor'"),
    ({"lr_multipliers": (".*=0",)}, "freeze every parameter"),
  ],
)
def test_optimizer_errors(changes, message):
  with pytest.raises(UserError, match=message) as e:
    _make(_to_tree(_params()), **changes)
  assert "\n" not in str(e.value)
