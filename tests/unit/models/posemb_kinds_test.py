"""Kinds of position embedding and their places, and PyTorch's conventions."""

import jax
import numpy as np
import pytest
import reference_vit
from mistakes import named
from random_models import assert_close, jit, random_images, random_params

from vit_jax import models
from vit_jax.models import posemb
from vit_jax.state import flatten

_PLACES = [
  *((kind, "input") for kind in ("learned", "2d", "sincos2d")),
  *((kind, "every_layer") for kind in ("learned", "2d", "sincos2d")),
  *((kind, "every_layer_shared") for kind in ("learned", "2d", "sincos2d")),
  ("relative", "input"),
  ("none", "input"),
]


def _create(**kwargs):
  options = {
    "variant": "ViT-w16d2m24h2_4",
    "num_classes": 5,
    # Two rows and three columns: mixed up, they do not fit.
    "image_size": (8, 12),
    "dtype": "float32",
  }
  return models.create(**options | kwargs)


def _compare(options, classifier="token", scan=False):
  """Compares a model with NumPy; returns its parameters, images and values."""
  model = _create(classifier=classifier, **options)
  params, images = random_params(model), random_images(model)
  expected = _reference(params, images, options, classifier)
  given = params
  if scan:
    model = _create(classifier=classifier, scan=True, **options)
    given = models.stack_blocks(params)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(given) == jax.tree.structure(shapes)
  logits, found = jit(model)(given, images, intermediates=True)
  assert_close(found, expected)
  np.testing.assert_array_equal(found["logits"], logits)
  return params, images, found


def _reference(params, images, options, classifier="token"):
  return reference_vit.apply(
    flatten(params), images, patch=4, classifier=classifier, **options
  )


# --- values ---


# Each kind and each place is scanned once and unrolled once; models_test.py has
# the other kinds.
@pytest.mark.parametrize(
  ("kind", "place", "scan"),
  [
    ("2d", "input", True),
    ("sincos2d", "input", False),
    ("learned", "every_layer", True),
    ("sincos2d", "every_layer", True),
    ("2d", "every_layer", False),
    ("2d", "every_layer_shared", True),
    ("learned", "every_layer_shared", False),
    ("sincos2d", "every_layer_shared", False),
    ("relative", "input", True),
    ("relative", "input", False),
  ],
)
def test_both_forms_equal_numpy(kind, place, scan):
  _compare({"pos_embedding": kind, "pos_embedding_at": place}, scan=scan)


@pytest.mark.parametrize("kind", ["2d", "relative"])
def test_without_a_class_token_they_equal_numpy(kind):
  _compare({"pos_embedding": kind}, classifier="gap")


def test_attention_pooling_with_relative_positions_equals_numpy():
  # The head's probe has no place in the sequence, and so no offsets.
  _compare({"pos_embedding": "relative"}, classifier="map")


@pytest.mark.parametrize("classifier", ["token", "map"])
def test_the_conventions_of_pytorch_equal_numpy(classifier):
  options = {"activation": "gelu_erf", "layer_norm_epsilon": 1e-3}
  params, images, found = _compare(options, classifier)
  for name in options:
    other = {k: x for k, x in options.items() if k != name}
    logits = _reference(params, images, other, classifier)["logits"]
    difference = np.abs(found["logits"] - logits).max()
    assert difference > 3e-4 * logits.std(), f"{name} changes nothing"


@pytest.mark.parametrize(
  ("kind", "place"), [("relative", "input"), ("2d", "every_layer")]
)
def test_a_bfloat16_model_is_close(kind, place):
  options = {"pos_embedding": kind, "pos_embedding_at": place}
  model = _create(dtype="bfloat16", **options)
  params, images = random_params(model), random_images(model, batch=16)
  logits = jit(model)(params, images)
  expected = _reference(params, images, options)["logits"]
  assert np.abs(logits - expected).max() <= 0.05 * expected.std()


# --- parameters ---

