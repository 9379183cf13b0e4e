"""What a chip can do, as its maker publishes it.

From cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of each
generation that it links to: bfloat16 TFLOP/s, GiB and GB/s of memory, Gbit/s to
other chips. The clock follows from the peak: in a cycle a matrix unit does
128 x 128 multiply-adds (256 x 256 from v6e on).
"""

from typing import Any, NamedTuple

from vit_jax.errors import UserError, suggest


class Chip(NamedTuple):
  """A generation of TPUs; all of one chip.

  Attributes:
    teraflops: peak of bfloat16 products.
    hbm_gib: memory.
    gigabytes: to and from the memory in a second.
    gigabits: to other chips in a second.
    matrix_units: how many there are.
    width: of a matrix unit, products along one side.
    options: for the topology. A v4 chip is used as one device, not two.
  """

  teraflops: float
  hbm_gib: float
  gigabytes: float
  gigabits: float
  matrix_units: int
  width: int = 128
  options: tuple[tuple[str, str], ...] = ()

  def flops_per_cycle(self) -> float:
    """Returns the operations of the matrix units in a cycle."""
    return 2.0 * self.width**2 * self.matrix_units

  def clock(self) -> float:
    """Returns the cycles of a second."""
    return self.teraflops * 1e12 / self.flops_per_cycle()

  def cost_kernel(self, cost: dict[str, Any], devices: int) -> float:
    """Returns the cycles of a kernel from its own count; see `hlo`.

    Whichever takes longest: products at peak, memory, or transcendental
    functions, of which a vector unit does 1024 in a cycle.

    Args:
      cost: {"flops", "transcendentals", "bytes_accessed"} on one device.
      devices: of a chip.
    """
    products = cost["flops"] / self.flops_per_cycle()
    moves = cost["bytes_accessed"] / (self.gigabytes * 1e9) * self.clock()
    return max(
      devices * products, devices * moves, cost["transcendentals"] / 1024
    )


# Of v3, v4, v5e and v5p the clock comes out as the 0.94, 1.05, 1.5 and 1.75 GHz
# that are known of them; those of v2, v6e and tpu7x are derived alone.
CHIPS = {
  "v2": Chip(46, 16, 700, 1984, 2),
  "v3": Chip(123, 32, 900, 2624, 4),
  "v4": Chip(275, 32, 1228, 2400, 8, 128, (("chip_config_name", "megacore"),)),
  "v5e": Chip(197, 16, 819, 1600, 4),
  "v5p": Chip(459, 95, 2765, 4800, 8),
  "v6e": Chip(918, 32, 1640, 3584, 4, 256),
  "tpu7x": Chip(2307, 192, 7380, 9600, 8, 256),
}


def find_chip(topology: str) -> Chip:
  """Returns the chip of "v5e:4x4".

  Raises:
    UserError: none of that name.
  """
  name, colon, _ = topology.partition(":")
  if name not in CHIPS or not colon:
    raise UserError(
      f"--topology={topology} is no CHIP:SIZE such as v5e:4x4; the chips are "
      f"{', '.join(CHIPS)}{suggest(name, CHIPS)}"
    )
  return CHIPS[name]
