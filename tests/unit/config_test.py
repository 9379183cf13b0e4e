"""Configurations: overrides, differences, durations, the defaults."""

import inspect
import re
import sys
from pathlib import Path

import ml_collections
import pytest
from mistakes import named

from vit_jax import config as configuration
from vit_jax import data, models
from vit_jax.data import preprocess
from vit_jax.errors import UserError
from vit_jax.training import inputs, losses, optim, run_folder

_CONFIGS = Path(__file__).parents[2] / "configs"
_COMMON = str(_CONFIGS / "common.py")


def _load(**overrides):
  given = {key.replace("__", "."): text for key, text in overrides.items()}
  return configuration.load(_COMMON, given)


# --- files ---


def test_names_of_the_configurations(tmp_path, monkeypatch):
  """Wherever it starts; a file that is there comes first."""
  arg = "ViT-B_16,cifar100"
  wanted = configuration.load(f"{_CONFIGS}/finetune.py:{arg}")
  monkeypatch.chdir(tmp_path)
  for name in ("finetune", "finetune.py", "configs/finetune.py"):
    assert configuration.load(f"{name}:{arg}") == wanted

  def check_mistake(name, meant):
    with named(f"; did you mean '{meant}'"):
      configuration.load(name)

  check_mistake("finetun", "finetune")
  check_mistake("configs/finetun.py", "finetune")
  (tmp_path / "finetune.py").write_text("get_config = None")
  assert configuration.load(f"finetune:{arg}") == wanted
  with pytest.raises(UserError, match=r"finetune\.py failed"):
    configuration.load(f"finetune.py:{arg}")
  check_mistake("./finetun.py", "finetune.py")
  with pytest.raises(UserError, match="no configuration file 'mine/finetune'"):
    configuration.load("mine/finetune")


def test_neighbours_of_a_configuration_are_forgotten(tmp_path):
  for folder in ("a", "b"):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "common.py").write_text(f"NAME = {folder!r}")
    (tmp_path / folder / "mine.py").write_text(
      "import ml_collections\n"
      "def get_config():\n"
      "  from common import NAME\n"
      "  return ml_collections.ConfigDict({'name': NAME})\n"
    )
  before = {**sys.modules, "common": sys}  # of somebody else
  sys.modules["common"] = sys
  try:
    for folder in ("a", "b", "a"):
      config = configuration.load(str(tmp_path / folder / "mine.py"))
      assert config.name == folder
    assert sys.modules == before
  finally:
    del sys.modules["common"]


# --- overrides ---


@pytest.mark.parametrize(
  ("key", "text", "value"),
  [
    ("batch_size", "64", 64),
    ("total_epochs", "0.5", 0.5),
    ("schedule.base_lr", "3e-4", 3e-4),
    ("optimizer.eps", "1", 1.0),
    ("model.scan", "false", False),
    ("train.split", "train[:800]+validation[:200]", None),
    ("train.preprocess", "resize(size)|flip_lr", None),
    ("loss.name", "1", "1"),
    ("init_from", "runs/pretrain", "runs/pretrain"),
    ("eval.dataset", "folder:images,a=0.5", None),
    ("image_size", "384", 384),
    ("image_size", "(224,448)", (224, 448)),
    ("image_size", "224,448", (224, 448)),
    (
      "optimizer.lr_multipliers",
      "('head/.*=10','.*=0')",
      ("head/.*=10", ".*=0"),
    ),
    ("optimizer.lr_multipliers", "['head/.*=10']", ("head/.*=10",)),
    ("optimizer.lr_multipliers", "()", ()),
  ],
)
def test_overrides_are_typed(key, text, value):
  config = configuration.load(_COMMON, {key: text})
  found = configuration.flatten(config)[key]
  value = text if value is None else value
  assert found == value
  assert type(found) is type(value)
  # Nothing else has changed.
  defaults = configuration.flatten(configuration.load(_COMMON))
  others = {k: v for k, v in configuration.flatten(config).items() if k != key}
  del defaults[key]
  assert others == defaults


@pytest.mark.parametrize(
  ("key", "text", "words"),
  [
    ("batch_size", "many", "config.batch_size is int, such as 4096; 'many'"),
    ("batch_size", "0.5", "config.batch_size is int"),
    ("batch_size", "True", "config.batch_size is int"),
    ("schedule.base_lr", "fast", "config.schedule.base_lr is float"),
    ("schedule.base_lr", "true", "config.schedule.base_lr is float"),
    ("model.scan", "1", "config.model.scan is bool, such as False; '1' is not"),
  ],
)
def test_values_of_another_type_are_refused(key, text, words):
  with named(words):
    configuration.load(_COMMON, {key: text})


