"""Low-rank updates of kernels (LoRA, arXiv 2106.09685).

A kernel W, as a matrix [in out], becomes W + alpha / rank * A B with A [in r]
and B [r out], stored beside it as `lora_a` and `lora_b`. W stays in the state
but is not trained (see `optim`), so it has no moments. `merge` computes the
plain model's parameters, in each step and when a run is loaded.
"""

import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.state import flatten, unflatten
from vit_jax.training.optim import match


def adapt(model, *, rank: int = 0, alpha: float = 0.0, params: str = ""):
  """Returns a model whose parameters also have A and B.

  Args:
    model: the `models.Model` to adapt.
    rank: r; with 0 the model is returned as it is.
    alpha: the scale of the update, times r.
    params: a regular expression for the whole paths of the kernels.

  Raises:
    UserError: no such kernels, or an invalid rank or alpha.
  """
  if not rank:
    return model
  shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
  paths = sorted(match("lora.params", params, list(shapes)))
  for path in paths:
    if not path.endswith("/kernel"):
      raise UserError(f"lora.params {params!r} matches {path}, not a kernel")
    _, *matrix = _find_matrix(path, shapes[path].shape)
    if not 0 < rank < min(matrix):
      raise UserError(
        f"lora.rank {rank} is not below {min(matrix)}, the smaller side of "
        f"{path}; choose for instance 8"
      )
  if not alpha > 0:
    raise UserError(f"lora.alpha {alpha} is not positive; try 16.0")

  def init(key):
    flat = flatten(model.init(key))
    for path in paths:
      flat |= _draw(key, path, flat[path].shape, rank)
    return unflatten(flat)

  def apply(params, *args, **kwargs):
    flat = merge(flatten(params), rank=rank, alpha=alpha)
    return model.apply(unflatten(flat), *args, **kwargs)

  return model._replace(init=init, apply=apply)


def merge(
  params: dict[str, Any], /, *, rank: int, alpha: float, **_
) -> dict[str, Any]:
  """Returns {path: array} of the plain model; arguments as of `adapt`."""
  merged = {path: x for path, x in params.items() if not is_update(path)}
  for path in params.keys() - merged.keys():
    place, _, name = path.rpartition("/")
    if name == "lora_a":
      w, b = params[f"{place}/kernel"], params[f"{place}/lora_b"]
      # Exactly, because by default TPUs round A and B to bfloat16.
      delta = jnp.matmul(params[path], b, precision="highest")
      merged[f"{place}/kernel"] = w + alpha / rank * delta.reshape(w.shape)
  return merged


def is_update(path: str) -> bool:
  """Returns whether the array at a path is an A or a B."""
  return path.endswith(("/lora_a", "/lora_b"))


def _find_matrix(path, shape) -> tuple[tuple[int, ...], int, int]:
  """Returns a kernel's (stacked axes, size of its input, of its output)."""
  blocks = shape[:1] if "/encoderblock/" in path else ()
  shape = shape[len(blocks) :]
  # One axis is the input's; several for convolutions and the heads of "out".
  last = 1 if re.search("(query|key|value)/kernel", path) else len(shape) - 1
  return blocks, math.prod(shape[:last]), math.prod(shape[last:])


def _draw(key, path, shape, rank) -> dict[str, jax.Array]:
  """Returns A, uniform as in the authors' code, and B, which is 0.

  A stacked kernel gets the values of the unrolled ones.
  """
  blocks, rows, columns = _find_matrix(path, shape)
  number = re.search(r"/encoderblock_(\d+)/", path)
  name = re.sub(r"/encoderblock_\d+/", "/encoderblock/", path)
  key = jax.random.fold_in(key, zlib.crc32(name.encode()))
  indices = jnp.arange(blocks[0] if blocks else 1)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
    indices + int(number[1] if number else 0)
  )
  limit = rows**-0.5
  a = jax.vmap(
    lambda key: jax.random.uniform(key, (rows, rank), minval=-1) * limit
  )(keys)
  place = path.removesuffix("kernel")
  return {
    f"{place}lora_a": a if blocks else a[0],
    f"{place}lora_b": jnp.zeros((*blocks, rank, columns)),
  }
