"""Replication of saved weights, and batch sizes for all devices."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError


def round_up(batch_size: int, mesh) -> int:
  """Returns the next batch size that splits evenly over the devices.

  Raises:
    UserError: it is less than 1.
  """
  if batch_size < 1:
    raise UserError(f"batch_size is {batch_size}; it must be 1 or more")
  return -(-batch_size // mesh.size) * mesh.size


def replicate(mesh, tree):
  """Puts arrays of the host on every device of the mesh."""
  everywhere = NamedSharding(mesh, P())
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, everywhere, x.__getitem__),
    tree,
  )
