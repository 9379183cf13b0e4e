"""Distillation: losses against float64, what a teacher sees, whole runs."""

import functools
import json
import shutil

import crashes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_vit
from mistakes import named
from random_models import random_params, random_weights
from tiny_runs import assert_same_run, read_state

import vit_jax
from vit_jax import config as configuration
from vit_jax import models, pretrained, sharding
from vit_jax.__main__ import main
from vit_jax.pretrained.teacher import read_teacher
from vit_jax.state import flatten, make_key
from vit_jax.train import make_step
from vit_jax.training import losses, objectives, steps
from vit_jax.training.teacher import Teacher

_CLASSES = 5
_NAMES = [str(k) for k in range(10)]  # of the digits
_EMBEDDED = "ViT-N_8-digits"


def _softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def _apply_linear(params, images, *, train=False, key=None):
  """A model that needs no compiler: logits of the mean colour."""
  return 3 * images.mean((1, 2)) @ params["kernel"]


def _linear_params(seed):
  kernel = np.random.default_rng(seed).normal(size=(3, _CLASSES))
  return {"kernel": jnp.asarray(kernel, jnp.float32)}


def _make_batch(count=8, size=8):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
  labels = rng.integers(0, _CLASSES, (count, 1)).astype(np.int32)
  return {"image": image, "labels": labels}


def _make_objective(teacher, model=None, **options):
  linear = models.Model(lambda _: None, _apply_linear, (8, 8), (1, 1), 0)
  return objectives.Classification(
    model=model or linear,
    class_names=[str(k) for k in range(_CLASSES)],
    loss_fn=losses.get_loss("softmax"),
    teacher=teacher,
    **options,
  )


# --- the loss ---


@pytest.mark.parametrize(
  ("loss", "temperature"),
  [
    ("kl", 1.0),
    ("kl", 3.0),
    ("cross_entropy", 1.0),
    ("cross_entropy", 3.0),
    ("hard", 1.0),
  ],
)
def test_losses_and_gradients_equal_their_formulas(loss, temperature):
  rng = np.random.default_rng(0)
  s, t = 4 * rng.normal(size=(2, 6, _CLASSES))
  labelled = rng.uniform(size=6)
  p, q = _softmax(t / temperature), _softmax(s / temperature)
  if loss == "hard":
    p = np.eye(_CLASSES)[t.argmax(-1)]
  expected = -(p * np.log(q)).sum(-1)
  if loss == "kl":
    expected += (p * np.log(p)).sum(-1)
  expected = 0.7 * labelled + 0.3 * temperature**2 * expected
  teacher = Teacher(_apply_linear, temperature, 0.3, loss)

  def mix(s):
    found = teacher.mix(jnp.float32(labelled), s, jnp.float32(t))
    return found.sum(), found

  gradient, found = jax.grad(mix, has_aux=True)(jnp.float32(s))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(
    gradient, 0.3 * temperature * (q - p), rtol=1e-4, atol=1e-6
  )


@pytest.mark.ci
def test_the_losses_are_finite_for_a_certain_teacher():
  t = jnp.array([[500.0, 0.0, -500.0]])
  for loss in ("kl", "cross_entropy", "hard"):
    distill = Teacher(_apply_linear, loss=loss).distill
    value, gradient = jax.value_and_grad(lambda s, f=distill: f(s, t).sum())(
      jnp.zeros((1, 3))
    )
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-2 / 3, 1 / 3, 1 / 3]], rtol=1e-6)


# --- in the objective and the step ---


