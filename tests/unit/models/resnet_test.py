"""The hybrids' stem and the baseline ResNets: sizes, values against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_resnet
import reference_vit
from mistakes import named
from random_models import assert_close, jit, random_images, random_params

from vit_jax import models
from vit_jax.models import variants
from vit_jax.pretrained import tables
from vit_jax.state import flatten, unflatten

_HYBRID = "R2+ViT-w16d2m24h2_8"
_ROOT_ONLY = "R+ViT-w16d2m24h2_16"
_BIT = "R2x1"
_UNITS = (2, 1)


@pytest.fixture(autouse=True)
def _tiny_variants(monkeypatch):
  # With a second unit in a stage: it has no projection.
  monkeypatch.setitem(variants.RESNETS, "R2", _UNITS)
  monkeypatch.setitem(variants.HYBRIDS, ("R2", 8), (_UNITS, 1))


def _create(variant, **kwargs):
  options = {"num_classes": 5, "image_size": (24, 40), "dtype": "float32"}
  return models.create(variant=variant, **options | kwargs)


def _uneven_params(model, norm_scale=1.0):
  """Random parameters with channels whose kernels are of very uneven sizes.

  Standardisation undoes the sizes but for its epsilon, which the smallest are
  no larger than: a wrong one cannot hide. `norm_scale` makes the outputs of
  the group normalisations small, so that the next one's epsilon counts.
  """
  rng = np.random.default_rng(2)
  flat = flatten(random_params(model))
  for path, x in flat.items():
    parent = path.split("/")[-2] if "/" in path else ""
    if parent.startswith("conv"):
      size = 10 ** rng.uniform(-5.5, 0, x.shape[-1])
      flat[path] = ((x + 0.1) * size).astype(np.float32)
    elif parent.startswith("gn"):
      flat[path] = x * np.float32(norm_scale)
  return unflatten(flat)


def _reference(variant, params, images, classifier="token"):
  sizes = variants.parse(variant)
  if sizes.encoder is None:
    return reference_resnet.apply_bit(flatten(params), images, sizes.units)
  return reference_vit.apply(
    flatten(params),
    images,
    patch=sizes.patch_size,
    classifier=classifier,
    units=sizes.units,
  )


# --- values ---

_CASES = [
  pytest.param(
    _HYBRID, {"classifier": "map", "scan": True}, marks=pytest.mark.ci
  ),
  (_BIT, {"image_size": (30, 41), "remat": "full"}),
  (_BIT, {"num_classes": 0}),
  # Plain ones, of which small values are compared below.
  pytest.param(_HYBRID, {}, marks=pytest.mark.nightly),
  pytest.param(_ROOT_ONLY, {"image_size": (32, 96)}, marks=pytest.mark.nightly),
  pytest.param(_BIT, {"image_size": (33, 47)}, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("variant", "options"), _CASES, ids=str)
def test_logits_and_intermediates_equal_numpy(variant, options):
  model = _create(variant, **options)
  images = random_images(model)
  params = _uneven_params(_create(variant, **options | {"scan": False}))
  expected = _reference(
    variant, params, images, options.get("classifier", "token")
  )
  given = models.stack_blocks(params) if options.get("scan") else params
  _, found = jit(model)(given, images, intermediates=True)
  assert_close(found, expected)
  last = list(expected.values())[-1]
  assert last.std(axis=0).mean() > 0.05, "the images make no difference"


def _faint(variant):
  """Returns a model, parameters and images that let small values through."""
  model = _create(variant, image_size=(32, 64))
  images = 1e-3 * random_images(model)
  return model, _uneven_params(model, norm_scale=1e-3), images


@pytest.mark.parametrize("variant", [_HYBRID, _ROOT_ONLY, _BIT])
def test_small_values_equal_numpy(variant):
  model, params, images = _faint(variant)
  _, found = jit(model)(params, images, intermediates=True)
  assert_close(found, _reference(variant, params, images))


@pytest.mark.parametrize(
  ("variant", "name"),
  [
    (_HYBRID, "STEM_NORM_EPSILON"),
    (_HYBRID, "STEM_KERNEL_EPSILON"),
    (_BIT, "BIT_NORM_EPSILON"),
    (_BIT, "BIT_KERNEL_EPSILON"),
  ],
)
def test_small_values_tell_epsilons_apart(variant, name, monkeypatch):
  _, params, images = _faint(variant)
  expected = _reference(variant, params, images)
  monkeypatch.setattr(reference_resnet, name, 0)
  other = _reference(variant, params, images)
  stage, wrong = expected["stage1"], other["stage1"]
  assert np.abs(wrong - stage).max() > 1e-2 * stage.std()


@pytest.mark.parametrize(
  "variant", [_BIT, pytest.param(_HYBRID, marks=pytest.mark.ci)]
)
def test_bfloat16_is_close_and_the_logits_are_float32(variant):
  model = _create(variant, dtype="bfloat16")
  params, images = random_params(model), random_images(model, batch=8)
  logits, found = jit(model)(params, images, intermediates=True)
  expected = _reference(variant, params, images)
  assert logits.dtype == jnp.float32
  assert found["pooled"].dtype == jnp.float32
  for name in ("root", "stage1", "stage2"):
    assert found[name].dtype == jnp.bfloat16
  for name, limit in (("root", 0.01), ("stage2", 0.03), ("pooled", 0.1)):
    x = expected[name]
    difference = np.asarray(found[name], np.float64) - x
    assert 1e-4 * x.std() < difference.std() < limit * x.std(), name


@pytest.mark.parametrize("image_size", [(33, 47), (8, 9)], ids=str)
def test_the_grid_of_an_odd_image_is_rounded_up(image_size):
  model, found = _run_once(_BIT, image_size)
  assert found["stage2"].shape[1:3] == model.grid
  assert model.grid == tuple(-(-side // 8) for side in image_size)
  assert model.num_layers == 0


def _run_once(variant, image_size):
  model = _create(variant, image_size=image_size)

  def run():
    params, images = random_params(model), random_images(model)
    return model.apply(params, images, intermediates=True)[1]

  return model, jax.eval_shape(run)


@pytest.mark.ci  # compiling two backward passes
def test_remat_changes_no_gradient():
  plain, other = _create("RNx1"), _create("RNx1", remat="full")
  params, images = random_params(plain), random_images(plain)

  def differentiate(model):
    def loss(params):
      return (model.apply(params, images, train=True, key=key) ** 2).sum()

    return flatten(jax.jit(jax.grad(loss))(params))

  key = jax.random.key(0)
  gradient, again = differentiate(plain), differentiate(other)
  scale = max(np.abs(x).max() for x in gradient.values())
  assert np.isfinite(scale)
  for path, x in gradient.items():
    assert np.abs(again[path] - x).max() <= 1e-6 * scale, path
    assert np.abs(x).max() > 0, path


# --- sizes ---

_PUBLISHED = {
  "R+ViT-Ti_16": 6_337_704,
  "R26+ViT-S_32": 36_431_912,
  "R26+ViT-B_32": 101_383_976,
  "R50+ViT-B_16": 98_659_112,
  "R50+ViT-L_32": 328_994_856,
  "R50x1": 25_549_352,
  "R101x1": 44_541_480,
  "R152x4": 936_533_224,
}


@pytest.mark.parametrize(
  "variant",
  [
    pytest.param(
      name,
      # Tracing a deep model takes seconds.
      marks=() if name in ("R+ViT-Ti_16", "R50x1") else pytest.mark.ci,
    )
    for name in _PUBLISHED
  ],
)
def test_parameter_counts_of_the_published_models(variant):
  model = models.create(variant=variant, num_classes=1000, image_size=224)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count == _PUBLISHED[variant]
  if variant == "R26+ViT-S_32":
    assert model.grid == (7, 7)


# [(unit, channels in, width, whether it projects its input)] of `_UNITS`.
_IN_STAGES = [
  ("block1/unit{:0{}d}", 1, 64, 64, True),
  ("block1/unit{:0{}d}", 2, 256, 64, False),
  ("block2/unit{:0{}d}", 1, 256, 128, True),
]


def _stages(digits, list_norms):
  """Returns the shapes in all units; the norms' widths are given."""
  shapes = {}
  for name, number, inside, width, projects in _IN_STAGES:
    out = 4 * width
    unit = {
      "conv1/kernel": (1, 1, inside, width),
      "conv2/kernel": (3, 3, width, width),
      "conv3/kernel": (1, 1, width, out),
      **_norms(list_norms(inside, width, out, projects)),
    }
    if projects:
      unit["conv_proj/kernel"] = (1, 1, inside, out)
    prefix = name.format(number, digits)
    shapes |= {f"{prefix}/{path}": shape for path, shape in unit.items()}
  return shapes