_LEARNED = {"pos_embedding": (1, 7, 16)}
_BY_AXIS = {"pos_embedding_y": (2, 8), "pos_embedding_x": (3, 8)}
_INPUT = "Transformer/posembed_input"
_BLOCK = "Transformer/encoderblock_{i}"
_ATTENTION = _BLOCK + "/MultiHeadDotProductAttention_0"
_SHAPES = {
  ("learned", "input"): (_INPUT, _LEARNED),
  ("learned", "every_layer_shared"): (_INPUT, _LEARNED),
  ("learned", "every_layer"): (_BLOCK + "/posembed", _LEARNED),
  ("2d", "input"): (_INPUT, _BY_AXIS),
  ("2d", "every_layer_shared"): (_INPUT, _BY_AXIS),
  ("2d", "every_layer"): (_BLOCK + "/posembed", _BY_AXIS),
  # Seven tokens are at most six apart, either way.
  ("relative", "input"): (_ATTENTION, {"relative_embedding": (13, 2, 8)}),
}


@pytest.mark.parametrize(("kind", "place"), _PLACES)
def test_names_and_shapes_of_the_parameters(kind, place):
  folder, tables = _SHAPES.get((kind, place), ("", {}))
  expected = {
    f"{folder}/{name}".format(i=i): shape
    for name, shape in tables.items()
    for i in range(2)
  }
  model = _create(pos_embedding=kind, pos_embedding_at=place)
  shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
  none = _create(pos_embedding="none")
  others = flatten(jax.eval_shape(none.init, jax.random.key(0)))
  own = {path: x.shape for path, x in shapes.items() if path not in others}
  assert own == expected
  assert shapes.keys() >= others.keys()


@pytest.mark.parametrize(
  ("kind", "place"),
  [("learned", "every_layer"), ("2d", "input"), ("relative", "input")],
)
def test_initial_values_are_normal_and_independent(kind, place):
  model = _create(
    variant="ViT-w128d2m24h2_4",
    image_size=64,
    pos_embedding=kind,
    pos_embedding_at=place,
  )

  def init(key):
    # Without the other arrays, which take long to compile.
    names = ("pos_embedding", "relative_embedding")
    params = flatten(model.init(key)).items()
    return [x for path, x in params if path.split("/")[-1].startswith(names)]

  tables = [np.asarray(x) for x in jax.jit(init)(jax.random.key(0))]
  folder, shapes = _SHAPES[kind, place]
  assert len(tables) == len(shapes) * (1 if folder == _INPUT else 2)
  for i, x in enumerate(tables):
    np.testing.assert_allclose(x.std(), 0.02, rtol=0.08)
    for y in tables[:i]:
      assert not np.array_equal(x, y)


# --- tables ---


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (7, 2)], ids=str)
@pytest.mark.parametrize("width", [8, 16])
def test_sincos_equals_the_written_out_formula(grid, width):
  found = posemb.sincos_2d(grid, width)
  assert found.dtype == np.float32
  expected = reference_vit.sincos_2d(grid, width)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


# --- what a user may get wrong ---


@pytest.mark.parametrize(
  ("wrong", "words"),
  [
    (
      {"pos_embedding": "sincos"},
      ["model.pos_embedding", "sincos2d, relative, none", "mean 'sincos2d'?"],
    ),
    (
      {"pos_embedding_at": "each"},
      ["model.pos_embedding_at", "input, every_layer, every_layer_shared"],
    ),
    (
      {"pos_embedding": "relative", "pos_embedding_at": "every_layer"},
      ["'relative' is not added anywhere", "at 'input'"],
    ),
    (
      {"variant": "ViT-w18d2m24h3_4", "pos_embedding": "sincos2d"},
      ["'sincos2d'", "divisible by 4", "has 18"],
    ),
    ({"activation": "gelu"}, ["model.activation", "gelu_tanh, gelu_erf"]),
    ({"layer_norm_epsilon": 0}, ["model.layer_norm_epsilon is 0", "positive"]),
  ],
  ids=str,
)
def test_wrong_arguments_are_named(wrong, words):
  with named(*words):
    _create(**wrong)
