"""Run folders and Orbax checkpoints of this project, as `Weights`."""

import contextlib
import logging
import time

import numpy as np
from etils import epath

from vit_jax import checkpoint, files
from vit_jax.data.sizes import as_pair
from vit_jax.errors import RunStopped, UserError, one_line
from vit_jax.pretrained import tables
from vit_jax.pretrained.weights import Weights, as_lazy
from vit_jax.state import unflatten
from vit_jax.training import lora

log = logging.getLogger(__name__)

ORIGIN = "vit_jax"


def matches(path) -> bool:
  """Returns whether a folder is a run or one of its checkpoints."""
  path = checkpoint.absolute(path)
  run = path.parent.parent if path.name.isdigit() else path
  return files.has_run(run) and any(
    (run / kind).exists() for kind in ("checkpoints", "best")
  )


def locate(path) -> tuple[epath.Path, list[epath.Path]]:
  """Returns the run folder and its checkpoints, the preferred one first.

  Args:
    path: a run folder (its best checkpoint, then its newest) or one
      checkpoint's folder, such as RUN/checkpoints/1000.

  Raises:
    UserError: no checkpoint at `path`.
  """
  path = checkpoint.absolute(path)
  if not path.exists():
    raise UserError(
      f"no checkpoint at {path}: it does not exist; give a run folder or one "
      "of its checkpoints/STEP"
    )
  if path.name.isdigit() and files.has_run(path.parent.parent):
    return path.parent.parent, [path]
  best = checkpoint.read_best(path)
  found = [best[0]] if best else []
  for step in reversed(checkpoint.list_steps(path)):
    folder = path / "checkpoints" / str(step)
    found += [folder] * (folder not in found)
  if not files.has_run(path) or not found:
    raise UserError(
      f"no checkpoint at {path}: a run folder has config.json and checkpoints; "
      "train one with `vit-jax train`"
    )
  return path, found


def read(source: str, *, arrays: bool = True) -> Weights:
  """Returns the weights of a run: its best checkpoint, else its newest.

  Corrupt checkpoints are skipped. Without `arrays`, only config.json is read.

  Raises:
    UserError: no checkpoint there, or all of them are corrupt.
    RunStopped: a checkpoint could not be read.
  """
  workdir, candidates = locate(source)
  if not arrays:
    run = files.read_json(workdir / "config.json")
    return _as_weights({}, run, workdir)
  for folder in candidates:
    try:
      params = checkpoint.read_params(folder)
    except checkpoint.Corrupt as e:
      log.warning("%s is corrupt (%s)", folder, e)
    else:
      return _as_weights(params, files.read_run(workdir), folder)
  raise UserError(
    f"no readable checkpoint at {source}: {len(candidates)} tried; "
    "run the training command again to make a new one"
  )


def _as_weights(params, run, folder) -> Weights:
  config = {**run["config"]}
  if adapted := config.pop("lora", None):  # merged into the plain model
    params = lora.merge(params, **adapted)
    run = {**run, "config": config}
  params = {path: as_lazy(np.asarray(x)) for path, x in params.items()}
  return Weights(
    ORIGIN,
    str(folder),
    dict(config["model"]),
    image_size=as_pair(config["image_size"]),
    num_classes=tables.width_of(params, "head/bias"),
    params=params,
    class_names=run["class_names"] or None,
    preprocess=config["eval"]["preprocess"],
    loss=config["loss"]["name"],
    resize=run.get("resize", "corner_aligned"),
    run=run,
  )


def write(weights: Weights, out) -> None:
  """Writes a folder that every command takes as a checkpoint.

  Raises:
    UserError: `out` exists.
  """
  folder = checkpoint.absolute(out)
  if folder.exists():
    raise UserError(f"{folder} exists; nothing is overwritten, choose another")
  run = {
    "config": {
      "image_size": weights.image_size,
      "model": weights.model,
      "eval": {"preprocess": weights.preprocess},
      "loss": {"name": weights.loss},
    },
    "class_names": weights.class_names,
    "resize": weights.resize,
    "converted_from": weights.source,
  }
  # In a bucket Orbax writes in place; config.json, written last, completes it.
  is_remote = files.is_remote(folder)
  place = contextlib.nullcontext if is_remote else files.atomic_folder
  with place(folder) as partial:
    checkpoints = checkpoint.Checkpoints(partial, keep=1)
    try:
      params = {path: x.read() for path, x in weights.params.items()}
      checkpoints.save(0, {"params": unflatten(params)})
      checkpoints.close()
    except RunStopped as e:
      time.sleep(1)  # TensorStore may still write into the folder
      # Without the advice to resume with the same command, which is for runs.
      raise OSError(one_line(e.__cause__ or e)) from e
    files.write_json(partial / "config.json", run)
