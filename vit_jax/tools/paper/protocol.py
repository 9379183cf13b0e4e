"""In what a run differs from the paper's protocol, as configs/ has it."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vit_jax import config as configuration
from vit_jax.tools.paper.pretraining import Pretraining
from vit_jax.tools.runs import Run

# What has no influence on a result, but for rounding; and what decides which
# cell a run is of, or how long it is, which the callers compare.
_IGNORED = {
  *configuration.RESUMABLE,
  "seed",
  "init_from",
  "model.dtype",
  "model.scan",
  "train.dataset",
  "total_steps",
  "total_epochs",
  "total_examples",
  "eval.dataset",
  "eval.split",
  "eval.batch_size",
}


def pretraining_spec(wanted: Pretraining) -> str:
  """Returns the file in configs/ and its argument."""
  return f"pretrain.py:{wanted.variant},{wanted.dataset},{wanted.epochs}"


def compare_pretraining(run: Run, wanted: Pretraining) -> list[str]:
  """Returns in what a pre-training differs, "KEY VALUE (protocol: VALUE)".

  Its evaluation does not matter: the weights are the same.
  """
  expected = {**load(pretraining_spec(wanted)), **dict(wanted.overrides)}
  del expected["eval.preprocess"]
  return list(_compare(run, expected, {}))


def compare_finetuning(
  run: Run, spec: str, base_lrs: Iterable[float]
) -> list[str]:
  """Returns in what a fine-tuning differs, see `compare_pretraining`.

  Args:
    run: the fine-tuning.
    spec: "finetune.py:ViT-B_16,cifar100".
    base_lrs: the learning rates that the protocol selects among.
  """
  expected = load(spec)
  choices = {"schedule.base_lr": list(base_lrs)}
  found = list(_compare(run, expected, choices))
  if run.total_steps != expected["total_steps"]:
    steps = expected["total_steps"]
    found.append(f"total_steps {run.total_steps} (protocol: {steps})")
  return found


@functools.cache
def load(spec: str) -> Mapping[str, Any]:
  """Returns a configuration of configs/, flat, as config.json has it."""
  config = configuration.load(spec.replace(".py:", ":", 1))
  return configuration.flatten(configuration.to_dict(config))


def _compare(
  run: Run, expected: Mapping[str, Any], choices: Mapping[str, list]
) -> Iterator[str]:
  """Yields the keys that differ; choices are {key: values that are right}."""
  found = run.config
  ignored = _IGNORED.union(configuration.find_unused(found))
  for key in sorted(expected.keys() & found.keys() - ignored):
    right = choices.get(key, [expected[key]])
    meanings = [
      configuration.find_meaning({**found, key: x}, key) for x in right
    ]
    if configuration.find_meaning(found, key) not in meanings:
      wanted = " or ".join(map(str, right))
      yield f"{key} {found[key]} (protocol: {wanted})"
