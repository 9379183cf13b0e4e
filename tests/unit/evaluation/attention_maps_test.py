"""Where a model looks: against NumPy float64."""

import numpy as np
import pytest
import random_models

from vit_jax import models, pretrained
from vit_jax.errors import UserError
from vit_jax.evaluation import attention_maps

_GRID, _PATCH = (2, 3), 4
_HYBRID = "R+ViT-w8d3m12h2_16"


def load(classifier="token", variant="ViT-w8d3m12h2_4", **options):
  """Returns a loaded tiny model with random parameters, and images for it."""
  patch = models.variants.parse(variant).stride
  size = tuple(side * patch for side in _GRID)
  options |= {"variant": variant, "classifier": classifier}
  model = pretrained.assemble(
    random_models.random_weights(image_size=size, num_classes=5, **options)
  )
  return model, random_models.random_images(model.model, 2)


def roll_out_by_numpy(weights):
  """Rolls attention out image by image, product by product, in float64."""
  out = []
  for image in range(len(weights[0])):
    joint = np.eye(weights[0].shape[-1])
    for layer in weights:
      mean = np.mean([np.float64(head) for head in layer[image]], axis=0)
      mixed = mean + np.eye(len(mean))
      joint = mixed / mixed.sum(axis=1, keepdims=True) @ joint
    out.append(joint)
  return np.stack(out)


def measure_by_numpy(heads, grid, patch):
  """Returns the mean distance of [a n n], pair by pair, in float64."""
  places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
  extra = heads.shape[-1] - len(places)
  out = []
  for head in np.float64(heads)[:, extra:, extra:]:
    means = []
    for (y, x), row in zip(places, head, strict=True):
      far = [patch * np.sqrt((y - v) ** 2 + (x - u) ** 2) for v, u in places]
      means.append(np.average(far, weights=row))
    out.append(np.mean(means))
  return out


@pytest.mark.ci
@pytest.mark.parametrize(
  ("classifier", "variant"),
  [
    ("token", "ViT-w8d3m12h2_4"),
    ("gap", "ViT-w8d3m12h2_4"),
    ("map", "ViT-w8d3m12h2_4"),
    ("token", _HYBRID),
  ],
)
def test_look_equals_numpy_on_captured_weights(classifier, variant):
  model, images = load(classifier, variant)
  weights = [np.asarray(w) for w in attention_maps.capture(model, images)]
  assert len(weights) == 3
  n = 6 + (classifier == "token")
  assert weights[0].shape == (2, 2, n, n)
  looks = attention_maps.make_look(model)(images)

  rolled = roll_out_by_numpy(weights)
  if classifier == "token":
    seen = rolled[:, 0, 1:]
  elif classifier == "gap":
    seen = rolled.mean(axis=1)
  else:
    _, out = random_models.jit(model.model)(
      model.params, images, intermediates=True
    )
    pooling = np.float64(out["pooling_weights"]).mean(axis=1)
    np.testing.assert_allclose(pooling.sum(1), 1, atol=1e-6)
    seen = (pooling[:, :, None] * rolled).sum(axis=1)
  seen /= seen.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(looks.maps.reshape(2, -1), seen, atol=1e-6)
  for layer in range(3):
    for image in range(2):
      np.testing.assert_allclose(
        looks.distances[image, layer],
        measure_by_numpy(weights[layer][image], _GRID, model.config.patch),
        rtol=1e-5,
      )
  np.testing.assert_allclose(
    looks.probabilities, model.probabilities(images), atol=1e-6
  )


@pytest.mark.ci
def test_no_kernel_is_in_the_way(monkeypatch):
  """With bfloat16, which has its attention from a kernel on accelerators."""
  model, images = load(dtype="bfloat16")
  exact, _ = load()

  def kernel(*_):
    raise AssertionError("the kernel was asked")

  monkeypatch.setattr(models.attention, "find_fused", lambda *_: kernel)
  with pytest.raises(AssertionError, match="the kernel was asked"):
    model.model.apply(model.params, images)
  found = attention_maps.make_look(model)(images)
  expected = attention_maps.make_look(exact)(images)
  np.testing.assert_allclose(found.maps, expected.maps, atol=0.02)


def test_an_overlay_is_darkest_where_nothing_is_seen():
  pixels = np.full((8, 12, 3), 200, np.uint8)
  seen = np.zeros(_GRID)
  seen[0, 2] = 0.7
  found = attention_maps.overlay(pixels, seen)
  assert found.shape == pixels.shape
  assert found.dtype == np.uint8
  assert found.max() == found[0, -1, 0] == 200
  assert found.min() == found[-1, 0, 0] == 30
  # The same everywhere tells nothing, and must not divide by zero.
  assert len(np.unique(attention_maps.overlay(pixels, np.ones(_GRID)))) == 1


def test_a_resnet_has_no_attention():
  weights = random_models.random_weights("RNx1", image_size=32)
  with pytest.raises(UserError, match=r"RNx1 has no attention"):
    attention_maps.make_look(pretrained.assemble(weights))
