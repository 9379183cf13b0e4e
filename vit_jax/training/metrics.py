"""A run's metrics: JSON lines, TensorBoard, W&B and log lines."""

import contextlib
import json
import logging
import math
import shutil
import tempfile
import time

import jax
import tensorflow as tf
from etils import epath

from vit_jax import files
from vit_jax.errors import RunStopped, os_errors
from vit_jax.sharding import RUN_AHEAD

log = logging.getLogger(__name__)

_UPLOAD_SECONDS = 60  # between two uploads of a run's lines to a bucket


class NotFinite(RunStopped):
  """The loss or the gradient of a step is infinite or not a number."""


class MetricLog:
  """Collects metrics of steps while they are computed, writes them later.

  metrics.jsonl gets one line a log step or evaluation, with names such as
  "train/loss" and "eval/accuracy". Everything but "speed/..." is a function of
  the configuration, so that an interrupted run writes the same lines.

  Objects in a bucket cannot be appended to. There the files are written in a
  local folder, and uploaded by `sync` or when the last upload is a minute old.
  """

  def __init__(self, config, workdir, start_step, total_steps, wandb=None):
    """Opens the files; drops lines after `start_step`, to be written again.

    `wandb` is a run of Weights & Biases that gets the same values.
    """
    self._config, self._total, self._wandb = config, total_steps, wandb
    self._pending: list = []
    self._clock = self._first = (start_step, time.monotonic())
    self._uploaded, self._is_behind = self._clock[1], files.is_remote(workdir)
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self._workdir = self._folder = workdir
    lines, _ = files.read_metrics(workdir)
    lines = [values for values in lines if values["step"] <= start_step]
    with _writing(workdir):
      if self._is_behind:
        self._folder = epath.Path(tempfile.mkdtemp(prefix="vit_jax-"))
      # Atomically, so that a kill in between does not lose the lines.
      self._folder.mkdir(parents=True, exist_ok=True)
      self._file = self._folder / "metrics.jsonl"
      text = "".join(json.dumps(values) + "\n" for values in lines)
      files.write_atomically(self._file, text)
      # Old event files may have later steps, so they are rewritten.
      old = list((workdir / "tensorboard").glob("events.out.tfevents.*"))
      folder = str(self._folder / "tensorboard")
      self._tensorboard = tf.summary.create_file_writer(folder)
      for values in lines:
        self._write_events(values.pop("step"), values)
      self._tensorboard.flush()
      self.sync()
      for events in old:
        events.unlink()

  def add(self, step: int, metrics: dict) -> None:
    """Takes the metrics of a step as device arrays, without fetching them."""
    # The time is taken here, not when the values are fetched an interval later;
    # the host is at most RUN_AHEAD steps ahead of the devices.
    self._pending.append((step, metrics, time.monotonic()))
    if len(self._pending) > RUN_AHEAD:
      jax.block_until_ready(self._pending[-RUN_AHEAD - 1][1])

  def flush(self, up_to: int) -> None:
    """Fetches the steps up to `up_to`, checks each, writes the log steps.

    Raises:
      NotFinite: a loss or gradient is not finite; names the first such step.
    """
    ready = [entry for entry in self._pending if entry[0] <= up_to]
    self._pending = self._pending[len(ready) :]
    fetched = jax.device_get(ready)
    if ready and not self._pending:
      # The devices have caught up, which took time after the last dispatch.
      fetched[-1] = (*fetched[-1][:2], time.monotonic())
    for step, metrics, now in fetched:
      values = {f"train/{name}": float(x) for name, x in metrics.items()}
      for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[f"train/{name}"]):
          raise NotFinite(f"{name} is {values[f'train/{name}']} at step {step}")
      if step % self._config.log_every == 0 or step == self._total:
        self._report(step, values, now)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes one line to metrics.jsonl and the same to TensorBoard."""
    if not self._writes:
      return
    with _writing(self._workdir):
      with self._file.open("a") as f:
        f.write(json.dumps({"step": step, **values}) + "\n")
      self._write_events(step, values)
    self._is_behind = self._folder != self._workdir
    if time.monotonic() > self._uploaded + _UPLOAD_SECONDS:
      self.sync()
    if self._wandb:
      self._wandb.log(values, step=step)

  def _write_events(self, step, values):
    with self._tensorboard.as_default(step):
      for name, x in values.items():
        tf.summary.scalar(name, x)

  def write_results(self, name: str, step: int, results) -> None:
    """Writes and prints the {NAME/METRIC: value} of an evaluation."""
    self.write(step, results)
    self.sync()
    text = "  ".join(
      f"{key.partition('/')[2]} {x if isinstance(x, int) else format(x, '.4f')}"
      for key, x in results.items()
    )
    what = "evaluation" if name == "eval" else name
    log.info("%s at step %d  %s", what, step, text)

  def sync(self) -> None:
    """Uploads lines that a run folder in a bucket does not have yet."""
    if not self._writes or not self._is_behind:
      return
    with _writing(self._workdir):
      self._tensorboard.flush()
      files.upload(self._folder, self._workdir)
    self._uploaded, self._is_behind = time.monotonic(), False

  def restart_clock(self, step: int) -> None:
    """Excludes the time until now, such as of an evaluation, from the speed."""
    self._clock = (step, time.monotonic())

  def close(self) -> None:
    if self._writes:
      with contextlib.suppress(RunStopped):  # keep the first error
        self.sync()
      self._tensorboard.close()
      if self._folder != self._workdir:
        shutil.rmtree(self._folder)
    if self._wandb:
      self._wandb.finish()

  def _report(self, step, values, now):
    steps, seconds = step - self._clock[0], now - self._clock[1]
    self._clock = (step, now)
    speed = steps * self._config.batch_size / max(seconds, 1e-9)
    each = speed / jax.device_count()
    values["speed/images_per_second"] = speed
    values["speed/images_per_second_per_device"] = each
    self.write(step, values)
    done = step - self._first[0]
    left = (now - self._first[1]) / max(done, 1) * (self._total - step)
    loss, lr = values["train/loss"], values["train/learning_rate"]
    log.info(
      f"step {step}/{self._total}  loss {loss:.4f}  lr {lr:.2e}  "
      f"{speed:.0f} images/s ({each:.0f}/device)  ETA {duration(left)}"
    )


@contextlib.contextmanager
def _writing(workdir):
  """Raises a RunStopped if metrics cannot be written."""
  try:
    with os_errors():
      yield
  except OSError as e:
    raise RunStopped(
      f"could not write the metrics in {workdir}: {e.strerror or e}; make room "
      "and run the same command again"
    ) from e


def duration(seconds: float) -> str:
  """Returns h:mm:ss, or m:ss below an hour."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  start = f"{hours}:{minute:02}" if hours else f"{minute}"
  return f"{start}:{second:02}"
