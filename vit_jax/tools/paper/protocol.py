"""Comparison of runs with the paper's protocol, as it is in configs/."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vit_jax import config as configuration
from vit_jax.pretrained.names import PUBLISHED
from vit_jax.tools.paper import data
from vit_jax.tools.runs import Run, find_origin

# Defaults of keys that distinguish pre-trainings of one model on one data set.
_KINDS = {
  "optimizer.name": "adam",
  "model.pos_embedding": "learned",
  "model.pos_embedding_at": "input",
}
# For rounding to whole steps, and for images that are held out.
_EPOCHS_TOLERANCE = 0.03
# Keys that change results by rounding at most, and keys that decide which cell
# a run belongs to, which the callers compare.
_IGNORED = {
  *configuration.RESUMABLE,
  *("seed", "init_from", "model.dtype", "model.scan", "train.dataset"),
  *("total_epochs", "total_examples"),
  *("eval.dataset", "eval.split", "eval.batch_size"),
}


class Pretraining(NamedTuple):
  """A pre-training; model and data set by our names."""

  variant: str
  dataset: str
  epochs: int
  # (key, value) that differ from the model's defaults.
  overrides: tuple[tuple[str, Any], ...] = ()

  @property
  def spec(self) -> str:
    """The file in configs/ and its argument."""
    return f"pretrain.py:{self.variant},{self.dataset},{self.epochs}"

  @property
  def published(self) -> str:
    """The name of the weights that the paper's authors published, or "".

    Only their ImageNet-21k files count, which are of 90 epochs.
    """
    name = f"{self.variant}-imagenet21k"
    is_theirs = self[1:] == ("imagenet21k", 90, ())
    return name if is_theirs and name in PUBLISHED else ""


def plain_name(dataset: str) -> str:
  """Returns a data set's name without configuration and version.

  "imagenet21k_clean" becomes "imagenet21k", because the paper's sets are also
  without test images.
  """
  if dataset.startswith(("vtab:", "mini:", "folder:", "pseudo:")):
    return dataset
  return dataset.partition(":")[0].partition("/")[0].removesuffix("_clean")


def is_pretraining(run: Run, wanted: Pretraining) -> bool:
  """Returns whether a run is this pre-training, finished or not."""
  kinds = _KINDS | {k: v for k, v in wanted.overrides if k in _KINDS}
  return (
    run.config["objective"] == "classification"
    and run.config["model.variant"] == wanted.variant
    and plain_name(run.config["train.dataset"]) == wanted.dataset
    and not run.config["init_from"]
    and abs(_count_epochs(run) / wanted.epochs - 1) < _EPOCHS_TOLERANCE
    and all(run.config.get(k, v) == v for k, v in kinds.items())
  )


def _count_epochs(run):
  """Returns a run's epochs; steps are converted by the paper's set sizes."""
  known = data.find_set(plain_name(run.config["train.dataset"]))
  examples = run.total_steps * run.config["batch_size"]
  # A set of unknown size gives 0 epochs.
  counted = examples / known.get("images", math.inf)
  return run.config["total_epochs"] or counted


def comes_from(run: Run, wanted: Pretraining, runs: list[Run]) -> bool:
  """Returns whether a run started from this pre-training's weights."""
  source = run.config["init_from"] or ""
  file = f"/imagenet21k/{wanted.variant}.npz"
  if wanted.published and (source == wanted.published or source.endswith(file)):
    return True
  origin = find_origin(run, runs)
  return origin is not None and is_pretraining(origin, wanted)


def compare_pretraining(run: Run, wanted: Pretraining) -> list[str]:
  """Returns a pre-training's differences, "KEY VALUE (protocol: VALUE)".

  Its evaluation is ignored, because it does not change the weights.
  """
  expected = {**load(wanted.spec), **dict(wanted.overrides)}
  del expected["eval.preprocess"], expected["total_steps"]
  return _compare(run, {key: [x] for key, x in expected.items()})


def compare_finetuning(
  run: Run, spec: str, base_lrs: Iterable[float]
) -> list[str]:
  """Returns a fine-tuning's differences, see `compare_pretraining`.

  Args:
    run: the fine-tuning.
    spec: "finetune.py:ViT-B_16,cifar100".
    base_lrs: the learning rates that the protocol selects from.
  """
  choices = {key: [x] for key, x in load(spec).items()}
  return _compare(run, choices | {"schedule.base_lr": [*base_lrs]})


def compare(run: Run, spec: str) -> list[str]:
  """Returns a run's differences from a configuration in configs/.

  Args:
    run: the run.
    spec: "noisy_student.py:L2,finetune".
  """
  return _compare(run, {key: [x] for key, x in load(spec).items()})


@functools.cache
def load(spec: str) -> Mapping[str, Any]:
  """Returns a configuration in configs/, flat, as in config.json."""
  config = configuration.load(spec.replace(".py:", ":", 1))
  return configuration.flatten(configuration.to_dict(config))


def _compare(run, choices):
  """Returns the keys whose value is none of `choices`, with both values."""
  differs = []
  found = run.config | {"total_steps": run.total_steps}
  ignored = _IGNORED.union(configuration.find_unused(found))
  for key in sorted(choices.keys() & found.keys() - ignored):
    meanings = [
      configuration.find_meaning({**found, key: x}, key) for x in choices[key]
    ]
    if configuration.find_meaning(found, key) not in meanings:
      wanted = " or ".join(map(str, choices[key]))
      differs.append(f"{key} {found[key]} (protocol: {wanted})")
  return differs
