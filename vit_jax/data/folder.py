"""Folders of images, with a sub-folder per class or without labels."""

import concurrent.futures
import functools
import hashlib
import logging
import os
import shlex
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data import ops, preprocess
from vit_jax.data.source import Source, digest
from vit_jax.data.tfds import resolve_split
from vit_jax.errors import UserError, suggest
from vit_jax.files import walk

log = logging.getLogger(__name__)

FOLDER, IMAGES = "folder:", "images:"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Formats that TensorFlow decodes, in Pillow's names.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Folder, in any case -> split.
_SPLITS = {"train": "train", "training": "train"}
_SPLITS |= {"test": "test", "testing": "test", "dev": "dev"}
_SPLITS |= {name: name for name in ("val", "valid", "validation", "eval")}
_HOLD_OUT = 0.1  # of each class, if the folder has no test images
_NUM_THREADS = 16  # for reading files, which is mostly waiting


class FolderSource(Source):
  """A folder of images with a sub-folder per class, or such a folder per split.

  If sub-folders are named for training and testing (`_SPLITS`), these are the
  splits. Otherwise a tenth of each class is held out as `test`: the files whose
  relative names have the smallest hashes. Splits are ordered by hash too, so
  that `train[:10%]` is a random tenth, the same everywhere. Links are followed.

  A record is the label (four bytes, little endian) followed by the file. No
  file is read before its record is.

  Attributes:
    left_out: files that are not read, and folders next to those of splits.
  """

  multilabel = False
  max_labels = 1
  _advice = ""  # in messages about unusable images
  _where = " in the folders of classes"  # in messages about other files

  def __init__(self, dataset: str, split: str, faults: list[str] | None = None):
    self.dataset, self.split = dataset, split
    self.class_names, splits, self.left_out = self._find_splits(dataset)
    self.num_classes = len(self.class_names)
    self._files = take_split(splits, dataset, split)
    if faults is None:
      command = f"vit-jax data check {shlex.quote(dataset)}"
      self._advice = f"; `{command}` lists all such files"
      if self.left_out:
        log.warning("%s: %s", dataset, self.describe_left_out())
    else:
      self._leave_out_broken(faults)
    self.num_examples = len(self._files)

  def _find_splits(self, dataset):
    return _find_splits(find_folder(dataset))

  def _leave_out_broken(self, faults):
    """Leaves out corrupt files and adds the reasons to `faults`."""
    Image.init()  # Pillow's list of formats; not thread-safe
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      found = list(pool.map(_find_fault, [path for path, _ in self._files]))
    self._files = [
      file for file, fault in zip(self._files, found, strict=True) if not fault
    ]
    faults += [fault for fault in found if fault]

  def check_example(self, index):
    try:
      return super().check_example(index)
    except UserError as e:
      raise type(e)(f"{e}{self._advice}") from e

  def describe_left_out(self) -> str:
    """Returns a message with the number of files not read, by kind."""
    kinds = Counter(
      "folder" if path.is_dir() else path.suffix.lower() or "without suffix"
      for path in self.left_out
    )
    counts = ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common())
    return (
      f"left out: {counts}, such as {self.left_out[0]}; only "
      f"{', '.join(_SUFFIXES)} files{self._where} are read"
    )

  def read(self, indices):
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      return list(pool.map(self._read_one, np.asarray(indices).tolist()))

  def check_labels(self):
    """Does nothing, because labels are those of folders and always valid."""

  def identity(self):
    return self._identity

  @functools.cached_property
  def _identity(self):  # cached, because it needs a stat of each file
    names = ["/".join(path.split("/")[-2:]) for path, _ in self._files]
    sizes = [os.stat(path).st_size for path, _ in self._files]
    return digest([*zip(names, sizes, strict=True)])

  def locate(self):
    return [(path, 0, 1) for path, _ in self._files]

  def _read_one(self, index):
    path, label = self._files[index]
    return struct.pack("<i", label) + Path(path).read_bytes()

  def parse_image(self, record):
    return tf.strings.substr(record, 4, -1)

  def parse_labels(self, record):
    return tf.io.decode_raw(tf.strings.substr(record, 0, 4), tf.int32)

  def describe(self, index):
    return self._files[index][0]


