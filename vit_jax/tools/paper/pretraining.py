"""Pre-trainings of the paper: which run is which, and what started from it."""

from typing import Any, NamedTuple

from vit_jax.pretrained.names import PUBLISHED
from vit_jax.tools.paper import data
from vit_jax.tools.runs import Run, find_origin

# What two pre-trainings of a model and a data set may differ in.
_KINDS = {
  "optimizer.name": "adam",
  "model.pos_embedding": "learned",
  "model.pos_embedding_at": "input",
}
# A step more or less, or some images held out, is the same number of epochs.
_EPOCHS_TOLERANCE = 0.03


class Pretraining(NamedTuple):
  """What weights come from.

  Attributes:
    variant: our name of the model.
    dataset: our name of the data set.
    epochs: of it.
    overrides: ((key, value), ...) where it is not the model's usual one.
  """

  variant: str
  dataset: str
  epochs: int
  overrides: tuple[tuple[str, Any], ...] = ()

  def published(self) -> str | None:
    """Returns the name of the weights that the paper's authors published.

    Of their ImageNet-21k files, which are those of 90 epochs.
    """
    if self.dataset == "imagenet21k" and self.epochs == 90:
      name = f"{self.variant}-imagenet21k"
      if name in PUBLISHED and not self.overrides:
        return name
    return None


def plain_name(dataset: str) -> str:
  """Returns a data set's name without configuration and version.

  "imagenet21k_clean", that is freed of test images, is "imagenet21k": as the
  paper's are.
  """
  if dataset.startswith(("vtab:", "mini:", "folder:")):
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
    and abs(count_epochs(run) / wanted.epochs - 1) < _EPOCHS_TOLERANCE
    and all(run.config.get(k, v) == v for k, v in kinds.items())
  )


def count_epochs(run: Run) -> float:
  """Returns a run's epochs, from the paper's sizes where it counts steps."""
  if run.config["total_epochs"]:
    return run.config["total_epochs"]
  examples = run.total_steps * run.config["batch_size"]
  for known in data.load()["pretraining"].values():
    if known["dataset"] == plain_name(run.config["train.dataset"]):
      return examples / known["images"]
  return 0


def comes_from(run: Run, wanted: Pretraining, runs: list[Run]) -> bool:
  """Returns whether a run started from this pre-training's weights."""
  source = run.config["init_from"] or ""
  name = wanted.published()
  file = f"/imagenet21k/{wanted.variant}.npz"
  if name and (source == name or source.endswith(file)):
    return True
  origin = find_origin(run, runs)
  return origin is not None and is_pretraining(origin, wanted)
