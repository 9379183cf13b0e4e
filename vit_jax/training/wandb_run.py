"""The optional run of Weights & Biases."""

import importlib.util
import secrets
from typing import Any

import jax

from vit_jax import files
from vit_jax.errors import RunStopped, needs_extra, one_line


def check(config) -> None:
  """Raises a UserError if `config.wandb` is set and wandb not installed."""
  if config.wandb and not importlib.util.find_spec("wandb"):
    raise needs_extra(f"config.wandb={config.wandb}", "wandb")


def start(config, workdir) -> Any:
  """Returns a run in the project `config.wandb`, or None.

  Only process 0 has one. A resumed run continues the same one, which ignores
  steps that it already has.

  Raises:
    RunStopped: no login, no network.
  """
  if not config.wandb or jax.process_index():
    return None
  import wandb  # pyright: ignore[reportMissingImports]

  file = workdir / "wandb_id"
  if not file.exists():
    files.write_atomically(file, secrets.token_hex(8))
  try:
    return wandb.init(
      project=config.wandb,
      id=file.read_text(),
      resume="allow",
      name=workdir.name,
      dir=None if files.is_remote(workdir) else str(workdir),
      config=config.to_dict(),
    )
  except Exception as e:
    raise RunStopped(
      f"Weights & Biases cannot be reached: {one_line(e)}; `wandb login`, or "
      "WANDB_MODE=offline, and run the same command again"
    ) from e
