"""Data sets by name: the forms of a name, and how it is opened."""

import functools
import math
from pathlib import Path

from vit_jax.data import tfds
from vit_jax.data.folder import FOLDER, IMAGES, FolderSource, ImagesSource
from vit_jax.data.objectnet import OBJECTNET, ObjectNetSource
from vit_jax.data.pseudo import PSEUDO, PseudoLabelled
from vit_jax.data.source import Source
from vit_jax.errors import UserError

BY_PATH = (FOLDER, IMAGES, OBJECTNET, PSEUDO)  # a path follows


def get_source(
  dataset: str,
  split: str,
  data_dir: str | None = None,
  faults: list[str] | None = None,
) -> Source:
  """Opens a split of a data set.

  Args:
    dataset: a TFDS name, `name/config:version`, a task of `benchmarks.py`
      (`vtab:clevr_count`), `folder:PATH`, `objectnet:PATH`, `images:PATH`,
      which has no labels, or `pseudo:PATH`, what a model has labelled.
    split: `train`, or a part or sum: `train[:98%]`, `train[:800]+test[:200]`;
      of a task also its names: `train800`. `pseudo:PATH` is always whole.
    data_dir: where TFDS data sets are; None for TFDS's own choice.
    faults: of a folder, takes a line for each file that is not a whole image,
      and the file is left out; None: no file is looked at before it is read.

  Raises:
    UserError: unknown or unprepared data set, bad split, no image and label in
      it.
  """
  if dataset.startswith(FOLDER):
    return FolderSource(dataset, split, faults)
  if dataset.startswith(IMAGES):
    return ImagesSource(dataset, split, faults)
  if dataset.startswith(OBJECTNET):
    return ObjectNetSource(dataset, split)
  if dataset.startswith(PSEUDO):
    return PseudoLabelled(
      dataset, functools.partial(get_source, data_dir=data_dir)
    )
  return tfds.TfdsSource(dataset, split, data_dir)


def parse_mixture(text: str) -> list[tuple[str, float]]:
  """Splits `a=0.7,b=0.3` into [(data set, weight)]; one name alone weighs 1.

  Weights are relative: `a=7,b=3` is the same mixture.

  Raises:
    UserError: a weight is missing, not a number or not positive.
  """
  text = text.strip()
  if not text:
    raise UserError("the data set's name is empty; see `vit-jax data list`")
  # A folder's path may hold commas and equal signs.
  weighs = _parse_weight(text.rpartition("=")[2])
  path = Path(text.partition(":")[2]).expanduser()
  if text.startswith(BY_PATH) and (not weighs or path.is_dir()):
    return [(text, 1.0)]
  if not {"=", ","} & {*text}:
    return [(text, 1.0)]
  mixture = []
  for part in text.split(","):
    name, _, weight = part.strip().rpartition("=")
    weight = _parse_weight(weight)
    if not name or not weight:
      raise UserError(
        f"mixture {text!r}: {part.strip()!r} needs a name and a positive "
        "weight, as in 'a=0.7,b=0.3'"
      )
    mixture.append((name, weight))
  return mixture


def _parse_weight(text) -> float | None:
  try:
    weight = float(text)
  except ValueError:
    return None
  return weight if 0 < weight < math.inf else None
