"""Low-rank updates: values, gradients, what moves, what does not."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from random_models import random_params

import vit_jax
from vit_jax import checkpoint, files, models, pretrained, sharding
from vit_jax import config as configuration
from vit_jax.errors import UserError
from vit_jax.evaluation import evaluators
from vit_jax.state import flatten, make_key, unflatten
from vit_jax.train import make_step
from vit_jax.training import lora, objectives

_OPTIONS = {
  "variant": "ViT-w16d2m32h2_8",
  "num_classes": 3,
  "image_size": 16,
  "dtype": "float32",
}
_LORA = {"rank": 2, "alpha": 6.0, "params": ".*/encoderblock.*/kernel"}
_BLOCK = "Transformer/encoderblock_1"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"


@functools.cache
def _make(scan=False):
  model = models.create(**_OPTIONS, scan=scan)
  return model, lora.adapt(model, **_LORA)


def test_kernels_get_the_product_added():
  """Each kind of kernel as a matrix, in float64."""
  _, adapted = _make()
  flat = flatten(random_params(adapted))
  merged = lora.merge(flat, **_LORA)
  changed = {path for path in merged if (merged[path] != flat[path]).any()}
  assert len(changed) == 2 * 6
  for path, rows in (
    (f"{_ATTENTION}/query/kernel", 16),  # [d a d/a]
    (f"{_ATTENTION}/out/kernel", 16),  # [a d/a d]
    (f"{_BLOCK}/MlpBlock_0/Dense_0/kernel", 16),
    (f"{_BLOCK}/MlpBlock_0/Dense_1/kernel", 32),
  ):
    place = path.removesuffix("kernel")
    w, a, b = (
      np.float64(flat[place + name]) for name in ("kernel", "lora_a", "lora_b")
    )
    assert (a.shape, len(b)) == ((rows, 2), 2)
    expected = (w.reshape(rows, -1) + 6.0 / 2 * a @ b).reshape(w.shape)
    np.testing.assert_allclose(merged[path], expected, rtol=1e-5, atol=1e-6)
    assert path in changed
  assert not [path for path in merged if "lora" in path]


@pytest.mark.ci
def test_gradients_are_those_of_torch():
  """Of a projection W x + alpha / r B (A x), in the paper's order."""
  import torch

  _, adapted = _make()
  flat = flatten(random_params(adapted))
  place = f"{_ATTENTION}/query"
  names = ("kernel", "lora_a", "lora_b")
  given = {f"{place}/{name}": flat[f"{place}/{name}"] for name in names}
  x = np.random.default_rng(1).normal(size=(5, 16)).astype("f4")

  def loss(params):
    w = lora.merge(params, **_LORA)[f"{place}/kernel"]
    return (jnp.tanh(x @ w.reshape(16, 16)) ** 2).sum()

  found = jax.jit(jax.grad(loss))(given)
  w, a, b = (
    torch.tensor(given[f"{place}/{n}"], requires_grad=True) for n in names
  )
  y = torch.tensor(x) @ w.reshape(16, 16) + 6.0 / 2 * (torch.tensor(x) @ a) @ b
  (y.tanh() ** 2).sum().backward()
  for name, there in zip(names, (w, a, b), strict=True):
    np.testing.assert_allclose(
      found[f"{place}/{name}"], there.grad.numpy(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.ci
def test_it_starts_as_the_model_scanned_or_not():
  images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3))
  images = images.astype("f4")
  plain, adapted = _make()
  key = jax.random.key(3)
  start = jax.jit(adapted.init)(key)
  for path, x in flatten(jax.jit(plain.init)(key)).items():
    np.testing.assert_array_equal(flatten(start)[path], x)
  np.testing.assert_array_equal(
    jax.jit(adapted.apply)(start, images),
    jax.jit(plain.apply)(start, images),
  )
  scanned = flatten(jax.jit(_make(scan=True)[1].init)(key))
  unrolled = flatten(start)
  a = [
    unrolled[f"Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/lora_a"]
    for i in (0, 1)
  ]
  name = "Transformer/encoderblock/MlpBlock_0/Dense_0/lora_a"
  np.testing.assert_array_equal(scanned[name], np.stack(a))
  assert (a[0] != a[1]).all()
  assert np.abs(a).max() <= 16**-0.5
  assert not flatten(start)[f"{_ATTENTION}/query/lora_b"].any()
  # With other values both forms are one model.
  flat = flatten(random_params(adapted))
  stacked = {}
  for path, x in flat.items():
    if "/encoderblock_0/" in path:
      pair = (x, flat[path.replace("block_0/", "block_1/")])
      stacked[path.replace("block_0/", "block/")] = np.stack(pair)
    elif "/encoderblock_1/" not in path:
      stacked[path] = x
  np.testing.assert_allclose(
    jax.jit(_make(scan=True)[1].apply)(unflatten(stacked), images),
    jax.jit(adapted.apply)(unflatten(flat), images),
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.ci
@pytest.mark.parametrize("scan", [False, True])
def test_a_run_is_read_as_the_plain_model(tmp_path, scan):
  """And so it is what predicts, is converted, and starts other runs."""
  adapted = _make(scan)[1]
  params = random_params(adapted)
  saved = checkpoint.Checkpoints(tmp_path, keep=1)
  saved.save(3, {"params": params})
  saved.close()
  given = {"model.variant": _OPTIONS["variant"], "image_size": "16"}
  given |= {"model.dtype": "float32", "model.scan": str(scan)}
  given |= {f"lora.{key}": str(x) for key, x in _LORA.items()}
  config = configuration.to_dict(configuration.load("common", given))
  run = {"config": config, "class_names": ["a", "b", "c"]}
  files.write_json(tmp_path / "config.json", run)
  images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3))
  loaded = vit_jax.load(str(tmp_path))
  assert not [path for path in flatten(loaded.params) if "lora" in path]
  np.testing.assert_allclose(
    loaded(images.astype("f4")),
    jax.jit(adapted.apply)(params, images.astype("f4")),
    rtol=1e-4,
    atol=1e-5,
  )
  # What evaluates it makes the plain model as well.
  weights = pretrained.read(str(tmp_path))
  config = ml_collections.ConfigDict(weights.run["config"])
  objective = objectives.create(config, ["a", "b", "c"])
  shapes = jax.eval_shape(objective.model.init, jax.random.key(0))
  assert flatten(shapes).keys() == weights.params.keys()


