"""Run folders and Orbax checkpoints of this project, as `Weights`."""

import time

from vit_jax import checkpoint, files
from vit_jax.errors import RunStopped, UserError, check_free
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
  if "://" not in str(folder):
    check_free(folder)
  elif folder.exists():
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
  with files.atomic_folder(folder) as partial:
    checkpoints = checkpoint.Checkpoints(partial, keep=1)
    try:
      params = {path: x.read() for path, x in weights.params.items()}
      checkpoints.save(0, {"params": unflatten(params)})
      checkpoints.close()
    except RunStopped as e:
      time.sleep(1)  # TensorStore may still write into the folder
      # Of a run it says that the same command resumes.
      raise OSError(checkpoint.first_line(e.__cause__ or e)) from e
    files.write_json(partial / "config.json", run)  # what makes it complete
