"""The `convert` command: weights from any format into another one."""

import pathlib

from vit_jax import pretrained
from vit_jax.errors import UserError


def convert(source: str, out: str, to: str) -> list[str]:
  """Writes the weights at `source` to `out`; nothing is overwritten.

  Args:
    source: whatever `vit_jax.load` reads.
    out: the file (npz, big_vision) or folder (hf, timm, orbax) to write.
    to: one of `pretrained.FORMATS`.

  Returns:
    What a user should know, one line each.

  Raises:
    UserError: nothing to read, something at `out`, or something that the
      format cannot say.
  """
  weights = pretrained.read(source)
  if "://" not in out and pathlib.Path(out).exists():
    raise UserError(f"{out} exists; nothing is overwritten, choose another")
  return pretrained.write(weights, out, to)