def test_parameter_names_of_a_hybrid_are_the_published_ones():
  found = _shapes(_HYBRID)

  def list_norms(inside, width, out, projects):
    norms = {"gn1": width, "gn2": width, "gn3": out}
    return norms | {"gn_proj": out} if projects else norms

  expected = {
    "conv_root/kernel": (7, 7, 3, 64),
    **_norms({"gn_root": 64}),
    **_stages(1, list_norms),
    "embedding/kernel": (1, 1, 512, 16),
    "embedding/bias": (16,),
    "cls": (1, 1, 16),
    "head/kernel": (16, 5),
    "head/bias": (5,),
  }
  rest = {k: x for k, x in found.items() if not k.startswith("Transformer/")}
  assert rest == expected
  # 3x5 cells and the class token.
  position = found["Transformer/posembed_input/pos_embedding"]
  assert position == (1, 16, 16)


def test_parameter_names_of_a_resnet_are_the_published_ones():
  def list_norms(inside, width, out, projects):
    return {"gn1": inside, "gn2": width, "gn3": width}

  assert _shapes(_BIT) == {
    "root_block/conv_root/kernel": (7, 7, 3, 64),
    **_stages(2, list_norms),
    **_norms({"norm-pre-head": 512}),
    "head/kernel": (512, 5),
    "head/bias": (5,),
  }