@pytest.mark.parametrize(
  "mixes",
  [(0.0, 0.0), (1.0, 0.0), pytest.param((0.5, 0.5), marks=pytest.mark.ci)],
)
def test_a_teacher_sees_the_pixels_of_the_student(mixes):
  """The same as without a teacher, mixed in the same way."""

  def apply(params, images):  # takes neither `train` nor a key
    return _apply_linear(params, images).astype(jnp.bfloat16)

  options = {"mixup_alpha": mixes[0], "cutmix_alpha": mixes[1]}
  batch, key, params = _make_batch(), jax.random.key(3), _linear_params(1)
  images, targets, taught = _make_objective(Teacher(apply), **options).prepare(
    {**batch, "teacher": params}, key
  )
  without = _make_objective(None, **options).prepare(batch, key)
  for found, expected in zip((images, targets), without, strict=True):
    np.testing.assert_array_equal(found, expected)
  plain = batch["image"] / 127.5 - 1
  assert (np.abs(images - plain).max() > 0.1) == any(mixes)
  kernel = np.float64(params["kernel"])
  np.testing.assert_allclose(
    taught, 3 * np.mean(images, (1, 2)) @ kernel, rtol=1e-2, atol=1e-2
  )
  assert taught.dtype == jnp.float32


@pytest.mark.ci
def test_micro_batches_give_the_same_step_for_any_teacher():
  """The teacher is an argument of the program, which another one may be."""
  objective = _make_objective(Teacher(_apply_linear, 2.0, 0.6), mixup_alpha=0.5)
  optimizer = optax.sgd(0.1)
  whole, pieces = (
    jax.jit(
      functools.partial(
        steps.train_step,
        objective=objective,
        optimizer=optimizer,
        schedule=lambda _: 0.1,
        micro_batches=count,
      )
    )
    for count in (1, 4)
  )
  params = _linear_params(0)
  state = steps.TrainState(
    jnp.zeros((), jnp.int32),
    params,
    optimizer.init(params),
    None,
    jax.random.key_data(jax.random.key(7)),
  )
  seen = []
  for seed in (1, 2):
    batch = {**_make_batch(), "teacher": _linear_params(seed)}
    (found, values), (expected, others) = (
      f(state, batch) for f in (pieces, whole)
    )
    np.testing.assert_allclose(values["loss"], others["loss"], rtol=1e-6)
    np.testing.assert_allclose(
      found.params["kernel"], expected.params["kernel"], rtol=1e-5
    )
    seen.append(float(values["loss"]))
  assert abs(seen[0] - seen[1]) > 0.01


@functools.cache
def _deit():
  """A small model with a distillation token, its values, and NumPy's logits."""
  model = models.create(
    variant="ViT-w16d2m24h2_4",
    num_classes=_CLASSES,
    image_size=8,
    distillation_token=True,
    dtype="float32",
  )
  params = random_params(model)
  logits = reference_vit.apply(
    flatten(params),
    steps.normalize(_make_batch()["image"]),
    patch=4,
    classifier="token",
  )
  return model, params, logits


@pytest.mark.ci
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_each_head_of_a_distilled_student_has_its_loss(weight):
  model, params, logits = _deit()
  teacher = Teacher(_apply_linear, 2.0, weight)
  objective = _make_objective(teacher, model, two_heads=True)
  batch = {**_make_batch(), "teacher": _linear_params(1)}
  examples = objective.prepare(batch, jax.random.key(0))
  gradient, _ = jax.jit(jax.grad(objective.loss, has_aux=True))(
    params, examples, jax.random.key(0)
  )
  taught = np.float64(examples[2])
  labels = np.eye(_CLASSES)[batch["labels"][:, 0]]
  p, q = _softmax(taught / 2), _softmax(logits["logits_dist"] / 2)
  for head, expected in (
    ("head", (1 - weight) * (_softmax(logits["logits_cls"]) - labels)),
    ("head_dist", weight * 2 * (q - p)),
  ):
    np.testing.assert_allclose(
      gradient[head]["bias"], expected.mean(0), rtol=1e-3, atol=1e-6
    )
    assert (np.abs(gradient[head]["kernel"]).max() > 1e-4) == expected.any()


