"""The `embed` command: features of image files, as one file of arrays."""

import concurrent.futures
import hashlib
import logging
import math
import os
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vit_jax import files, models, pretrained, sharding
from vit_jax.data import preprocess
from vit_jax.errors import UserError, check_free
from vit_jax.evaluation import devices
from vit_jax.evaluation.predict import list_images
from vit_jax.training.steps import normalize

log = logging.getLogger(__name__)

_PART = 1024  # images of a part; a killed command repeats at most one
_THREADS = 8  # that decode images; Pillow releases the GIL for that
SUFFIXES = (".npz", ".parquet")


def embed(
  source: str,
  images: Sequence[str],
  out: str,
  *,
  what: str = "pooled",
  layers: Sequence[int] = (-1,),
  image_size: int | tuple[int, int] | None = None,
  resize: str | None = None,
  batch_size: int = 64,
) -> dict[str, Any]:
  """Writes the features of image files.

  Finished parts are kept beside `out`, so that the same command resumes.

  Args:
    source: whatever `vit_jax.load` reads.
    images: files, and folders of them.
    out: FILE.npz of the arrays "images", the paths, and "features" f32[n ...];
      or FILE.parquet of the columns "image" and "features", flattened.
    what, layers: which features, see `models.make_features`.
    image_size: pixels, or (h, w); unset: the checkpoint's own.
    resize: of position embeddings, see `vit_jax.load`.
    batch_size: images at once, on all devices.

  Returns:
    {"images": how many, "shape": of the features, "errors": a line for each
    file that was skipped because it is not an image}.

  Raises:
    UserError: no checkpoint or images, `out` exists, or it has unfinished
      parts of other features.
  """
  path = pathlib.Path(out)
  if path.suffix not in SUFFIXES:
    raise UserError(f"--out is {out}; it must end in {' or '.join(SUFFIXES)}")
  if files.is_remote(out):
    raise UserError(f"--out is {out}; give a local file, and copy it there")
  check_free(path)
  paths = list_images(images)
  weights = pretrained.read(source, resize)
  model = pretrained.assemble(weights, image_size=image_size)
  run = _make_run(model, what, layers, batch_size)
  parts = path.with_name(path.name + ".parts")
  about = {
    "checkpoint": weights.source,
    "images": _identify(paths),
    "what": [what, *layers],
    "image_size": list(model.config.image_size),
    "resize": model.config.resize,
  }
  files.open_parts(parts, about, "features")
  found = _write_parts(parts, paths, run)
  _join(path, found)
  errors = [str(line) for part in found for line in part["errors"]]
  shapes = [part["features"].shape for part in found]
  shutil.rmtree(parts)
  count = sum(shape[0] for shape in shapes)
  return {"images": count, "shape": [count, *shapes[0][1:]], "errors": errors}


def _identify(paths) -> str:
  """Returns a hash of files' names, sizes and modification times."""
  digest = hashlib.sha256()
  for path in paths:
    about = os.stat(path) if os.path.exists(path) else None
    changed = (about.st_size, about.st_mtime_ns) if about else ()
    digest.update(repr((path, changed)).encode())
  return digest.hexdigest()


def _write_parts(folder, paths, run):
  """Writes the missing parts; returns all of them, loaded lazily."""
  begun, done, parts = time.monotonic(), 0, []
  for start in range(0, len(paths), _PART):
    part, chosen = folder / f"{start:012}.npz", paths[start : start + _PART]
    parts.append(part)
    if part.exists():
      continue
    with files.atomic_file(part) as partial, open(partial, "wb") as f:
      np.savez(f, **run(chosen))
    done += len(chosen)
    log.info(
      "%d of %d images, %.1f images/s",
      *(start + len(chosen), len(paths), done / (time.monotonic() - begun)),
    )
  return [np.load(part) for part in parts]


def _make_run(model, what, layers, batch_size):
  """Returns paths -> {"images", "features" f32[n ...], "errors"}."""
  mesh = sharding.make_mesh()
  size = devices.round_up(batch_size, mesh)
  take = models.make_features(model.model, what, layers)
  features = jax.jit(
    sharding.on_mesh(mesh, lambda params, x: take(params, normalize(x)))
  )
  params = devices.replicate(mesh, jax.tree.map(np.asarray, model.params))
  about = model.config

  def read(path):
    try:
      return preprocess.preprocess_image(
        path, about.preprocess, about.image_size
      )
    except UserError as e:
      return str(e)

  def run(paths):
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      pixels = list(pool.map(read, paths))
    good = [i for i, x in enumerate(pixels) if not isinstance(x, str)]
    found = []
    for start in range(0, max(len(good), 1), size):
      rows = good[start : start + size]
      # A fixed shape, so that the model is compiled once.
      batch = np.zeros((size, *about.image_size, 3), np.uint8)
      for row, i in enumerate(rows):
        batch[row] = pixels[i]
      batch = sharding.put_batch(mesh, {"image": batch}, size)["image"]
      found.append(np.asarray(features(params, batch))[: len(rows)])
    return {
      "images": np.array([paths[i] for i in good], str),
      "features": np.concatenate(found),
      "errors": np.array([x for x in pixels if isinstance(x, str)], str),
    }

  return run


def _flatten(x):
  """[n ...] -> [n d], also where n is 0."""
  return x.reshape(len(x), math.prod(x.shape[1:]))


def _join(path, parts):
  """Writes all parts as one file."""
  with files.atomic_file(path) as partial, open(partial, "wb") as f:
    if path.suffix == ".npz":
      images, features = (
        np.concatenate([part[name] for part in parts])
        for name in ("images", "features")
      )
      np.savez(f, images=images, features=features)
      return
    import pyarrow as pa
    from pyarrow import parquet

    fields = [("image", pa.string()), ("features", pa.list_(pa.float32()))]
    schema = pa.schema(fields)
    with parquet.ParquetWriter(f, schema) as writer:
      for part in parts:
        features = list(_flatten(part["features"]))
        columns = {"image": part["images"], "features": features}
        writer.write_table(pa.table(columns, schema))
