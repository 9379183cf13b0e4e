"""Configuration files: loading, overrides, checks and comparison.

Configurations are run as files, not imported as a package, so that they may
also lie outside this project.
"""

import ast
import contextlib
import dataclasses
import json
import math
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from vit_jax import data
from vit_jax.data import preprocess
from vit_jax.errors import UserError, check_choice, suggest

# Keys that may change when a run is resumed. They change the trained parameters
# at most by the rounding of sums in another order.
RESUMABLE = (
  "data_dir",
  "fsdp",
  "micro_batches",
  "model.remat",
  "optimizer.shard_state",
  "log_every",
  "eval_every",
  "checkpoint_every",
  "keep_checkpoints",
  "profile_step",
  "profile_steps",
  "train.buffer_gib",
  "train.on_bad_example",
  "wandb",
)

# Keys added since the first release, {key: its value in older runs}; and
# new names of keys, {old: new}. Without an entry, older runs cannot be resumed.
ADDED: dict[str, Any] = {
  "best_metric": None,
  "model.class_token": False,
  "model.distillation_token": False,
  "model.final_norm": "tokens",
  "model.layer_scale_init": 0.0,
  "model.map_heads": 0,
  "model.mlp": "plain",
  "model.patch_bias": True,
  "model.pre_norm": False,
  "model.prefix_positions": "tokens",
  "model.projection_size": 0,
  "model.qk_norm": False,
  "model.qkv_bias": "all",
  "model.registers": 0,
  "model.rope": "none",
  "model.rope_base": 100.0,
  "train.shuffle": "auto",
  "train.buffer_gib": 4.0,
  "train.on_bad_example": "stop",
  "train.cutmix_alpha": 0.0,
  "train.repeats": 1,
  "ema_warmup": False,
  "schedule.exponential_rate": 0.97,
  "schedule.exponential_steps": 10_000.0,
  "optimizer.layer_decay": 1.0,
  "optimizer.freeze_blocks": 0,
  "optimizer.shard_state": 1,
  "lora.rank": 0,
  "lora.alpha": 16.0,
  "lora.params": ".*/MultiHeadDotProductAttention_0/.*/kernel",
  "teacher.source": "",
  "teacher.loss": "kl",
  "teacher.temperature": 1.0,
  "teacher.weight": 0.5,
  "wandb": "",
}
RENAMED: dict[str, str] = {}


def load(spec: str, overrides: dict[str, str] | None = None):
  """Returns the locked ConfigDict of a configuration file, with overrides.

  Args:
    spec: "CONFIG", see `find`, or "CONFIG:ARG", an argument of get_config.
    overrides: {"schedule.base_lr": "3e-4"} as typed by the user.

  Raises:
    UserError: no such file, one that fails or rejects its argument, an
      unknown key, a value of the wrong type.
  """
  file, _, arg = spec.partition(":")
  path = find(file)
  try:
    with _importing_from(path.parent.absolute()):
      get_config = runpy.run_path(str(path))["get_config"]
      config = get_config(arg) if arg else get_config()
  except ValueError as e:
    raise UserError(str(e)) from e
  except Exception as e:
    # ConfigDict lists every key, with escaped line breaks, before its hint.
    words = str(e).replace("\\n", "\n").strip(" \n'") or "no message"
    line = words.splitlines()[-1][-300:]
    raise UserError(f"{file} failed: {type(e).__name__}: {line}") from e
  for key, text in (overrides or {}).items():
    override(config, key, text)
  return config.lock()


def find(file: str) -> Path:
  """Returns the path of a configuration file.

  `file` is a path, or names one of configs/: "finetune", "configs/finetune.py".

  Raises:
    UserError: no such file.
  """
  path = Path(file)
  if path.suffix == ".py" and path.is_file():
    return path
  folder = Path(__file__).parent / "configs"  # where it is installed
  folder = folder if folder.is_dir() else folder.parents[1] / "configs"
  known = {p.stem: p for p in sorted(folder.glob("*.py"))}
  if path.stem in known and str(path.parent) in (".", "configs"):
    return known[path.stem]
  siblings = [str(p) for p in path.parent.glob("*.py")]
  meant = suggest(file, siblings) or suggest(path.stem, known)
  raise UserError(
    f"no configuration file {file!r}{meant}; give --config=CONFIG[:ARG], a "
    "file or the name of one in configs/, such as quickstart_pretrain"
  )


@contextlib.contextmanager
def _importing_from(folder):
  """Lets a configuration import modules beside it, then unloads them.

  Modules of another folder may have the same names.
  """
  names = {path.stem for path in folder.glob("*.py")} - sys.stdlib_module_names
  hidden = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
  packages = {path.parent.name for path in folder.glob("*/__init__.py")}
  packages -= sys.modules.keys()
  sys.path.insert(0, str(folder))
  try:
    yield
  finally:
    sys.path.remove(str(folder))
    for name in [*sys.modules]:
      if name in names or name.partition(".")[0] in packages:
        del sys.modules[name]
    sys.modules.update(hidden)