class ImagesSource(FolderSource):
  """The images in a folder, at any depth, without labels: `images:PATH`.

  They can be pseudo-labelled. The only split is `train`, ordered by name. Links
  are followed. A record is four bytes followed by the file.
  """

  multilabel = True  # images have no labels
  _where = ""

  def _find_splits(self, dataset):
    root = find_folder(dataset, IMAGES)
    images, left_out = _walk_images(root)
    if not images:
      raise UserError(
        f"{dataset!r} has no images ({', '.join(_SUFFIXES)}); give a folder "
        "with some in it, at any depth"
      )
    self._start = _find_start(root)
    files = [(path, 0) for path in sorted(images)]
    return [], {"train": files}, left_out

  @functools.cached_property
  def _identity(self):
    return digest(
      [(path[self._start :], os.stat(path).st_size) for path, _ in self._files]
    )

  def parse_labels(self, record):
    del record
    return tf.zeros([0], tf.int32)


def list_splits(dataset: str) -> dict[str, int]:
  """Returns {split: number of files}; see `preparation.list_splits`."""
  _, splits, _ = _find_splits(find_folder(dataset))
  return {name: len(files) for name, files in splits.items()}


def find_folder(dataset: str, prefix: str = FOLDER) -> Path:
  """Returns the folder of `folder:PATH`, or of another prefix.

  Raises:
    UserError: there is none.
  """
  root = Path(dataset.removeprefix(prefix)).expanduser()
  if not root.is_dir():
    each = "" if prefix == IMAGES else "a sub-folder for each class of "
    raise UserError(
      f"{dataset!r}: {root} is not a folder; give one with {each}images"
    )
  return root


def _list_folders(root):
  return sorted(d for d in root.iterdir() if d.is_dir() and d.name[0] != ".")


def _find_splits(root):
  """Returns class names, {split: [(path, label)]} and paths that are left out.

  Files are ordered by hash.
  """
  folders: dict[str, Path] = {}
  others = []
  for folder in _list_folders(root):
    split = _SPLITS.get(folder.name.lower())
    if split in folders:
      raise UserError(
        f"{root}: {folders[split].name}/ and {folder.name}/ mean the same "
        "split; remove or rename one"
      )
    if split:
      folders[split] = folder
    else:
      others.append(folder)
  if "train" not in folders or len(folders) == 1:
    classes, files, left_out = _find_files(root)
    return classes, _hold_out(files, len(classes)), left_out
  classes, train, left_out = _find_files(folders.pop("train"))
  splits = {"train": train}
  for split, folder in folders.items():
    _, splits[split], more = _find_files(folder, classes)
    left_out += more
  return classes, splits, left_out + others


def _find_files(root, known=None):
  """Returns class names, [(path, label)] and [path] of what is left out.

  Labels are those of the `known` classes, some of which may have no images.
  """
  classes = [folder.name for folder in _list_folders(root)]
  unknown = [name for name in classes if name not in (known or classes)]
  if unknown:
    raise UserError(
      f"{root}: the training images have no class {unknown[0]!r}"
      f"{suggest(unknown[0], known or ())}; rename or remove the folder"
    )
  files, left_out = find_images(root, classes)
  if len(classes) < (1 if known else 2):
    found = f"1 class, {classes[0]!r}" if classes else "no folder of images"
    split = _SPLITS.get(classes[0].lower()) if classes else None
    other = "test/" if split == "train" else "train/"
    raise UserError(
      f"{root}: found {found}; it needs a sub-folder of images for each of at "
      f"least 2 classes{f', or {other} beside {classes[0]}/' if split else ''}"
    )
  _check_classes(root, classes, files)
  left_out += [
    path for path in root.iterdir() if path.is_file() and path.name[0] != "."
  ]
  labels = [(known or classes).index(name) for name in classes]
  files = [(path, labels[label]) for path, label in files]
  start = _find_start(root)
  files.sort(key=lambda file: _hash(file[0][start:]))
  return classes, files, left_out


