"""Descriptions of files and folders of weights."""

import re
from typing import Any

import numpy as np

from vit_jax import models, pretrained
from vit_jax.pretrained.loaded import HEAD_OF_ZEROS


def inspect(source: str) -> dict[str, Any]:
  """Reads weights and describes them.

  Args:
    source: whatever `vit_jax.load` reads.

  Returns:
    {"source", ...the fields of `pretrained.Config`, "mean", "std", "head",
    "num_parameters", "parameters": [{"path", "shape", "dtype", "mean",
    "std"}], "notes"}. "head" is "none", "zeros" or "trained".

  Raises:
    UserError: nothing there, corrupt, or of an unknown format.
  """
  weights = pretrained.read(source)
  parameters = [
    _describe_array(path, weights.params[path])
    for path in sorted(weights.params, key=_natural)
  ]
  head, notes = "none", list(weights.notes)
  for row in parameters:
    if row["path"] == "head/kernel":
      head = "trained" if row["mean"] or row["std"] else "zeros"
  if head == "zeros":
    notes.append(HEAD_OF_ZEROS)
  return {
    "source": weights.source,
    **pretrained.describe(weights)._asdict(),
    "mean": weights.mean,
    "std": weights.std,
    "head": head,
    "num_parameters": sum(
      int(np.prod(x.shape))
      for path, x in weights.params.items()
      if not models.is_statistic(path)
    ),
    "parameters": parameters,
    "notes": notes,
  }


def _natural(path):
  """Returns a sort key that puts encoderblock_10 after encoderblock_9."""
  return [
    int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)
  ]


def _describe_array(path, x):
  values = x.read().astype(np.float32)
  return {
    "path": path,
    "shape": list(x.shape),
    "dtype": str(x.dtype),
    "mean": float(values.mean(dtype=np.float64)),
    "std": float(values.std(dtype=np.float64)),
  }