def override(config, key: str, text: str) -> None:
  """Sets `config.a.b` for key "a.b"; the value keeps the default's type.

  Raises:
    UserError: unknown key, or a value of another type.
  """
  entry = re.match(r"evals\.([^.]+)\.", key)
  if entry and "evals" in config and entry[1] not in config.evals:
    add_eval(config, entry[1])
  known = flatten(config)
  if key not in known:
    raise UserError(f"unknown config key {key!r}{suggest(key, known)}")
  *parents, name = key.split(".")
  node = config
  for parent in parents:
    node = node[parent]
  kind = node.get_type(name)
  value = parse_value(text, kind)
  # ConfigDict alone would accept None for anything and True for an integer.
  # Values of keys of type object are checked where they are used.
  if kind is not object and type(value) is not kind:
    example = "" if known[key] is None else f", such as {known[key]!r}"
    raise UserError(
      f"config.{key} is {kind.__name__}{example}; {text!r} is not"
    )
  with node.unlocked():
    node[name] = value


@dataclasses.dataclass(frozen=True)
class Eval:
  """One evaluation of a run, with all defaults filled in."""

  name: str  # "eval" for `config.eval`, else that of an entry of `config.evals`
  type: str  # the run's objective, or one of `evaluators.OTHERS`
  dataset: str
  split: str  # of the test images
  preprocess: str  # of all its images
  batch_size: int  # over all hosts and devices
  every: int  # steps; 0: at the end only
  train_split: str  # of the training images of "fewshot"
  shots: tuple[int, ...]  # training images of each class

  @property
  def key(self) -> str:
    """The configuration's key of this evaluation."""
    return "eval" if self.name == "eval" else f"evals.{self.name}"


def add_eval(config, name: str, **values: Any) -> None:
  """Adds an entry to `config.evals`; missing values keep their defaults.

  `list_evals` checks the name and the values.
  """
  unset = {key: placeholder(kind) for key, kind in _EVAL_KEYS.items()}
  with config.unlocked():
    config.evals[name] = unset
    config.evals[name].update(values)


# Keys of an entry of `config.evals`; `list_evals` has their defaults.
_EVAL_KEYS: dict[str, type] = {
  **dict.fromkeys(("type", "dataset", "split", "preprocess"), str),
  **{"batch_size": int, "every": int, "train_split": str, "shots": tuple},
}
# Other prefixes of logged names, before the "/".
LOGGED = ("eval", "train", "speed")


def list_evals(config) -> list[Eval]:
  """Returns the evaluations of a run; that of `config.eval` is the first.

  Raises:
    UserError: an invalid name, key or number, or no split.
  """
  usual = {
    "type": config.objective,
    "dataset": find_test_set(config),
    "split": config.eval.split,
    "preprocess": config.eval.preprocess,
    "batch_size": config.eval.batch_size or config.batch_size,
    "every": config.eval_every,
    "train_split": "train",
    "shots": (5, 10),
  }
  found = [Eval("eval", **usual)] if config.eval.split else []
  for name, entry in config.get("evals", {}).items():  # old runs have none
    if not re.fullmatch(r"[A-Za-z]\w*", name) or name in LOGGED:
      raise UserError(
        f"config.evals.{name}: an evaluation's name is a word of letters, "
        f"digits and _, and none of {', '.join(LOGGED)}"
      )
    for key in entry:
      if key not in _EVAL_KEYS:
        meant = suggest(key, _EVAL_KEYS)
        raise UserError(f"unknown config key evals.{name}.{key}{meant}")
    given = {k: v for k, v in entry.items() if v is not None}
    e = Eval(name, **usual | given)
    if not e.split:
      raise UserError(f"config.{e.key} needs a split to evaluate")
    numbers = (e.batch_size, e.every + 1, *(e.shots or (0,)))
    if any(type(n) is not int or n < 1 for n in numbers):
      raise UserError(
        f"config.{e.key} has batch_size {e.batch_size}, every {e.every}, shots "
        f"{e.shots}; it needs integers, batch_size and shots of 1 or more and "
        "every of 0 or more"
      )
    found.append(e)
  return found


def parse_value(text: str, kind: type):
  """Parses a user's value as a Python literal; if it is not one, as text."""
  if kind is str:
    return text
  if text.lower() in ("true", "false"):
    return text.lower() == "true"
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if kind is float and type(value) is int:
    return float(value)
  if kind is tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
  return value


