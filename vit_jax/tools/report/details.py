"""Predictions of a run's best checkpoint for its test set."""

import base64
import io
import logging
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from vit_jax import config as configuration
from vit_jax import data, pretrained, sharding
from vit_jax.data.relabelled import match_classes
from vit_jax.errors import UserError, one_line
from vit_jax.evaluation import attention_maps, devices
from vit_jax.pretrained.runs import locate
from vit_jax.tools.report import by_class
from vit_jax.tools.runs import Run
from vit_jax.training.steps import normalize

log = logging.getLogger(__name__)

# Pixels along the longer side of a picture in the page.
_PICTURE = 192


class Details(NamedTuple):
  """Results on a test set."""

  checkpoint: str  # the folder of the weights, such as "checkpoints/240"
  source: Any  # the test set, a `data.Source`
  tally: by_class.Tally
  shown: list[dict[str, str | None]]  # `_show` of each mistake


def evaluate(run: Run, data_dir: str | None, mistakes: int) -> Details | str:
  """Evaluates a run's best checkpoint on its test set, or returns why not.

  Args:
    run: the run.
    data_dir: where the data sets are now, if they have moved.
    mistakes: how many to show.
  """
  if run.config["objective"] != "classification":
    return "The run predicts masked patches, so it has no classes."
  if not run.config["eval.split"]:
    return "The run has no test set: its eval.split is empty."
  try:
    locate(run.path)
  except UserError:
    return "The run has no checkpoint yet."
  try:
    return _evaluate(run, data_dir, mistakes)
  except Exception as e:  # the rest of the page is still useful
    log.warning("%s: %s", run.name, e, exc_info=not isinstance(e, UserError))
    return f"The test set could not be evaluated: {one_line(e)}"


def _evaluate(run, data_dir, mistakes):
  config = run.config
  weights = pretrained.read(str(run.path))
  test = data.get_source(
    configuration.find_test_set(config),
    config["eval.split"],
    data_dir or config["data_dir"],
  )
  test = match_classes(weights, test)
  model = pretrained.assemble(weights)
  mesh = sharding.make_mesh()
  batch_size = config["eval.batch_size"] or config["batch_size"]
  tally = by_class.make_tally(
    model=model.model,
    to_probabilities=model.to_probabilities,
    source=test,
    mesh=mesh,
    batch_size=devices.round_up(batch_size, mesh),
    preprocess=weights.preprocess,
    mistakes=mistakes,
  )(devices.replicate(mesh, jax.tree.map(np.asarray, model.params)))
  look = attention_maps.make_look(model) if model.model.num_layers else None
  shown = [_show(look, test, mistake) for mistake in tally.mistakes]
  name = "/".join(weights.source.split("/")[-2:])
  return Details(name, test, tally, shown)


def _show(look, test, mistake):
  """Returns what the page shows of a mistake.

  Returns:
    {"name": of the file or the example, "labels": names, "picture": the
    preprocessed image as a data URI, "attention": the same, darkened where
    attention is low; None for a ResNet}.
  """
  attention = None
  if look:  # one by one, because a large model's attention takes gigabytes
    (seen,) = np.asarray(look(normalize(mistake.pixels[None])).maps)
    attention = encode(attention_maps.overlay(mistake.pixels, seen))
  labels = [test.class_names[label] for label in mistake.labels]
  more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
  return {
    "name": test.describe(mistake.index),
    "labels": ", ".join(labels[:3]) + more,
    "picture": encode(mistake.pixels),
    "attention": attention,
  }


def encode(pixels: np.ndarray) -> str:
  """Returns u8[h w 3] as a data URI: PNG for a small image, else JPEG."""
  image = Image.fromarray(pixels)
  kind = "png" if max(image.size) <= _PICTURE // 2 else "jpeg"
  image.thumbnail((_PICTURE, _PICTURE), Image.Resampling.LANCZOS)
  file = io.BytesIO()
  image.save(file, kind, quality=85)
  text = base64.b64encode(file.getvalue()).decode()
  return f"data:image/{kind};base64,{text}"