def test_a_distilled_student_is_evaluated_by_the_mean_of_its_heads():
  model, params, logits = _deit()
  batch = {**_make_batch(), "mask": np.ones(8, bool)}
  objective = _make_objective(Teacher(_apply_linear), model, two_heads=True)
  sums = jax.jit(objective.eval_step)(params, batch)
  mean = (logits["logits_cls"] + logits["logits_dist"]) / 2
  p = np.take_along_axis(_softmax(mean), batch["labels"], 1)
  np.testing.assert_allclose(sums["loss"], -np.log(p).sum(), rtol=1e-4)


# --- a teacher from a file ---


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """{name: a source}: what cannot teach the digits, and what can."""
  folder = tmp_path_factory.mktemp("weights")
  usual = random_weights("ViT-w16d1m16h2_8")
  made = {
    "unnamed": (usual, "npz"),
    "no head": (random_weights("ViT-w16d1m16h2_8", num_classes=0), "npz"),
    "others": (random_weights("ViT-w16d1m16h2_8", num_classes=7), "npz"),
    "turned": (usual._replace(class_names=_NAMES[::-1]), "hf"),
    "words": (usual._replace(class_names=[f"no {x}" for x in _NAMES]), "hf"),
    "patches": (random_weights("ViT-w16d1m16h2_16"), "npz"),
    "relative": (
      random_weights("ViT-w16d1m16h2_8", (16, 24), pos_embedding="relative"),
      "orbax",
    ),
  }
  for name, (weights, form) in made.items():
    path = str(folder / name) + (".npz" if form == "npz" else "")
    pretrained.write(weights, path, form)
    made[name] = path
  return made


def _read(source, run=None, devices=1, **overrides):
  """Returns (the configuration, the mesh, what `read_teacher` returns)."""
  given = {
    "model.variant": "ViT-w16d1m16h2_8",
    "model.dtype": "float32",
    "model.scan": "True",
    "image_size": "16",
    "batch_size": "8",
    "schedule.warmup_steps": "0",
    "train.mixup_alpha": "0.2",
    "teacher.source": str(source),
    **overrides,
  }
  config = configuration.load("common", given)
  mesh = sharding.make_mesh(config.fsdp, jax.devices()[:devices])
  return config, mesh, read_teacher(config, mesh, _NAMES, run)


@pytest.mark.ci
def test_a_file_becomes_the_teacher_at_the_size_of_the_images():
  *_, teaching = _read(_EMBEDDED)
  expected = vit_jax.load(_EMBEDDED, image_size=16)
  images = steps.normalize(_make_batch(size=16)["image"])
  np.testing.assert_allclose(
    jax.jit(teaching.teacher.predict)(teaching.params, images),
    expected(images),
    rtol=1e-4,
    atol=1e-5,
  )
  assert teaching.about["teacher"]["source"] == _EMBEDDED


def _train(source, devices, **overrides):
  """Returns the parameters after two steps, the losses, the teacher's."""
  config, mesh, teaching = _read(source, devices=devices, **overrides)
  objective = objectives.create(config, _NAMES, teaching.teacher)
  train_step, init_state = make_step(config, objective, total_steps=10_000)
  key = make_key(0)
  layout = sharding.tree_shardings(mesh, jax.eval_shape(init_state, key))
  state = jax.jit(init_state, out_shardings=layout)(key)
  step = sharding.jit_train_step(mesh, train_step, layout)
  batches = iter([sharding.put_batch(mesh, _make_batch(size=16), 8)] * 2)
  seen = []
  for batch in teaching.add_to(batches):
    state, values = step(state, batch)
    seen.append(float(values["loss"]))
  return jax.device_get(flatten(state.params)), seen, flatten(teaching.params)


