"""ImageNet-21k from ImageNet's own archive; TFDS has no builder for it.

The archive of fall 2011 has 14,197,122 images of 21,841 WordNet synsets. A
class is named by its WordNet id, "n01440764", because words are not unique. An
image of several synsets occurs once for each, with that one label, so the set
is single-label, as in the paper's pre-training.

`imagenet21k.txt` has the 21,843 sorted ids, in the class order of the published
checkpoints: storage.googleapis.com/bit_models, file
`imagenet21k_wordnet_ids.txt`. The list of fall 2011 lacks two of them, of which
the archive has no images.
"""

import collections
import concurrent.futures
import contextlib
import functools
import io
import logging
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data import preprocess
from vit_jax.data.benchmarks import BY_HAND
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

# The first that exists is used; the folders are unpacked archives.
ARCHIVES = BY_HAND["imagenet21k"][0].split(" or ")
GOOGLE, FALL_2011 = "classes_21843", "classes_21841"
_NOT_IN_FALL_2011 = ("n03931044", "n09859684")
_KEPT = ("JPEG", "MPO", "PNG")  # MPO: JPEG with a second picture
NUM_THREADS = os.cpu_count() or 1
_BUFFER = 1 << 20  # bytes per read
_LOG_EVERY = 100_000  # images


class Imagenet21k(tfds.core.GeneratorBasedBuilder):
  """One split, `train`, in random order; hold out a slice of it.

  Preparation needs as much free space as the archive takes. If interrupted, it
  restarts from the beginning.
  """

  name = "imagenet21k"
  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = (
    tfds.core.BuilderConfig(
      name=GOOGLE,
      description="The 21,843 classes of the published checkpoints' heads.",
    ),
    tfds.core.BuilderConfig(
      name=FALL_2011,
      description="The 21,841 synsets that the archive of fall 2011 has.",
    ),
  )
  MANUAL_DOWNLOAD_INSTRUCTIONS = """
  Log in at https://image-net.org/download-images and download one of two
  archives. fall11_whole.tar (1.3 TB) is the paper's, but was no longer offered
  in 2022. winter21_whole.tar.gz (1.1 TB) lacks 2,674 of the synsets, most of
  them of persons; their classes stay empty, and all others keep their ids.
  Leave it packed, or replace it by the unpacked folder.
  """

  def _info(self) -> tfds.core.DatasetInfo:
    assert self.builder_config
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "label": tfds.features.ClassLabel(
            names=read_ids(self.builder_config.name)
          ),
          "file_name": tfds.features.Text(),  # n01440764/n01440764_18.JPEG
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://image-net.org",
      citation="J. Deng et al., 2009. doi:10.1109/CVPR.2009.5206848",
      metadata=tfds.core.MetadataDict(),  # filled below
    )

  def _split_generators(self, dl_manager):
    folder = Path(dl_manager.manual_dir)
    archive = next(folder / a for a in ARCHIVES if (folder / a).exists())
    return {"train": self._generate_examples(archive)}

  def _generate_examples(self, archive: Path):
    config, metadata = self.builder_config, self.info.metadata
    assert config
    assert metadata is not None
    empty = dict.fromkeys(read_ids(config.name))
    report = {"encoded_anew": [], "unreadable": []}
    count = 0
    for synset, name, encoded, made in _read_decoded(archive, set(empty)):
      file_name = f"{synset}/{name}"
      if made is None:
        report["unreadable"].append(file_name)
        continue
      if made != encoded:
        report["encoded_anew"].append(file_name)
      empty.pop(synset, None)
      count += 1
      if count % _LOG_EVERY == 0:
        log.info("%s images, at %s", f"{count:,}", synset)
      image = io.BytesIO(made)
      example = {"image": image, "label": synset, "file_name": file_name}
      yield file_name, example
    report["classes_without_images"] = list(empty)
    metadata.update(report, archive=archive.name)
    log.info("%s: %s images", archive.name, f"{count:,}")


@functools.cache
def read_ids(config: str) -> tuple[str, ...]:
  """Returns the WordNet ids of the classes of GOOGLE or FALL_2011, in order."""
  ids = Path(__file__).with_suffix(".txt").read_text().split()
  left_out = _NOT_IN_FALL_2011 if config == FALL_2011 else ()
  return tuple(i for i in ids if i not in left_out)


# --- reading the archive ---


