"""Masked patch prediction: what is hidden, what is asked, what is learnt."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluating import evaluate
from mistakes import named
from PIL import Image
from tiny_runs import (
  REPO,
  assert_same_run,
  best_step,
  read_metrics,
  saved_steps,
  shared_programs,
)

from vit_jax import config as configuration
from vit_jax import data, models, sharding
from vit_jax.__main__ import main
from vit_jax.evaluation import devices
from vit_jax.models import masking
from vit_jax.state import TrainState, flatten
from vit_jax.training import objectives, steps

COLOURS = ("mean_colour", "colour_grid")
_TINY = "ViT-w16d2m32h2_4"


_draw_corruption = jax.jit(masking.draw_corruption, static_argnums=1)


_make_targets = jax.jit(masking.make_targets, static_argnums=(1, 2))


def _draw(num_images, num_patches):
  keys = jax.random.split(jax.random.key(0), num_images)
  return jax.device_get(_draw_corruption(keys, num_patches))


def _random_images(num_images, height=16, width=16, seed=0):
  rng = np.random.default_rng(seed)
  # Dark and light ones, so that every bin is met.
  top = rng.integers(1, 257, (num_images, 1, 1, 3))
  return rng.integers(0, top, (num_images, height, width, 3)).astype(np.uint8)


def _create(target="mean_colour", **kwargs):
  options = {"variant": _TINY, "image_size": 16, "dtype": "float32"}
  return models.create_masked(target=target, **options | kwargs)


def _random_params(model, seed=0):
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes
  )


# --- what is hidden ---


@pytest.mark.parametrize("num_patches", [2, 16, 49])
def test_half_of_the_patches_are_corrupted_rounded_down(num_patches):
  drawn = _draw(40, num_patches)
  assert drawn.corrupted.shape == (40, num_patches // 2)
  for corrupted in drawn.corrupted:
    assert len(set(corrupted)) == num_patches // 2
    assert set(corrupted) <= set(range(num_patches))


def test_patches_and_kinds_are_drawn_as_often_as_the_paper_says():
  images, patches = 4000, 16
  drawn = _draw(images, patches)
  count = images * patches // 2

  def check(found, probability, trials):
    sigma = np.sqrt(probability * (1 - probability) / trials)
    assert abs(found / trials - probability) < 5 * sigma

  swapped = (drawn.source != np.arange(patches)).sum()
  masked = drawn.masked.sum()
  check(masked, 0.8, count)
  check(swapped, 0.1, count)
  check(count - masked - swapped, 0.1, count)  # kept
  for patch in range(patches):
    check((drawn.corrupted == patch).sum(), 0.5, images)
  # Each other patch is as likely to be shown, and never a patch itself.
  distance = (drawn.source - np.arange(patches)) % patches
  distance = distance[distance > 0]
  for other in range(1, patches):
    check((distance == other).sum(), 1 / (patches - 1), len(distance))


def test_corruption_is_a_function_of_the_key_of_the_image():
  whole = _draw(40, 16)
  keys = jax.random.split(jax.random.key(0), 40)
  part = _draw_corruption(keys[2:5], 16)
  for x, y in zip(part, whole, strict=True):
    np.testing.assert_array_equal(x, y[2:5])
  assert len({tuple(row) for row in whole.corrupted}) == 40


# --- what is asked ---


def _targets_by_definition(image, patch, target):
  """Loops over patches, cells and channels, with means in float64."""
  out = []
  for top in range(0, image.shape[0], patch):
    for left in range(0, image.shape[1], patch):
      x = image[top : top + patch, left : left + patch].astype(float)
      if target == "pixels":
        out.append([v / 127.5 - 1 for v in x.ravel()])
        continue
      side = patch if target == "mean_colour" else patch // 4
      colours = []
      for i in range(0, patch, side):
        for j in range(0, patch, side):
          mean = x[i : i + side, j : j + side].reshape(-1, 3).mean(0)
          red, green, blue = (int(v // 32) for v in mean)
          colours.append(64 * red + 8 * green + blue)
      out.append(colours)
  return np.array(out)


@pytest.mark.parametrize("target", masking.TARGETS)
@pytest.mark.parametrize("patch", [4, 8])
def test_targets_equal_their_definition(target, patch):
  images = _random_images(5, 16, 24)
  found = np.asarray(_make_targets(images, patch, target))
  expected = [_targets_by_definition(image, patch, target) for image in images]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  if target in COLOURS:
    assert found.dtype == np.int32
    assert len(np.unique(found)) > 5


def test_a_mean_on_the_edge_of_a_bin_belongs_to_the_upper_one():
  image = np.zeros((1, 4, 4, 3), np.uint8)
  image[0, :2] = 64  # on the mean 32
  assert _make_targets(image, 4, "mean_colour").item() == 73
  image[0, 0, 0] = 63
  assert _make_targets(image, 4, "mean_colour").item() == 0


def _make_objective(model, target):
  return objectives.MaskedPatches(model=model, class_names=[], target=target)


# --- the model ---


@pytest.mark.parametrize(
  ("target", "outputs", "classifier"),
  [
    ("mean_colour", 512, "token"),
    ("colour_grid", 16 * 512, "gap"),
    ("pixels", 4 * 4 * 3, "map"),
  ],
)
def test_parameters_are_the_vits_and_two_more(classifier, target, outputs):
  model = _create(target, classifier=classifier)
  shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
  vit = models.create(
    variant=_TINY, num_classes=0, image_size=16, classifier=classifier
  )
  expected = flatten(jax.eval_shape(vit.init, jax.random.key(0)))
  expected = {
    path: x.shape
    for path, x in expected.items()
    if not path.startswith("MAPHead_0/")
  }
  expected |= {
    "mask_token": (1, 1, 16),
    "mpp_head/kernel": (16, outputs),
    "mpp_head/bias": (outputs,),
  }
  assert {path: x.shape for path, x in shapes.items()} == expected
  mesh = sharding.make_mesh(2)
  layout = flatten(sharding.tree_shardings(mesh, shapes))
  assert layout["mpp_head/kernel"].spec[0] == "fsdp"


@pytest.mark.parametrize(
  ("classifier", "scan"), [("token", False), ("gap", True)]
)
def test_the_encoder_sees_the_corrupted_embeddings(classifier, scan):
  model = _create("pixels", classifier=classifier, scan=scan)
  params = _random_params(model)
  images = np.asarray(steps.normalize(_random_images(40)))
  drawn = _draw(40, 16)
  predictions, seen = jax.device_get(
    jax.jit(lambda *args: model.apply(*args, intermediates=True))(
      params, images, drawn
    )
  )
  flat = flatten(params)
  extra = int(classifier == "token")
  tokens = seen["embedded"] - flat["Transformer/posembed_input/pos_embedding"]
  if extra:
    np.testing.assert_allclose(
      tokens[:, 0], np.tile(flat["cls"][0], (40, 1)), atol=1e-5
    )
  tokens = tokens[:, extra:]
  stem = seen["stem"].reshape(40, 16, 16)
  kinds = set()
  for i in range(40):
    for patch in range(16):
      expected, kind = stem[i, patch], "untouched"
      if patch in drawn.corrupted[i]:
        kind = "kept"
      if drawn.masked[i, patch]:
        expected, kind = flat["mask_token"][0, 0], "masked"
      elif drawn.source[i, patch] != patch:
        expected, kind = stem[i, drawn.source[i, patch]], "swapped"
      kinds.add(kind)
      np.testing.assert_allclose(tokens[i, patch], expected, atol=1e-5)
  assert kinds == {"untouched", "kept", "masked", "swapped"}
  # Each prediction is of the patch that it says.
  assert predictions.shape == (40, 8, 48)
  assert predictions.dtype == np.float32
  for i in range(40):
    encoded = seen["encoded"][i, extra + drawn.corrupted[i]]
    expected = encoded @ flat["mpp_head/kernel"] + flat["mpp_head/bias"]
    np.testing.assert_allclose(predictions[i], expected, atol=1e-4)


# --- learning ---


@pytest.mark.ci
def test_the_loss_falls():
  """Of steps on one batch; the embedding of masked patches learns, too."""
  model = _create("colour_grid", scan=True)
  optimizer = optax.adam(0.03, eps=1e-2)
  step = functools.partial(
    steps.train_step,
    objective=_make_objective(model, "colour_grid"),
    optimizer=optimizer,
    schedule=lambda step: 0.03,
    micro_batches=2,
  )
  step = jax.jit(step)
  params = _random_params(model)
  state = TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=jax.jit(optimizer.init)(params),
    ema=None,
    rng=jax.random.key_data(jax.random.key(42)),
  )
  losses = []
  for _ in range(20):
    state, values = step(state, {"image": _random_images(8)})
    losses.append(float(values["loss"]))
  assert losses[-1] < 0.97 * losses[0]
  assert np.abs(state.params["mask_token"] - params["mask_token"]).max() > 0.05


@pytest.mark.ci
def test_a_new_head_finds_every_colour_as_likely():
  model = _create(scan=True)
  objective = _make_objective(model, "mean_colour")

  def run(key, images):
    examples = objective.prepare({"image": images}, key)
    return objective.loss(model.init(key), examples, key)

  loss, _ = jax.jit(run)(jax.random.key(1), _random_images(2))
  np.testing.assert_allclose(loss, np.log(512), rtol=1e-6)


# --- evaluation ---


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """13 images in two classes."""
  root = tmp_path_factory.mktemp("photos")
  for i, image in enumerate(_random_images(13, seed=5)):
    folder = root / "test" / "ab"[i % 2]
    (root / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{i:02d}.png")
    shutil.copy(folder / f"{i:02d}.png", root / "train" / "ab"[i % 2])
  return root


@pytest.mark.ci
@pytest.mark.parametrize(
  "target",
  [
    "mean_colour",
    pytest.param("colour_grid", marks=pytest.mark.ci),
    pytest.param("pixels", marks=pytest.mark.ci),
  ],
)
def test_an_evaluation_equals_its_definition_on_any_machine(target, photos):
  source = data.get_source(f"folder:{photos}", "test")
  images = np.concatenate(
    [
      batch["image"]
      for batch in data.eval_batches(
        source,
        batch_size=13,
        rows=np.arange(13),
        preprocess="resize(size)",
        image_size=16,
      )
    ]
  )
  model = _create(target, scan=True)
  params = _random_params(model)
  keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(13)]
  drawn = _draw_corruption(jnp.stack(keys), 16)
  predictions = jax.jit(model.apply)(params, steps.normalize(images), drawn)
  predictions = np.asarray(predictions, float)
  everything = [_targets_by_definition(x, 4, target) for x in images]
  targets = np.array(
    [x[i] for x, i in zip(everything, drawn.corrupted, strict=True)]
  )
  if target == "pixels":
    trivial = np.mean((targets - targets.mean((0, 1))) ** 2)
    loss = np.mean((targets - predictions) ** 2)
    expected = {"loss": loss, "r2": 1 - loss / trivial, "trivial_loss": trivial}
  else:
    logits = predictions.reshape(*targets.shape, 512)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_p = np.take_along_axis(log_p, targets[..., None], -1)
    right = likely = entropy = 0
    for cell in range(targets.shape[-1]):
      counts = np.bincount(targets[..., cell].ravel())
      right += counts.max()
      share = counts[counts > 0] / counts.sum()
      entropy -= (share * np.log(share)).sum() / targets.shape[-1]
    likely = (logits.argmax(-1) == targets).mean()
    expected = {
      "loss": -log_p.mean(),
      "accuracy": likely,
      "trivial_loss": entropy,
      "trivial_accuracy": right / targets.size,
    }
  devices, batch_size = (8, 16) if target == "mean_colour" else (1, 5)
  objective = _make_objective(model, target)
  found = evaluate(objective, params, source, devices, batch_size)
  assert found.pop("examples") == 13
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, rtol=1e-5, err_msg=name)


# --- mistakes ---


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"target": "mean_color"}, "did you mean 'mean_colour'?"),
    ({"variant": "RN+ViT-N_8"}, "patches of pixels, which RN+ViT-N_8 does not"),
    (
      {"target": "colour_grid", "variant": "ViT-N_6", "image_size": 12},
      "the patch size 6 of ViT-N_6 is not divisible",
    ),
    ({"variant": "ViT-N_16"}, "image_size 16 is one patch of ViT-N_16"),
    ({"head_bias_init": -10.0}, "leave it at 0"),
  ],
)
def test_models_that_cannot_be_had(options, words):
  with named(words):
    _create(**{"target": "mean_colour", **options})


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    ({"objective": "masked"}, "did you mean 'masked_patches'?"),
    ({"masked_target": "colours"}, "mean_colour, colour_grid, pixels"),
    ({"train.mixup_alpha": "0.2"}, "train.mixup_alpha is 0.2"),
    ({"train.cutmix_alpha": "1"}, "train.cutmix_alpha is 1.0"),
  ],
)
def test_configurations_that_cannot_be_run(overrides, words, runs):
  given = {"objective": "masked_patches", "loss.name": "sigmoid", **overrides}
  config = configuration.load(str(runs.config), given)
  with named(words):
    configuration.check_ranges(config)
    configuration.check_unused(config)
    objectives.create(config, ["a", "b"])


@pytest.mark.ci
@pytest.mark.parametrize(
  "spec",
  ["masked.py", "masked.py:ViT-L_16,imagenet2012", "quickstart_masked.py"],
)
def test_the_configurations_can_be_run(spec):
  config = configuration.load(str(REPO / "configs" / spec))
  objective = objectives.create(config, ["a", "b"])
  assert configuration.count_steps(config, 1000) == config.total_steps
  shapes = flatten(jax.eval_shape(objective.model.init, jax.random.key(0)))
  assert shapes["mpp_head/kernel"].shape[1] % 512 == 0


# --- whole runs ---


SHORT = (
  "model.variant=ViT-w16d2m32h2_8",
  "total_steps=4",
  "eval_every=3",
  "checkpoint_every=2",
)


@pytest.fixture(scope="module")
def pretrained(runs, tmp_path_factory):
  """A tiny run with masked patches."""
  workdir = tmp_path_factory.mktemp("masked") / "run"
  with shared_programs():
    assert main(_args(runs, workdir)) == 0
    yield workdir


def _args(runs, workdir):
  objective = ("objective=masked_patches", "loss.name=sigmoid")
  return runs.train_args(workdir, *objective, *SHORT)


@pytest.mark.ci
def test_a_run_writes_what_it_measures(pretrained):
  run = json.loads((pretrained / "config.json").read_text())
  assert run["class_names"] == []
  lines = read_metrics(pretrained)
  assert len([m for m in lines if "train/loss" in m]) == 4
  evaluations = [m for m in lines if "eval/loss" in m]
  assert [m["step"] for m in evaluations] == [3, 4]
  for line in evaluations:
    assert line["eval/examples"] == 40
    # The test patches are the same each time.
    trivial = ("eval/trivial_loss", "eval/trivial_accuracy")
    assert [line[n] for n in trivial] == [evaluations[0][n] for n in trivial]
  best = max(evaluations, key=lambda m: m["eval/accuracy"])
  assert best_step(pretrained) == best["step"]


@pytest.mark.ci
def test_evaluate_repeats_the_runs_own_numbers(pretrained, capsys, monkeypatch):
  sizes = []
  round_up = devices.round_up
  monkeypatch.setattr(
    devices, "round_up", lambda n, mesh: sizes.append(n) or round_up(n, mesh)
  )
  checkpoint = f"{pretrained}/checkpoints/4"
  command = ["evaluate", f"--checkpoint={checkpoint}", "--json"]
  assert main([*command, "--batch_size=3"]) == 0
  assert sizes == [3]
  found = json.loads(capsys.readouterr().out)
  expected = read_metrics(pretrained)[-1]
  assert found["checkpoint"] == checkpoint
  for name in ("examples", "loss", "accuracy", "trivial_accuracy"):
    assert found[name] == pytest.approx(expected[f"eval/{name}"], rel=1e-5)


@pytest.mark.ci
def test_a_run_goes_on_exactly_where_it_stopped(runs, pretrained, tmp_path):
  workdir = shutil.copytree(pretrained, tmp_path / "run")
  assert saved_steps(workdir) == sorted({2, 4, best_step(workdir)})
  shutil.rmtree(workdir / "checkpoints" / "4")
  assert main(_args(runs, workdir)) == 0
  assert_same_run(workdir, pretrained)


@pytest.mark.ci
def test_fine_tuning_starts_from_it(runs, pretrained, tmp_path, caplog):
  args = runs.train_args(
    tmp_path / "run",
    *SHORT,
    f"init_from={pretrained}",
    "image_size=24",
    "total_steps=2",
    "schedule.warmup_steps=1",
  )
  assert main(args) == 0
  report = "\n".join(caplog.messages).splitlines()
  for line in (
    "resized: Transformer/posembed_input/pos_embedding 2x2 -> 3x3",
    "new: head/bias 10",
    "new: head/kernel 16x10",
    "dropped: mask_token 1x1x16",
    "dropped: mpp_head/bias 512",
    "dropped: mpp_head/kernel 16x512",
  ):
    assert line in report


@pytest.mark.ci
def test_predict_says_that_there_are_no_classes(pretrained, tmp_path, capsys):
  Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
  command = ["predict", f"--checkpoint={pretrained}"]
  assert main([*command, str(tmp_path / "black.png")]) == 2
  out, err = capsys.readouterr()
  assert not out
  (line,) = err.splitlines()
  assert "masked patches" in line
  assert "fine-tune" in line