def _shapes(variant):
  init = _create(variant).init
  found = flatten(jax.eval_shape(init, jax.random.key(0)))
  assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}
  return {path: x.shape for path, x in found.items()}


def _norms(widths):
  return {
    f"{name}/{kind}": (width,)
    for name, width in widths.items()
    for kind in ("scale", "bias")
  }


@pytest.mark.parametrize("variant", [_HYBRID, _BIT])
def test_initial_zeros_and_ones(variant):
  model = _create(variant, head_bias_init=-3.0)

  def init(key):
    # Without the random kernels, which take long to compile.
    params = flatten(model.init(key))
    is_kernel = {path: path.endswith("kernel") for path in params}
    is_kernel["head/kernel"] = False
    return {path: x for path, x in params.items() if not is_kernel[path]}

  params = jax.jit(init)(jax.random.key(0))
  for path, x in params.items():
    if path.endswith("/scale"):
      # A hybrid's unit starts as its shortcut.
      is_zero = variant == _HYBRID and path.endswith("gn3/scale")
      assert (x == (0 if is_zero else 1)).all(), path
    elif path == "head/bias":
      assert (x == -3).all()
    elif path.rpartition("/")[0].split("/")[-1].startswith(("gn", "norm")):
      assert (x == 0).all(), path
  assert (params["head/kernel"] == 0).all()


# --- names ---


@pytest.mark.parametrize(
  "name",
  [
    "ViT-B_16",
    "ViT-w24d3m40h2_7",
    *_PUBLISHED,
    "RNx1",
    "RN+ViT-N_8",
    "R50+ViT-w24d3m40h2_16",
  ],
)
def test_names_of_what_they_stand_for(name):
  sizes = variants.parse(name)
  found = tables.name_variant(
    sizes.encoder, sizes.patch_size, sizes.units, sizes.width
  )
  assert found == name


def test_a_written_out_encoder_of_the_table_gets_its_short_name():
  assert variants.parse("ViT-w768d12m3072h12_16") == variants.parse("ViT-B_16")
  sizes = variants.parse("R50+ViT-w768d12m3072h12_16")
  found = tables.name_variant(sizes.encoder, sizes.patch_size, sizes.units, 1)
  assert found == "R50+ViT-B_16"


def test_what_no_name_stands_for():
  encoder = variants.ENCODERS["B"]
  assert tables.name_variant(encoder, 1, (3, 4, 9), width=2) is None
  assert tables.name_variant(encoder, 2, (3, 4, 9)) is None
  assert tables.name_variant(encoder, 1, (1, 2, 3)) is None
  assert tables.name_variant(None, 0, (1, 2, 3)) is None


# --- what a user may get wrong ---


@pytest.mark.parametrize(
  ("variant", "options", "words"),
  [
    (
      _BIT,
      {"classifier": "gap"},
      ["model.classifier is 'gap'", "convolutions of R2x1"],
    ),
    (_BIT, {"remat": "dots"}, ["model.remat 'dots'", "'full' or 'none'"]),
    (_BIT, {"scan": True}, ["model.scan is True", "leave it at False"]),
    (_BIT, {"pos_embedding": "2d"}, ["model.pos_embedding is '2d'"]),
    (_BIT, {"image_size": (7, 40)}, ["(7, 40) is too small; at least 8"]),
    (_HYBRID, {"image_size": (24, 36)}, ["(24, 36)", "valid: (24, 32)"]),
    (_ROOT_ONLY, {"image_size": 48}, ["48 is not divisible", "size 32"]),
    ("R51x1", {}, ["'R51x1'", "R50, R101, R152, R200"]),
    ("R50-ViT-B_16", {}, ["'R50-ViT-B_16'", "mean 'R50+ViT-B_16'?"]),
    ("R50x1+ViT-B_16", {}, ["'R50x1+ViT-B_16'", "R50+ViT-SIZE_16"]),
    ("ViT-w16d2m24h3_8", {}, ["'ViT-w16d2m24h3_8'"]),
  ],
  ids=str,
)
def test_wrong_arguments_are_named(variant, options, words):
  with named(*words):
    _create(variant, **options)
