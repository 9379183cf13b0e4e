"""The `linear` command: evaluation of frozen representations.

Few-shot accuracy and the linear probe are solved in closed form, without a
learning rate or steps, so that they are reproducible. k-nearest neighbours need
no training.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vit_jax import data, pretrained, sharding
from vit_jax.errors import UserError
from vit_jax.evaluation import devices, fewshot


def linear(
  source: str,
  dataset: str,
  *,
  train_split: str = "train",
  test_split: str = "test",
  shots: Sequence[int | None] = (5, 10),
  seeds: int = 3,
  l2: float = fewshot.L2,
  neighbours: int = 0,
  what: str = "pooled",
  layers: Sequence[int] = (-1,),
  image_size: int | tuple[int, int] | None = None,
  resize: str | None = None,
  preprocess: str | None = None,
  data_dir: str | None = None,
  batch_size: int = 64,
) -> dict[str, Any]:
  """Evaluates a representation by ridge regression.

  Args:
    source: whatever `vit_jax.load` reads; its head does not matter.
    dataset, train_split, test_split: data with one label an image.
    shots: training images of each class; None for all.
    seeds: how many draws of the shots.
    l2: the penalty's factor.
    neighbours: k, see `fewshot.evaluate_neighbours`; 0 for no k-NN.
    what, layers: which features, see `models.make_features`.
    image_size, resize: as of `vit_jax.load`.
    preprocess: of all images; unset: the checkpoint's, for evaluation.
    data_dir: where the TFDS data sets are.
    batch_size: images at once, rounded up to a multiple of the devices.

  Returns:
    {"checkpoint", "dataset", "train_split", "test_split", "train_examples",
    "test_examples", "preprocess", "image_size", "features", "l2", "results":
    [{"shots", "accuracy": the mean, "spread": the sample standard deviation,
    "accuracies": [of each seed]}]}. "shots" is "all" for a probe. With
    `neighbours` also "knn": {"neighbours", "accuracy"}.

  Raises:
    UserError: no checkpoint, no data, other classes, too few images.
  """
  _check_options(shots, seeds, l2, neighbours)
  splits = [
    data.get_source(dataset, split, data_dir)
    for split in (train_split, test_split)
  ]
  names = fewshot.check_classes(*splits)
  # A head of one class, which is not used but possible for all weights.
  loaded = pretrained.load(
    source, image_size=image_size, num_classes=1, resize=resize
  )
  preprocess = preprocess or loaded.config.preprocess
  choice = {"what": what, "layers": layers}
  train, test = _extract(loaded, splits, preprocess, batch_size, **choice)

  return {
    "checkpoint": source,
    "dataset": dataset,
    "train_split": train_split,
    "test_split": test_split,
    "train_examples": len(train[1]),
    "test_examples": len(test[1]),
    "preprocess": preprocess,
    "image_size": list(loaded.config.image_size),
    "features": int(train[0].shape[1]),
    "l2": l2,
    **_evaluate(train, test, names, shots, seeds, l2, neighbours),
  }


def _evaluate(train, test, names, shots, seeds, l2, neighbours):
  """Returns "results" and, with `neighbours`, "knn" of `linear`."""
  results = []
  for count in shots:
    draws = range(1 if count is None else seeds)  # all images: one draw
    accuracies = [
      fewshot.evaluate(train, test, names, shots=count, seed=seed, l2=l2)
      for seed in draws
    ]
    results.append(_summarize(count, accuracies))
  if not neighbours:
    return {"results": results}
  vote = fewshot.evaluate_neighbours
  accuracy = vote(train, test, len(names), count=neighbours)
  knn = {"neighbours": neighbours, "accuracy": accuracy}
  return {"results": results, "knn": knn}


def _check_options(shots, seeds, l2, neighbours):
  if seeds < 1 or any(n is not None and n < 1 for n in shots):
    raise UserError("--seeds and --shots must be 1 or more; --shots=5,10,all")
  if l2 <= 0:
    raise UserError(f"--l2 is {l2}; it must be greater than 0")
  if neighbours < 0:
    raise UserError(f"--knn is {neighbours}; it must be 0 or more")


def _extract(loaded, splits, preprocess, batch_size, **choice):
  """Returns (features, labels) of each split."""
  mesh = sharding.make_mesh()
  params = devices.replicate(mesh, jax.tree.map(np.asarray, loaded.params))
  size = devices.round_up(batch_size, mesh)
  where = {"mesh": mesh, "batch_size": size, "preprocess": preprocess}
  where |= choice
  return [
    fewshot.make_extract(model=loaded.model, source=source, **where)(params)
    for source in splits
  ]


def _summarize(count, accuracies):
  return {
    "shots": count or "all",
    "accuracy": statistics.fmean(accuracies),
    "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
    "accuracies": accuracies,
  }