@pytest.mark.parametrize(
  ("key", "meant"),
  [
    ("batchsize", "batch_size"),
    ("optimiser.name", "optimizer.name"),
    ("base_lr", "schedule.base_lr"),
  ],
)
def test_unknown_keys_are_refused(key, meant):
  with named(f"unknown config key {key!r}; did you mean {meant!r}?"):
    configuration.load(_COMMON, {key: "1"})


def test_groups_are_no_values():
  for key in ("model", "model.scan.x", "", "."):
    with pytest.raises(UserError, match="unknown config key"):
      configuration.load(_COMMON, {key: "1"})


# --- image sizes of two numbers ---


@pytest.mark.parametrize("text", ["(32,64)", "[32,64]"])
def test_a_pair_is_an_image_size_everywhere(text):
  config = _load(image_size=text, model__variant="ViT-N_16")
  saved = configuration.to_dict(config)  # JSON knows no tuples
  assert saved["image_size"] == [32, 64]
  again = ml_collections.ConfigDict(saved)
  for size in (config.image_size, again.image_size):
    model = models.create(num_classes=2, image_size=size, **config.model)
    assert model.image_size == (32, 64)
    assert model.grid == (2, 4)
    ops = preprocess.parse(config.train.preprocess, size)
    assert ops[0] == ("inception_crop", {"size": (32, 64)})
  assert configuration.differences(saved, configuration.to_dict(again)) == []


def test_a_file_gets_its_argument(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "import ml_collections\n"
    "def get_config(arg='none'):\n"
    "  return ml_collections.ConfigDict({'arg': arg})\n"
  )
  assert configuration.load(str(file)).arg == "none"
  assert configuration.load(f"{file}:a,b=1:c").arg == "a,b=1:c"


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("def get_config(:", "SyntaxError"),
    ("def get_config(): raise ValueError('choose a or b')", "choose a or b"),
    ("def get_config(): return 1 / 0", "ZeroDivisionError"),
  ],
)
def test_files_that_fail_say_so_in_one_line(tmp_path, text, words):
  file = tmp_path / "mine.py"
  file.write_text(text)
  with named(words):
    configuration.load(str(file))


# --- what a resumed run may change ---


def test_differences_are_named_with_both_values():
  old = configuration.to_dict(_load())
  new = configuration.to_dict(
    _load(batch_size="64", optimizer__lr_multipliers="head/.*=2")
  )
  assert configuration.differences(old, old) == []
  assert configuration.differences(old, new) == [
    "batch_size: 4096 -> 64",
    "optimizer.lr_multipliers: [] -> ['head/.*=2']",
  ]


def test_the_same_preprocessing_written_otherwise_is_no_difference():
  old = configuration.to_dict(_load())
  new = configuration.to_dict(_load())
  old["eval"]["preprocess"] = "resize_small(256)|central_crop(size)"
  assert old != new
  assert configuration.differences(old, new) == []
  old["image_size"] = new["image_size"] = 384  # 256 is not 439
  [difference] = configuration.differences(old, new)
  assert difference.startswith("eval.preprocess: 'resize_small(256)|")


def test_a_new_run_enlarges_no_images_again(tmp_path):
  config = _load(eval__preprocess="resize_small(256)|central_crop(size)")
  assert run_folder.check(config, tmp_path) is None
  larger = {"image_size": "384", "eval.preprocess": config.eval.preprocess}
  with pytest.raises(UserError, match=r"256.*439"):
    run_folder.check(configuration.load(_COMMON, larger), tmp_path)


def test_test_images_that_are_training_images_are_said(tmp_path, caplog):
  data.prepare("digits", str(tmp_path))
  options = {"data_dir": str(tmp_path), "train.dataset": "digits"}
  options |= {"train.split": "train[:60%]", "eval.split": "train[50%:]"}
  inputs.open_inputs(configuration.load(_COMMON, options))
  assert "100 of the 500 test images of digits are training" in caplog.text
  caplog.clear()
  options["train.split"] = "train[:50%]"
  inputs.open_inputs(configuration.load(_COMMON, options))
  assert "training images" not in caplog.text


