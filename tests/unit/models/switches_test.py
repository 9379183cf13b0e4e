"""Other encoders' architecture: each switch against NumPy, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_vit
from random_models import assert_close, jit, random_images, random_params

from vit_jax import models, sharding
from vit_jax.errors import UserError
from vit_jax.models import posemb
from vit_jax.state import flatten, unflatten
from vit_jax.training import steps

# Option sets of today's encoders, which have every switch between them.
FAMILIES = {
  "DINOv2": {
    "registers": 4,
    "layer_scale_init": 1e-5,
    "classifier": "token+gap",
    "activation": "gelu_erf",
  },
  "DINOv2 giant": {
    "layer_scale_init": 1e-5,
    "mlp": "gated",
    "activation": "silu",
  },
  "DINOv3": {
    "pos_embedding": "none",
    "rope": "dinov3",
    "registers": 4,
    "layer_scale_init": 1e-5,
    "qkv_bias": "qv",
    "layer_norm_epsilon": 1e-5,
  },
  "CLIP": {
    "patch_bias": False,
    "pre_norm": True,
    "activation": "gelu_quick",
    "projection_size": 12,
  },
  "CLIP's tokens": {
    "classifier": "gap",
    "class_token": True,
    "final_norm": "none",
  },
  "MAE": {"classifier": "gap", "class_token": True, "final_norm": "pooled"},
  "DeiT": {"distillation_token": True},
  "so150m": {
    "classifier": "gap",
    "registers": 3,
    "prefix_positions": "all",
    "qkv_bias": "none",
    "qk_norm": True,
  },
  "PE": {
    "classifier": "map",
    "map_heads": 4,
    "class_token": True,
    "prefix_positions": "none",
  },
}
_of_each_family = pytest.mark.parametrize(
  "name",
  [
    pytest.param(
      name, marks=() if name in ("DINOv3", "CLIP") else pytest.mark.ci
    )
    for name in FAMILIES
  ],
)
# Those that have most of the switches between them, and in CI the others.
_of_some = pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name == "DINOv3" else pytest.mark.ci)
    for name in FAMILIES
  ],
)


def _create(name, **kwargs):
  options = {
    "variant": "ViT-w16d2m24h2_4",
    "num_classes": 5,
    "image_size": (8, 12),
    "dtype": "float32",
  }
  return models.create(**options | FAMILIES[name] | kwargs)


def _reference(name, params, images):
  names = ("activation", "layer_norm_epsilon", "pos_embedding", "classifier")
  options = models.DEFAULTS | FAMILIES[name]
  return reference_vit.apply(
    flatten(params),
    images,
    patch=4,
    rope_base=100.0 if options["rope"] == "dinov3" else None,
    **{name: options[name] for name in names},
  )


@_of_each_family
def test_values_equal_numpy(name):
  model = _create(name)
  params, images = random_params(model), random_images(model)
  expected = _reference(name, params, images)
  _, found = jit(model)(params, images, intermediates=True)
  assert_close(found, expected)
  # Without attention weights, and each block's tokens after the last norm.
  logits, tokens = jit(model)(params, images, intermediates="tokens")
  assert_close({"logits": logits}, {"logits": expected["logits"]})
  assert not any("attention" in key for key in tokens)
  np.testing.assert_array_equal(tokens["block01/encoded"], tokens["encoded"])
  n = tokens["encoded"].shape[1]
  assert model.num_prefix == n - 6
  assert tokens["block00/encoded"].shape == tokens["encoded"].shape


def _differentiate(model, params, images):
  """Returns the loss and the gradient of what a training step computes."""

  def loss(params):
    return (model.apply(params, images) ** 2).sum()

  return jax.value_and_grad(loss)(params)


@pytest.mark.ci
@_of_some
def test_scanned_and_recomputed_gradients_are_the_plain_ones(name):
  model = _create(name)
  params, images = random_params(model), random_images(model)
  loss, gradient = jax.jit(lambda p: _differentiate(model, p, images))(params)
  stacked = models.stack_blocks(params)
  other = _create(name, scan=True, remat="dots")
  loss_2, gradient_2 = jax.jit(lambda p: _differentiate(other, p, images))(
    stacked
  )
  np.testing.assert_allclose(loss_2, loss, rtol=1e-5)
  gradient = flatten(models.stack_blocks(gradient))
  scale = max(np.abs(x).max() for x in gradient.values())
  for path, x in flatten(gradient_2).items():
    assert np.abs(x - gradient[path]).max() <= 2e-6 * scale, path
    assert np.abs(x).max() > 0, f"nothing depends on {path}"


@pytest.mark.ci
@_of_each_family
def test_sharded_micro_batches_have_the_plain_gradient(name):
  model = _create(name)
  params, images = random_params(model), random_images(model, batch=16)

  def loss(params, images, key):
    return (model.apply(params, images) ** 2).sum(1).mean()

  expected, gradient = jax.jit(jax.value_and_grad(loss))(params, images, None)
  mesh = sharding.make_mesh(2)
  layout = sharding.tree_shardings(mesh, params)
  key = jax.random.key(0)

  def run(params, images):
    return steps.mean_gradient(
      lambda *args: (loss(*args), {}), params, images, key, 2
    )

  found = jax.jit(sharding.on_mesh(mesh, run), out_shardings=(None, layout))(
    jax.device_put(params, layout),
    jax.device_put(images, sharding.batch_sharding(mesh)),
  )
  np.testing.assert_allclose(found[0][0], expected, rtol=1e-5)
  gradient = flatten(gradient)
  scale = max(np.abs(x).max() for x in gradient.values())
  for path, x in flatten(found[1]).items():
    assert np.abs(x - gradient[path]).max() <= 2e-6 * scale, path
    assert any(x.sharding.spec) == path.endswith("/kernel"), path


@_of_some
def test_the_tpu_layout_in_bfloat16_is_close(name):
  model = _create(name, dtype="bfloat16", variant="ViT-w64d2m96h4_4")
  params, images = random_params(model), random_images(model, batch=16)
  flat = flatten(params)
  for path, x in flat.items():  # of variance 1 / inputs, as in training
    if path.endswith("kernel") and "embedding" not in path:
      flat[path] = x / 0.3 / np.sqrt(np.prod(x.shape) / x.shape[-1])
  params = unflatten(flat)
  expected = _reference(name, params, images)["logits"]
  found = jit(model)(params, images)
  assert found.dtype == jnp.float32
  assert np.abs(found - expected).max() <= 0.06 * np.std(expected)


@pytest.mark.parametrize(("heads", "width"), [(4, 64), (2, 128), (3, 64)])
def test_rotations_in_bfloat16_are_those_of_complex_numbers(heads, width):
  """By a product where heads fill registers, else by moving channels."""
  angles = posemb.dinov3_angles((3, 4), width, 100.0)
  x = np.random.default_rng(0).normal(size=(2, 12, heads * width))
  x = jnp.asarray(x, jnp.bfloat16)
  found = np.asarray(posemb.rotate(x, angles, heads), np.float64)
  pairs = np.asarray(x, np.float64).reshape(2, 12, heads, 2, width // 2)
  turned = pairs[..., 0, :] + 1j * pairs[..., 1, :]
  turned = turned * np.exp(1j * angles)[:, None]
  expected = np.stack([turned.real, turned.imag], -2).reshape(found.shape)
  np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-4)
  # A gradient is turned back.
  _, pull = jax.vjp(lambda x: posemb.rotate(x, angles, heads), x)
  (back,) = pull(jnp.asarray(found, jnp.bfloat16))
  np.testing.assert_allclose(np.float64(back), np.float64(x), atol=0.03)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"registers": -1}, "registers is -1, below 0"),
    ({"rope_base": 0.0}, "rope_base is 0.0, not positive"),
    ({"rope": "dinov3", "variant": "ViT-w12d1m24h2_4"}, "head width divisible"),
    (
      {"distillation_token": True, "classifier": "gap"},
      "needs model.classifier 'token', not 'gap'",
    ),
    ({"classifier": "map", "map_heads": 3}, "map_heads 3 does not divide"),
    ({"mlp": "swiglu"}, "plain, gated"),
  ],
)
def test_impossible_switches_are_named(options, words):
  with pytest.raises(UserError, match=words):
    _create("DeiT", **{"distillation_token": False} | options)


def test_a_resnet_has_none_of_them():
  with pytest.raises(UserError, match="registers"):
    models.create(variant="R50x1", num_classes=5, image_size=32, registers=4)
