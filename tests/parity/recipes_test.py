"""The recipes are the public ones, and each of them traces.

The values are those of the public configurations, commands and papers, written
here in their units: batches a GPU, rates of 256 images, epochs.
"""

import math
from pathlib import Path

import covering
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_weights

from vit_jax import config as configuration
from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.pretrained.warmstart import warm_start
from vit_jax.state import flatten
from vit_jax.tools import noisy_student
from vit_jax.train import make_step
from vit_jax.training import objectives, optim

_CONFIGS = Path(__file__).parents[2] / "configs"
_IMAGENET = 1_281_167


def _load(spec):
  config = configuration.load(str(_CONFIGS / spec))
  configuration.check_ranges(config)
  configuration.check_unused(config)
  return config


def _check(config, values):
  """Compares keys, written with __ for their dots."""
  flat = configuration.flatten(config)
  for key, value in values.items():
    assert flat[key.replace("__", ".")] == pytest.approx(value), key


def _check_rates(config, rate, images=_IMAGENET):
  """Compares the schedule with rate(step, steps) at some steps."""
  steps = configuration.count_steps(config, images)
  schedule = optim.make_schedule(**config.schedule, total_steps=steps)
  warm = config.schedule.warmup_steps
  for step in (0, warm // 2, warm, (warm + steps) // 2, steps - 1):
    expected = rate(step, steps)
    # f32 has a step of 2e-8 near 0.128.
    assert float(schedule(step)) == pytest.approx(expected, 2e-4, 1e-8), step
  return steps


def _cosine(base, warm):
  def rate(step, steps):
    if step < warm:
      return base * step / warm
    return base * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

  return rate


# --- big_vision ---

# Of big_vision's tables: randaug's magnitude and mixup's p of a level.
_LEVELS = {
  "none": (None, 0.0),
  "light1": (0, 0.0),
  "light2": (10, 0.2),
  "medium1": (15, 0.2),
  "medium2": (15, 0.5),
  "strong1": (20, 0.5),
  "strong2": (20, 0.8),
}
_LEVEL_OF = {
  "imagenet2012": "light1 light2 medium2 medium2 medium2 medium2",
  "imagenet21k": "none none light1 light2 light2 medium2",
}
_BIG_VISION = {
  "optimizer__name": "adam",
  "optimizer__b1": 0.9,
  "optimizer__b2": 0.999,
  "optimizer__accumulator_dtype": "bfloat16",
  "optimizer__weight_decay": 1e-4,
  "optimizer__weight_decay_scaling": "schedule",
  "optimizer__weight_decay_params": ".*/kernel",
  "optimizer__clip_norm": 1.0,
  "image_size": 224,
  "model__dropout_rate": 0,
  "model__stochastic_depth_rate": 0,
  "eval__preprocess": "resize_small(size * 8 / 7)|central_crop(size)",
}


def _check_level(config, level):
  magnitude, p = _LEVELS[level]
  crop, *ops = preprocess.parse(config.train.preprocess, 224)
  assert crop == ("inception_crop", {"size": (224, 224)})
  randaug = {"num_ops": 2, "magnitude": magnitude, "contrast": "augreg"}
  expected = [] if magnitude is None else [("randaug", randaug)]
  assert ops == [("flip_lr", {}), *expected]
  assert config.train.mixup_alpha == p


@pytest.mark.parametrize("epochs", [90, 150, 300])
def test_plain_vit_is_vit_s16_i1k(epochs):
  config = _load(f"plain_vit.py:{epochs}")
  _check(config, _BIG_VISION)
  _check_level(config, "light2")
  values = {
    "batch_size": 1024,
    "loss__name": "softmax",
    "model__variant": "ViT-S_16",
    "model__classifier": "gap",
    "model__pos_embedding": "sincos2d",
    "model__representation_size": -1,
    "model__head_bias_init": 0,
    "train__split": "train[:99%]",
    "eval__split": "train[99%:]",
    "evals__val__split": "validation",
  }
  _check(config, values)
  images = round(0.99 * _IMAGENET)
  steps = _check_rates(config, _cosine(1e-3, 10_000), images)
  assert steps == pytest.approx(epochs * images / 1024, abs=1)


@pytest.mark.parametrize("dataset", _LEVEL_OF)
def test_augreg_is_big_visions(dataset):
  names = "ViT-Ti_16 ViT-S_32 ViT-S_16 ViT-B_32 ViT-B_16 ViT-L_16"
  is_21k = dataset == "imagenet21k"
  for variant, level in zip(
    names.split(), _LEVEL_OF[dataset].split(), strict=True
  ):
    config = _load(f"augreg.py:{variant},{dataset}")
    _check(config, _BIG_VISION)
    _check_level(config, level)
    values = {
      "batch_size": 4096,
      "total_epochs": 300,
      "loss__name": "sigmoid" if is_21k else "softmax",
      "model__variant": variant,
      "model__classifier": "token",
      "model__pos_embedding": "learned",
      "model__representation_size": 0 if is_21k else -1,
      "model__head_bias_init": -10 if is_21k else 0,
      "train__dataset": dataset,
      "train__split": "train[51200:]" if is_21k else "train[:99%]",
    }
    _check(config, values)
    _check_rates(config, _cosine(1e-3, 10_000))
  for level in _LEVELS:
    _check_level(_load(f"augreg.py:ViT-B_16,{dataset},{level}"), level)


# --- DeiT III ---

# Of the commands in README_revenge.md: nodes x GPUs x batch, rate, epochs,
# input size, drop-path. H's input sizes are less what fills no patch of 14.
_REST = 64  # 2048 images are not three times as many of 64 devices'
_DEIT3 = {
  "S": (8 * 256 + _REST, 4e-3, 800, 224, 0.05),
  "B": (8 * 256 + _REST, 3e-3, 800, 192, 0.2),
  "L": (4 * 8 * 64 + _REST, 3e-3, 800, 192, 0.45),
  "H": (4 * 8 * 64 + _REST, 3e-3, 800, 160 - 160 % 14, 0.6),
  "S,imagenet21k": (2 * 8 * 128, 1e-3, 240, 224, 0.05),
  "B,imagenet21k": (4 * 8 * 64, 1e-3, 240, 224, 0.1),
  "L,imagenet21k": (4 * 8 * 64, 1e-3, 240, 224, 0.3),
  "H,imagenet21k": (4 * 8 * 64, 1e-3, 90, 128 - 128 % 14, 0.5),
  "S,finetune": (8 * 64, 1e-5, 20, 384, 0.0),
  "B,finetune": (8 * 64, 1e-5, 20, 224, 0.2),
  "L,finetune": (8 * 64, 1e-5, 20, 224, 0.45),
  "H,finetune": (2 * 8 * 32, 1e-5, 20, 224, 0.55),
  "S,imagenet21k,finetune": (2 * 8 * 128, 3e-4, 50, 224, 0.05),
  "B,imagenet21k,finetune": (4 * 8 * 64, 3e-4, 50, 224, 0.15),
  "L,imagenet21k,finetune": (4 * 8 * 64, 3e-4, 50, 224, 0.4),
  "H,imagenet21k,finetune": (4 * 8 * 64, 3e-4, 50, 224, 0.45),
}
_RANDOM_CROP = "inception_crop(size, 8)|flip_lr|"
_THREE_AUGMENT = "three_augment|color_jitter(0.3)"
# What else the commands of a kind have in common: from scratch on ImageNet;
# there after that; with ImageNet-21k.
_SCRATCH = {
  "optimizer__name": "lamb",
  "optimizer__weight_decay": 0.05,
  "loss__name": "sigmoid",
  "loss__label_smoothing": 0,
  "train__mixup_alpha": 0.8,
  "train__repeats": 3,
  "train__preprocess": _RANDOM_CROP + _THREE_AUGMENT,
}
_FINETUNE = {
  "optimizer__name": "adam",
  "optimizer__eps": 1e-8,
  "optimizer__weight_decay": 0.1,
  "optimizer__clip_norm": 0,
  "loss__name": "softmax",
  "loss__label_smoothing": 0.1,
  "train__mixup_alpha": 0.8,
  "train__repeats": 1,
  "train__preprocess": f"{_RANDOM_CROP}randaug(2, 9)",
}
_21K = {
  "optimizer__name": "lamb",
  "optimizer__eps": 1e-8,
  "optimizer__weight_decay": 0.02,
  "optimizer__clip_norm": 1,  # max_grad_norm of FusedLAMB
  "loss__name": "softmax",
  "loss__label_smoothing": 0.1,
  "train__mixup_alpha": 0,
  "train__repeats": 1,
  "train__preprocess": f"simple_crop(size)|flip_lr|{_THREE_AUGMENT}",
}
_DEIT3_MODEL = {
  "train__cutmix_alpha": 1,
  "optimizer__b1": 0.9,
  "optimizer__b2": 0.999,
  "optimizer__weight_decay_scaling": "lr",
  "optimizer__weight_decay_params": ".*/kernel",
  "model__classifier": "token",
  "model__prefix_positions": "none",
  "model__layer_scale_init": 1e-4,
  "model__activation": "gelu_erf",
  "model__layer_norm_epsilon": 1e-6,
  "model__dropout_rate": 0,
  "ema_decay": 0,
}


@pytest.mark.parametrize("arg", _DEIT3)
def test_deit3_is_the_readmes(arg):
  config = _load(f"deit3.py:{arg}")
  batch, rate, epochs, size, drop_path = _DEIT3[arg]
  values = {
    "batch_size": batch,
    "total_epochs": epochs,
    "image_size": size,
    "model__variant": f"ViT-{arg[0]}_{14 if arg[0] == 'H' else 16}",
    "model__stochastic_depth_rate": drop_path,
    "train__dataset": "imagenet21k" if arg.endswith("21k") else "imagenet2012",
  }
  _check(config, values | _DEIT3_MODEL)
  kind = _21K if "21k" in arg else _FINETUNE if "," in arg else _SCRATCH
  _check(config, kind)
  assert size % variants.parse(config.model.variant).patch_size == 0
  preprocess.parse(config.train.preprocess, size)
  images = _IMAGENET
  if arg.endswith("21k"):
    # Within 1 %: which of its images there are depends on who counts.
    images, warm = 14_100_000, config.schedule.warmup_steps
    assert warm == pytest.approx(5 * 14_197_122 / batch, rel=0.01)
  else:
    warm = round(5 * images / batch)
  # The fine-tuning's cosine is from 1e-5 to the least rate, which is that.
  rate_at = _cosine(rate, warm)
  if rate == 1e-5:
    rate_at = lambda step, _: rate * min(1, step / warm)  # noqa: E731
  _check_rates(config, rate_at, images)


@pytest.mark.ci
def test_a_sum_over_the_classes_moves_lamb_as_the_mean_does():
  """Clipped and not, for 5 steps, with gradients of the sum 1,000 times."""
  config = _load("deit3.py:B")
  mean = {**config.optimizer, "clip_norm": 1.0, "eps": 1e-8}
  start, *draws = np.random.default_rng(0).normal(size=(6, 12))
  sizes = np.array([1e-4, 3.0, 0.02, 50.0, 1e-3])  # of the mean's gradients
  gradients = sizes[:, None] * draws
  ours = _move(dict(config.optimizer), 3e-3, start, 1000 * gradients)
  theirs = _move(mean, 3e-3, start, gradients)
  assert np.abs(theirs).max() > 1e-3
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def _move(options, rate, start, gradients):
  """Returns the updates f32[steps n] of one kernel from f[n]."""
  params = {"head": {"kernel": jnp.asarray(start, jnp.float32)}}
  params["head"]["bias"] = jnp.zeros(())  # RMSProp's decay wants one
  optimizer = optim.make_optimizer(
    **options,
    schedule=lambda _: jnp.float32(rate),
    base_lr=rate,
    params=params,
  )

  def step(state, gradient):
    params, opt_state = state
    tree = {"head": {"kernel": gradient, "bias": jnp.zeros(())}}
    updates, opt_state = optimizer.update(tree, opt_state, params)
    params = jax.tree.map(jnp.add, params, updates)
    return (params, opt_state), flatten(updates)["head/kernel"]

  state = (params, optimizer.init(params))
  gradients = jnp.asarray(gradients, jnp.float32)
  return np.asarray(
    jax.jit(jax.lax.scan, static_argnums=0)(step, state, gradients)[1]
  )


# --- MAE ---


@pytest.mark.parametrize(
  ("size", "patch", "epochs", "blr", "layer_decay", "drop_path"),
  [
    ("B", 16, 100, 5e-4, 0.65, 0.1),
    ("L", 16, 50, 1e-3, 0.75, 0.2),
    ("H", 14, 50, 1e-3, 0.75, 0.3),
  ],
)
def test_mae_is_finetune_md(size, patch, epochs, blr, layer_decay, drop_path):
  config = _load(f"mae.py:{size}")
  values = {
    "batch_size": 4 * 8 * 32,
    "image_size": 224,
    "model__variant": f"ViT-{size}_{patch}",
    "model__classifier": "gap",
    "model__class_token": True,
    "model__final_norm": "pooled",
    "model__stochastic_depth_rate": drop_path,
    "optimizer__name": "adam",
    "optimizer__weight_decay": 0.05,
    "optimizer__layer_decay": layer_decay,
    "optimizer__clip_norm": 0,
    "loss__name": "softmax",
    "loss__label_smoothing": 0.1,
    "train__mixup_alpha": 0.8,
    "train__cutmix_alpha": 1,
    "train__preprocess": f"{_RANDOM_CROP}randaug(2, 9)",
    "total_steps": round(epochs * _IMAGENET / 1024),
  }
  _check(config, values)
  _check_rates(config, _cosine(blr * 1024 / 256, round(5 * _IMAGENET / 1024)))


@pytest.mark.ci
def test_mae_starts_from_its_files_with_a_norm_after_the_mean(tmp_path):
  file = tmp_path / "mae"
  pretrained.write(
    random_weights(
      "ViT-w32d2m64h2_16", image_size=224, classifier="gap", num_classes=0,
      class_token=True, activation="gelu_erf",
    ),
    str(file), "hf",
  )  # fmt: skip
  config = _load(f"mae.py:B,{file}")
  assert config.init_from == str(file)
  assert config.model.class_token
  weights = pretrained.read(str(file))
  pretrained.check_numerics(weights, config.model)
  model = objectives.create(config, ["a", "b"]).model
  target = flatten(jax.eval_shape(model.init, jax.random.key(0)))
  _, report = warm_start(
    target, weights.params, old_grid=model.grid, new_grid=model.grid,
    same_classes=False, source="the file",
  )  # fmt: skip
  norm = [f"{name} 32" for name in ("fc_norm/bias", "fc_norm/scale")]
  heads = ["head/bias 2", "head/kernel 32x2"]
  assert sorted(report.new) == [*norm, *heads]
  names = [path.partition(" ")[0] for path in report.dropped]
  assert names == [f"Transformer/encoder_norm/{x}" for x in ("bias", "scale")]


# --- Noisy Student ---

# Resolution, dropout, RandAugment's magnitude, unlabel_ratio, train_ratio of
# train.sh and efficientnet_builder.py; L2 is the paper's.
_STUDENTS = {
  "B0": (224, 0.2, None, 1, 2),
  "B1": (240, 0.2, None, 3, 2),
  "B2": (260, 0.3, 6, 3, 2),
  "B3": (300, 0.3, 12, 3, 2),
  "B4": (380, 0.4, 15, 3, 2),
  "B5": (456, 0.4, 18, 3, 1),
  "B6": (528, 0.5, 24, 3, 1),
  "B7": (600, 0.5, 27, 3, 1),
  "L2": (475, 0.5, 27, 14, 1),
}
_EPOCH = _IMAGENET / 2048


def _noisy(epochs, ratio, train_ratio):
  """Returns the learning rate of main.py and utils.py at a step."""

  def rate(step, _):
    base = 0.016 * 2048 / 256
    if step < int(5 * _EPOCH):
      return base * step / int(5 * _EPOCH)
    return base * 0.97 ** (step // (_EPOCH * 2.4 * train_ratio))

  return rate


@pytest.mark.parametrize("model", _STUDENTS)
def test_noisy_student_is_the_papers(model):
  size, dropout, magnitude, ratio, train_ratio = _STUDENTS[model]
  student = _load(f"noisy_student.py:{model},student1")
  values = {
    "image_size": size,
    "batch_size": 2048 * (1 + ratio),
    "total_steps": round(350 * train_ratio * _EPOCH),
    "model__variant": f"EfficientNet-{model}",
    "model__dropout_rate": dropout,
    "model__stochastic_depth_rate": 0.2,
    "optimizer__name": "rmsprop",
    "optimizer__b2": 0.9,
    "optimizer__momentum": 0.9,
    "optimizer__weight_decay_scaling": "gradient",
    "optimizer__clip_norm": 0,
    "loss__name": "softmax",
    "loss__label_smoothing": 0.1,
    "ema_decay": 0.9999,
    "ema_warmup": True,
    "train__dataset": "imagenet2012",
    "train__split": "train",
    "eval__split": "validation",
  }
  _check(student, values)
  _check_rates(student, _noisy(350 * train_ratio, ratio, train_ratio))
  crop, _, *randaug = preprocess.parse(student.train.preprocess, size)
  assert crop[1] == {"size": (size, size), "area_min": 8}
  assert [arguments["magnitude"] for _, arguments in randaug] == (
    [] if magnitude is None else [magnitude]
  )
  resize, _ = preprocess.parse(student.eval.preprocess, size)
  assert resize[1]["smaller_size"] == size + 32
  # Its teacher: a model of the same size, and the first one of L2 a B7.
  teacher = _load(f"noisy_student.py:{model},teacher")
  of_teacher = "B7" if model == "L2" else model
  values |= {
    "model__variant": f"EfficientNet-{of_teacher}",
    "image_size": _STUDENTS[of_teacher][0],
    "batch_size": 2048,
    "total_steps": round(350 * _EPOCH),
    "optimizer__eps": 1e-3,
    "optimizer__weight_decay": 1e-5,
  }
  _check(teacher, values)
  _check_rates(teacher, _noisy(350, 0, 1))


def test_the_loop_of_l2_is_the_papers():
  loop = _load_loop("L2")
  students = [f"student{i}" for i in (1, 2, 3)]
  assert list(loop.stages) == ["teacher", *students, "finetune"]
  assert list(loop.ratio) == [14, 14, 28]
  assert (loop.min_confidence, loop.per_class) == (0.3, 130_000)
  assert (loop.soft, loop.balance, loop.dataset) == (True, True, "jft")
  for student, ratio in zip(students, loop.ratio, strict=True):
    config = _load(f"noisy_student.py:L2,{student}")
    assert config.batch_size == 2048 * (1 + ratio)
    assert config.optimizer.eps == pytest.approx(1e-3 / (1 + ratio) ** 2)
    assert config.image_size == 475
  last = _load("noisy_student.py:L2,finetune")
  assert (last.image_size, last.batch_size) == (800, 2048)
  assert last.total_steps == round(1.5 * _EPOCH)
  assert last.train.preprocess == last.eval.preprocess  # unaugmented
  expected = 0.128 * 0.97 ** int(348.5 / 2.4)
  _check_rates(last, lambda *_: expected)
  # Repeats of L2's first three stages are fixed, with the stem.
  assert last.optimizer.lr_multipliers[0].endswith(
    "block([01]\\d|2[0-7]))/.*=0"
  )
  assert sum(math.ceil(5.3 * repeats) for repeats in (1, 2, 2)) == 28


def test_the_command_takes_the_loop(tmp_path):
  """Every stage passes the checks before a run, with its data put in."""
  spec = f"{_CONFIGS}/noisy_student.py:L2"
  loop, configs = noisy_student.load(spec, {})
  *_, student, last = noisy_student.plan(loop, configs, tmp_path)
  labels = f"pseudo:{tmp_path}/labels_student3"
  assert student.config.train.dataset == f"imagenet2012=1,{labels}=28.0"
  assert last.config.init_from == str(tmp_path / "student3")


def _load_loop(arg):
  return configuration.load(str(_CONFIGS / f"noisy_student.py:{arg}"))


def test_the_unlabelled_images_may_be_others():
  assert _load_loop("B0,jft_like,loop").dataset == "jft_like"
  assert _load_loop("B0,images:a,b,loop").dataset == "images:a,b"
  assert _load_loop("B0").to_dict() == _load_loop("B0,jft,loop").to_dict()
  assert _load_loop("B0").ratio == 1
  assert tuple(_load_loop("B0").stages) == ("teacher", "student1")


def test_a_mean_over_all_images_moves_rmsprop_as_the_sum_of_two():
  """The published loss is 1 + ratio times ours, with L2 regularisation."""
  ratio, decay, momentum, epsilon = 14, 1e-5, 0.9, 1e-3
  config = _load("noisy_student.py:L2,student1")
  gradients = np.random.default_rng(0).normal(0.02, 0.03, 400)
  mean = gradients[:, None] / (1 + ratio)
  found = _move(dict(config.optimizer), 0.01, [3.0], mean)[:, 0]
  # TensorFlow 1's RMSPropOptimizer, in float64; past the first updates, which
  # remember that the mean square begins at 1.
  weights = 3.0 + np.append(0, np.cumsum(found)[:-1])
  square, velocity, theirs = 1.0, 0.0, []
  for gradient, weight in zip(gradients, weights, strict=True):
    total = gradient + decay * weight
    square = 0.9 * square + 0.1 * total**2
    velocity = momentum * velocity + 0.01 * total / math.sqrt(square + epsilon)
    theirs.append(-velocity)
  np.testing.assert_allclose(found[250:], theirs[250:], rtol=1e-4, atol=1e-6)


# --- mistakes, and every recipe traces ---


@pytest.mark.parametrize(
  ("spec", "words"),
  [
    ("plain_vit.py:100", "90, 150, 300"),
    ("augreg.py:ViT-B_16", "imagenet2012 or imagenet21k"),
    ("augreg.py:ViT-B_16,imagenet2012,mild", "medium1"),
    ("augreg.py:ViT-H_14,imagenet2012,none", "ViT-L_16"),
    ("augreg.py:ViT-B_16,cifar10,none", "imagenet2012 or"),
    ("augreg.py:ViT-B_16,imagenet2012,none,x", "augreg.py:VARIANT|is not"),
    ("deit3.py:G", "one of S, B, L, H"),
    ("deit3.py:B,finetune,imagenet21k", "is not deit3.py:SIZE"),
    ("mae.py:S", "one of B, L, H"),
    ("noisy_student.py:B9,teacher", "one of B0"),
    ("noisy_student.py:B0,student2", "only L2 has more than one student"),
    ("noisy_student.py:B0,finetune", "only L2"),
    ("noisy_student.py:techer", "STAGE loop or one of teacher"),
  ],
)
def test_what_no_recipe_has_is_refused(spec, words):
  with pytest.raises(UserError, match=words) as error:
    configuration.load(str(_CONFIGS / spec))
  assert "\n" not in str(error.value)


def _list_specs():
  """Returns one recipe of each kind; larger models run nightly."""
  quick = ["plain_vit.py:90", "deit3.py:S", "mae.py:B"]
  quick += ["augreg.py:ViT-B_32,imagenet21k", "noisy_student.py:B0,student1"]
  rest = [f"deit3.py:{x}" for x in _DEIT3] + ["mae.py:L", "mae.py:H"]
  rest += [f"noisy_student.py:{x},student1" for x in _STUDENTS]
  rest += ["noisy_student.py:L2,finetune", "augreg.py:ViT-L_16,imagenet2012"]
  return [
    *quick,
    *covering.nightly(*(x for x in rest if x not in quick)),
  ]


@pytest.mark.ci
@pytest.mark.parametrize("spec", _list_specs())
def test_every_recipe_traces(spec):
  """Traces the whole step of a recipe, at its size."""
  config = _load(spec)
  if "ViT" in config.model.variant:  # one block stands for all of them
    with config.unlocked():
      config.model.scan = True
  count = 21_843 if config.train.dataset == "imagenet21k" else 1000
  objective = objectives.create(config, [str(i) for i in range(count)])
  step, init = make_step(config, objective, total_steps=600_000)
  state = jax.eval_shape(init, jax.random.key(0))
  size = objective.model.image_size
  batch = {
    "image": jax.ShapeDtypeStruct((8, *size, 3), jnp.uint8),
    "labels": jax.ShapeDtypeStruct((8, 1), jnp.int32),
  }
  after, values = jax.eval_shape(step, state, batch)
  same = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == same
  assert values["loss"].shape == ()
  if "EfficientNet" in config.model.variant:
    paths = list(flatten(state.params))
    decayed = optim.match("params", config.optimizer.weight_decay_params, paths)
    # All but batch normalisation, and the pixels' mean and std.
    norms = {path for path in paths if "_norm/" in path or "pixels/" in path}
    assert decayed == {*paths} - norms
