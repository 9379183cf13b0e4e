"""Parameters and images that let a comparison of two models see everything.

A new model has zeros and ones where a trained one has numbers: nothing that is
multiplied or added there would be compared.
"""

import functools

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.pretrained import Weights
from vit_jax.pretrained.weights import as_lazy
from vit_jax.state import flatten, unflatten

_create = functools.lru_cache(models.create)


@pytest.fixture(autouse=True)
def models_are_kept(monkeypatch):
  """Makes `models.create` return the same model for the same options.

  JAX keeps what it has traced of a function, and tracing is most of the time
  that a small model takes. A test file that imports this has it in all tests.
  """
  monkeypatch.setattr(models, "create", _create)


def random_params(model, seed=0):
  """Random values of a sensible size in every array, the zeros included."""
  rng = np.random.default_rng(seed)
  flat = flatten(jax.eval_shape(model.init, jax.random.key(0)))
  for path, x in flat.items():
    center, spread = (1, 0.2) if path.endswith("scale") else (0, 0.3)
    values = rng.normal(center, spread, x.shape)
    if path.endswith(("/var", "/std")):  # of data
      values = 0.5 + np.abs(values)
    flat[path] = values.astype(np.float32)
  return unflatten(flat)


def random_weights(variant, image_size=16, num_classes=10, **options):
  """Returns a model's random parameters as if they had been read."""
  model = models.create(
    variant=variant, num_classes=num_classes, image_size=image_size, **options
  )
  params = flatten(random_params(model))
  return Weights(
    "test",
    "nowhere",
    {"variant": variant, **options},
    image_size=model.image_size,
    num_classes=num_classes,
    params={name: as_lazy(x) for name, x in params.items()},
  )


def random_images(model, batch=3, seed=1):
  """Returns f32[batch h w 3] in [-1, 1]."""
  rng = np.random.default_rng(seed)
  shape = (batch, *model.image_size, 3)
  return rng.uniform(-1, 1, shape).astype(np.float32)


def jit(model):
  """Returns the compiled apply; one operation at a time takes seconds."""
  return jax.jit(model.apply, static_argnames=("train", "intermediates"))


def assert_close(found, expected, tolerance=1e-4):
  """Compares {name: array}, in units of each array's standard deviation."""
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].shape == x.shape, name
    difference = np.abs(found[name] - x).max() / x.std()
    assert difference <= tolerance, f"{name}: {difference:.2g}"