def _check_classes(root, classes, files):
  """Raises a UserError for sub-folders that cannot be classes."""
  for name in classes:
    try:
      name.encode()
    except UnicodeEncodeError as e:
      raise UserError(
        f"{root}: the class folder {name!r} is not in UTF-8; rename it"
      ) from e
  start = _find_start(root)
  inner: dict[int, set[str]] = {}
  for path, label in files:
    parts = path[start:].split("/")
    if len(parts) == 2:  # an image directly in the class folder
      return
    inner.setdefault(label, set()).add(parts[1])
  first = inner[0]
  if len(first) > 1 and all(names == first for names in inner.values()):
    raise UserError(
      f"{root}: {', '.join(classes[:5])} would be the classes, but all have "
      f"the same sub-folders, {', '.join(sorted(first)[:5])}; name splits "
      "train/ and test/, or give a folder whose sub-folders are the classes"
    )


def find_images(
  root: Path, classes: list[str]
) -> tuple[list[tuple[str, int]], list[Path]]:
  """Returns [(path, index of the class)] of a folder of class folders.

  Second: the files that are not read, without hidden ones.

  Raises:
    UserError: a class has no images.
  """
  files, left_out = [], []
  for label, name in enumerate(classes):
    images, others = _walk_images(root / name)
    left_out += others
    if not images:
      raise UserError(
        f"{root / name}: class {name!r} has no images ({', '.join(_SUFFIXES)});"
        " add some or remove the folder"
      )
    files += [(path, label) for path in images]
  return files, left_out


def _walk_images(root):
  """Returns the images at any depth below a folder, and the other files.

  Hidden files are ignored.
  """
  paths = [
    path
    for path in walk(str(root))
    if os.path.basename(path)[0] != "."
    # A broken link is an error when it is read.
    and (os.path.isfile(path) or os.path.islink(path))
  ]
  images = [path for path in paths if path.lower().endswith(_SUFFIXES)]
  return images, sorted(map(Path, {*paths}.difference(images)))


def _find_start(root):
  """Returns where the relative part of a path below `root` starts."""
  return len(str(root / "x")) - 1  # 0 of ".", whose name is left out


def _hash(relative):
  return hashlib.sha256(os.fsencode(relative)).digest()


def _hold_out(files, num_classes):
  """Splits off the first tenth of each class, at least one if it has two."""
  totals = np.bincount([label for _, label in files], minlength=num_classes)
  quota = np.where(
    totals < 2, 0, np.maximum(1, np.floor(totals * _HOLD_OUT + 0.5))
  )
  splits = {"train": [], "test": []}
  for path, label in files:
    splits["test" if quota[label] > 0 else "train"].append((path, label))
    quota[label] -= 1
  return splits


def take_split(splits: dict[str, list], dataset: str, split: str) -> list:
  """Returns the files of `split`, a slice or a sum in TFDS's syntax.

  Raises:
    UserError: no such split, or a slice of it that has no files.
  """
  infos = {
    name: tfds.core.SplitInfo(
      name=name, shard_lengths=[len(files)], num_bytes=0
    )
    for name, files in splits.items()
  }
  _, parts = resolve_split(infos, dataset, split)
  return [file for name, i, j in parts for file in splits[name][i:j]]


def _find_fault(path) -> str | None:
  """Returns the fault of a file that is not a whole image, or None.

  Fast: checks the header, PNG's checksums and the end. Only suspicious files
  are decoded.
  """
  try:
    data = Path(path).read_bytes()
    image = preprocess.open_image(data, path, _FORMATS)
    kind = image.format
    image.verify()
    if not _has_end(data, kind):
      ops.decode(tf.constant(data), precise=False)
  except UserError as e:
    return str(e)
  except Exception as e:  # Pillow's plugins may raise any exception
    if isinstance(e, OSError) and e.strerror:
      return f"{path}: cannot be read: {e.strerror}"
    kind = type(e).__name__
    return f"{path}: not a readable image ({kind}); repair or remove it"


def _has_end(data, kind):
  if kind in ("JPEG", "MPO"):  # the end marker cannot occur inside a scan
    return b"\xff\xd9" in data[-4096:]
  if kind == "PNG":
    return b"IEND" in data[-4096:]
  if kind == "WEBP":
    return len(data) >= 8 + int.from_bytes(data[4:8], "little")
  return False