def test_entries_of_evals_are_checked_however_they_are_written():
  config = _load(eval__split="")
  with config.unlocked():
    config.eval_every = 7  # is what the entries do not say
    config.evals.few = ml_collections.ConfigDict({"split": "test"})
  configuration.check_unused(config)
  (found,) = configuration.list_evals(config)
  assert (found.name, found.type, found.every) == ("few", "classification", 7)
  for entry, words in (
    ({"spit": "test"}, "evals.few.spit.*did you mean 'split'"),
    ({"split": "test", "shots": (2.5,)}, "needs integers"),
    ({"split": "test", "shots": (5, "a")}, "needs integers"),
  ):
    with config.unlocked():
      config.evals.few = ml_collections.ConfigDict(entry)
    with pytest.raises(UserError, match=words):
      configuration.list_evals(config)
  with config.unlocked():
    del config.evals.few
  configuration.override(config, "evals.few-shot.every", "3")
  with pytest.raises(UserError, match=r"few-shot: .* a word of letters"):
    configuration.list_evals(config)


def test_a_key_that_one_side_lacks_is_a_difference():
  old = configuration.to_dict(_load())
  new = configuration.to_dict(_load())
  del old["model"]["scan"]
  assert configuration.differences(old, new) == ["model.scan: None -> False"]


def test_a_run_from_before_a_key_was_added_counts_as_its_default(monkeypatch):
  old = {"model": {"variant": "ViT-B_16"}, "lr": 0.1}
  new = {"model": {"variant": "ViT-B_16", "gate": 0}, "base_lr": 0.1}
  monkeypatch.setattr(configuration, "ADDED", {"model.gate": 0})
  monkeypatch.setattr(configuration, "RENAMED", {"lr": "base_lr"})
  assert configuration.differences(old, new) == []
  new["model"]["gate"] = 1
  assert configuration.differences(old, new) == ["model.gate: 0 -> 1"]


_FIRST_KEYS = """
  batch_size checkpoint_every data_dir ema_decay eval.batch_size eval.dataset
  eval.preprocess eval.split eval_every fsdp image_size init_from
  keep_checkpoints log_every loss.label_smoothing loss.name masked_target
  micro_batches model.activation model.attention_dropout_rate
  model.classifier model.dropout_rate model.dtype model.head_bias_init
  model.layer_norm_epsilon model.pos_embedding model.pos_embedding_at
  model.remat model.representation_size model.scan
  model.stochastic_depth_rate model.variant objective
  optimizer.accumulator_dtype optimizer.b1 optimizer.b2 optimizer.clip_norm
  optimizer.eps optimizer.lr_multipliers optimizer.momentum optimizer.name
  optimizer.weight_decay optimizer.weight_decay_params
  optimizer.weight_decay_scaling profile_step profile_steps
  schedule.base_lr schedule.cooldown_steps schedule.decay
  schedule.linear_end schedule.rsqrt_timescale schedule.warmup_steps seed
  total_epochs total_examples total_steps train.dataset train.mixup_alpha
  train.preprocess train.split
"""


def test_every_key_that_was_added_has_a_value_for_runs_from_before():
  """The keys of the first release; one that is added later goes to ADDED."""
  first = _FIRST_KEYS.split()
  before = {configuration.RENAMED.get(key, key) for key in first}
  now = configuration.flatten(configuration.load(_COMMON))
  assert now.keys() - before == configuration.ADDED.keys()
  for name in models.SWITCHES:
    assert configuration.ADDED[f"model.{name}"] == models.DEFAULTS[name]


def test_resumable_keys_are_no_differences_and_exist():
  flat = configuration.flatten(_load())
  assert set(configuration.RESUMABLE) <= flat.keys()
  old = configuration.to_dict(_load())
  others = {"data_dir": "elsewhere", "model.remat": "full"}
  for key in configuration.RESUMABLE:
    text = others.get(key, "7")
    new = configuration.to_dict(configuration.load(_COMMON, {key: text}))
    assert new != old
    assert configuration.differences(old, new) == [], key


def test_a_teacher_may_be_moved():
  """A digest of its weights is compared later, see `pretrained.teacher`."""
  old, moved, without = (
    configuration.to_dict(configuration.load(_COMMON, {"teacher.source": x}))
    for x in ("here", "there", "")
  )
  assert configuration.differences(old, moved) == []
  assert configuration.differences(old, without)
  assert configuration.differences(without, old)


def test_micro_batches_are_a_difference_where_they_count():
  named_rates = {name for name in models.DEFAULTS if name.endswith("_rate")}
  assert {*models.RATES} == named_rates
  for given in (
    *({f"model.{rate}": "0.1"} for rate in models.RATES),
    {"model.variant": "EfficientNet-B0"},  # normalised over each
  ):
    old, new = (
      configuration.to_dict(configuration.load(_COMMON, given | more))
      for more in ({}, {"micro_batches": "2", "fsdp": "2"})
    )
    assert configuration.differences(old, new) == ["micro_batches: 1 -> 2"]