def read_images(
  archive: Path, known: Collection[str]
) -> Iterator[tuple[str, str, bytes]]:
  """Yields (synset, file name, its bytes), reading from start to end.

  Args:
    archive: a tar file, perhaps compressed, with a tar file per synset; or a
      folder with a tar file or a folder per synset.
    known: the synsets that have a class.

  Raises:
    UserError: it cannot be read, has no synset, or an unknown one. Skipping
      that one would drop images silently; ImageNet's archives have none.
  """
  synset = None
  opened = _open_folder if archive.is_dir() else _open_tar
  try:
    for synset, files in opened(archive, known):
      yield from ((synset, name, encoded) for name, encoded in files)
  except (tarfile.TarError, EOFError, OSError) as e:
    where = f", in or after {synset}" if synset else ""
    raise UserError(
      f"{archive} cannot be read{where} ({e}); fetch it again"
    ) from e
  if not synset:
    raise UserError(
      f"{archive} has no synset; it needs tar files or folders with names such "
      "as n01440764.tar"
    )


def _open_folder(folder, known):
  """Checks all names, then yields (synset, iterator of its files)."""
  found = {}
  for path in sorted(folder.iterdir()):
    synset = _parse_synset(path.name, folder, known)
    if synset:
      found[synset] = path  # the tar, which sorts last, if both exist
  for synset in sorted(found):
    path = found[synset]
    yield synset, _read_folder(path) if path.is_dir() else _read_tar(path)


def _open_tar(archive, known):
  # A stream, because seeking in a compressed file of a terabyte takes hours.
  with tarfile.open(archive, "r|*", bufsize=_BUFFER) as outer:
    for member in outer:
      synset = _parse_synset(member.name, archive, known)
      if synset and member.isfile() and member.size:
        yield synset, _read_tar(outer.extractfile(member))


def _parse_synset(path, archive, known):
  """Returns the synset that a tar file or a folder is named after, or None."""
  match = re.fullmatch(r"(n\d{8})(\.tar)?", Path(path).name)
  if match and match[1] not in known:
    raise UserError(
      f"{archive} has {match[1]}, which is not a class of ImageNet-21k; fetch "
      "one of ImageNet's archives, or unpack this one and remove it"
    )
  return match and match[1]


def _read_tar(file) -> Iterator[tuple[str, bytes]]:
  """Yields (name, bytes) of a path's or an open file's members."""
  with contextlib.ExitStack() as stack:
    if isinstance(file, Path):
      file = stack.enter_context(file.open("rb"))
    inner: Any = stack.enter_context(
      tarfile.open(fileobj=file, mode="r|", bufsize=_BUFFER)
    )
    # TFDS would detect a duplicate name only at the very end, hours later.
    seen = set()
    for member in inner:
      name = Path(member.name).name
      if member.isfile() and name[0] != "." and name not in seen:
        seen.add(name)
        yield name, inner.extractfile(member).read()


def _read_folder(folder) -> Iterator[tuple[str, bytes]]:
  for path in sorted(folder.iterdir()):
    if path.is_file() and path.name[0] != ".":
      yield path.name, path.read_bytes()


# --- images ---


def _read_decoded(archive, known):
  """Yields (synset, file name, bytes, readable bytes or None), with threads."""

  def run(image):
    return *image, make_readable(image[-1])

  with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
    yield from map_ahead(pool, run, read_images(archive, known))


def map_ahead(
  pool: concurrent.futures.Executor, function: Callable, items: Iterable
) -> Iterator:
  """Yields function(item) in order; a pool computes a few items ahead.

  At most four items per core are in memory.
  """
  ahead = collections.deque()
  for item in items:
    ahead.append(pool.submit(function, item))
    if len(ahead) >= 4 * NUM_THREADS:
      yield ahead.popleft().result()
  while ahead:
    yield ahead.popleft().result()


def make_readable(encoded: bytes) -> bytes | None:
  """Returns bytes that TensorFlow decodes to RGB, None if it is not an image.

  JPEG and PNG that TensorFlow can decode are unchanged. CMYK images, which
  decoders interpret differently, and all others become PNG, without loss.
  """
  try:
    image = preprocess.open_image(encoded, "image")
    if image.format in _KEPT and image.mode != "CMYK":
      with contextlib.suppress(tf.errors.OpError):  # Pillow may decode it
        tf.io.decode_image(encoded, channels=3, expand_animations=False)
        return encoded
    pixels = preprocess.decode_image(image)
  except Exception:  # Pillow's plugins may raise any exception
    return None
  png = io.BytesIO()
  Image.fromarray(pixels).save(png, "PNG")
  return png.getvalue()
