"""What a run takes from another one's weights."""

import jax
import numpy as np
import pytest
import scipy.ndimage

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.pretrained.warmstart import POS_EMBEDDING, warm_start
from vit_jax.pretrained.weights import as_lazy
from vit_jax.state import flatten


@pytest.fixture(autouse=True)
def _tiny_variants(monkeypatch):
  for name, sizes in (("Tiny", (8, 2, 12, 2)), ("Deep", (8, 3, 12, 2))):
    sizes = models.variants.Encoder(*sizes)
    monkeypatch.setitem(models.ENCODERS, name, sizes)


def _create(**kwargs):
  options = {"variant": "ViT-Tiny_4", "num_classes": 5, "image_size": 16}
  return models.create(**options | kwargs)


def _params(model, seed):
  """Random parameters, with the head that a model starts with."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes
  )
  params["head"] = {
    "kernel": np.zeros(shapes["head"]["kernel"].shape, np.float32),
    "bias": np.full(shapes["head"]["bias"].shape, -3, np.float32),
  }
  return params


def _weights(model, seed=1):
  params = _params(model, seed)
  shape = params["head"]["kernel"].shape
  params["head"]["kernel"] = np.ones(shape, np.float32)
  return flatten(params)


def _start(new, old, same_classes=True, weights=None):
  """Returns (params before, weights, params after, report), all flat."""
  before = _params(new, 0)
  given = _weights(old) if weights is None else weights
  before = flatten(before)
  arrays, report = warm_start(
    before,
    {path: as_lazy(x) for path, x in given.items()},
    old_grid=old.grid,
    new_grid=new.grid,
    same_classes=same_classes,
    source="runs/before",
  )
  assert arrays.keys() <= before.keys()
  after = before | {path: x.read() for path, x in arrays.items()}
  for path, x in after.items():
    assert x.shape == before[path].shape, path
    assert path not in arrays or arrays[path].shape == x.shape, path
  # Every array is in the report, on exactly one line of its side.
  lines = [*report.taken, *report.resized, *report.new]
  assert sorted(line.split()[0] for line in lines) == sorted(after)
  return before, given, after, report


def _assert_taken(after, weights, paths):
  for path in paths:
    np.testing.assert_array_equal(after[path], weights[path], err_msg=path)


HEAD = ["head/bias", "head/kernel"]


def test_the_same_model_takes_everything():
  model = _create()
  _, weights, after, report = _start(model, model)
  assert sorted(report.taken) == sorted(after)
  assert (report.resized, report.new, report.dropped) == ([], [], [])
  _assert_taken(after, weights, after)


@pytest.mark.parametrize("num_classes", [5, 7])
def test_other_classes_get_two_new_heads(num_classes):
  """DeiT's distillation token has one of its own."""
  *_, report = _start(
    _create(distillation_token=True, num_classes=num_classes),
    _create(distillation_token=True),
    same_classes=False,
  )
  names = {line.split("/")[0] for line in report.new}
  assert names == {"head", "head_dist"}


@pytest.mark.parametrize("num_classes", [5, 7])
def test_other_classes_get_a_new_head(num_classes):
  before, weights, after, report = _start(
    _create(num_classes=num_classes), _create(), same_classes=False
  )
  _assert_taken(after, weights, after.keys() - set(HEAD))
  _assert_taken(after, before, HEAD)
  assert not after["head/kernel"].any()
  assert report.new == [
    f"head/bias {num_classes}",
    f"head/kernel 8x{num_classes}",
  ]
  assert report.dropped == ["head/bias 5", "head/kernel 8x5"]
  assert report.resized == []
  assert sorted(report.taken) == sorted(after.keys() - set(HEAD))


