"""Data sets by name: parsing and opening."""

import functools
import math
from pathlib import Path

from vit_jax.data import tfds
from vit_jax.data.folder import FOLDER, IMAGES, FolderSource, ImagesSource
from vit_jax.data.objectnet import OBJECTNET, ObjectNetSource
from vit_jax.data.pseudo import PSEUDO, PseudoLabelled
from vit_jax.data.source import Source
from vit_jax.errors import UserError

BY_PATH = (FOLDER, IMAGES, OBJECTNET, PSEUDO)  # prefixes of a path


def get_source(
  dataset: str,
  split: str,
  data_dir: str | None = None,
  faults: list[str] | None = None,
) -> Source:
  """Opens a split of a data set.

  Args:
    dataset: a TFDS name, `name/config:version`, a task of `benchmarks.py`
      (`vtab:clevr_count`), `folder:PATH`, `objectnet:PATH`, `images:PATH`
      (unlabelled) or `pseudo:PATH` (labelled by a model).
    split: `train`, a slice or a sum: `train[:98%]`, `train[:800]+test[:200]`;
      for a task also its names: `train800`. `pseudo:PATH` is always whole.
    data_dir: folder of TFDS data sets; None for TFDS's default.
    faults: for a folder, the list to which a line is added for each corrupt
      image, which is left out; None: no file is checked before it is read.

  Raises:
    UserError: unknown or unprepared data set, bad split, no image or label
      feature.
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
  """Splits `a=0.7,b=0.3` into [(data set, weight)]; a single name has weight 1.

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
