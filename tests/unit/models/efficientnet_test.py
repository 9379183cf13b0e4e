"""EfficientNets: sizes, values against NumPy, statistics, what is dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_efficientnet
from mistakes import named
from random_models import assert_close, random_images

from vit_jax import models, sharding
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.state import flatten, unflatten
from vit_jax.tools.paper import flops

SMALL = "EfficientNet-N"
# Sides are halved to odd numbers.
SIZE = (40, 56)


@functools.cache
def _create(variant=SMALL, **options):
  defaults = {"num_classes": 7, "image_size": SIZE, "dtype": "float32"}
  return models.create(variant=variant, **defaults | options)


@functools.cache
def _shapes(size):
  model = models.create(
    variant=f"EfficientNet-{size}", num_classes=1000, image_size=64
  )
  return flatten(jax.eval_shape(model.init, jax.random.key(0)))


def _random_params(model, seed=0):
  """Returns {path: array}, statistics among them that are not 0 and 1."""
  rng = np.random.default_rng(seed)
  flat = flatten(jax.eval_shape(model.init, jax.random.key(0)))
  for path, x in flat.items():
    if path.endswith(("/var", "/scale", "/std")):
      values = rng.uniform(0.5, 1.5, x.shape)
    else:
      inputs = np.prod(x.shape[:-1]) if path.endswith("/kernel") else 10
      values = rng.normal(0, inputs**-0.5, x.shape)
    flat[path] = values.astype(np.float32)
  return flat


# --- sizes ---

# Parameters, running statistics, blocks: of the authors' models.
_PUBLISHED = {
  "B0": (5_288_548, 42_016, 16),
  "B1": (7_794_184, 62_048, 23),
  "B2": (9_109_994, 67_568, 23),
  "B3": (12_233_232, 87_296, 26),
  "B4": (19_341_616, 125_200, 32),
  "B5": (30_389_784, 172_736, 39),
  "B6": (43_040_704, 224_432, 45),
  "B7": (66_347_960, 310_720, 55),
  "B8": (87_413_142, None, None),
  "L2": (480_309_308, 1_090_688, 88),
}
_CASES = [
  # Tracing takes a second or more.
  pytest.param(size, marks=() if size == "B0" else pytest.mark.ci)
  for size in _PUBLISHED
]


@pytest.mark.parametrize("size", _CASES)
def test_counts_of_the_published_models(size):
  shapes = _shapes(size)
  parameters = sum(
    x.size for path, x in shapes.items() if not models.is_statistic(path)
  )
  running = sum(
    x.size for path, x in shapes.items() if path.endswith(("_norm/mean", "var"))
  )
  blocks = {path[:7] for path in shapes if path.startswith("block")}
  expected = _PUBLISHED[size]
  found = parameters, running, len(blocks)
  assert found[: 1 if size == "B8" else 3] == expected[: 1 + 2 * (size != "B8")]
  statistics = {path for path in shapes if models.is_statistic(path)}
  assert len(statistics) == 2 + 2 * sum(
    path.endswith("_norm/scale") for path in shapes
  )


@pytest.mark.ci
def test_stages_of_l2():
  shapes = _shapes("L2")
  widths = [
    shapes[f"block{i:02d}/project_conv/kernel"].shape[-1] for i in range(88)
  ]
  stages = [(6, 72), (11, 104), (11, 176), (16, 344), (16, 480), (22, 824)]
  stages.append((6, 1376))
  assert widths == [width for count, width in stages for _ in range(count)]
  assert shapes["stem_conv/kernel"].shape == (3, 3, 3, 136)
  assert shapes["head/kernel"].shape == (5504, 1000)


def test_multiply_adds_of_b0():
  """Published as 0.39 billion, products with padding included."""
  found = flops.count_multiply_adds("EfficientNet-B0", 224, 1000)
  assert 0.375e9 < found < 0.39e9


@pytest.mark.parametrize(
  "size", ["B0", pytest.param("L2", marks=pytest.mark.ci)]
)
def test_every_parameter_has_a_layout_on_8_shards(size):
  for path, x in _shapes(size).items():
    spec = sharding.partition_spec(path, x.shape, 8)
    is_split = path.endswith(("conv/kernel", "head/kernel"))
    is_split &= "depthwise" not in path
    assert ("fsdp" in spec) == is_split, path


# --- values ---


@pytest.fixture(scope="module")
def case():
  """A small model, its parameters, images and what NumPy makes of them."""
  model = _create()
  params, images = _random_params(model), random_images(model, batch=8)
  expected = {
    train: reference_efficientnet.apply(params, images, train=train)
    for train in (False, True)
  }
  return model, params, images, expected


def _run(model, params, images, train=False, mesh=None, names=None):
  """Returns the intermediates, some of them, and the new statistics."""

  def apply(params, images):
    (_, out), new = model.apply(
      params,
      images,
      train=train,
      key=jax.random.key(0),
      intermediates=True,
      statistics=True,
    )
    if names:
      return {name: out[name] for name in names}, {
        path: x for path, x in new.items() if path.startswith("stem")
      }
    return out, new

  params = unflatten(params)
  if mesh:
    apply = sharding.on_mesh(mesh, apply)
    params = jax.device_put(params, sharding.tree_shardings(mesh, params))
    images = jax.device_put(images, sharding.batch_sharding(mesh))
  return jax.jit(apply)(params, images)


@pytest.mark.parametrize(
  "train", [pytest.param(False, marks=pytest.mark.ci), True]
)
def test_values_and_statistics_equal_numpy(case, train):
  model, params, images, expected = case
  found, new = _run(model, params, images, train)
  out, statistics = expected[train]
  assert_close(found, out)
  assert new.keys() == statistics.keys()
  assert all(map(models.is_statistic, new))
  for path, x in statistics.items():
    assert new[path].dtype == jnp.float32
    np.testing.assert_allclose(new[path], x, rtol=1e-5, atol=1e-6)
    assert not train or np.abs(x - params[path]).max() > 1e-4


@pytest.mark.ci
def test_statistics_are_those_of_the_batch_on_all_devices(case):
  model, params, images, expected = case
  mesh = sharding.make_mesh(fsdp=2)
  assert mesh.size == 8
  found, new = _run(model, params, images, train=True, mesh=mesh)
  out, statistics = expected[True]
  assert_close(found, out)
  for path, x in statistics.items():
    np.testing.assert_allclose(new[path], x, rtol=1e-5, atol=1e-6)


@pytest.mark.ci
def test_bfloat16_is_close_with_float32_statistics(case):
  _, params, images, expected = case
  model = _create(dtype="bfloat16")
  names = ("stem", "block03/out")
  found, new = _run(model, params, images, train=True, names=names)
  out, statistics = expected[True]
  shapes = jax.eval_shape(
    lambda: model.apply(unflatten(params), images, intermediates=True)[1]
  )
  for name in ("pooled", "logits"):
    assert shapes[name].dtype == jnp.float32
  for name, limit in zip(names, (0.01, 0.05), strict=True):
    assert found[name].dtype == jnp.bfloat16
    difference = np.asarray(found[name], np.float64) - out[name]
    assert 1e-4 < difference.std() / out[name].std() < limit, name
  assert len(new) == 2
  for path, x in new.items():
    assert x.dtype == jnp.float32
    # The batch's own share is a hundredth.
    np.testing.assert_allclose(x, statistics[path], rtol=1e-4, atol=1e-4)


@pytest.mark.ci
def test_what_is_dropped():
  """Branches by the depth of their block, then channels of what is pooled."""
  rate, count, width = 0.9, 128, 320
  options = {"num_classes": width, "image_size": 32}
  plain = _create(**options)
  noisy = _create(**options, stochastic_depth_rate=rate, dropout_rate=0.75)
  params = _random_params(plain)
  params["head/kernel"] = np.eye(width, dtype=np.float32)
  params["head/bias"] = np.zeros(width, np.float32)
  images = random_images(plain, batch=count)
  names = [f"block{i:02d}/out" for i in range(3, 9)] + ["pooled", "logits"]
  found, _ = _run(noisy, params, images, train=True, names=names)
  whole, _ = _run(plain, params, images, train=True, names=names[:2])

  def branch(out, i):
    branch = out[f"block{i:02d}/out"] - out[f"block{i - 1:02d}/out"]
    return np.asarray(branch).reshape(count, -1)

  for i in (4, 6, 8):  # those with a skip, but for the first
    dropped = (branch(found, i) == 0).all(-1)
    expected = rate * i / 10
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert abs(dropped.mean() - expected) < 4 * deviation
    if i == 4:  # nothing before it was dropped
      kept, same = branch(found, i)[~dropped], branch(whole, i)[~dropped]
      scale = np.abs(same).max()
      assert np.abs(kept - same / (1 - expected)).max() < 1e-4 * scale
  pooled, logits = np.asarray(found["pooled"]), np.asarray(found["logits"])
  kept = logits != 0
  assert abs(kept.mean() - 0.25) < 0.01
  np.testing.assert_allclose(logits[kept], 4 * pooled[kept], rtol=1e-5)


@pytest.mark.ci
def test_initial_values():
  """Normal by what goes out, as the authors' code, depthwise kernels too."""
  names = {
    "stem_conv/kernel": (2 / (9 * 8)) ** 0.5,
    "block09/expand_conv/kernel": (2 / 288) ** 0.5,
    "block09/depthwise_conv/kernel": (2 / 9) ** 0.5,
    "block09/se_expand/kernel": (2 / 288) ** 0.5,
    "head/kernel": (1 / 7 / 3) ** 0.5,  # uniform
  }
  model = _create(head_bias_init=-3.0)

  def init(key):
    flat = flatten(model.init(key))
    return {
      path: x
      for path, x in flat.items()
      if path in names or not path.endswith("kernel")
    }

  params = jax.jit(init)(jax.random.key(0))
  for path, expected in names.items():
    x = np.asarray(params[path])
    assert x.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * x.size)), path
  assert np.abs(params["head/kernel"]).max() <= 7**-0.5
  mean, std = (params.pop(f"pixels/{name}") for name in ("mean", "std"))
  np.testing.assert_allclose((mean + 1) / 2, (0.485, 0.456, 0.406), rtol=1e-6)
  np.testing.assert_allclose(std / 2, (0.229, 0.224, 0.225), rtol=1e-6)
  for path, x in params.items():
    value = {"scale": 1, "var": 1, "mean": 0, "bias": 0}.get(
      path[-5:].strip("/")
    )
    if path == "head/bias":
      value = -3
    if path not in names:
      value = 1 if path.endswith(("/scale", "/var")) else value or 0
      assert (x == value).all(), path