# The paper: pre-train with one, fine-tune without.
@pytest.mark.parametrize(("old_size", "new_size"), [(8, 0), (0, 8), (8, 6)])
def test_another_tanh_layer_takes_the_head_with_it(old_size, new_size):
  before, _, after, report = _start(
    _create(representation_size=new_size), _create(representation_size=old_size)
  )
  tanh = ["pre_logits/bias", "pre_logits/kernel"]
  new = [*HEAD, *tanh] if new_size else HEAD
  _assert_taken(after, before, new)
  assert sorted(line.split()[0] for line in report.new) == new
  dropped = [line.split()[0] for line in report.dropped]
  assert dropped == ([*HEAD, *tanh] if old_size else HEAD)


def test_a_tanh_layer_on_both_sides_is_taken():
  model = _create(representation_size=8)
  before, weights, after, report = _start(model, model)
  assert not report.new
  _assert_taken(after, weights, after)
  # With a new head, the layer is still there.
  before, weights, after, report = _start(
    _create(representation_size=8, num_classes=3), model, same_classes=False
  )
  _assert_taken(after, weights, ["pre_logits/kernel"])
  _assert_taken(after, before, HEAD)


# --- the position embedding ---


def _zoom(tokens, old, new):
  grid = tokens.reshape(*old, -1).astype(np.float64)
  factors = (new[0] / old[0], new[1] / old[1], 1)
  return scipy.ndimage.zoom(grid, factors, order=1).reshape(1, -1, 8)


@pytest.mark.parametrize("classifier", ["token", "gap"])
@pytest.mark.parametrize(
  ("old_size", "new_size"),
  # 2x8 and 4x4 patches are as many, and lie otherwise.
  [(16, 32), ((8, 32), 16), ((12, 24), (20, 8)), (24, 16)],
  ids=str,
)
def test_the_grid_is_resized_as_scipy_does(classifier, old_size, new_size):
  old = _create(image_size=old_size, classifier=classifier)
  new = _create(image_size=new_size, classifier=classifier)
  _, weights, after, report = _start(new, old)
  extra = int(classifier == "token")
  found, given = after[POS_EMBEDDING], weights[POS_EMBEDDING]
  np.testing.assert_array_equal(found[:, :extra], given[:, :extra])
  expected = _zoom(given[:, extra:], old.grid, new.grid)
  np.testing.assert_allclose(found[:, extra:], expected, rtol=0, atol=1e-6)
  (h, w), (h2, w2) = old.grid, new.grid
  assert report.resized == [f"{POS_EMBEDDING} {h}x{w} -> {h2}x{w2}"]
  assert not report.new
  assert not report.dropped


@pytest.mark.parametrize("new_size", [16, 32])
@pytest.mark.parametrize("to", ["gap", "token"])
def test_from_a_class_token_to_the_mean_and_back(to, new_size):
  old = _create(classifier="token" if to == "gap" else "gap")
  new = _create(classifier=to, image_size=new_size)
  before, weights, after, report = _start(new, old)
  given = weights[POS_EMBEDDING][:, -16:]
  expected = _zoom(given, (4, 4), new.grid)
  wants = int(to == "token")
  found = after[POS_EMBEDDING][:, wants:]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  # The new token's own position starts at zero.
  assert not after[POS_EMBEDDING][:, :wants].any()
  _assert_taken(after, before, ["cls"] * wants)
  changes = [[], ["cls 1x1x8"]]
  assert [report.new, report.dropped] == (changes[::-1] if wants else changes)


@pytest.mark.parametrize(("had", "wants"), [(1, 3), (6, 2), (0, 5), (4, 0)])
def test_entries_before_the_patches_are_kept_dropped_or_zeros(had, wants):
  rng = np.random.default_rng(0)
  given = rng.normal(size=(1, had + 16, 8)).astype(np.float32)
  arrays, report = warm_start(
    {POS_EMBEDDING: np.zeros((1, wants + 6, 8), np.float32)},
    {POS_EMBEDDING: as_lazy(given)},
    old_grid=(4, 4),
    new_grid=(2, 3),
    same_classes=True,
    source="runs/before",
  )
  found, kept = arrays[POS_EMBEDDING].read(), min(had, wants)
  assert found.shape == (1, wants + 6, 8)
  np.testing.assert_array_equal(found[:, :kept], given[:, :kept])
  assert not found[:, kept:wants].any()
  expected = _zoom(given[:, had:], (4, 4), (2, 3))
  np.testing.assert_allclose(found[:, wants:], expected, rtol=0, atol=1e-6)
  assert report.resized == [f"{POS_EMBEDDING} 4x4 -> 2x3"]


