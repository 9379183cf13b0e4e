"""The `predict` command: class names and probabilities for image files."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax import preprocess, pretrained
from vit_jax.errors import UserError
from vit_jax.steps import normalize

BATCH_SIZE = 32


def predict(
  source: str,
  images: Sequence[str],
  top: int = 5,
  class_names: str | None = None,
) -> list[dict[str, Any]]:
  """Classifies image files with saved weights.

  The images are prepared as the run prepared its test images, or as the
  authors of other weights do.

  Args:
    source: whatever `vit_jax.load` reads.
    images: paths of image files.
    top: how many classes to return for each.
    class_names: a text file with a name a line, for weights that have none.

  Returns:
    [{"image": path, "classes": [{"name", "probability"}, ...]}], the most
    probable class first. Probabilities are a softmax, or independent
    sigmoids where the run was trained with the sigmoid loss.

  Raises:
    UserError: no checkpoint, or a file that is no image.
  """
  if top < 1:
    raise UserError(f"--top is {top}; it must be 1 or more")
  model = pretrained.load(source)
  about = model.config
  names = read_names(class_names, about)
  # All files are read before the model is compiled: a wrong path shows now.
  pixels = [
    preprocess.preprocess_image(image, about.preprocess, about.image_size)
    for image in images
  ]
  results = []
  for start in range(0, len(pixels), BATCH_SIZE):
    batch = np.stack(pixels[start : start + BATCH_SIZE])
    for classes in classify(model, batch, names, top):
      image = str(images[len(results)])
      results.append({"image": image, "classes": classes})
  return results


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
    names: of the classes; None: they are numbered.
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
  """Returns the lines of a file; for None the names that came with weights.

  Raises:
    UserError: it cannot be read, or has not a line for each class.
  """
  if file is None:
    return about.class_names
  try:
    with open(file, encoding="utf-8-sig") as f:  # Windows adds a mark
      names = [line.strip() for line in f.read().splitlines()]
  except (OSError, ValueError) as e:
    raise UserError(f"--class_names {file}: cannot be read: {e}") from e
  if len(names) != about.num_classes:
    raise UserError(
      f"--class_names {file} has {len(names)} lines; the head has "
      f"{about.num_classes} classes"
    )
  return names
