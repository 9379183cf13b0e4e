"""How fast a run was, and how long it took."""

from typing import NamedTuple

from vit_jax.tools.runs import Run

SPEED = "speed/images_per_second"
_SPEED_PER_DEVICE = f"{SPEED}_per_device"


class Speed(NamedTuple):
  """How fast a run was.

  Attributes:
    mean: images/s: all images over all of the time.
    least, most: of one log interval.
    devices: of the last interval.
    seconds: of all training steps, estimated.
    device_seconds: times the devices, which may have changed on the way.
  """

  mean: float
  least: float
  most: float
  devices: int
  seconds: float
  device_seconds: float


def measure_speed(run: Run) -> Speed | None:
  """Returns what metrics.jsonl says of the speed, None if nothing.

  The time of an interval is its images over their speed. A run measures speed
  from the last log line, evaluation or save on: what is not training is left
  out.
  """
  speeds = run.series.get(SPEED)
  batch_size = run.config.get("batch_size")
  if not speeds or not batch_size or min(x for _, x in speeds) <= 0:
    return None
  per_device = dict(run.series.get(_SPEED_PER_DEVICE, ()))
  seconds = device_seconds = images = 0.0
  before, devices = 0, 0
  for step, speed in speeds:
    now = (step - before) * batch_size
    devices = round(speed / per_device[step]) if per_device.get(step) else 0
    images += now
    seconds += now / speed
    device_seconds += now / speed * devices
    before = step
  values = [x for _, x in speeds]
  return Speed(
    images / seconds,
    min(values),
    max(values),
    devices,
    seconds,
    device_seconds,
  )
