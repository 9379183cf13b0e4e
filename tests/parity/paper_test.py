"""The configurations are the paper's, and each of them traces."""

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import covering
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_formats

from vit_jax import config as configuration
from vit_jax import files, pretrained, sharding
from vit_jax.data import benchmarks as data_tasks
from vit_jax.errors import UserError
from vit_jax.state import flatten
from vit_jax.tools.paper import data
from vit_jax.train import make_step
from vit_jax.training import objectives, optim

_CONFIGS = Path(__file__).parents[2] / "configs"
_PAPER = data.load()
_SETS = _PAPER["pretraining"]


def _load(spec):
  return configuration.load(str(_CONFIGS / spec))


def _module(file):
  """Returns a configuration file as a module."""
  spec = importlib.util.spec_from_file_location("config_file", _CONFIGS / file)
  module = importlib.util.module_from_spec(spec)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(_CONFIGS)
    spec.loader.exec_module(module)
  return module


def _check(config, numbers, keys):
  """Compares keys of a configuration with the table's of the same name."""
  for key in keys.split():
    assert configuration.flatten(config)[key] == numbers[key.split(".")[-1]], (
      key
    )


# --- Table 3 ---


def _pretrainings():
  """Returns [(row of Table 3, variant, epochs)]."""
  return [
    (row, data.variant_of(model), epochs)
    for row in _PAPER["table3"]["rows"]
    for model in row["models"]
    for epochs in row["epochs"]
  ]


@pytest.mark.parametrize(
  ("row", "variant", "epochs"),
  [
    pytest.param(*given, id=f"{given[1]}-{given[0]['pretraining']}-{given[2]}")
    for given in _pretrainings()
  ],
)
def test_pretraining_is_table_3(row, variant, epochs):
  name = _SETS[row["pretraining"]]["dataset"]
  config = _load(f"pretrain.py:{variant},{name},{epochs}")
  common = _PAPER["table3"]["common"]
  assert (config.train.dataset, config.model.variant) == (name, variant)
  assert (config.total_epochs, config.total_steps) == (epochs, 0)
  _check(config, row, "schedule.base_lr schedule.decay model.dropout_rate")
  _check(config, row, "optimizer.weight_decay optimizer.clip_norm")
  _check(config, common, "optimizer.b1 optimizer.b2 schedule.warmup_steps")
  _check(config, common, "batch_size image_size")
  assert config.optimizer.name == common["optimizer"]
  assert config.optimizer.weight_decay_scaling == "lr"
  assert config.schedule.cooldown_steps == 0
  # What else the paper says of pre-training, or those who did it.
  assert config.loss.name == "sigmoid"
  assert config.model.head_bias_init == -10
  assert (config.model.representation_size == -1) == ("ViT" in variant)
  # What the rates become: the first step has none, the base is reached once
  # warm, and the end is the decay's.
  images = _SETS[row["pretraining"]]["images"]
  steps = configuration.count_steps(config, images)
  assert steps == round(epochs * images / common["batch_size"])
  schedule = optim.make_schedule(**config.schedule, total_steps=steps)
  assert float(schedule(0)) == 0
  peak = float(schedule(common["warmup_steps"]))
  assert peak == pytest.approx(row["base_lr"], rel=1e-5)
  end = 1e-5 if row["decay"] == "linear" else 0
  assert float(schedule(steps)) == pytest.approx(end, abs=1e-9)


def test_what_is_not_in_table_3_is_said_to_be():
  module = _module("pretrain.py")
  in_paper = {
    (variant, _SETS[row["pretraining"]]["dataset"], epochs, row["base_lr"])
    for row, variant, epochs in _pretrainings()
  }
  claimed = {
    (variant, dataset, n, base_lr)
    for dataset, rows in module.TABLE_3.items()
    for variants, (epochs, base_lr) in rows.items()
    for variant, n in itertools.product(variants.split(), epochs)
  }
  assert claimed == in_paper
  others = set(module.list_rows().values()) - claimed
  assert others
  assert all(row[:3] not in {x[:3] for x in in_paper} for row in others)


