"""Pseudo-labelled data sets: images of another data set, labels of a model.

`pseudo:PATH` is a folder written by `vit-jax pseudo-label`:

  index.npy: i64[n], examples of the other set, ascending. An image may occur
    several times.
  labels.npy: i32[n l], classes, the most probable first; l is 1 if hard.
  probabilities.npy: f32[n l], with soft labels only.
  about.json: the model, the images and the options.

Images are not copied, so opening such a set also opens the other one.
"""

import hashlib
import io
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from vit_jax import files
from vit_jax.data.source import Source
from vit_jax.errors import UserError, os_errors

PSEUDO = "pseudo:"
ABOUT = "about.json"
_INDEX, _LABELS, _PROBABILITIES = "index", "labels", "probabilities"
# In a bucket these are written one by one, before ABOUT.
ARRAYS = tuple(f"{x}.npy" for x in (_INDEX, _LABELS, _PROBABILITIES))
# In a bucket, reading this many unneeded records is faster than sending another
# request.
_GAP = 16


class PseudoLabelled(Source):
  """Images of another source with the labels in a folder.

  It is always used whole; its split is the one that was labelled.

  A record is the labels, then the probabilities of soft ones (4 bytes each,
  little endian), then the record of the other source.
  """

  multilabel = False

  def __init__(self, dataset: str, open_images: Callable[[str, str], Source]):
    """Opens `pseudo:PATH`.

    Args:
      dataset: PATH may be a gs:// address.
      open_images: (data set, split) -> its source.

    Raises:
      UserError: the set is missing or corrupt, or its images are missing or
        have changed.
    """
    folder = files.make_path(dataset.removeprefix(PSEUDO)).expanduser()
    about = read_about(folder)
    self.dataset, self.split = dataset, about["split"]
    self.class_names = about["class_names"]
    self.num_classes = len(self.class_names)
    self.soft = about["options"]["soft"]
    self._digest = about["digest"]
    names = [_INDEX, _LABELS] + [_PROBABILITIES] * self.soft
    self._index, *self._values = [_load(folder, name) for name in names]
    self._images = images = _open_images(dataset, about, open_images)
    shape = (len(self._index), *self._values[0].shape[1:])
    if (
      len(shape) != 2
      or any(x.shape != shape for x in self._values)
      or not shape[0]
      or self._index[-1] >= images.num_examples  # ascending
    ):
      raise UserError(
        f"{dataset!r} is corrupt: its arrays differ in length or are of other "
        "images; restore it from a copy, or write it again"
      )
    self.num_examples, self.max_labels = shape
    self._bytes = 4 * self.max_labels  # of one array in a record
    share = self.num_examples / images.num_examples
    self.num_bytes, self.remote = int(share * images.num_bytes), images.remote

  def identity(self):
    return f"{self._images.identity()} {self._digest}"

  def locate(self):
    return self._images.locate()

  def describe(self, index):
    return self._images.describe(int(self._index[index]))

  def read(self, indices):
    indices = np.asarray(indices)
    wanted, places = np.unique(self._index[indices], return_inverse=True)
    records = self._read_images(wanted)
    values = [np.ascontiguousarray(x[indices]) for x in self._values]
    packed = np.concatenate([x.view(np.uint8) for x in values], axis=1)
    return [
      row.tobytes() + records[i]
      for row, i in zip(packed, places.tolist(), strict=True)
    ]

  def _read_images(self, wanted):
    """Returns the records of examples in ascending order."""
    if not self.remote:
      return self._images.read(wanted)
    new = np.diff(wanted) > _GAP
    first, last = wanted[np.r_[True, new]], wanted[np.r_[new, True]]
    pairs = zip(first.tolist(), last.tolist(), strict=True)
    all_ = np.concatenate([np.arange(a, b + 1) for a, b in pairs])
    records = self._images.read(all_)
    return [records[i] for i in np.searchsorted(all_, wanted).tolist()]

  def check_labels(self):
    """Does nothing, because a model's classes are always in range."""

  def parse_image(self, record):
    start = self._bytes * len(self._values)
    return self._images.parse_image(tf.strings.substr(record, start, -1))

  def parse_labels(self, record):
    packed = tf.strings.substr(record, 0, self._bytes)
    return tf.io.decode_raw(packed, tf.int32)

  def parse_probabilities(self, record, length):
    if not self.soft:
      return super().parse_probabilities(record, length)
    packed = tf.strings.substr(record, self._bytes, self._bytes)
    found = tf.io.decode_raw(packed, tf.float32)
    found = tf.pad(found, [[0, length - self.max_labels]])
    return tf.ensure_shape(found, [length])


def _open_images(dataset, about, open_images):
  """Returns the source that was labelled.

  Raises:
    UserError: it cannot be opened, or has changed.
  """
  try:
    images = open_images(about["dataset"], about["split"])
  except UserError as e:
    raise UserError(f"{dataset!r} needs the images it labels: {e}") from e
  now = images.identity()
  if now != about["identity"]:
    raise UserError(
      f"{dataset!r} has labels of other images: {about['dataset']!r} "
      f"{about['split']} is {now}, and was {about['identity']}; restore it, or "
      "label it again with vit-jax pseudo-label"
    )
  return images


def read_about(folder) -> dict:
  """Returns about.json of a pseudo-labelled set.

  Raises:
    UserError: the folder has none.
  """
  file = folder / ABOUT
  about = files.read_json(file, "give a folder of vit-jax pseudo-label")
  if not {"digest", "options"} <= about.keys():
    raise UserError(
      f"{file} is not of pseudo-labels; give a folder of vit-jax pseudo-label"
    )
  return about


def _load(folder, name):
  """Returns an array of the folder, memory-mapped if the folder is local."""
  file = folder / f"{name}.npy"
  try:
    with os_errors():
      if files.is_remote(file):
        return np.load(io.BytesIO(file.read_bytes()))
      return np.load(file, mmap_mode="r")
  except (OSError, ValueError, EOFError) as e:
    raise UserError(
      f"{file} cannot be read: {e}; restore it from a copy, or label again"
    ) from e


def write(folder, about: dict, index, labels, probabilities=None) -> None:
  """Writes a pseudo-labelled set atomically.

  Args:
    folder: to create; a pathlib or epath path.
    about: for about.json: "dataset", "split", "identity", "class_names",
      "options" with "soft", and any others.
    index: i64[n], ascending.
    labels: i32[n l].
    probabilities: f32[n l], of soft labels.
  """
  arrays = {
    _INDEX: np.asarray(index, "<i8"),
    _LABELS: np.asarray(labels, "<i4"),
  }
  if probabilities is not None:
    arrays[_PROBABILITIES] = np.asarray(probabilities, "<f4")
  digest = hashlib.sha256()
  with files.atomic_folder(folder) as partial:
    for name, array in arrays.items():
      np.save(partial / f"{name}.npy", array)
      digest.update(np.ascontiguousarray(array).data)
    about = {**about, "digest": digest.hexdigest()[:16]}
    files.write_json(partial / ABOUT, about)
