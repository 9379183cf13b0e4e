"""The `bench run` command: where the wall time of a training goes.

`train` runs unchanged: functions of the core are wrapped from outside. Each
moment counts for the innermost wrapped function, so the parts add up.
"""

import collections
import contextlib
import functools
import pkgutil
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax

from vit_jax import config
from vit_jax.errors import RunStopped
from vit_jax.tools.bench.process import call
from vit_jax.tools.text import format_columns
from vit_jax.training import early

_METRICS = "training.metrics.MetricLog"
# The part of a function that another one calls is "OUTER: INNER".
_PARTS = {
  "data sets": "training.inputs.open_inputs",
  "model and step": "training.objectives.create train.make_step",
  "state": "train.make_state",
  "run folder": "training.run_folder.take training.run_folder.write",
  "metrics opened": f"{_METRICS}.__init__",
  "metrics written": f"{_METRICS}.write",
  "steps: wait": f"{_METRICS}.add {_METRICS}.flush",  # for the devices
  "evaluation": "train.run_evaluation",
  "save": "checkpoint.Checkpoints.save",
  "fingerprint": "checkpoint.fingerprint",
  "folder opened": "checkpoint.Checkpoints.open",
  "wait for the disk": "checkpoint.Checkpoints.wait",
  "end": f"checkpoint.Checkpoints.close {_METRICS}.close",
}
_COMPILE = "/jax/core/compile/backend_compile_duration"
_SAVE = "/jax/checkpoint/write/async/{}_duration_secs"  # of Orbax


class _Clock:
  """Divides the time since `begin` among parts."""

  def __init__(self, begin: float):
    self._labels, self._now = ["start-up", "imports"], begin
    # Seconds, those of XLA or its cache among them, how often.
    self.parts: dict[str, list] = collections.defaultdict(lambda: [0.0, 0.0, 0])
    self.events: dict[str, float] = collections.defaultdict(float)

  def part(self) -> list:
    return self.parts[": ".join(self._labels) or "the rest"]

  def change(self, *labels: str) -> None:
    """Counts the time since the last change; a new part begins."""
    now = time.time()
    self.part()[0] += now - self._now
    self._labels, self._now = [*labels], now

  def wrap(self, label, function, first=None):
    """Times a function; during the start-up its part may be another one."""

    @functools.wraps(function)
    def timed(*args, **kwargs):
      outer = self._labels
      self.change(*outer, first if outer and first else label)
      self.part()[2] += 1
      try:
        return function(*args, **kwargs)
      finally:
        self.change(*self._labels[:-1])

    return timed

  def wrap_jit(self, jit):
    def make(*args):
      step = jit(*args)

      def run(*given):
        result = step(*given)
        if "start-up" in self._labels:
          jax.block_until_ready(result)
          self.change("")  # the start-up is over
        return result

      return self.wrap("steps: dispatch", run, "first step")

    return make

  def wrap_read(self, read):
    take = self.wrap("steps: wait for a batch", next, "first batch")
    return lambda *args: iter(functools.partial(take, read(*args), None), None)

  def listen(self, event: str, seconds: float, **_) -> None:
    self.events[event] += seconds
    if event == _COMPILE:
      self.part()[1] += seconds


def bench(spec: str, overrides: dict[str, str]) -> dict[str, dict]:
  """Returns `measure` of a "cold" run and of a "warm" one after it.

  Raises:
    UserError: a configuration that cannot be run.
    RunStopped: a run has failed.
  """
  early.check(config.load(spec, overrides))
  found = {}
  with tempfile.TemporaryDirectory() as cache:
    given = {"spec": spec, "overrides": overrides, "cache": cache}
    for name in ("cold", "warm"):
      found[name] = call(measure, {**given, "begin": time.time()})
      if error := found[name].get("error"):
        raise RunStopped(error)
  return found


def measure(*, spec, overrides, cache: str | None, begin: float) -> dict:
  """Trains in a temporary folder; returns where the time since `begin` went.

  `cache` is JAX's folder of compiled programs.

  Returns:
    "wall", seconds; "parts", {name: [seconds, those of XLA, count]};
    "background", the seconds of saves in other threads.
  """
  from vit_jax import train  # with TensorFlow, which `bench` does without

  jax.config.update("jax_compilation_cache_dir", cache)
  loaded = config.load(spec, overrides)
  clock, monitoring = _Clock(begin), jax.monitoring
  wraps = {
    "sharding.jit_train_step": clock.wrap_jit,
    "training.inputs.read_batches": clock.wrap_read,
  }
  for label, paths in _PARTS.items():
    wraps |= dict.fromkeys(paths.split(), functools.partial(clock.wrap, label))
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    for path, wrap in wraps.items():
      owner, _, name = f"vit_jax.{path}".rpartition(".")
      owner = pkgutil.resolve_name(owner)
      new = wrap(getattr(owner, name))
      stack.enter_context(mock.patch.object(owner, name, new))
    monitoring.register_event_duration_secs_listener(clock.listen)
    unlisten = monitoring.unregister_event_duration_listener
    stack.callback(unlisten, clock.listen)
    clock.change("start-up")
    train.train(loaded, Path(folder) / "run")
    clock.change()
    wall = time.time() - begin
  saves = [clock.events[_SAVE.format(x)] for x in ("total", "blocking")]
  parts = {**clock.parts}
  return {"wall": wall, "parts": parts, "background": saves[0] - saves[1]}


def format_report(found: dict[str, dict]) -> str:
  """Returns the results of `bench` as text."""
  head = [x for name in found for x in (f"{name} s", "share", "of XLA")]
  rows = [("", "count", *head)]
  names = {x: None for run in found.values() for x in run["parts"]}
  names = sorted(names, key=lambda name: name == "the rest")
  for group in dict.fromkeys(name.partition(": ")[0] for name in names):
    inner = [n for n in names if n == group or n.startswith(f"{group}: ")]
    rows.append(_make_row(group, inner, found))
    for name in inner if inner[1:] else ():
      text = name.partition(": ")[2] or "the rest"
      rows.append(_make_row(f"  {text}", [name], found))
  rows.append(_make_row("wall time", names, found))
  saves = ", ".join(f"{x['background']:.1f} s" for x in found.values())
  return "\n".join([*format_columns(rows), f"saves in the background: {saves}"])


def _make_row(text, names, found):
  """Returns the sums of some parts, as texts; of one also its count."""
  cells, count = [], 0
  for run in found.values():
    parts = [run["parts"].get(name, (0, 0, 0)) for name in names]
    seconds, compiling = (sum(part[i] for part in parts) for i in (0, 1))
    share = f"{seconds / run['wall']:.1%}"
    cells += [f"{seconds:.2f}", share, f"{compiling:.2f}" if compiling else ""]
    count = parts[0][2] if len(parts) == 1 else 0
  return (text, f"{count:,}" if count else "", *cells)