def test_the_sgd_of_table_7_decays_as_bit_does():
  """BiT adds 1e-4 times the weight to the gradient; momentum sums that up."""
  row, other = (r for r in _PAPER["table7"]["rows"] if r.get("overrides"))
  assert row["overrides"] == other["overrides"]
  overrides = {k: str(x) for k, x in row["overrides"].items()}
  config = configuration.load(
    str(_CONFIGS / "pretrain.py:R50x1,jft"), overrides
  )
  lr = config.schedule.base_lr
  assert lr == 0.03 * config.batch_size / 256
  params = {"kernel": jnp.ones(()), "norm": {"kernel": jnp.ones(())}}
  optimizer = optim.make_optimizer(
    **config.optimizer,
    schedule=lambda _: jnp.asarray(lr),
    base_lr=lr,
    params=params,
  )

  def update(_, both):
    params, state = both
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = optimizer.update(zeros, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  start = (params, optimizer.init(params))
  params, _ = jax.jit(lambda: jax.lax.fori_loop(0, 2000, update, start))()
  weight, velocity = np.float64(1), np.float64(0)
  for _ in range(2000):
    velocity = 0.9 * velocity + 1e-4 * weight
    weight -= lr * velocity
  assert weight == pytest.approx(0.383, abs=5e-4)
  assert float(params["norm"]["kernel"]) == pytest.approx(weight, rel=0.01)


def test_every_model_of_the_tables_has_a_pretraining():
  rows = _module("pretrain.py").list_rows()
  for table in (2, 5, 6, 7, 8, 9):
    for row in _PAPER[f"table{table}"]["rows"]:
      if row.get("reference"):
        continue
      variant = row.get("variant") or data.variant_of(row["name"])
      name = _SETS[row["pretraining"]]["dataset"]
      assert f"{variant},{name},{row['epochs']}" in rows
      # Where that is private, something public stands in.
      if _SETS[row["pretraining"]]["private"]:
        assert f"{variant},imagenet21k" in rows


@pytest.mark.parametrize(
  ("spec", "words"),
  [
    ("pretrain.py:ViT-B_8,jft", "ViT-B_16,jft,7"),
    ("pretrain.py:ViT-B_16", "ViT-B_16,imagenet21k,90"),
    ("finetune.py:ViT-B_16", "oxford_flowers102"),
    ("finetune.py:ViT-B_16,cifar10,big", "'big'"),
    ("finetune.py:ViT-B_16,folder:a,b", "'b', .* in double quotes"),
    ("finetune.py:ViT-X_16,cifar10", "'ViT-X_16' is not a variant .*; did you"),
    (
      "finetune.py:no/such/run,cifar10",
      "nor weights: no checkpoint at no/such",
    ),
    ("photos.py:a/b,ViT-B_61", "ViT-B_16"),
    ("photos.py", "photos.py:FOLDER"),
    ("vtab.py:ViT-B_16,clevr_coun", "did you mean 'vtab:clevr_count'"),
  ],
)
def test_what_no_table_has_is_refused(spec, words):
  with pytest.raises(UserError, match=words) as error:
    _load(spec)
  assert "\n" not in str(error.value)


# --- Table 4 ---

_TRANSFERS = [
  row
  for row in _PAPER["table4"]["rows"]
  if _PAPER["measures"][row["name"]]["kind"] == "finetune"
]


def _check_transfer(config, row):
  common = _PAPER["table4"]["common"]
  assert (config.total_steps, config.total_epochs) == (row["steps"], 0)
  assert config.schedule.base_lr in row["base_lrs"]
  _check(config, common, "schedule.decay optimizer.momentum batch_size")
  _check(config, common, "optimizer.weight_decay optimizer.clip_norm")
  assert config.optimizer.name == common["optimizer"]
  assert config.loss.name == common["loss"]
  assert config.optimizer.lr_multipliers == ()
  # A single new layer, of zeros.
  assert config.model.representation_size == 0
  assert config.model.head_bias_init == 0
  assert config.model.dropout_rate == 0


@pytest.mark.parametrize("row", _TRANSFERS, ids=lambda row: row["name"])
def test_finetuning_is_table_4(row):
  name = _PAPER["measures"][row["name"]]["dataset"]
  config = _load(f"finetune.py:ViT-B_16,{name}")
  _check_transfer(config, row)
  assert config.train.dataset == name
  assert config.image_size == _PAPER["table4"]["common"]["image_size"]
  assert config.ema_decay == 0
  assert config.train.split == "train"
  assert config.eval.split == ("validation" if "imagenet" in name else "test")
  rates = _module("finetune.py").LEARNING_RATES[name]
  assert list(rates) == row["base_lrs"]
  # The sweep sees the same, but for the data.
  percent = 100 - row["held_out_percent"]
  tuning = _load(f"finetune.py:ViT-B_16,{name},held_out")
  assert tuning.train.split == f"train[:{percent}%]"
  assert tuning.eval.split == f"train[{percent}%:]"
  changed = configuration.differences(
    configuration.to_dict(config), configuration.to_dict(tuning)
  )
  assert [text.partition(":")[0] for text in changed] == [
    "eval.split",
    "train.split",
  ]


@pytest.mark.parametrize(
  "model", _PAPER["table4"]["table2_imagenet"]["image_size"]
)
def test_imagenet_in_table_2_is_larger_and_averaged(model):
  special = _PAPER["table4"]["table2_imagenet"]
  size = special["image_size"][model]
  config = _load(f"finetune.py:{data.variant_of(model)},imagenet2012,{size}")
  row = next(r for r in _TRANSFERS if r["name"] == "ImageNet")
  _check_transfer(config, row)
  assert config.image_size == size
  assert config.ema_decay == special["ema_decay"]


def test_large_patches_are_whole():
  # 384 pixels hold 27 patches of 14; the paper's convolution drops the rest.
  for file in ("finetune.py:ViT-H_14,cifar10", "vtab.py:ViT-H_14,dtd"):
    assert _load(file).image_size == 384 // 14 * 14 == 378


@pytest.fixture
def foreign(tmp_path):
  """A folder of Hugging Face's with a comma and a colon in its name."""
  weights = torch_formats.make_weights(
    0, (32, 48), representation_size=-1, activation="gelu_erf"
  )
  pretrained.write(weights, str(tmp_path / "a,b:c"), "hf")
  return tmp_path / "a,b:c"


def test_finetuning_starts_from_any_weights(foreign):
  spec = f'finetune.py:"{foreign}","cifar10=0.7,beans=0.3"'
  config, plain = _load(spec), _load("finetune.py:ViT-B_16,cifar10")
  assert config.init_from == str(foreign)
  assert config.train.dataset == "cifar10=0.7,beans=0.3"
  assert (config.total_steps, config.schedule.warmup_steps) == (2500, 200)
  assert (config.eval.split, config.schedule.base_lr) == ("test", 0.01)
  assert config.image_size == (32, 48)
  weights = pretrained.read(str(foreign))
  assert weights.model["representation_size"] == 24
  pretrained.check_numerics(weights, config.model)
  changed = {
    key
    for key, x in configuration.flatten(config).items()
    if x != configuration.flatten(plain)[key]
  }
  assert {key for key in changed if key.startswith("model.")} == {
    "model.variant",
    "model.activation",
  }
  assert changed >= {"init_from", "total_steps", "train.dataset"}
  config = _load(f"{spec},64,held_out")
  assert (config.image_size, config.eval.split) == (64, "train[90%:]")
  # The paper's data sets keep their numbers.
  config = _load(f'finetune.py:"{foreign}",cifar100')
  assert config.total_steps == 10_000
  assert config.schedule.base_lr == plain.schedule.base_lr


def test_finetuning_starts_from_a_run_without_reading_it(tmp_path):
  """A run's own choices, such as dropout, are not taken over."""
  given = {
    "model.variant": "ViT-S_16",
    "model.classifier": "gap",
    "model.dropout_rate": "0.1",
    "model.scan": "True",
    "image_size": "160",
  }
  config = configuration.load(str(_CONFIGS / "common.py"), given)
  (tmp_path / "checkpoints" / "5").mkdir(parents=True)
  run = {"config": configuration.to_dict(config), "class_names": ["a"]}
  files.write_json(tmp_path / "config.json", run)
  found = _load(f"finetune.py:{tmp_path},beans")
  assert found.model.variant == "ViT-S_16"
  assert found.model.classifier == "gap"
  assert found.model.dropout_rate == 0
  assert not found.model.scan
  assert found.image_size == 160


def test_the_recipe_of_mae():
  """arXiv 2111.06377, Table 9, and its code's numbers for ViT-B."""
  config = _load("finetune.py:ViT-B_16,imagenet2012,224,adamw")
  configuration.check_unused(config)
  optimizer, blr = config.optimizer, 5e-4
  assert (optimizer.name, optimizer.weight_decay) == ("adam", 0.05)
  assert (optimizer.b1, optimizer.b2) == (0.9, 0.999)
  assert optimizer.weight_decay_scaling == "lr"
  assert (optimizer.layer_decay, optimizer.clip_norm) == (0.65, 0)
  assert config.schedule.base_lr == blr * config.batch_size / 256
  assert config.schedule.warmup_steps / config.total_steps == 5 / 100
  assert config.schedule.decay == "cosine"
  assert (config.train.mixup_alpha, config.train.cutmix_alpha) == (0.8, 1)
  assert config.model.stochastic_depth_rate == config.loss.label_smoothing
  assert config.loss.label_smoothing == 0.1


@pytest.mark.ci
def test_a_configuration_leaves_the_devices_alone():
  """Several processes connect after they have read it."""
  code = (
    "from jax._src import xla_bridge; from vit_jax import config; "
    "config.load('finetune.py:ViT-N_8-digits,beans'); "
    "assert not xla_bridge.backends_are_initialized()"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_vtab_is_the_same_for_every_task():
  row = next(
    row for row in _PAPER["table4"]["rows"] if row["name"].startswith("VTAB")
  )
  for title, name in _PAPER["vtab"]["tasks"].items():
    config = _load(f"vtab.py:ViT-L_16,{name}")
    _check_transfer(config, row)
    task = data_tasks.find_task(f"vtab:{name}")
    assert task.title == title
    assert title in _PAPER["vtab"]["groups"][task.group]
    assert config.image_size == _PAPER["table4"]["common"]["image_size"]
    assert config.train.dataset == task.name
    assert config.train.split == "train800val200"
    assert config.eval.split == "test"
    assert ("flip_lr" in config.train.preprocess) == task.flip
    assert ("random_crop" in config.train.preprocess) == task.crop
  listed = [task.name for task in data_tasks.list_tasks("vtab:")]
  assert listed == [f"vtab:{x}" for x in _PAPER["vtab"]["tasks"].values()]


# --- every configuration traces ---

_CLASSES = {x["dataset"]: x["classes"] for x in _SETS.values()}
_CLASSES |= {"cifar100": 100, "oxford_iiit_pet": 37, "digits": 10}
_CLASSES |= {"jft_like": 100}
# One of each file and kind; the others differ in depth, width and classes.
_QUICK = {
  "quickstart_pretrain.py",
  "quickstart_finetune.py",
  "vtab_mini.py:ViT-N_8,mini:count",
}
# One of each other file; all would take minutes.
_CI = {
  "finetune.py:ViT-B_32,oxford_iiit_pet",
  "masked.py:ViT-B_32,jft",
  "quickstart_masked.py",
  "vtab.py:ViT-B_32,clevr_count",
}


def _list_specs():
  """Returns what differs in more than numbers, the slow ones marked."""
  rows = _module("pretrain.py").list_rows().values()
  variants = {row[0] for row in rows}
  specs = {f"pretrain.py:{row[0]},{row[1]}" for row in rows}
  specs |= {f"finetune.py:{variant},cifar100" for variant in variants}
  specs |= {f"masked.py:{x},jft" for x in variants if x.startswith("ViT-")}
  specs |= {"finetune.py:ViT-L_16,imagenet2012,512"}
  specs |= {"finetune.py:ViT-H_14,imagenet2012,518"}
  return [
    *sorted(_QUICK),
    *(pytest.param(x, marks=pytest.mark.ci) for x in sorted(_CI)),
    *covering.nightly(*sorted(specs - _QUICK - _CI)),
  ]


def _count_classes(dataset):
  task = data_tasks.find_task(dataset)
  return task.num_classes if task and ":" in dataset else _CLASSES[dataset]


@pytest.mark.parametrize("spec", _list_specs())
def test_every_configuration_traces(spec):
  """Traces a configuration's whole step and lays its state out."""
  config = _load(spec)
  if "ViT" in config.model.variant:
    # One block stands for all of them: the unrolled model has the same, and
    # its own tests.
    with config.unlocked():
      config.model.scan = True
  dataset = config.train.dataset
  classes = [str(i) for i in range(_count_classes(dataset))]
  objective = objectives.create(config, classes)
  step, init = make_step(config, objective, total_steps=20_000)
  state = jax.eval_shape(init, jax.random.key(0))
  image_size = objective.model.image_size
  batch = {
    "image": jax.ShapeDtypeStruct((8, *image_size, 3), jnp.uint8),
    "labels": jax.ShapeDtypeStruct((8, 3), jnp.int32),
  }
  after, values = jax.eval_shape(step, state, batch)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert values["loss"].shape == ()
  for path, x in flatten(state).items():
    sharding.partition_spec(path, x.shape, fsdp=1)
