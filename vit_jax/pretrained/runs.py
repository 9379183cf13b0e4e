"""Run folders and Orbax checkpoints of this project, as `Weights`."""

import json

from vit_jax import checkpoint
from vit_jax.errors import UserError
from vit_jax.pretrained.weights import Weights, width_of
from vit_jax.state import as_lazy, unflatten

ORIGIN = "vit_jax"


def matches(path) -> bool:
  """Returns whether a folder is a run's or one of its checkpoints."""
  path = checkpoint.absolute(path)
  run = path.parent.parent if path.name.isdigit() else path
  return (run / "config.json").exists() and any(
    (run / kind).exists() for kind in ("checkpoints", "best")
  )


def read(source: str) -> Weights:
  """Returns the weights of a run: its best checkpoint, else its newest.

  Raises:
    UserError: nothing that can be read.
  """
  found = checkpoint.load_weights(source)
  run, config = found.run, found.run["config"]
  params = {path: as_lazy(x) for path, x in found.params.items()}
  size = config["image_size"]
  return Weights(
    ORIGIN,
    str(found.source),
    dict(config["model"]),
    image_size=(size, size) if isinstance(size, int) else tuple(size),
    num_classes=width_of(params, "head/bias"),
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
    UserError: there is something at `out` already.
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
  # Complete or not there; a bucket has no renaming, but config.json comes last.
  local = "://" not in str(folder)
  partial = folder.with_name(folder.name + ".tmp") if local else folder
  checkpoints = checkpoint.Checkpoints(partial, keep=1)
  params = {path: x.read() for path, x in weights.params.items()}
  checkpoints.save(0, {"params": unflatten(params)})
  checkpoints.close()
  checkpoint.write_atomically(
    partial / "config.json", json.dumps(run, indent=1)
  )
  if local:
    partial.rename(folder)
