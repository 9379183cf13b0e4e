"""Ahead-of-time compilation for a TPU topology, without a TPU.

Chip specifications are from
cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of each
generation that it links to.
"""

import importlib.util
import math
import os
from typing import Any, NamedTuple

import jax

from vit_jax.errors import UserError, needs_extra, suggest

# With these, libtpu neither queries the machine's metadata nor opens a device,
# so that a second process may compile at the same time.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "none",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Chip(NamedTuple):
  """Specification of one chip of a TPU generation."""

  teraflops: float  # peak of bfloat16 matmuls
  hbm_gib: float  # memory
  gigabytes: float  # memory bandwidth, per second
  gigabits: float  # interconnect bandwidth, per second
  multiply_adds: int  # of the matrix units, per cycle

  def clock(self) -> float:
    """Returns the clock frequency in Hz."""
    return self.teraflops * 1e12 / (2 * self.multiply_adds)


# For v3, v4, v5e and v5p, `clock` gives the published 0.94, 1.05, 1.5 and
# 1.75 GHz. Those of v2, v6e and tpu7x are derived only.
CHIPS = {
  "v2": Chip(46, 16, 700, 1984, 2 * 128**2),
  "v3": Chip(123, 32, 900, 2624, 4 * 128**2),
  "v4": Chip(275, 32, 1228, 2400, 8 * 128**2),
  "v5e": Chip(197, 16, 819, 1600, 4 * 128**2),
  "v5p": Chip(459, 95, 2765, 4800, 8 * 128**2),
  "v6e": Chip(918, 32, 1640, 3584, 4 * 256**2),
  "tpu7x": Chip(2307, 192, 7380, 9600, 8 * 256**2),
}


class Slice(NamedTuple):
  """The TPU slice to plan for."""

  name: str
  chip: Chip
  chips: int
  devices: tuple  # one or two per chip

  def per_chip(self) -> int:
    """Returns the number of devices per chip."""
    return len(self.devices) // self.chips


def find_slice(topology: str) -> Slice:
  """Returns the slice of a topology such as "v5e:4x4".

  Raises:
    UserError: an unknown chip or size, or no TPU compiler.
  """
  name, colon, size = topology.partition(":")
  if name not in CHIPS or not colon:
    raise UserError(
      f"--topology={topology} is not CHIP:SIZE such as v5e:4x4; the chips are "
      f"{', '.join(CHIPS)}{suggest(name, CHIPS)}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise needs_extra("the TPU compiler", "libtpu")
  os.environ |= _ENVIRONMENT | os.environ
  from jax.experimental import topologies

  # A v4 chip is used as one device, not two.
  options = {"chip_config_name": "megacore"} if name == "v4" else {}
  try:
    found = topologies.get_topology_desc(topology, "tpu", **options)
  except (jax.errors.JaxRuntimeError, ValueError) as e:
    line = str(e).splitlines()[0][:200]
    raise UserError(
      f"--topology={topology} is unknown to the compiler ({line}); give "
      "CHIP:SIZE such as v5e:4x4 or v5p:2x2x4"
    ) from e
  chips = math.prod(map(int, size.split("x")))
  return Slice(topology, CHIPS[name], chips, tuple(found.devices))


def compile_step(step, *shapes) -> tuple[str, dict[str, float], Any]:
  """Compiles a jitted function for the devices of its arguments.

  Returns:
    Its HLO, and JAX's analyses of cost and of memory; the cost counts the body
    of a loop once.

  Raises:
    JaxRuntimeError: RESOURCE_EXHAUSTED if it does not fit.
    UserError: the compiled program cannot be read.
  """
  compiled = step.lower(*shapes).compile()
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as e:
    # Seen with jaxlib 0.10.2 and libtpu 0.0.52, for tpu7x.
    raise UserError(
      f"jaxlib cannot read what libtpu compiled ({str(e)[:100]}); try other "
      "versions of the two, or another chip"
    ) from None
  return text, compiled.cost_analysis(), compiled.memory_analysis()
