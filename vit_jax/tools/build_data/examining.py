"""Per-image work of a build: reading, decoding, finding near-duplicates.

It runs in worker processes, which start without TensorFlow, or in an Apache
Beam pipeline.
"""

import io
import json
import multiprocessing
import os
import signal
import threading
import warnings
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data import preprocess
from vit_jax.errors import UserError, one_line
from vit_jax.tools.build_data import near_duplicates, own_files

_KEPT = ("JPEG", "MPO", "PNG")  # others are re-encoded as PNG
UNREADABLE, UNLABELLED, TWINS = "unreadable", "without labels", "twins"


def run(
  images: list[tuple[str, own_files.Place, list[int] | None]],
  index: str,
  data_dir: str,
) -> list[tuple[str, str, Any]]:
  """Reads images and finds their near-duplicates among the test images.

  Args:
    images: (name, place, labels); labels are None for a data set's own.
    index: the folder of the saved index of test images.
    data_dir: that of TFDS.

  Returns:
    (name, reason, result) of each image. The reason for leaving it out is
    UNREADABLE, UNLABELLED or TWINS, and "" for a kept image. The result is the
    entry in report.json, or the key and example for TFDS.
  """
  outcomes, found = [], []
  for name, place, labels in images:
    try:
      if labels != []:
        encoded, own = own_files.read(place, data_dir)
        labels = labels or own
      if labels:
        found.append((name, labels, *_decode(encoded)))
      else:
        outcomes.append((name, UNLABELLED, name))
    except Exception as e:  # Pillow's plugins raise errors of any type
      why = one_line(e) if isinstance(e, UserError) else type(e).__name__
      outcomes.append((name, UNREADABLE, [name, why]))
  if found:
    thumbnails = np.stack([thumbnail for *_, thumbnail in found])
    twins = near_duplicates.Index.load(index).find(thumbnails)
    for (name, labels, encoded, _), twin in zip(found, twins, strict=True):
      example = os.fsencode(name), {"image": encoded, "labels": labels}
      outcome = (TWINS, [name, *twin]) if twin else ("", example)
      outcomes.append((name, *outcome))
  return outcomes


def _decode(encoded):
  """Returns bytes that training decodes to the same image, and a thumbnail.

  Pixels are decoded as for training, by `preprocess.decode_image`. CMYK is
  converted to RGB here.
  """
  with warnings.catch_warnings():  # about images that Pillow can still read
    warnings.simplefilter("ignore")
    image = preprocess.open_image(encoded, "image")
    kept = image.format in _KEPT and image.mode != "CMYK"
    image = Image.fromarray(preprocess.decode_image(image))
  if not kept:
    out = io.BytesIO()
    image.save(out, "PNG")
    encoded = out.getvalue()
  return encoded, near_duplicates.make_thumbnail(image)


def make_pipeline(images: str, problems: str, examine):
  """Returns the Beam transform that makes a split's examples.

  Args:
    images: a JSON-lines file of arguments for `examine`.
    problems: prefix of the JSON-lines files for outcomes with a reason.
    examine: `run` with its index.
  """
  import apache_beam as beam  # pyright: ignore[reportMissingImports]

  def transform(pipeline):
    outcomes = (
      pipeline
      | beam.io.ReadFromText(images)
      | beam.Reshuffle()  # distributes the lines over the workers
      | beam.FlatMap(lambda line: examine(json.loads(line)))
    )
    bad = outcomes | "Bad" >> beam.Filter(lambda outcome: outcome[1])
    _ = bad | beam.Map(json.dumps) | beam.io.WriteToText(problems)
    good = outcomes | "Good" >> beam.Filter(lambda outcome: not outcome[1])
    return good | beam.Map(lambda outcome: outcome[2])

  return beam.ptransform_fn(transform)()


def start_worker() -> None:
  """Initialises a worker process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the build handles Ctrl-C
  parent = multiprocessing.parent_process()
  assert parent

  def end_with_build():  # even if the build is killed
    parent.join()
    os._exit(1)

  threading.Thread(target=end_with_build, daemon=True).start()
