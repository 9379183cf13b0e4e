"""Run folders, as far as a report tells of them."""

import json
import math
import os
from typing import Any, NamedTuple

from vit_jax import checkpoint
from vit_jax import config as configuration
from vit_jax.errors import UserError
from vit_jax.tools.paper.runs import NEEDED, name_runs, read_metrics, walk

SPEED = "speed/images_per_second"
_SPEED_PER_DEVICE = f"{SPEED}_per_device"
# By which runs are compared, in this order; more is better.
MAIN_METRICS = ("eval/accuracy", "eval/prec@1", "eval/r2")
# What an evaluation counts; no results.
COUNTS = ("eval/examples", "eval/labelled")


class Run(NamedTuple):
  """A run folder.

  Attributes:
    path: of it.
    name: what the report calls it, different for each run.
    written: what config.json holds.
    series: {"train/loss": [(step, value), ...]}, finite values, in the order of
      their steps.
    step: of the last line; 0 before the first.
    notes: what is wrong with the files, a sentence each.
  """

  path: Any
  name: str
  written: dict[str, Any]
  series: dict[str, list[tuple[int, float]]]
  step: int
  notes: tuple[str, ...]

  @property
  def config(self) -> dict[str, Any]:
    """Flat: {"schedule.base_lr": 0.03}."""
    return configuration.flatten(self.written["config"])

  @property
  def total_steps(self) -> int:
    return self.written["total_steps"]

  @property
  def objective(self) -> str:
    return self.config.get("objective", "classification")

  def last(self, name: str) -> float | None:
    """Returns the last value of a metric, None for none."""
    values = self.series.get(name)
    return values[-1][1] if values else None

  def at(self, name: str, step: int) -> float | None:
    """Returns a metric's value at a step, None for none."""
    return dict(self.series.get(name, ())).get(step)

  def main_metric(self) -> str | None:
    """Returns the name of what the run is compared by, None before it."""
    names = (*MAIN_METRICS, "eval/loss")
    return next((name for name in names if name in self.series), None)


def find_runs(workdirs) -> list[Run]:
  """Returns the runs in and below these folders, each once.

  Raises:
    UserError: a folder that is not there or has no run, or a config.json that
      cannot be read.
  """
  found = {}
  for workdir in workdirs:
    root = checkpoint.absolute(workdir)
    if not root.is_dir():
      raise UserError(f"{workdir}: there is no such folder; give a run's")
    runs = [path for path in walk(root) if _is_run(path)]
    if not runs:
      raise UserError(
        f"{workdir} has no run in it or below it; a run is a folder that "
        "`vit-jax train` writes"
      )
    for path in runs:
      found.setdefault(os.path.realpath(path), path)
  names = name_runs([str(path) for path in found.values()])
  return [
    _read(path, name) for path, name in zip(found.values(), names, strict=True)
  ]


def _is_run(path) -> bool:
  """Returns whether a folder is a run's; a converted checkpoint is none."""
  written = _parse_config(path / "config.json")
  config = written.get("config")
  if not isinstance(config, dict) or "total_steps" not in written:
    return False
  return configuration.flatten(config).keys() >= NEEDED


def _parse_config(file):
  try:
    written = json.loads(file.read_text())
  except ValueError as e:
    raise UserError(f"{file} is damaged: {e}; move its folder away") from e
  except OSError as e:
    raise UserError(f"{file} cannot be read: {e}") from e
  return written if isinstance(written, dict) else {}


def _read(path, name) -> Run:
  lines, damaged = read_metrics(path)
  series, infinite = {}, set()
  for values in lines:
    for key, x in values.items():
      if key == "step" or not isinstance(x, (int, float)):
        continue
      if math.isfinite(x):
        series.setdefault(key, []).append((values["step"], x))
      else:
        infinite.add(key)
  notes = []
  if damaged:
    notes.append(f"{damaged} lines of metrics.jsonl cannot be read.")
  if infinite:
    names = ", ".join(sorted(infinite))
    notes.append(f"Values that are no finite numbers are left out: {names}.")
  for values in series.values():
    values.sort(key=lambda entry: entry[0])
  written = _parse_config(path / "config.json")
  step = max((values["step"] for values in lines), default=0)
  return Run(path, name, written, series, step, tuple(notes))


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
