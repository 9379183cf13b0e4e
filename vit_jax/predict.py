"""The `predict` command: class names and probabilities for image files."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import checkpoint, models, preprocess
from vit_jax.errors import UserError
from vit_jax.state import unflatten
from vit_jax.steps import normalize

BATCH_SIZE = 32


def predict(
  source: str, images: Sequence[str], top: int = 5
) -> list[dict[str, Any]]:
  """Classifies image files with saved weights.

  The images are prepared as the run prepared its test images.

  Args:
    source: a run folder or one of its checkpoints.
    images: paths of image files.
    top: how many classes to return for each.

  Returns:
    [{"image": path, "classes": [{"name", "probability"}, ...]}], the most
    probable class first. Probabilities are a softmax, or independent
    sigmoids where the run was trained with the sigmoid loss.

  Raises:
    UserError: no checkpoint, or a file that is no image.
  """
  if top < 1:
    raise UserError(f"--top is {top}; it must be 1 or more")
  weights = checkpoint.load_weights(source)
  config, names = weights.run["config"], weights.run["class_names"]
  model = models.create(
    num_classes=len(names), image_size=config["image_size"], **config["model"]
  )
  # All files are read before the model is compiled: a wrong path shows now.
  pixels = [
    preprocess.preprocess_image(
      image, config["eval"]["preprocess"], model.image_size
    )
    for image in images
  ]
  to_probability = (
    jax.nn.sigmoid if config["loss"]["name"] == "sigmoid" else jax.nn.softmax
  )
  params = unflatten({k: jnp.asarray(v) for k, v in weights.params.items()})
  forward = jax.jit(
    lambda params, x: to_probability(model.apply(params, normalize(x)))
  )
  results = []
  for start in range(0, len(pixels), BATCH_SIZE):
    batch = np.stack(pixels[start : start + BATCH_SIZE])
    for row in np.asarray(forward(params, batch)):
      best = np.argsort(-row, kind="stable")[:top]
      results.append(
        {
          "image": str(images[len(results)]),
          "classes": [
            {"name": names[i], "probability": float(row[i])} for i in best
          ],
        }
      )
  return results
