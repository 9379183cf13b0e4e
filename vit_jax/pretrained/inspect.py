"""The `inspect` command: what a file or folder of weights holds."""

import re
from typing import Any

import numpy as np

from vit_jax import pretrained
from vit_jax.pretrained import embedded
from vit_jax.pretrained.loaded import HEAD_OF_ZEROS
from vit_jax.pretrained.names import PUBLISHED


def inspect(source: str) -> dict[str, Any]:
  """Reads weights and says what they are.

  Args:
    source: whatever `vit_jax.load` reads.

  Returns:
    {"source", ...the fields of `pretrained.Config`, "mean", "std", "head",
    "num_parameters", "parameters": [{"path", "shape", "dtype", "mean",
    "std"}], "notes"}. "head" is "none", "zeros" or "trained".

  Raises:
    UserError: nothing there, damaged, or of no known format.
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
      int(np.prod(x.shape)) for x in weights.params.values()
    ),
    "parameters": parameters,
    "notes": notes,
  }


def _natural(path):
  """Sorts encoderblock_10 behind encoderblock_9."""
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


def format_report(found: dict[str, Any]) -> str:
  """Returns the text that people read of what `inspect` returns."""
  by = "x".join
  size, grid = (by(map(str, found[name])) for name in ("image_size", "grid"))
  names = found["class_names"]
  lines = [
    f"{found['source']}",
    f"origin         {found['origin']}",
    f"variant        {found['variant']}, "
    f"{found['num_parameters']:,} parameters",
    f"image size     {size}, patch {found['patch']}, grid {grid}",
    f"classes        {found['num_classes']}, "
    + ("named " + ", ".join(names[:3]) + ", ..." if names else "without names"),
    f"head           {found['head'].upper()}"
    f", from {found['classifier']}"
    + (
      f" through a tanh layer of {found['representation_size']}"
      if found["representation_size"]
      else ""
    ),
    f"positions      {found['pos_embedding']}, resized {found['resize']}",
    f"activation     {found['activation']}, LayerNorm epsilon "
    f"{found['layer_norm_epsilon']:g}",
    f"preprocessing  {found['preprocess']}, mean {_triple(found['mean'])}, "
    f"std {_triple(found['std'])}, {found['loss']}",
    "",
  ]
  width = max(len(row["path"]) for row in found["parameters"])
  lines += [
    f"{row['path']:{width}}  {by(map(str, row['shape'])) or 'scalar':>16}  "
    f"{row['dtype']:8}  mean {row['mean']:+.4f}  std {row['std']:.4f}"
    for row in found["parameters"]
  ]
  lines += [f"NOTE: {note}" for note in found["notes"]]
  return "\n".join(lines)


def _triple(values):
  return "/".join(f"{x:g}" for x in values)


def list_published() -> str:
  """Returns the published names and their addresses, a line each."""
  places = {name: found.address for name, found in PUBLISHED.items()}
  places |= dict.fromkeys(embedded.MODELS, "in the package: no download")
  width = max(map(len, places))
  return "\n".join(
    f"{name:{width}}  {place}" for name, place in sorted(places.items())
  )