# --- the functions around it ---


def test_features_are_what_is_pooled(case):
  model, params, images, expected = case
  features = jax.jit(models.make_features(model))
  found = features(unflatten(params), images)
  assert_close({"pooled": found}, {"pooled": expected[False][0]["pooled"]})
  with pytest.raises(UserError, match="no 'cls' features; take 'pooled'"):
    models.make_features(model, "cls")


def test_a_vit_has_no_statistics():
  model = models.create(variant="ViT-w8d1m8h1_8", num_classes=3, image_size=8)

  def run(key):
    images = jnp.zeros((1, 8, 8, 3))
    params = model.init(key)
    assert not any(map(models.is_statistic, flatten(params)))
    return model.apply(params, images, train=True, key=key, statistics=True)

  logits, new = jax.eval_shape(run, jax.random.key(0))
  assert logits.shape == (1, 3)
  assert new == {}
  assert not model.has_statistics
  assert _create().has_statistics


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"classifier": "map"}, ["model.classifier is 'map'", SMALL]),
    ({"attention_dropout_rate": 0.1}, ["attention_dropout_rate is 0.1"]),
    ({"scan": True}, ["model.scan is True", "leave it at False"]),
    ({"remat": "dots"}, ["model.remat 'dots'", "'full' or 'none'"]),
    ({"dropout_rate": 1.0}, ["model.dropout_rate is 1.0"]),
    ({"image_size": 24}, ["24 is too small; at least 32"]),
    ({"variant": "EfficientNet-B9"}, ["mean 'EfficientNet-B"]),
    ({"variant": "R50x1", "dropout_rate": 0.1}, ["model.dropout_rate is 0.1"]),
  ],
  ids=str,
)
def test_wrong_arguments_are_named(options, words):
  with named(*words):
    _create(**options)


def test_kinds():
  names = ("ViT-B_16", "R50+ViT-B_16", "R50x1", "EfficientNet-B0")
  kinds = [variants.parse(name).kind for name in names]
  assert kinds == ["ViT", "hybrid", "ResNet", "EfficientNet"]