# --- values out of range ---


@pytest.mark.parametrize(
  ("key", "text", "words"),
  [
    ("optimizer.name", "adm", "did you mean 'adam'"),
    ("optimizer.b2", "1.0", "must be at least 0 and below 1"),
    ("schedule.base_lr", "-0.001", "-0.001; it must be at least 0"),
    ("micro_batches", "0", "must be at least 1"),
    ("schedule.rsqrt_timescale", "0", "must be at least 1"),
    ("train.repeats", "3", "divide batch_size 4096"),
    ("objective", "masks", "choose from classification, masked_patches"),
  ],
)
def test_values_out_of_range_are_refused(key, text, words):
  with named(f"config.{key} ", words):
    configuration.check_ranges(configuration.load(_COMMON, {key: text}))


# --- keys that have no effect ---


@pytest.mark.parametrize(
  ("others", "key", "text", "needs"),
  [
    ({}, "masked_target", "pixels", "objective to be 'masked_patches'"),
    ({}, "optimizer.momentum", "0.8", "optimizer.name to be 'sgd'"),
    ({"optimizer.name": "sgd"}, "optimizer.b1", "0.8", "name to be 'adam'"),
    (
      {"optimizer.name": "lamb"},
      "optimizer.momentum",
      "0",
      "'sgd' or 'rmsprop'",
    ),
    ({"schedule.decay": "cosine"}, "schedule.linear_end", "0", "be 'linear'"),
    ({}, "schedule.exponential_steps", "7", "decay to be 'exponential'"),
    ({}, "ema_warmup", "true", "config.ema_decay to be set"),
    ({"eval.split": ""}, "eval.dataset", "cifar10", "eval.split to be set"),
    ({"objective": "masked_patches"}, "loss.name", "softmax", "classification"),
  ],
)
def test_a_key_without_effect_is_named(others, key, text, needs):
  configuration.check_unused(configuration.load(_COMMON, others))
  config = configuration.load(_COMMON, {**others, key: text})
  with named(f"config.{key} is ", needs):
    configuration.check_unused(config)


def test_what_keys_need_exists_and_defaults_are_those_of_common():
  flat = configuration.flatten(_load())
  for key, (harmless, needed, _) in configuration.NEEDS.items():
    assert harmless[0] == flat[key], key
    assert needed in flat


def test_no_configuration_sets_a_key_without_effect():
  for file in sorted(_CONFIGS.glob("*.py")):
    arg = ":pictures" if file.name == "photos.py" else ""
    configuration.check_unused(configuration.load(f"{file}{arg}"))


# --- durations ---


@pytest.mark.parametrize(
  ("given", "steps"),
  [
    ({"total_steps": "123"}, 123),
    ({"total_epochs": "1"}, 10),
    ({"total_epochs": "0.5"}, 5),
    ({"total_examples": "640"}, 10),
    ({"total_examples": "700"}, 11),
  ],
)
def test_durations_become_steps(given, steps):
  config = _load(batch_size="64", **given)
  assert configuration.count_steps(config, 640) == steps


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ({}, "set now: none"),
    ({"total_steps": "3", "total_epochs": "1"}, "'total_steps': 3"),
    ({"total_steps": "-3"}, "'total_steps': -3"),
  ],
)
def test_exactly_one_duration_is_set(given, words):
  with named(words, "exactly one of"):
    configuration.count_steps(_load(**given), 640)


# --- the defaults ---


def test_every_default_has_a_comment():
  """A comment on the line, or above the group of lines it stands in."""
  lines = Path(_COMMON).read_text().splitlines()
  missing = []
  for i, line in enumerate(lines):
    if not re.match(r"  config\.[\w.]+ = ", line) or "ConfigDict()" in line:
      continue
    name = line.split()[0]
    above = i - 1
    while lines[above].startswith("  config."):
      above -= 1
    if "  # " not in line and not lines[above].strip().startswith("#"):
      missing.append(name)
  assert not missing


def test_the_defaults_are_what_the_functions_take():
  """A group has the keyword arguments of one function, all that it asks for."""
  config = _load()
  assert {*config.model} == {"variant", *models.DEFAULTS}
  optimizer = {"schedule", "base_lr", "params"}
  for function, group, others in (
    (losses.get_loss, config.loss, set()),
    (optim.make_schedule, config.schedule, {"total_steps"}),
    (optim.make_optimizer, config.optimizer, optimizer),
  ):
    assert {*inspect.signature(function).parameters} == {*group} | others
