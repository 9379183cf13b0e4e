"""What is done to each image of a build: read, decoded, compared.

It runs in processes of its own, which start without TensorFlow.
"""

import io
import multiprocessing
import os
import signal
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vit_jax.data import preprocess
from vit_jax.errors import UserError, one_line
from vit_jax.tools.build_data import near_duplicates, own_files

_KEPT = ("JPEG", "MPO", "PNG")  # others are re-encoded as PNG
UNREADABLE, UNLABELLED, TWINS = "unreadable", "without labels", "twins"


class Outcome(NamedTuple):
  """What became of an image.

  Attributes:
    name: the image's.
    problem: why it is left out, UNREADABLE, UNLABELLED or TWINS; "" if not.
    found: (encoded image, labels), or what report.json says of the problem.
  """

  name: str
  problem: str
  found: Any


_worker: dict[str, Any] = {}  # what each process is given once


def load(index: Path, data_dir: str) -> None:
  """Takes the folder of the saved index of test images, and that of TFDS."""
  loaded = near_duplicates.Index.load(index)
  _worker.update(index=loaded, data_dir=data_dir)


def run(
  images: list[tuple[str, own_files.Place, list[int] | None]],
) -> list[Outcome]:
  """Reads images, and looks for them among the test images, see `load`.

  Args:
    images: (name, place, labels); None: the labels are a data set's own.
  """
  outcomes, read = [], []
  for name, place, labels in images:
    try:
      if labels is None:
        source = own_files.open_set(place.path, _worker["data_dir"])
        encoded, labels = source.read_example(place.row)
      else:
        encoded = labels and own_files.read_image(place)
      if labels:
        read.append((name, labels, *_decode(encoded)))
      else:
        outcomes.append(Outcome(name, UNLABELLED, name))
    except Exception as e:  # Pillow's plugins raise what they like
      why = one_line(e) if isinstance(e, UserError) else type(e).__name__
      outcomes.append(Outcome(name, UNREADABLE, [name, why]))
  if not read:
    return outcomes
  thumbnails = np.stack([thumbnail for *_, thumbnail in read])
  twins = _worker["index"].find(thumbnails)
  for (name, labels, encoded, _), twin in zip(read, twins, strict=True):
    if twin:
      found = [name, twin.name, round(twin.similarity, 4)]
      outcomes.append(Outcome(name, TWINS, found))
    else:
      outcomes.append(Outcome(name, "", (encoded, labels)))
  return outcomes


def _decode(encoded):
  """Returns bytes that training decodes to the same image, and a thumbnail.

  Pixels are those that training sees, see `preprocess.decode_image`. CMYK is
  made RGB here, in one way.
  """
  with warnings.catch_warnings():  # of what Pillow can read all the same
    warnings.simplefilter("ignore")
    image = preprocess.open_image(encoded, "image")
    kept = image.format in _KEPT and image.mode != "CMYK"
    image = Image.fromarray(preprocess.decode_image(image))
  if not kept:
    out = io.BytesIO()
    image.save(out, "PNG")
    encoded = out.getvalue()
  return encoded, near_duplicates.make_thumbnail(image)


# --- in a process of its own ---


def start_worker(*given) -> None:
  """Prepares a process that is nothing but a worker; takes what `load` does."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the build's
  threading.Thread(target=_end_with_parent, daemon=True).start()
  load(*given)


def _end_with_parent():
  """Ends this worker with a build that is killed."""
  parent = multiprocessing.parent_process()
  assert parent
  parent.join()
  os._exit(1)
