"""The `predict` command: class names and probabilities for image files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.errors import UserError
from vit_jax.training.steps import normalize

BATCH_SIZE = 32
# Files that are read in a folder.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def predict(
  source: str,
  images: Sequence[str],
  top: int = 5,
  class_names: str | None = None,
) -> list[dict[str, Any]]:
  """Classifies image files with saved weights.

  The images are preprocessed like the run's test images, or as the authors of
  other weights do.

  Args:
    source: whatever `vit_jax.load` reads.
    images: paths of image files, and of folders with images below them.
    top: how many classes to return for each.
    class_names: a text file with a name a line, for weights that have none.

  Returns:
    [{"image": path, "classes": [{"name", "probability"}, ...]}], the most
    probable class first. Probabilities are a softmax, or independent sigmoids
    where the run was trained with the sigmoid loss. A file that is not an
    image has "error", a line, in place of "classes".

  Raises:
    UserError: no checkpoint, or one that gives no probabilities.
  """
  if top < 1:
    raise UserError(f"--top is {top}; it must be 1 or more")
  model = pretrained.load(source)
  about = model.config
  names = read_names(class_names, about)
  files = list_images(images)
  size = min(len(files), BATCH_SIZE)
  # A fixed shape, so that the model is compiled once.
  batch = np.zeros((size, *about.image_size, 3), np.uint8)
  results: list[dict[str, Any]] = [{"image": file} for file in files]
  for start in range(0, len(files), size):
    rows = results[start : start + size]
    for row, pixels in zip(rows, batch, strict=False):
      try:
        pixels[:] = preprocess.preprocess_image(
          row["image"], about.preprocess, about.image_size
        )
      except UserError as e:
        row["error"] = str(e)
    found = classify(model, batch, names, top)
    for row, classes in zip(rows, found, strict=False):
      if "error" not in row:
        row["classes"] = classes
  return results


def list_images(paths: Sequence[str]) -> list[str]:
  """Returns the paths, with folders replaced by the images below them.

  Raises:
    UserError: a folder without images.
  """
  files = []
  for path in map(os.fspath, paths):
    if not os.path.isdir(path):
      files.append(path)
      continue
    found = sorted(
      str(file)
      for file in Path(path).rglob("*")
      if file.suffix.lower() in _SUFFIXES and file.name[0] != "."
    )
    if not found:
      raise UserError(
        f"{path} is a folder without images: no {', '.join(_SUFFIXES)} is in "
        "it or below it"
      )
    files += found
  return files


def classify(
  model: pretrained.Pretrained,
  pixels: np.ndarray,
  names: Sequence[str] | None,
  top: int,
) -> list[list[dict[str, Any]]]:
  """Returns the most probable classes of each image, best first.

  Args:
    model: with a head.
    pixels: u8[b h w 3], from `preprocess.preprocess_image`.
    names: of the classes; None to number them.
    top: how many classes for each.
  """
  probabilities = np.asarray(model.probabilities(normalize(pixels)))
  return [
    [
      {
        "name": names[i] if names else f"class {i}",
        "probability": float(row[i]),
      }
      for i in np.argsort(-row, kind="stable")[:top]
    ]
    for row in probabilities
  ]


def read_names(
  file: str | None, about: pretrained.Config
) -> Sequence[str] | None:
  """Returns the lines of a file; without one, the names of the weights.

  Raises:
    UserError: it cannot be read, or does not have one line per class.
  """
  if file is None:
    return about.class_names
  try:
    with open(file, encoding="utf-8-sig") as f:  # may have a BOM
      names = [line.strip() for line in f.read().splitlines()]
  except (OSError, ValueError) as e:
    raise UserError(f"--class_names {file}: cannot be read: {e}") from e
  if len(names) != about.num_classes:
    raise UserError(
      f"--class_names {file} has {len(names)} lines; the head has "
      f"{about.num_classes} classes"
    )
  return names
