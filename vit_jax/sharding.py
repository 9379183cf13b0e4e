"""The device mesh, and a table of the sharding of every array on it.

Both axes of the mesh split the batch; "fsdp" also splits parameters and
optimizer moments, so that a device holds 1/fsdp of them. "zero1", which may be
in its place, splits only the moments. `jax.jit` inserts the collectives that
these shardings require.
"""

import functools
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.state import flatten, path_str

# Steps that the host may run ahead of the devices; each holds a batch in device
# memory.
RUN_AHEAD = 4

# First match wins; each pattern must match the path's last names. Optimizer
# moments end in the path of their parameter and so share its sharding. The spec
# is of the last axes, because scanned parameters have a depth axis before them.
RULES = (
  (r"(query|key|value)/kernel", P("fsdp", None, None)),  # [d a d/a]
  (r"out/kernel", P(None, None, "fsdp")),  # [a d/a d]
  (r"(Dense_0|gate)/kernel", P("fsdp", None)),  # [d m]
  (r"Dense_1/kernel", P(None, "fsdp")),  # [m d]
  (r"embedding/kernel", P(None, None, None, "fsdp")),  # [p p 3 d]
  (r"(depthwise_conv|se_reduce|se_expand)/kernel", P()),  # small ones
  (r"(\w+_)?conv(_root|_proj|\d)?/kernel", P(None, None, None, "fsdp")),
  (r"(projection|pre_logits|(mpp_)?head(_dist)?)/kernel", P("fsdp", None)),
  # One vector a layer: the all-gather would cost more than the memory is worth.
  (r"mean|var|std", P()),  # running statistics
  (r"bias|scale|cls|dist|registers|mask_token|probe|relative_embedding", P()),
  (r"pos_embedding(_x|_y)?", P()),
  (r"lora_[ab]", P()),  # [d r] and [r d], small beside their kernel
  (r"step|rng|count", P()),
)


def make_mesh(
  fsdp: int = 1, devices=None, shard_state: int = 1
) -> jax.sharding.Mesh:
  """Returns the mesh ("data", "fsdp") over all devices of all processes.

  With `shard_state` above 1 it is ("data", "zero1").

  Raises:
    UserError: `fsdp` or `shard_state` does not divide the number of devices, or
      both are above 1.
  """
  devices = jax.devices() if devices is None else devices
  for key, parts in ("fsdp", fsdp), ("optimizer.shard_state", shard_state):
    if parts < 1 or len(devices) % parts:
      valid = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
      raise UserError(
        f"{key} {parts} does not divide {len(devices)} devices; "
        f"valid: {', '.join(map(str, valid))}"
      )
  if min(fsdp, shard_state) > 1:
    raise UserError(
      f"fsdp {fsdp} splits the optimizer's state already; set it or "
      f"optimizer.shard_state {shard_state} to 1"
    )
  names = "data", "zero1" if shard_state > 1 else "fsdp"
  # Linen modules are written for Auto axes; Explicit is make_mesh's default.
  parts, auto = fsdp * shard_state, (AxisType.Auto,) * 2
  shape = (len(devices) // parts, parts)
  return jax.make_mesh(shape, names, auto, devices=devices)


def partition_spec(
  path: str, shape: tuple[int, ...], fsdp: int, axis_name: str = "fsdp"
) -> P:
  """Returns the sharding of the array at `path`, for which there is a rule.

  Raises:
    UserError: the rule splits an axis that `fsdp` does not divide.
  """
  matches = [s for names, s in RULES if re.search(rf"(^|/)({names})$", path)]
  assert matches, f"no sharding rule covers {path}; add one to RULES"
  spec = matches[0]
  spec = P(*[None] * (len(shape) - len(spec)), *spec) if len(spec) else spec
  for axis, name in enumerate(spec):
    if name and shape[axis] % fsdp:
      key = "optimizer.shard_state" if axis_name == "zero1" else axis_name
      raise UserError(
        f"{key} {fsdp} does not divide axis {axis} of {path} {shape}; "
        f"choose a divisor of {shape[axis]}"
      )
  return P(*(name and axis_name for name in spec))


def tree_shardings(mesh, tree):
  """Returns a NamedSharding for each array (or shape) of a pytree.

  Arrays outside `opt_state` and `ema` of a `TrainState` are whole on each
  device if the mesh has an axis "zero1".
  """

  def place(path, x):
    path = path_str(path)
    whole = _is_zero1(mesh) and not path.startswith(("opt_state/", "ema/"))
    return NamedSharding(mesh, P() if whole else _find_spec(mesh, path, x))

  return jax.tree_util.tree_map_with_path(place, tree)


def split_like_moments(params):
  """Constrains parameters or gradients to their moments' sharding.

  Only within a mesh with an axis "zero1". Each device then updates its part,
  after which all parts are gathered (ZeRO-1, arXiv 1910.02054).
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not _is_zero1(mesh):
    return params

  def split(path, x):
    spec = _find_spec(mesh, path_str(path), x)
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree_util.tree_map_with_path(split, params)


def _is_zero1(mesh):
  return "zero1" in mesh.axis_names


def _find_spec(mesh, path, x):
  name = mesh.axis_names[1]
  return partition_spec(path, x.shape, mesh.shape[name], name)


def batch_sharding(mesh) -> NamedSharding:
  """Returns the sharding of a batch: its first axis over all devices."""
  return NamedSharding(mesh, P(mesh.axis_names))


def on_mesh(mesh, function: Callable) -> Callable:
  """Returns the function, to be jitted, with the mesh set while it is traced.

  Pallas kernels are sharded over that mesh, see `models/attention.py`.
  """

  @functools.wraps(getattr(function, "func", function))  # of a partial
  def run(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args)

  return run


def jit_train_step(mesh, train_step: Callable, layout) -> Callable:
  """Returns the jitted step, to which the old state is donated.

  `layout` has the shardings of the state, before and after.
  """
  train_step = on_mesh(mesh, train_step)
  return jax.jit(train_step, donate_argnums=0, out_shardings=(layout, None))


def check_batch_size(batch_size: int, mesh, micro_batches: int = 1) -> None:
  """Raises a UserError unless the batch splits evenly over the devices."""
  pieces = mesh.size * micro_batches
  if batch_size < 1 or batch_size % pieces:
    nearest = max(1, round(batch_size / pieces)) * pieces
    more = f" x {micro_batches} micro-batches" if micro_batches > 1 else ""
    what = f"{mesh.size} devices{more}"
    raise UserError(
      f"batch_size {batch_size} is not divisible by {what}; "
      f"nearest valid: {nearest}"
    )


def local_rows(mesh, batch_size: int) -> np.ndarray:
  """Returns the rows i64[r] of a global batch that this process feeds."""
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  rows = [np.arange(batch_size)[index] for index in indices.values()]
  return np.unique(np.concatenate(rows))


def put_batch(mesh, batch: dict, batch_size: int) -> dict:
  """Makes global arrays from this process's rows; copies are asynchronous.

  `batch` is {name: array[r ...]}, the rows of `local_rows`.
  """
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(
      sharding, x, (batch_size, *x.shape[1:])
    )
    for name, x in batch.items()
  }


def bytes_per_device(tree) -> int:
  """Returns the bytes that one device holds of a tree of sharded arrays."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
    for x in flatten(tree).values()
  )
