"""What a run's best weights make of its test set, image by image."""

import io
import logging
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from vit_jax import checkpoint, data, pretrained, sharding
from vit_jax import config as configuration
from vit_jax.data.relabelled import match_classes
from vit_jax.errors import UserError
from vit_jax.evaluation import attention_maps
from vit_jax.tools.report import by_class
from vit_jax.tools.runs import Run
from vit_jax.training.steps import normalize

log = logging.getLogger(__name__)

# Pixels along the longer side of a picture in the page. Smaller ones stay as
# they are, in PNG; JPEG is for those that were made smaller.
_PICTURE = 192


class Picture(NamedTuple):
  """An encoded picture.

  Attributes:
    kind: "image/png" or "image/jpeg".
    content: the bytes.
    size: (h, w) in pixels.
  """

  kind: str
  content: bytes
  size: tuple[int, int]


class ShownMistake(NamedTuple):
  """A mistake with pictures.

  Attributes:
    found: what it is.
    name: of the image: a file's, or its place in the data set.
    picture: as the model got it.
    attention: the same, dark where the model did not look; None for a model
      without attention.
  """

  found: by_class.Mistake
  name: str
  picture: Picture
  attention: Picture | None


class Details(NamedTuple):
  """One pass over a test set.

  Attributes:
    checkpoint: the folder of the weights in the run's, such as "best/240".
    dataset, split: what was looked at.
    class_names: a name for each class.
    multilabel: whether an image may have several labels.
    tally: the counts.
    mistakes: with pictures, the most confident first.
    attends: whether the model has attention.
  """

  checkpoint: str
  dataset: str
  split: str
  class_names: list[str]
  multilabel: bool
  tally: by_class.Tally
  mistakes: list[ShownMistake]
  attends: bool

  @property
  def step(self) -> int:
    """Of the weights."""
    return int(self.checkpoint.split("/")[-1])


def look(run: Run, data_dir: str | None, mistakes: int) -> Details | str:
  """Returns what the run's best checkpoint makes of its test set, or why not.

  Args:
    run: the run.
    data_dir: where the data sets are, if not where they were.
    mistakes: how many to show.
  """
  if run.config["objective"] != "classification":
    return (
      "The run learns to predict masked patches and gives no classes: there is "
      "nothing to count by class."
    )
  if not run.config["eval.split"]:
    return "The run has no test set: its eval.split is empty."
  try:
    checkpoint.locate(run.path)
  except UserError:
    return (
      "There is no checkpoint in the run's folder yet: what it takes for what "
      "cannot be counted. The curves are from metrics.jsonl."
    )
  try:
    return _look(run, data_dir, mistakes)
  except UserError as e:
    log.warning("%s: %s", run.name, e)
    return f"The test set could not be looked at: {e}."
  except Exception as e:  # other runs, and the curves, are worth their page
    log.warning("%s: %s", run.name, e, exc_info=True)
    return f"The test set could not be looked at: {type(e).__name__}: {e}"


def _look(run, data_dir, mistakes):
  config = run.config
  dataset = configuration.find_test_set(config)
  split = config["eval.split"]
  try:
    test = data.get_source(dataset, split, data_dir or config["data_dir"])
  except UserError as e:
    hint = "" if data_dir else "; or say where it is with --data_dir"
    raise UserError(f"{e}{hint}") from e
  weights = pretrained.read(str(run.path))
  test = match_classes(weights, test)
  model = pretrained.assemble(weights)
  mesh = sharding.make_mesh()
  tally = by_class.make_tally(
    model=model.model,
    to_probabilities=model.to_probabilities,
    source=test,
    mesh=mesh,
    batch_size=sharding.round_up(
      config["eval.batch_size"] or config["batch_size"], mesh
    ),
    preprocess=weights.preprocess,
    mistakes=mistakes,
  )(sharding.replicate(mesh, jax.tree.map(np.asarray, model.params)))
  return Details(
    checkpoint="/".join(weights.source.split("/")[-2:]),
    dataset=dataset,
    split=split,
    class_names=test.class_names,
    multilabel=test.multilabel,
    tally=tally,
    mistakes=_show(model, test, tally.mistakes),
    attends=bool(model.model.num_layers),
  )


def _show(model, test, mistakes):
  """Returns the mistakes with pictures, and attention if there is some."""
  make_map = None
  if model.model.num_layers:
    make_map = attention_maps.make_look(model)
  shown = []
  for mistake in mistakes:
    attention = None
    if make_map:
      # One by one: the weights of a large model's layers are gigabytes.
      seen = make_map(normalize(mistake.pixels[None])).maps
      overlaid = attention_maps.overlay(mistake.pixels, np.asarray(seen[0]))
      attention = encode(overlaid)
    name = test.describe(mistake.index)
    picture = encode(mistake.pixels)
    shown.append(ShownMistake(mistake, name, picture, attention))
  return shown


def encode(pixels: np.ndarray) -> Picture:
  """Returns u8[h w 3] as a picture for the page, a large one smaller."""
  image = Image.fromarray(pixels)
  small = max(image.size) <= _PICTURE // 2
  image.thumbnail((_PICTURE, _PICTURE), Image.Resampling.LANCZOS)
  file = io.BytesIO()
  if small:
    image.save(file, "png", optimize=True)
  else:
    image.save(file, "jpeg", quality=85)
  kind = "image/png" if small else "image/jpeg"
  return Picture(kind, file.getvalue(), (image.height, image.width))
