"""Published figures of TPU chips.

From cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of each
generation that it links to.
"""

from typing import NamedTuple

from vit_jax.errors import UserError, suggest


class Chip(NamedTuple):
  """A generation of TPUs, per chip.

  Attributes:
    teraflops: peak of bfloat16 matmuls.
    hbm_gib: memory.
    gigabytes: memory bandwidth, a second.
    gigabits: to other chips, a second.
    multiply_adds: of the matrix units in a cycle.
    options: for the topology. A v4 chip is used as one device, not two.
  """

  teraflops: float
  hbm_gib: float
  gigabytes: float
  gigabits: float
  multiply_adds: int
  options: tuple[tuple[str, str], ...] = ()

  def clock(self) -> float:
    """Returns the cycles of a second."""
    return self.teraflops * 1e12 / (2 * self.multiply_adds)


# Of v3, v4, v5e and v5p the clock comes out as the published 0.94, 1.05, 1.5
# and 1.75 GHz; those of v2, v6e and tpu7x are derived alone.
CHIPS = {
  "v2": Chip(46, 16, 700, 1984, 2 * 128**2),
  "v3": Chip(123, 32, 900, 2624, 4 * 128**2),
  "v4": Chip(
    275, 32, 1228, 2400, 8 * 128**2, (("chip_config_name", "megacore"),)
  ),
  "v5e": Chip(197, 16, 819, 1600, 4 * 128**2),
  "v5p": Chip(459, 95, 2765, 4800, 8 * 128**2),
  "v6e": Chip(918, 32, 1640, 3584, 4 * 256**2),
  "tpu7x": Chip(2307, 192, 7380, 9600, 8 * 256**2),
}


def find_chip(topology: str) -> Chip:
  """Returns the chip of "v5e:4x4"; a UserError if there is none."""
  name, colon, _ = topology.partition(":")
  if name not in CHIPS or not colon:
    raise UserError(
      f"--topology={topology} is no CHIP:SIZE such as v5e:4x4; the chips are "
      f"{', '.join(CHIPS)}{suggest(name, CHIPS)}"
    )
  return CHIPS[name]