def flatten(config) -> dict[str, Any]:
  """Returns {"a.b": value} of a configuration or its dictionary."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, (dict, ml_collections.ConfigDict)):
      flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
    else:
      flat[name] = value
  return flat


def to_dict(config) -> dict[str, Any]:
  """Returns the configuration as nested dictionaries of JSON types."""
  return json.loads(json.dumps(config.to_dict()))


def differences(old: dict, new: dict) -> list[str]:
  """Returns "key: old -> new" for changes that a resumed run may not have.

  Changes are allowed of `RESUMABLE` keys and of evaluations in `config.evals`
  that do not pick the best checkpoint, but not of `micro_batches` where that
  changes the result.
  """
  old, new = modernize(flatten(old)), flatten(new)
  best = str(new.get("best_metric")).partition("/")[0]

  def may_differ(key):
    if key == "teacher.source":  # config.json has a digest of the weights
      return bool(old.get(key)) and bool(new.get(key))
    if key == "micro_batches":
      from vit_jax import models  # takes seconds to import

      # BatchNorm uses the statistics of each micro-batch.
      has_statistics = new["model.variant"].startswith("EfficientNet")
      # Random numbers are drawn for each micro-batch.
      draws = any(new.get(f"model.{rate}") for rate in models.RATES)
      return not (draws or has_statistics)
    group, _, rest = key.partition(".")
    is_free = not rest.startswith(f"{best}.") or rest == f"{best}.every"
    return key in RESUMABLE or (group == "evals" and is_free)

  return [
    f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
    for key in sorted(old.keys() | new.keys())
    if find_meaning(old, key) != find_meaning(new, key) and not may_differ(key)
  ]


def modernize(flat: dict[str, Any]) -> dict[str, Any]:
  """Returns a flat configuration of any version with current keys."""
  return ADDED | {RENAMED.get(key, key): value for key, value in flat.items()}


def find_meaning(flat: Mapping[str, Any], key: str) -> Any:
  """Returns a value for comparison; preprocessing is parsed first."""
  value = flat.get(key)
  if key.endswith(".preprocess") and value:
    with contextlib.suppress(UserError):
      return preprocess.parse(value, flat["image_size"])
  return value


def find_test_set(config) -> str:
  """Returns `eval.dataset` of a configuration, or its first training set.

  Pseudo-labelled sets are skipped, because they have no test images. Returns ""
  if there is no other.
  """
  flat = flatten(config)
  train = [name for name, _ in data.parse_mixture(flat["train.dataset"])]
  labelled = [name for name in train if not name.startswith(data.PSEUDO)]
  return flat["eval.dataset"] or next(iter(labelled), "")


# Key -> its choices.
CHOICES = {
  "objective": ("classification", "masked_patches"),
  "train.shuffle": ("auto", "all", "blocks"),
  "train.on_bad_example": ("stop", "replace"),
  "optimizer.name": ("adam", "sgd", "rmsprop", "lamb"),
  "optimizer.accumulator_dtype": ("float32", "bfloat16"),
  "optimizer.weight_decay_scaling": ("lr", "schedule", "gradient"),
  "teacher.loss": ("kl", "cross_entropy", "hard"),
}
_FRACTIONS = (
  *("ema_decay", "optimizer.b1", "optimizer.b2", "optimizer.momentum"),
  "schedule.exponential_rate",
)
_AMOUNTS = (
  *("train.buffer_gib", "train.mixup_alpha", "train.cutmix_alpha"),
  *("optimizer.freeze_blocks", "lora.rank", "eval.batch_size"),
  *("optimizer.eps", "optimizer.clip_norm", "optimizer.weight_decay"),
  *("schedule.base_lr", "schedule.linear_end", "schedule.warmup_steps"),
  *("schedule.cooldown_steps", "eval_every", "checkpoint_every"),
  "profile_step",
)
_COUNTS = (
  *("schedule.rsqrt_timescale", "schedule.exponential_steps"),
  *("micro_batches", "log_every", "keep_checkpoints", "profile_steps"),
  "train.repeats",
)
# Key -> (its least value, the limit that it must stay below).
RANGES = {
  "seed": (-(2**63), 2**63),  # the range that JAX's keys accept
  **dict.fromkeys(_FRACTIONS, (0, 1)),
  **dict.fromkeys(_AMOUNTS, (0, math.inf)),
  **dict.fromkeys(_COUNTS, (1, math.inf)),
}


def check_ranges(config) -> None:
  """Raises a UserError for a value outside its choices or its range."""
  values = flatten(config)
  for key, choices in CHOICES.items():
    check_choice(f"config.{key}", values[key], choices)
  for key, (least, limit) in RANGES.items():
    if not least <= values[key] < limit:
      below = f" and below {limit}" if limit < math.inf else ""
      raise UserError(
        f"config.{key} is {values[key]}; it must be at least {least}{below}"
      )
  if config.batch_size % config.train.repeats:
    raise UserError(
      f"config.train.repeats {config.train.repeats} does not divide batch_size "
      f"{config.batch_size}, and a batch has all repeats of an image; change "
      "one of the two"
    )


# Key -> (its default and other values that mean "off", the key that it needs,
# the value or values that this must have; None for any but 0, "" or unset).
_DECAY = "optimizer.weight_decay"
NEEDS: dict[str, tuple[tuple[Any, ...], str, Any]] = {
  "masked_target": (("mean_colour",), "objective", "masked_patches"),
  "model.rope_base": ((100.0,), "model.rope", "dinov3"),
  "model.map_heads": ((0,), "model.classifier", "map"),
  "model.prefix_positions": (("tokens",), "model.pos_embedding", "learned"),
  "train.mixup_alpha": ((0.0,), "objective", "classification"),
  "train.cutmix_alpha": ((0.0,), "objective", "classification"),
  "loss.name": (("sigmoid",), "objective", "classification"),
  "loss.label_smoothing": ((0.0,), "objective", "classification"),
  "teacher.source": (("",), "objective", "classification"),
  "teacher.loss": (("kl",), "teacher.source", None),
  "teacher.temperature": ((1.0,), "teacher.source", None),
  "teacher.weight": ((0.5,), "teacher.source", None),
  "optimizer.b1": ((0.9,), "optimizer.name", ("adam", "lamb")),
  "optimizer.b2": ((0.999,), "optimizer.name", ("adam", "lamb", "rmsprop")),
  "optimizer.eps": ((1e-8,), "optimizer.name", ("adam", "lamb", "rmsprop")),
  "optimizer.momentum": ((0.9,), "optimizer.name", ("sgd", "rmsprop")),
  "optimizer.weight_decay_scaling": (("lr",), _DECAY, None),
  "optimizer.weight_decay_params": ((".*/kernel",), _DECAY, None),
  "lora.alpha": ((16.0,), "lora.rank", None),
  "lora.params": ((ADDED["lora.params"],), "lora.rank", None),
  "schedule.linear_end": ((1e-5,), "schedule.decay", "linear"),
  "schedule.rsqrt_timescale": ((10_000,), "schedule.decay", "rsqrt"),
  "schedule.exponential_rate": ((0.97,), "schedule.decay", "exponential"),
  "schedule.exponential_steps": ((10_000,), "schedule.decay", "exponential"),
  "ema_warmup": ((False,), "ema_decay", None),
  "eval.dataset": ((None, ""), "eval.split", None),
  "eval.batch_size": ((0,), "eval.split", None),
  "eval_every": ((5000, 0), "eval.split", None),
  "profile_steps": ((5,), "profile_step", None),
}


def find_unused(values: dict[str, Any]) -> list[str]:
  """Returns the keys of `NEEDS` that have no effect in a flat configuration."""
  # Keys of `eval` are also the defaults of entries of `evals`.
  meant = {"eval.split"} if any(k.startswith("evals.") for k in values) else {}

  def is_met(needed, wanted):
    value = values[needed]
    return bool(value) if wanted is None else value in _as_tuple(wanted)

  return [
    key
    for key, (_, needed, wanted) in NEEDS.items()
    if key in values and needed in values and needed not in meant
    if not is_met(needed, wanted)
  ]


def _as_tuple(wanted: Any) -> tuple[Any, ...]:
  return wanted if isinstance(wanted, tuple) else (wanted,)


def check_unused(config) -> None:
  """Raises a UserError for a key that is set where it has no effect."""
  values = flatten(config)
  for key in find_unused(values):
    harmless, needed, wanted = NEEDS[key]
    if values[key] not in harmless:
      needs = "to be set"
      if wanted is not None:
        needs = f"to be {' or '.join(map(repr, _as_tuple(wanted)))}"
      default = "its default" if harmless[0] is None else repr(harmless[0])
      raise UserError(
        f"config.{key} is {values[key]!r} and has no effect: it needs "
        f"config.{needed} {needs}, which is {values[needed]!r}; leave it at "
        f"{default}"
      )


def count_steps(config, num_examples: int) -> int:
  """Returns the steps of a run whose epochs have `num_examples`.

  Raises:
    UserError: not exactly one duration is set.
  """
  durations = ("total_steps", "total_epochs", "total_examples")
  given = {name: config[name] for name in durations if config[name]}
  if len(given) != 1 or min(given.values()) < 0:
    raise UserError(
      "set exactly one of total_steps, total_epochs and total_examples to a "
      f"positive number; set now: {given or 'none'}"
    )
  if config.total_steps:
    return config.total_steps
  examples = config.total_examples or config.total_epochs * num_examples
  # The nearest number of whole batches, at least one.
  return max(1, round(examples / config.batch_size))