@functools.cache
def _train(devices=1, **overrides):
  """Returns the flat state before and after three steps, on the host."""
  given = {
    "model.variant": "ViT-w16d2m32h2_8",
    "model.dtype": "float32",
    "model.scan": "True",
    "image_size": "16",
    "batch_size": "8",
    "schedule.warmup_steps": "0",
    "optimizer.weight_decay": "0.1",
    "optimizer.clip_norm": "1.0",
    "lora.rank": "2",
    **overrides,
  }
  config = configuration.load("common", given)
  objective = objectives.create(config, ["a", "b", "c"])
  train_step, init_state = make_step(config, objective, total_steps=10_000)
  mesh = sharding.make_mesh(config.fsdp, jax.devices()[:devices])
  key = make_key(0)
  layout = sharding.tree_shardings(mesh, jax.eval_shape(init_state, key))
  state = jax.jit(init_state, out_shardings=layout)(key)
  before = jax.device_get(flatten(state))
  step = sharding.jit_train_step(mesh, train_step, layout)
  rng = np.random.default_rng(0)
  for _ in range(3):
    batch = {
      "image": rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8),
      "labels": rng.integers(0, 3, (8, 1)).astype(np.int32),
    }
    state, _ = step(state, sharding.put_batch(mesh, batch, 8))
  return before, jax.device_get(flatten(state))


@pytest.mark.ci
def test_a_and_b_and_the_head_are_trained():
  before, after = _train()
  moved = {
    path.removeprefix("params/")
    for path in before
    if path.startswith("params/") and (before[path] != after[path]).any()
  }
  attention = "Transformer/encoderblock/MultiHeadDotProductAttention_0"
  trained = {
    f"{attention}/{name}/lora_{x}"
    for name in ("query", "key", "value", "out")
    for x in "ab"
  } | {"head/kernel", "head/bias"}
  assert moved == trained
  moments = {p.partition("/mu/")[2] for p in after if "/mu/" in p}
  assert moments == trained


@pytest.mark.parametrize(
  ("devices", "overrides"),
  [
    pytest.param(1, {"micro_batches": "2"}, marks=pytest.mark.ci),
    pytest.param(4, {"fsdp": "2"}, marks=pytest.mark.ci),
  ],
)
def test_in_pieces_and_on_devices_it_is_the_same(devices, overrides):
  _, expected = _train()
  _, found = _train(devices, **overrides)
  for path, x in expected.items():
    if path.startswith("params/") and "key/lora" not in path:
      np.testing.assert_allclose(
        found[path], x, rtol=1e-3, atol=1e-5, err_msg=path
      )


@pytest.mark.ci
def test_rules_come_first():
  """What they name is trained as well, or not; A and B are as deep as W."""
  _, after = _train(
    **{
      "optimizer.lr_multipliers": "('head/bias=0', '.*/bias=0.1')",
      "optimizer.freeze_blocks": "1",
    }
  )
  before, _ = _train()
  path = "params/Transformer/encoderblock/MultiHeadDotProductAttention_0"
  changed = before[f"{path}/query/lora_a"] != after[f"{path}/query/lora_a"]
  assert not changed[0].any()
  assert changed[1].any()
  name = "params/head/bias"
  np.testing.assert_array_equal(before[name], after[name])
  name = "params/Transformer/encoder_norm/bias"
  assert (before[name] != after[name]).any()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rank": 16}, "lora.rank 16 is not below 16, the smaller side of"),
    ({"alpha": 0.0}, "lora.alpha 0.0 is not positive"),
    ({"params": ".*/kernl"}, "lora.params '.*/kernl' matches no parameter"),
    ({"params": "head/.*"}, "matches head/bias, not a kernel"),
  ],
)
def test_what_cannot_be_adapted(changes, message):
  with pytest.raises(UserError, match=message) as e:
    lora.adapt(_make()[0], **_LORA | changes)
  assert "\n" not in str(e.value)


@pytest.mark.ci
def test_few_shot_features_are_those_of_the_merged_model(monkeypatch):
  """An evaluation in a run sees what has been trained."""
  _, adapted = _make()
  flat = flatten(random_params(adapted))
  config = configuration.load("common")
  with config.unlocked():
    config.image_size = 16
    config.model.variant = _OPTIONS["variant"]
    config.model.dtype = "float32"
    config.lora.update(_LORA)
  entry = configuration.Eval(
    "few", "fewshot", None, "test", "resize(size)", 8, 0, "train", (1,)
  )
  made = []
  monkeypatch.setattr(
    evaluators.fewshot,
    "make_evaluate",
    lambda model, *_, **__: made.append(model),
  )
  evaluators.OTHERS["fewshot"](config, entry, (None, None), None)
  images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3))
  images = images.astype(np.float32)
  plain = models.create(**{**_OPTIONS, "num_classes": 0})
  np.testing.assert_allclose(
    made[0].apply(unflatten(flat), images),
    plain.apply(unflatten(lora.merge(flat, **_LORA)), images),
    rtol=1e-4,
    atol=1e-5,
  )