@pytest.mark.ci
def test_with_sharded_parameters_it_is_the_same(files):
  expected, losses_before, _ = _train(files["unnamed"], 1)
  found, losses_after, teacher = _train(files["unnamed"], 4, fsdp="2")
  np.testing.assert_allclose(losses_after, losses_before, rtol=1e-5)
  assert losses_after[1] < losses_after[0]
  # Adam's first steps turn the sign of a tiny gradient into a whole step.
  far = [np.abs(found[path] - x).mean() for path, x in expected.items()]
  assert max(far) < 1e-4
  kernel = teacher["Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"]
  assert kernel.sharding.shard_shape((16, 16)) == (8, 16)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("no head", ["has no head", "fine-tune it first"]),
    ("others", ["it has 7 classes, the training data 10;"]),
    ("turned", ["it has 10 classes, the training data 10, in another order"]),
    ("relative", ["relative position embeddings cannot be resized"]),
    ("missing", ["no checkpoint at", "missing"]),
  ],
)
def test_what_cannot_teach(name, words, files):
  source = files.get(name, name)
  with named(f"config.teacher.source={source}: ", *words):
    _read(source)


def test_a_teacher_that_cannot_take_the_images(files):
  with named("image_size 24 is not divisible by the patch size 16"):
    _read(files["patches"], image_size="24")


def test_names_of_other_projects_are_taken_to_be_in_order(files, caplog):
  for name in ("unnamed", "words"):
    caplog.clear()
    _read(files[name])
    assert "assumed to be in the same order" in caplog.text


def test_a_run_keeps_its_teacher(files):
  *_, teaching = _read(files["unnamed"])
  _read(files["unnamed"], teaching.about)
  with named("the weights have changed since the run began", "unnamed"):
    _read(_EMBEDDED, teaching.about)


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
    ({"weight": 1.5}, "weight is 1.5; it must be between 0 and 1"),
    ({"weight": -0.1}, "weight is -0.1; it must be between 0 and 1"),
    ({"loss": "hard", "temperature": 2.0}, "temperature is 2.0 and has no eff"),
    ({"loss": "mse"}, "choose from kl, cross_entropy, hard"),
  ],
)
def test_values_that_cannot_be(values, words):
  with named("config.teacher.", words):
    Teacher(_apply_linear, **values)


@pytest.mark.parametrize(
  ("key", "text", "others", "needs"),
  [
    ("temperature", "2.0", {"source": ""}, "teacher.source to be set"),
    ("weight", "1.0", {"source": ""}, "teacher.source to be set"),
    ("source", "a", {}, "objective to be 'classification'"),
  ],
)
def test_keys_without_effect(key, text, others, needs):
  given = {f"teacher.{k}": x for k, x in {**others, key: text}.items()}
  if key == "source":
    given["objective"] = "masked_patches"
  with named(f"config.teacher.{key} is ", needs):
    configuration.check_unused(configuration.load("common", given))


# --- whole runs ---


@pytest.mark.nightly
def test_a_run_with_a_teacher_that_is_killed_leaves_no_trace(
  runs, sharing, files, tmp_path
):
  """The teacher is in no checkpoint; another one does not take its place."""
  options = (
    "model.variant=ViT-w16d1m16h2_8",
    "model.distillation_token=True",
    "train.mixup_alpha=0.5",
    "total_steps=4",
    "eval_every=0",
    f"teacher.source={files['unnamed']}",
    "teacher.loss=hard",
  )
  whole, workdir = tmp_path / "whole", tmp_path / "run"
  with crashes.watch(whole, tmp_path / "copies") as moments:
    assert main(runs.train_args(whole, *options)) == 0
  operation = "os.rename checkpoints/4.orbax-checkpoint-tmp checkpoints/4"
  killed = next(m for m in moments if m.is_before(operation))
  shutil.copytree(killed.folder, workdir)
  assert main(runs.train_args(workdir, *options)) == 0
  assert_same_run(workdir, whole)
  assert not [path for path in read_state(whole)[1] if "teacher" in path]
  written = json.loads((workdir / "config.json").read_text())
  assert written["teacher"]["source"] == files["unnamed"]
  written["teacher"]["digest"] = "of another"
  (workdir / "config.json").write_text(json.dumps(written))
  with named("have changed since the run began", "(of another)"):
    vit_jax.train.train(_read_config(runs, options), workdir)


def _read_config(runs, options):
  given = dict(text.split("=", 1) for text in options)
  given["data_dir"] = str(runs.data_dir)
  return configuration.load(str(runs.config), given)