def test_attention_pooling_and_positions_are_new_or_dropped():
  token, pooled = _create(classifier="token"), _create(classifier="map")
  _, _, after, report = _start(pooled, token)
  pool = sorted(path for path in after if path.startswith("MAPHead_0/"))
  assert len(pool) == 15
  assert sorted(line.split()[0] for line in report.new) == pool
  assert report.dropped == ["cls 1x1x8"]
  _, _, _, report = _start(token, pooled)
  assert sorted(line.split()[0] for line in report.dropped) == pool
  assert report.new == ["cls 1x1x8"]
  none = _create(pos_embedding="none")
  before, _, after, report = _start(token, none)
  _assert_taken(after, before, [POS_EMBEDDING])
  assert report.new == [f"{POS_EMBEDDING} 1x17x8"]
  _, _, _, report = _start(none, token)
  assert report.dropped == [f"{POS_EMBEDDING} 1x17x8"]


# --- layouts and architectures ---


@pytest.mark.parametrize("scan", [False, True])
def test_scanned_and_unrolled_weights_fit_each_other(scan):
  old, new = _create(scan=not scan), _create(scan=scan)
  _, weights, after, report = _start(new, old)
  assert sorted(report.taken) == sorted(after)
  assert not report.new
  assert not report.dropped
  for path, x in after.items():
    if "encoderblock" not in path:
      np.testing.assert_array_equal(x, weights[path], err_msg=path)
  path = "MlpBlock_0/Dense_0/kernel"
  stacked, unrolled = (after, weights) if scan else (weights, after)
  for i in range(2):
    np.testing.assert_array_equal(
      stacked[f"Transformer/encoderblock/{path}"][i],
      unrolled[f"Transformer/encoderblock_{i}/{path}"],
    )


def test_positions_in_every_scanned_layer_are_resized():
  options = {"scan": True, "pos_embedding_at": "every_layer"}
  old, new = _create(**options), _create(**options, image_size=24)
  _, weights, after, report = _start(new, old)
  path = "Transformer/encoderblock/posembed/pos_embedding"
  assert f"{path} 4x4 -> 6x6" in report.resized
  assert after[path].shape == (2, 1, 37, 8)
  for layer in range(2):
    token, *grid = weights[path][layer, 0]
    zoomed = scipy.ndimage.zoom(
      np.reshape(grid, (4, 4, 8)), (1.5, 1.5, 1), order=1
    )
    found = after[path][layer, 0]
    np.testing.assert_array_equal(found[0], token)
    np.testing.assert_allclose(found[1:], zoomed.reshape(36, 8), atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
  ("other", "words"),
  [
    ({"variant": "ViT-Deep_4"}, "encoderblock"),
    (
      {"variant": "ViT-Tiny_8"},
      "embedding/kernel is 8x8x3x8 there and 4x4x3x8 here",
    ),
    ({"variant": "ViT-N_4"}, "Transformer/encoder_norm/bias is 128 there"),
  ],
)
def test_another_architecture_names_parameters(other, words, scan):
  with pytest.raises(UserError) as error:
    _start(_create(scan=scan), _create(**other))
  message = str(error.value)
  assert words in message
  assert message.startswith("runs/before holds another architecture: ")
  assert message.endswith("set config.model as in that run")
  assert "\n" not in message
  assert len(message) < 500
