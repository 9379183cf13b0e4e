"""The mesh, the table of layouts, and how batches are laid out."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from mistakes import named

from vit_jax import models, sharding
from vit_jax.errors import UserError
from vit_jax.evaluation.devices import replicate
from vit_jax.state import TrainState, flatten
from vit_jax.training import lora, optim

_OPTIMIZER = {
  "b1": 0.9,
  "b2": 0.999,
  "eps": 1e-8,
  "momentum": 0.9,
  "accumulator_dtype": "bfloat16",
  "weight_decay": 0.1,
  "weight_decay_scaling": "lr",
  "weight_decay_params": ".*/kernel",
  "clip_norm": 1.0,
  "layer_decay": 1.0,
  "freeze_blocks": 0,
  "base_lr": 1e-3,
  "schedule": lambda step: 1e-3,
}


def _state_shapes(optimizer="adam", lr_multipliers=(), **kwargs):
  # Two blocks have every rule that 48 have, and are traced at once.
  options = {
    "variant": "ViT-w16d2m32h2_4",
    "num_classes": 10,
    "image_size": 8,
  }
  model = models.create(**options | kwargs)

  def init(key):
    params = model.init(key)
    transformation = optim.make_optimizer(
      name=optimizer,
      lr_multipliers=lr_multipliers,
      params=params,
      **_OPTIMIZER,
    )
    return TrainState(
      step=jax.numpy.zeros((), "int32"),
      params=params,
      opt_state=transformation.init(params),
      ema=params,
      rng=jax.random.key_data(key),
    )

  return jax.eval_shape(init, jax.random.key(0))


# Each value of an option with each value of every other one, but that not each
# optimizer has each classifier.
_FORMS = [
  ("token", 0, False, "adam"),
  ("token", -1, True, "sgd"),
  ("gap", 0, True, "rmsprop"),
  ("gap", -1, False, "lamb"),
  ("map", 0, True, "lamb"),
  ("map", -1, False, "rmsprop"),
]


@pytest.mark.parametrize(
  ("classifier", "representation_size", "scan", "optimizer"), _FORMS, ids=str
)
def test_rules_cover_every_form(
  classifier, representation_size, scan, optimizer
):
  shapes = _state_shapes(
    optimizer,
    classifier=classifier,
    representation_size=representation_size,
    scan=scan,
  )
  _check_rules(shapes)


@pytest.mark.parametrize("name", models.ENCODERS)
def test_rules_cover_every_variant(name, monkeypatch):
  """Its width, heads and MLP, of which 8 devices have a part each."""
  encoder = models.ENCODERS[name]._replace(num_layers=2)
  monkeypatch.setitem(models.ENCODERS, name, encoder)
  _check_rules(
    _state_shapes(variant=f"ViT-{name}_14", image_size=28, scan=True)
  )


def _check_rules(shapes, fsdp=8):
  """Every kernel is split once, moments lie as their parameters do."""
  specs = {
    path: sharding.partition_spec(path, x.shape, fsdp)
    for path, x in flatten(shapes).items()
  }
  flat = flatten(shapes)
  for path, spec in specs.items():
    names = [name for name in spec if name]
    assert names == (["fsdp"] if path.endswith("/kernel") else []), path
    assert len(spec) in (0, flat[path].ndim), path
  params = {p.removeprefix("params/") for p in specs if p.startswith("params/")}
  mirrored = 0
  for path, spec in specs.items():
    owner = next((p for p in params if path.endswith("/" + p)), None)
    if owner:
      assert spec == specs[f"params/{owner}"], path
      mirrored += 1
  assert mirrored >= 3 * len(params)  # params, ema and at least one moment


@pytest.mark.parametrize("scan", [False, True])
def test_rules_cover_low_rank_updates(scan):
  """A and B are whole on each device, as their moments are."""
  options = {"variant": "ViT-w16d2m32h2_4", "num_classes": 10, "image_size": 8}
  model = lora.adapt(
    models.create(**options, scan=scan),
    rank=2,
    alpha=4.0,
    params=".*/encoderblock.*/kernel",
  )
  for path, x in flatten(jax.eval_shape(model.init, jax.random.key(0))).items():
    for prefix in ("params", "opt_state/1/0/mu"):
      spec = sharding.partition_spec(f"{prefix}/{path}", x.shape, 8)
      assert any(spec) == path.endswith("/kernel")


def test_rules_cover_frozen_parameters():
  shapes = _state_shapes(lr_multipliers=("head/.*=1", ".*=0"))
  moments = [p for p in flatten(shapes) if p.startswith("opt_state/")]
  assert any(p.endswith("mu/head/kernel") for p in moments)
  assert not any("encoderblock" in p for p in moments)
  for path, x in flatten(shapes).items():
    sharding.partition_spec(path, x.shape, 8)


def test_specs_by_example():
  block = "params/Transformer/encoderblock"
  attention = "MultiHeadDotProductAttention_0"
  for path, shape, spec in (
    (f"{block}_3/{attention}/query/kernel", (64, 4, 16), P("fsdp", None, None)),
    (f"{block}_3/{attention}/out/kernel", (4, 16, 64), P(None, None, "fsdp")),
    (f"{block}_3/MlpBlock_0/Dense_0/kernel", (64, 256), P("fsdp", None)),
    (f"{block}_3/MlpBlock_0/Dense_1/kernel", (256, 64), P(None, "fsdp")),
    (f"{block}/MlpBlock_0/Dense_1/kernel", (6, 256, 64), P(None, None, "fsdp")),
    (f"opt_state/0/mu/{block}_3/LayerNorm_0/scale", (64,), P()),
    ("params/head/kernel", (64, 10), P("fsdp", None)),
    ("params/embedding/kernel", (4, 4, 3, 64), P(None, None, None, "fsdp")),
    ("opt_state/0/count", (), P()),
    ("step", (), P()),
  ):
    assert sharding.partition_spec(path, shape, 4) == spec, path


@pytest.mark.parametrize("path", ["params/adapter/kernel", "head/kernel2", "x"])
def test_a_path_without_a_rule_is_our_own_mistake(path):
  with pytest.raises(AssertionError, match=path):
    sharding.partition_spec(path, (8, 8), 1)


def test_fsdp_that_does_not_divide_an_axis_names_it():
  with named("fsdp 5", "axis 0 of params/head/kernel", "192"):
    sharding.partition_spec("params/head/kernel", (192, 10), 5)


@pytest.mark.parametrize("fsdp", [0, -1, 3, 16])
def test_fsdp_that_does_not_divide_the_devices(fsdp):
  with pytest.raises(UserError, match=f"fsdp {fsdp} .*8 devices.*1, 2, 4, 8"):
    sharding.make_mesh(fsdp)


def test_parameters_stay_whole_where_only_moments_are_split():
  mesh = sharding.make_mesh(shard_state=4)
  assert dict(mesh.shape) == {"data": 2, "zero1": 4}
  specs = {
    path: x.spec
    for path, x in flatten(
      sharding.tree_shardings(mesh, _state_shapes())
    ).items()
  }
  split = {path for path, spec in specs.items() if any(spec)}
  assert split == {
    path
    for path in specs
    if path.endswith("/kernel") and not path.startswith("params/")
  }
  assert {path.split("/")[0] for path in split} == {"ema", "opt_state"}
  assert {name for p in split for name in specs[p] if name} == {"zero1"}


def test_only_one_key_splits_the_moments():
  with named("fsdp 2", "optimizer.shard_state 4", "to 1"):
    sharding.make_mesh(2, shard_state=4)
  with named("optimizer.shard_state 3", "8 devices", "1, 2, 4, 8"):
    sharding.make_mesh(shard_state=3)
  mesh = sharding.make_mesh(shard_state=8)
  with named("optimizer.shard_state 8", "opt_state/0/mu/head/kernel", "12"):
    sharding.tree_shardings(
      mesh, {"opt_state": [{"mu": {"head": {"kernel": np.zeros((12, 3))}}}]}
    )


def test_mesh_has_every_device_once():
  mesh = sharding.make_mesh(4)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
  assert set(mesh.devices.flat) == set(jax.devices())
  assert sharding.make_mesh(1, jax.devices()[:2]).size == 2


def test_fsdp_lowers_the_bytes_on_a_device():
  shapes = {
    "head": {"kernel": (64, 40), "bias": (40,)},
    "pos_embedding": (1, 9, 64),
  }
  arrays = jax.tree.map(
    lambda shape: np.zeros(shape, np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )

  def count(fsdp):
    mesh = sharding.make_mesh(fsdp)
    layout = sharding.tree_shardings(mesh, arrays)
    placed = jax.device_put(arrays, layout)
    largest = max(
      sum(
        shard.data.nbytes
        for x in jax.tree.leaves(placed)
        for shard in x.addressable_shards
        if shard.device == device
      )
      for device in jax.devices()
    )
    assert sharding.bytes_per_device(placed) == largest
    return largest

  small = 4 * (40 + 9 * 64)
  assert count(1) == 4 * 64 * 40 + small
  assert count(2) == 4 * 64 * 40 / 2 + small
  assert count(8) == 4 * 64 * 40 / 8 + small


# --- batches ---


@pytest.mark.parametrize(
  ("devices", "fsdp"), [(1, 1), (2, 1), (2, 2), (8, 1), (8, 2), (8, 8)]
)
def test_batches_arrive_as_they_were(devices, fsdp):
  mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
  rows = sharding.local_rows(mesh, 16)
  np.testing.assert_array_equal(rows, np.arange(16))
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (16, 4, 4, 3)).astype(np.uint8),
    "labels": rng.integers(0, 9, (16, 2)).astype(np.int32),
    "mask": rng.uniform(size=16) < 0.5,
  }
  placed = sharding.put_batch(mesh, batch, 16)
  for name, x in batch.items():
    np.testing.assert_array_equal(placed[name], x)
    assert placed[name].dtype == x.dtype
    shards = placed[name].addressable_shards
    assert {s.data.shape[0] for s in shards} == {16 // devices}


def test_replicate_puts_the_whole_array_everywhere():
  x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
  placed = replicate(sharding.make_mesh(2), {"x": x})["x"]
  assert len(placed.addressable_shards) == 8
  for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, x)


@pytest.mark.parametrize(
  ("batch_size", "micro_batches", "message"),
  [
    (100, 1, "batch_size 100 .*8 devices.* 96"),
    (4, 1, "batch_size 4 .*8 devices.* 8"),
    (0, 1, "batch_size 0 .*8 devices.* 8"),
    (-8, 1, "batch_size -8 .*8 devices.* 8"),
    (40, 4, "batch_size 40 .*8 devices x 4 .* 32"),
  ],
)
def test_batch_sizes_that_do_not_split(batch_size, micro_batches, message):
  with pytest.raises(UserError, match=message):
    sharding.check_batch_size(batch_size, sharding.make_mesh(), micro_batches)
