"""The steps of a configuration, compiled ahead of time for a TPU topology."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax import sharding
from vit_jax.errors import UserError, needs_extra
from vit_jax.tools.plan.chips import Chip, find_chip
from vit_jax.train import make_step

# libtpu neither asks for the machine's metadata nor opens a device, so that a
# second process may compile at the same time.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "none",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Slice(NamedTuple):
  """The machines to plan for: chips of one kind, each one or two devices."""

  name: str
  chip: Chip
  chips: int
  devices: tuple

  def per_chip(self) -> int:
    """Returns the devices of a chip."""
    return len(self.devices) // self.chips


class Program(NamedTuple):
  """A compiled step, on one device.

  Attributes:
    text: its HLO.
    flops: of a step; the body of a loop counts once.
    bytes: accessed by a step, likewise.
    memory: bytes of "arguments", "outputs" (without those that reuse the
      arguments' memory), "temporaries" and "program".
  """

  text: str
  flops: float
  bytes: float
  memory: dict[str, int]


class OutOfMemory(Exception):
  """A step does not fit; `needed` has the GiB that a device would need."""

  def __init__(self, needed: float | None):
    super().__init__("out of memory")
    self.needed = needed


def find_slice(topology: str) -> Slice:
  """Returns the machines of "v5e:4x4".

  Raises:
    UserError: an unknown chip or size, or no TPU compiler.
  """
  chip = find_chip(topology)
  if importlib.util.find_spec("libtpu") is None:
    raise needs_extra("the TPU compiler", "libtpu")
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
    # Else JAX would ask libtpu for devices first.
    jax.config.update("jax_platforms", "cpu")
  from jax.experimental import topologies

  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, **dict(chip.options)
    )
  except (jax.errors.JaxRuntimeError, ValueError) as e:
    line = str(e).splitlines()[0][:200]
    raise UserError(
      f"--topology={topology} is none that the compiler knows ({line}); give "
      "CHIP:SIZE such as v5e:4x4 or v5p:2x2x4"
    ) from e
  chips = math.prod(map(int, topology.partition(":")[2].split("x")))
  return Slice(topology, chip, chips, tuple(found.devices))


def make_shapes(config, objective, mesh, total_steps: int):
  """Returns (train_step, its state, its batch) as shapes with shardings.

  Raises:
    UserError: a batch or a layout that does not fit these machines.
  """
  sharding.check_batch_size(config.batch_size, mesh, config.micro_batches)
  train_step, init_state = make_step(config, objective, total_steps)
  shapes = jax.eval_shape(init_state, jax.random.key(0))
  layout = sharding.tree_shardings(mesh, shapes)
  state = jax.tree.map(_place, shapes, layout)
  batch = make_batch(mesh, config.batch_size, objective.model.image_size)
  batch = {name: batch[name] for name in ("image", "labels")}
  step = sharding.jit_train_step(mesh, train_step, layout)
  return step, state, batch


def make_batch(mesh, batch_size: int, image_size) -> dict[str, Any]:
  """Returns the shapes of a batch of `data`, with one label an image."""
  layout = sharding.batch_sharding(mesh)
  shapes = {
    "image": jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.uint8),
    "labels": jax.ShapeDtypeStruct((batch_size, 1), jnp.int32),
    "mask": jax.ShapeDtypeStruct((batch_size,), jnp.bool_),
    "index": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }
  return {name: _place(x, layout) for name, x in shapes.items()}


def _place(x, layout):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)


def compile_step(step, *shapes) -> Program:
  """Compiles a jitted function for the devices that its arguments lie on.

  Raises:
    OutOfMemory: it does not fit.
    UserError: the compiled program cannot be read.
  """
  try:
    compiled = step.lower(*shapes).compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise OutOfMemory(_read_need(str(e))) from None
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as e:
    # With jaxlib 0.10.2 and libtpu 0.0.52, for tpu7x.
    raise UserError(
      f"jaxlib cannot read what libtpu compiled ({str(e)[:100]}); try other "
      "versions of the two, or another chip"
    ) from None
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  return Program(
    text=text,
    flops=cost["flops"],
    bytes=cost["bytes accessed"],
    memory={
      "arguments": memory.argument_size_in_bytes,
      "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "program": memory.generated_code_size_in_bytes,
    },
  )


def _read_need(message):
  """Returns the GiB that the compiler's error says a device would need."""
  found = re.search(r"Used ([\d.]+)([MG]) of [\d.]+[MG] hbm", message)
  return found and float(found[1]) / {"G": 1, "M": 1024}[found[2]]
