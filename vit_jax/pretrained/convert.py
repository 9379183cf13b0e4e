"""The `convert` command: weights from any format into another one."""

from vit_jax import pretrained


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
      format cannot represent.
    RunStopped: it could not be written.
  """
  return pretrained.write(pretrained.read(source), out, to)
