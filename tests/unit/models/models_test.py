"""The model: sizes, values against NumPy, its two forms, dropout, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_vit
from mistakes import named
from random_models import jit as _jit
from random_models import random_images as _images
from random_models import random_params as _random_params

from vit_jax import models
from vit_jax.state import flatten, unflatten


def _create(**kwargs):
  options = {
    # Two layers of width 16 show everything that 32 of width 1280 do.
    "variant": "ViT-w16d2m24h2_4",
    "num_classes": 5,
    "image_size": (8, 12),
    "dtype": "float32",
  }
  return models.create(**options | kwargs)


def _assert_identical(a, b):
  a, b = flatten(a), flatten(b)
  assert a.keys() == b.keys()
  for path, x in a.items():
    np.testing.assert_array_equal(x, b[path], err_msg=path)


# --- sizes ---


@pytest.mark.parametrize(
  ("variant", "count"),
  [
    ("ViT-Ti_16", 5_717_416),
    ("ViT-S_16", 22_050_664),
    ("ViT-S_32", 22_878_952),
    ("ViT-B_8", 86_576_872),
    ("ViT-B_16", 86_567_656),
    ("ViT-B_32", 88_224_232),
    ("ViT-L_16", 304_326_632),
    ("ViT-L_32", 306_535_400),
    ("ViT-H_14", 632_045_800),
  ],
)
def test_parameter_counts_of_the_published_models(monkeypatch, variant, count):
  assert _count(monkeypatch, variant) == count


def _count_whole(**kwargs):
  model = models.create(**{"num_classes": 1000, "image_size": 224, **kwargs})
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return sum(x.size for x in jax.tree.leaves(shapes))


def _count(monkeypatch, variant, **kwargs):
  """Counts with one and two blocks: tracing 32 of them takes seconds."""
  name = variant.removeprefix("ViT-").partition("_")[0]
  encoder = models.ENCODERS[name]
  counts = []
  for depth in (1, 2):
    cut = encoder._replace(num_layers=depth)
    with monkeypatch.context() as patch:
      patch.setitem(models.ENCODERS, name, cut)
      counts.append(_count_whole(variant=variant, **kwargs))
  return counts[0] + (encoder.num_layers - 1) * (counts[1] - counts[0])


def test_parameter_counts_of_other_heads(monkeypatch):
  def count(variant, **kwargs):
    return _count(monkeypatch, variant, **kwargs)

  assert count("ViT-B_16", classifier="gap") == 86_566_120
  # The tanh layer: a square matrix and a bias.
  wider = count("ViT-B_16", representation_size=-1)
  assert wider == 86_567_656 + 768 * 768 + 768
  # 197 position embeddings.
  plain = count("ViT-B_16", pos_embedding="none")
  assert plain == 86_567_656 - 197 * 768
  # 37x37 patches instead of 16x16.
  larger = count("ViT-H_14", image_size=518)
  assert larger == 632_045_800 + (37 * 37 - 16 * 16) * 1280


def test_parameter_names_are_the_published_ones():
  model = _create(representation_size=-1)
  shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
  block = "Transformer/encoderblock_{i}/"
  attention = block + "MultiHeadDotProductAttention_0/"
  expected = {
    "cls": (1, 1, 16),
    "embedding/kernel": (4, 4, 3, 16),
    "embedding/bias": (16,),
    "Transformer/posembed_input/pos_embedding": (1, 7, 16),
    "Transformer/encoder_norm/scale": (16,),
    "Transformer/encoder_norm/bias": (16,),
    "pre_logits/kernel": (16, 16),
    "pre_logits/bias": (16,),
    "head/kernel": (16, 5),
    "head/bias": (5,),
  }
  in_block = {
    attention + "out/kernel": (2, 8, 16),
    attention + "out/bias": (16,),
    block + "LayerNorm_0/scale": (16,),
    block + "LayerNorm_0/bias": (16,),
    block + "LayerNorm_1/scale": (16,),
    block + "LayerNorm_1/bias": (16,),
    block + "MlpBlock_0/Dense_0/kernel": (16, 24),
    block + "MlpBlock_0/Dense_0/bias": (24,),
    block + "MlpBlock_0/Dense_1/kernel": (24, 16),
    block + "MlpBlock_0/Dense_1/bias": (16,),
  }
  for name in ("query", "key", "value"):
    in_block[attention + f"{name}/kernel"] = (16, 2, 8)
    in_block[attention + f"{name}/bias"] = (2, 8)
  for i in range(2):
    expected |= {path.format(i=i): shape for path, shape in in_block.items()}
  assert {path: x.shape for path, x in shapes.items()} == expected
  assert {str(x.dtype) for x in shapes.values()} == {"float32"}


# --- values ---

_FORMS = [
  {"classifier": "token"},
  {"classifier": "gap"},
  {"classifier": "map", "representation_size": -1},
  {
    "classifier": "token",
    "representation_size": 10,
    "pos_embedding": "none",
  },
]


@pytest.mark.parametrize("form", _FORMS, ids=str)
def test_logits_and_intermediates_equal_numpy(form):
  model = _create(**form)
  params = _random_params(model)
  images = _images(model)
  expected = reference_vit.apply(
    flatten(params), images, patch=4, classifier=form["classifier"]
  )
  logits, found = _jit(model)(params, images, intermediates=True)
  spread = expected["logits"].std()
  assert spread > 0.1, "the comparison needs logits that differ"
  assert np.abs(logits - expected["logits"]).max() <= 1e-4 * spread
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(
      found[name], x, rtol=0, atol=1e-4 * x.std(), err_msg=name
    )


def test_bfloat16_is_close_and_the_logits_are_float32():
  model = _create(dtype="bfloat16")
  params = _random_params(model)
  images = _images(model, batch=16)
  logits, found = _jit(model)(params, images, intermediates=True)
  expected = reference_vit.apply(
    flatten(params), images, patch=4, classifier="token"
  )["logits"]
  assert logits.dtype == jnp.float32
  assert np.abs(logits - expected).max() <= 0.05 * np.std(expected)
  dtypes = {name: x.dtype for name, x in found.items()}
  assert dtypes["block00/attention_weights"] == jnp.float32
  assert dtypes["pooled"] == jnp.float32
  assert dtypes["stem"] == jnp.bfloat16
  assert dtypes["block01/out"] == jnp.bfloat16


# --- two forms of one function ---


def _unstack_blocks(params):
  """Scan form -> unrolled parameters; the inverse of `models.stack_blocks`."""
  encoder = dict(params["Transformer"])
  stacked = encoder.pop("encoderblock")
  count = jax.tree.leaves(stacked)[0].shape[0]
  for i in range(count):
    encoder[f"encoderblock_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
  return {**params, "Transformer": encoder}


def _differentiate(model, params):
  """Returns (loss, (logits, intermediates)) and the gradient."""

  def loss(params):
    images = _images(model)
    logits, out = model.apply(params, images, intermediates=True)
    return (logits**2).sum(), (logits, out)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def plain():
  """The parameters, and the values of the plain form."""
  model = _create()
  params = _random_params(model)
  return params, _differentiate(model, params)


@pytest.mark.parametrize(
  ("scan", "remat"),
  [
    (False, "full"),
    pytest.param(True, "none", marks=pytest.mark.ci),
    pytest.param(True, "dots", marks=pytest.mark.ci),
    pytest.param(False, "dots", marks=pytest.mark.nightly),
  ],
)
def test_scan_and_remat_change_no_value_and_no_gradient(scan, remat, plain):
  params, ((loss, (logits, out)), gradient) = plain
  given = models.stack_blocks(params) if scan else params
  other = _create(scan=scan, remat=remat)
  (loss2, (logits2, out2)), gradient2 = _differentiate(other, given)
  if scan:
    gradient2 = _unstack_blocks(gradient2)
  # The compiler may fuse the forms differently: the last bit is its own.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(loss2, loss)
  close(logits2, logits)
  assert out2.keys() == out.keys()
  jax.tree.map(close, out2, out)
  assert flatten(gradient2).keys() == flatten(gradient).keys()
  scale = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
  for path, x in flatten(gradient).items():
    difference = np.abs(flatten(gradient2)[path] - x).max()
    assert difference <= 1e-6 * scale, path


def _square(model):
  """Returns params -> the sum of the squared logits."""
  return lambda params: (model.apply(params, _images(model)) ** 2).sum()


@pytest.mark.ci
@pytest.mark.parametrize("mlp", ["plain", "gated"])
def test_scan_with_remat_dots_changes_only_rounding_in_bfloat16(mlp):
  options = {"mlp": mlp, "classifier": "gap"}
  params = _random_params(_create(**options))

  def differentiate(params, **kwargs):
    loss = _square(_create(**options, **kwargs))
    return jax.jit(jax.value_and_grad(loss))(params)

  loss, gradient = differentiate(params, dtype="bfloat16")
  stacked = models.stack_blocks(params)
  forms = {"scan": True, "remat": "dots", "dtype": "bfloat16"}
  loss2, gradient2 = differentiate(stacked, **forms)
  np.testing.assert_allclose(loss2, loss, rtol=0.02)
  gradient2 = flatten(_unstack_blocks(gradient2))
  scale = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
  for path, x in flatten(gradient).items():
    assert np.abs(gradient2[path] - x).max() <= 0.02 * scale, path


def test_remat_dots_saves_each_value_once():
  model = _create(scan=True, remat="dots", dtype="bfloat16")
  traced = jax.make_jaxpr(jax.grad(_square(model)))(_random_params(model))
  forward, _ = (x for x in traced.eqns if x.primitive.name == "scan")
  stacks = [x.aval for x in forward.outvars[1:]]  # after the carry
  # 3 images of 6 patches and a class token, padded to 8.
  sizes = [x.str_short() for x in stacks if x.size >= 2 * 24]
  assert sorted(sizes) == [
    *["bfloat16[2,24,16]"] * 4,  # the block's input, query, key, value
    "bfloat16[2,24,24]",  # the hidden layer
    *["float32[2,24,1]"] * 4,  # two LayerNorms' means and factors
  ]


@pytest.mark.ci
def test_remat_recomputes_the_same_dropout():
  rates = {"dropout_rate": 0.3, "stochastic_depth_rate": 0.3}
  params = _random_params(_create(scan=True))

  def run(remat):
    model = _create(scan=True, remat=remat, **rates)

    def loss(params):
      key = jax.random.key(3)
      logits = model.apply(params, _images(model), train=True, key=key)
      return (logits**2).sum()

    return jax.jit(jax.value_and_grad(loss))(params)

  loss, gradient = run("none")
  loss2, gradient2 = run("full")
  np.testing.assert_allclose(loss2, loss, rtol=1e-5)
  for x, y in zip(*map(jax.tree.leaves, (gradient, gradient2)), strict=True):
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-3)


def test_stacking_keeps_the_order_of_more_than_ten_blocks():
  params = _random_params(_create(variant="ViT-w4d12m4h1_4"))
  kernel = "MlpBlock_0/Dense_0/kernel"
  stacked = flatten(models.stack_blocks(params))
  for i in range(12):
    np.testing.assert_array_equal(
      stacked[f"Transformer/encoderblock/{kernel}"][i],
      flatten(params)[f"Transformer/encoderblock_{i}/{kernel}"],
    )


@pytest.mark.ci
def test_a_key_gives_the_same_parameters_in_both_forms():
  key = jax.random.key(7)
  init = jax.jit(_create().init)
  params = init(key)
  _assert_identical(params, init(key))
  scanned = _create(scan=True, remat="full", dtype="bfloat16")
  _assert_identical(_unstack_blocks(jax.jit(scanned.init)(key)), params)
  other = flatten(init(jax.random.key(8)))
  assert not np.array_equal(
    other["embedding/kernel"], params["embedding"]["kernel"]
  )


# --- dropout and stochastic depth ---


def _record_draws(monkeypatch, model):
  """Returns the keep probability and shape of every random draw of a step."""
  shapes = []
  bernoulli = jax.random.bernoulli

  def step(params, images, key):
    rates = []

    def record(key, p=0.5, shape=None, **kwargs):
      rates.append(p)
      shapes.append(tuple(shape))
      return bernoulli(key, p, shape, **kwargs)

    monkeypatch.setattr(jax.random, "bernoulli", record)
    model.apply(params, images, train=True, key=key)
    return rates  # all else is only traced, not compiled

  params, key = _random_params(model), jax.random.key(0)
  rates = jax.jit(step)(params, _images(model), key)
  return list(zip(rates, shapes, strict=True))


def test_dropout_is_where_the_paper_has_it(monkeypatch):
  # After the position embedding, then in each of two blocks after the
  # attention's output and after both dense layers of the MLP; none of query,
  # key, value, pre_logits or head.
  model = _create(dropout_rate=0.25, representation_size=-1)
  embedded = (3, 7, 16)
  # In a block the tokens of all images are in a row, in the last one those that
  # are read, as elsewhere with a class token.
  draws = _record_draws(monkeypatch, model)
  assert {float(p) for p, _ in draws} == {0.75}
  blocks = [
    *[(3 * 7, 16), (3 * 7, 24), (3 * 7, 16)],
    *[(3, 16), (3, 24), (3, 16)],
  ]
  assert [s for _, s in draws] == [embedded, *blocks]


def test_attention_dropout_drops_single_weights(monkeypatch):
  model = _create(attention_dropout_rate=0.5)
  draws = _record_draws(monkeypatch, model)
  shapes = [(3, 2, 7, 7), (3, 2, 1, 7)]  # the class token asks last, alone
  assert [(float(p), s) for p, s in draws] == [(0.5, s) for s in shapes]


def test_stochastic_depth_draws_one_number_an_example(monkeypatch):
  model = _create(variant="ViT-w4d5m4h1_4", stochastic_depth_rate=0.4)
  draws = _record_draws(monkeypatch, model)
  assert {s for _, s in draws} == {(3, 1, 1)}
  # Two branches a block, linear from 0 to the rate of the last block.
  expected = np.repeat(1 - np.linspace(0, 0.4, 5), 2)
  np.testing.assert_allclose([p for p, _ in draws], expected, rtol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_no_rate_and_no_training_draw_nothing(scan):
  model = _create(scan=scan)
  rates = _create(
    scan=scan,
    dropout_rate=0.5,
    attention_dropout_rate=0.5,
    stochastic_depth_rate=0.5,
  )
  params = _random_params(model)
  images, key = _images(model), jax.random.key(0)

  def lower(model, **kwargs):
    return _jit(model).lower(params, images, **kwargs).as_text()

  # The same program, so the same bits.
  expected = lower(model, key=key)
  assert lower(model, train=True, key=key) == expected
  assert lower(rates, key=key) == expected
  assert lower(rates, train=True, key=key) != expected


def test_dropout_is_a_function_of_the_key():
  rates = {"dropout_rate": 0.5, "attention_dropout_rate": 0.5}
  model = _create(scan=True, stochastic_depth_rate=0.5, **rates)
  params, images = _random_params(model), _images(model)

  def run(key):
    key = jax.random.key(key)
    return apply(params, images, train=True, key=key)

  apply = _jit(model)
  dropped = run(0)
  np.testing.assert_array_equal(run(0), dropped)
  assert not np.allclose(run(1), dropped)


def test_scanned_layers_draw_different_numbers():
  # With identity blocks but for the MLP's last bias, what a block adds is its
  # dropout mask.
  model = _create(scan=True, dropout_rate=0.5)
  flat = flatten(jax.tree.map(np.zeros_like, _random_params(model)))
  path = "Transformer/encoderblock/MlpBlock_0/Dense_1/bias"
  flat[path] += 1
  _, out = _jit(model)(
    unflatten(flat),
    _images(model),
    train=True,
    key=jax.random.key(0),
    intermediates=True,
  )
  first, second = out["block00/mlp"], out["block01/mlp"]
  assert set(np.unique(first)) == set(np.unique(second)) == {0.0, 2.0}
  assert np.mean(first == second) < 0.7


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
  x = np.ones((20_000, 2, 3), np.float32) * np.arange(1, 4, dtype=np.float32)
  drop_path = jax.jit(models.layers.drop_path)
  out = np.asarray(drop_path(x, jnp.float32(0.3), jax.random.key(0)))
  kept = out[:, 0, 0] > 0
  np.testing.assert_array_equal(out[~kept], 0)
  np.testing.assert_allclose(out[kept], np.asarray(x)[kept] / 0.7, rtol=1e-6)
  # Five standard deviations of 20,000 draws.
  assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / 20_000)
  np.testing.assert_allclose(out.mean((0, 1)), [1, 2, 3], rtol=0.03)


# --- initialisation ---


@pytest.fixture(scope="module")
def small_params():
  # As wide as ViT-S: statistics need many values.
  model = models.create(
    variant="ViT-w384d2m1536h6_16",
    num_classes=10,
    image_size=64,
    classifier="token",
    representation_size=-1,
    head_bias_init=-10.0,
  )
  return flatten(jax.jit(model.init)(jax.random.key(0)))


def test_initial_zeros_and_ones(small_params):
  for path, x in small_params.items():
    if path.endswith("/scale"):
      assert (x == 1).all(), path
    elif path == "head/bias":
      assert (x == -10).all()
    elif path in ("cls", "head/kernel") or (
      path.endswith("/bias") and "MlpBlock" not in path
    ):
      assert (x == 0).all(), path


def test_initial_xavier_uniform_of_the_flattened_shapes(small_params):
  shapes = {
    "query": (384, 384),
    "key": (384, 384),
    "value": (384, 384),
    "out": (384, 384),
    "Dense_0": (384, 1536),
    "Dense_1": (1536, 384),
  }
  for path, x in small_params.items():
    name = path.split("/")[-2:]
    if name[0] in shapes and name[1] == "kernel":
      bound = np.sqrt(6 / sum(shapes[name[0]]))
      largest = np.abs(x).max()
      assert 0.999 * bound < largest <= 1.0001 * bound, path
      np.testing.assert_allclose(np.std(x), bound / np.sqrt(3), rtol=0.01)


def test_initial_normal_values(small_params):
  position = small_params["Transformer/posembed_input/pos_embedding"]
  np.testing.assert_allclose(np.std(position), 0.02, rtol=0.03)
  assert np.abs(position).max() > 0.05, "normal, not uniform"
  biases = [
    x
    for path, x in small_params.items()
    if "MlpBlock" in path and path.endswith("bias")
  ]
  assert len(biases) == 4
  for x in biases:
    np.testing.assert_allclose(np.std(x), 1e-6, rtol=0.15)
  # LeCun: variance 1 / fan-in.
  for path, fan_in in (("embedding", 16 * 16 * 3), ("pre_logits", 384)):
    std = np.std(small_params[f"{path}/kernel"])
    np.testing.assert_allclose(std, fan_in**-0.5, rtol=0.02)


def test_initial_probe_is_xavier_uniform():
  model = _create(classifier="map")

  def init(key):
    return flatten(model.init(key))["MAPHead_0/probe"]

  probe = jax.jit(init)(jax.random.key(0))
  assert probe.shape == (1, 1, 16)
  assert 0 < np.abs(probe).max() <= np.sqrt(6 / 17)


# --- what a user may get wrong ---


@pytest.mark.parametrize(
  ("wrong", "words"),
  [
    ({"variant": "ViT-X_16"}, ["ViT-X_16", "Ti, S, B, L, H, g, G"]),
    ({"variant": "ViT-B-16"}, ["ViT-B-16", "did you mean 'ViT-B_16'?"]),
    ({"variant": "B/16"}, ["'B/16'", "ViT-SIZE_PATCH"]),
    ({"classifier": "tokn"}, ["model.classifier", "did you mean 'token'?"]),
    ({"pos_embedding": "sincos"}, ["model.pos_embedding", "learned, 2d"]),
    ({"dropout_rate": 1.0}, ["model.dropout_rate is 1.0", "[0, 1)"]),
    (
      {"image_size": 225},
      ["image_size 225 is not divisible by the patch size 4", "valid: 224"],
    ),
    ({"image_size": (8, 13)}, ["(8, 13)", "nearest valid: (8, 12)"]),
    ({"image_size": 0}, ["image_size 0 ", "nearest valid: 4"]),
    ({"image_size": "large"}, ["'large'", "(height, width)"]),
    ({"representation_size": -2}, ["model.representation_size is -2"]),
  ],
  ids=str,
)
def test_wrong_arguments_are_named(wrong, words):
  with named(*words):
    _create(**wrong)


def test_image_sizes_that_are_right():
  assert _create(image_size=8).image_size == (8, 8)
  assert _create(image_size=[8, 12]).image_size == (8, 12)
  assert _create(image_size=(8, 12)).grid == (2, 3)
