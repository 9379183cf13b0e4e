"""What a run writes down, and that a run that goes on writes the same."""

import errno
import json
import sys

import fake_gcs
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from tensorboard.backend.event_processing import event_accumulator

from vit_jax import config as configuration
from vit_jax.errors import RunStopped, UserError
from vit_jax.training import wandb_run
from vit_jax.training.metrics import MetricLog, NotFinite, duration


def _open(workdir, start_step=0, total_steps=10, log_every=2, wandb=None):
  config = ml_collections.ConfigDict({"log_every": log_every, "batch_size": 8})
  return MetricLog(config, epath.Path(workdir), start_step, total_steps, wandb)


def _values(step, **kwargs):
  values = {"loss": step / 2, "gradient_norm": 1.0, "learning_rate": 0.1}
  return {name: jnp.float32(x) for name, x in (values | kwargs).items()}


def _read(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _without_speed(lines):
  return [
    {k: v for k, v in line.items() if not k.startswith("speed/")}
    for line in lines
  ]


def _run(log, steps):
  for step in steps:
    log.add(step, _values(step))
    if step % 4 == 0:
      log.write(step, {"eval/accuracy": step / 100})
    log.flush(step)


def test_log_steps_and_evaluations_are_lines(tmp_path):
  log = _open(tmp_path)
  _run(log, range(1, 6))
  log.close()
  train = {
    "train/gradient_norm": 1.0,
    "train/learning_rate": float(np.float32(0.1)),
  }
  assert _without_speed(_read(tmp_path)) == [
    {"step": 2, "train/loss": 1.0, **train},
    {"step": 4, "eval/accuracy": 0.04},
    {"step": 4, "train/loss": 2.0, **train},
  ]
  speed = _read(tmp_path)[0]
  per_device = speed["speed/images_per_second_per_device"]
  assert speed["speed/images_per_second"] == pytest.approx(
    jax.device_count() * per_device
  )
  assert per_device > 0


def test_speed_counts_what_the_devices_still_had_to_do(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr("vit_jax.training.metrics.time.monotonic", lambda: now[0])

  def fetch(ready):
    now[0] += 3  # seconds until the devices are there
    return ready

  monkeypatch.setattr("vit_jax.training.metrics.jax.device_get", fetch)
  log = _open(tmp_path, log_every=4)
  for step in range(1, 5):
    now[0] += 0.25
    log.add(step, _values(step))
  log.flush(4)
  log.restart_clock(4)
  log.close()
  (line,) = _read(tmp_path)
  assert line["speed/images_per_second"] == pytest.approx(4 * 8 / (1 + 3))


def test_the_last_step_is_logged_though_it_is_no_multiple(tmp_path):
  log = _open(tmp_path, total_steps=5, log_every=3)
  _run(log, range(1, 6))
  log.close()
  steps = [x["step"] for x in _read(tmp_path) if "train/loss" in x]
  assert steps == [3, 5]


def test_flush_leaves_later_steps_for_later(tmp_path):
  log = _open(tmp_path, log_every=1)
  for step in (1, 2, 3):
    log.add(step, _values(step))
  log.flush(2)
  assert [x["step"] for x in _read(tmp_path)] == [1, 2]
  log.flush(2)
  log.flush(3)
  log.close()
  assert [x["step"] for x in _read(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("resumed_at", [0, 3, 6])
def test_a_run_that_goes_on_writes_the_same_lines(tmp_path, resumed_at):
  whole = _open(tmp_path / "whole")
  _run(whole, range(1, 11))
  whole.close()
  # Killed after step 6; the checkpoint is older.
  first = _open(tmp_path / "run")
  _run(first, range(1, 7))
  first.close()
  second = _open(tmp_path / "run", start_step=resumed_at)
  _run(second, range(resumed_at + 1, 11))
  second.close()
  assert _without_speed(_read(tmp_path / "run")) == _without_speed(
    _read(tmp_path / "whole")
  )


def test_tensorboard_has_the_same_numbers_and_never_runs_backwards(tmp_path):
  first = _open(tmp_path, log_every=1)
  _run(first, range(1, 7))
  first.close()
  second = _open(tmp_path, start_step=3, log_every=1)
  _run(second, range(4, 9))
  second.close()
  folder = tmp_path / "tensorboard"
  assert len(list(folder.iterdir())) == 1
  events = event_accumulator.EventAccumulator(str(folder))
  events.Reload()
  found = [
    (event.step, float(tf.make_ndarray(event.tensor_proto)))
    for event in events.Tensors("train/loss")
  ]
  assert found == [(step, step / 2) for step in range(1, 9)]


@pytest.mark.parametrize("cut", [1, 40])
def test_half_a_last_line_is_dropped(tmp_path, cut):
  log = _open(tmp_path, log_every=1)
  _run(log, range(1, 4))
  log.close()
  file = tmp_path / "metrics.jsonl"
  whole = file.read_text()
  file.write_text(whole[:-cut])
  log = _open(tmp_path, start_step=5, log_every=1)
  log.write(6, {"eval/accuracy": 0.5})
  log.close()
  lines = whole.splitlines(keepends=True)
  expected = [*lines[:-1], '{"step": 6, "eval/accuracy": 0.5}\n']
  assert file.read_text() == "".join(expected)


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, "No space left on device"),
    tf.errors.ResourceExhaustedError(None, None, "No space left on device"),
  ],
)
def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, error):
  """And the lines and events of before are still there."""

  def fail(*_):
    raise error

  log = _open(epath.Path(tmp_path))
  _run(log, range(1, 5))
  log.close()
  before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
  monkeypatch.setattr(tf.summary, "scalar", fail)
  with pytest.raises(RunStopped, match=f"{tmp_path}: No space left on device;"):
    _open(epath.Path(tmp_path), start_step=4)
  assert {f: f.read_bytes() for f in before} == before


@pytest.mark.parametrize(
  ("name", "value"), [("loss", float("nan")), ("gradient_norm", float("inf"))]
)
def test_the_first_step_that_is_not_finite_is_named(tmp_path, name, value):
  log = _open(tmp_path)
  for step in range(1, 8):
    bad = {name: value} if step in (5, 6) else {}
    log.add(step, _values(step, **bad))
  with pytest.raises(NotFinite) as error:
    log.flush(7)
  log.close()
  assert str(error.value) == f"{name} is {value} at step 5"
  assert isinstance(error.value, RunStopped)
  assert [x["step"] for x in _read(tmp_path)] == [2, 4]


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.6, "0:01"),
    (59.6, "1:00"),
    (3599.7, "1:00:00"),
    (3661, "1:01:01"),
    (100 * 3600, "100:00:00"),
  ],
)
def test_durations(seconds, text):
  assert duration(seconds) == text


# Stands for the library: writes down what it is asked.
_FAKE_WANDB = """
import json, pathlib
def init(**options):
  options["dir"] = pathlib.Path(options["dir"])
  class Run:
    def write(self, *what):
      with (options["dir"] / "calls.jsonl").open("a") as f:
        f.write(json.dumps(what) + "\\n")
    def log(self, values, step):
      self.write("log", step, values)
    def finish(self):
      self.write("finish")
  run = Run()
  run.write("init", *(options[k] for k in ("project", "id", "resume", "name")))
  return run
"""


def test_wandb_gets_the_same_numbers_in_one_run(tmp_path, monkeypatch):
  config = configuration.load("configs/common.py", {"wandb": "vits"})
  with pytest.raises(UserError, match=r"pip install 'vit_jax\[wandb\]'"):
    wandb_run.check(config)
  (tmp_path / "wandb.py").write_text(_FAKE_WANDB)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  wandb_run.check(config)
  workdir = tmp_path / "a run"
  workdir.mkdir()
  for start in (0, 4):  # resumed
    log = _open(workdir, start, wandb=wandb_run.start(config, workdir))
    _run(log, range(start + 1, start + 3))
    log.close()
  calls = [json.loads(line) for line in (workdir / "calls.jsonl").open()]
  assert [call[0] for call in calls] == ["init", "log", "finish"] * 2
  assert calls[0] == calls[3]  # the same id
  assert calls[0][1::2] == ["vits", "allow"]
  logged = [{"step": call[1], **call[2]} for call in calls if call[0] == "log"]
  assert logged == _read(workdir)[:1] + _read(workdir)[-1:]
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert wandb_run.start(config, workdir) is None


def test_a_bucket_gets_the_lines_once_a_minute_and_at_sync(
  tmp_path, monkeypatch
):
  """Objects cannot be appended to: each upload is the whole file."""
  now = [0.0]
  monkeypatch.setattr("vit_jax.training.metrics.time.monotonic", lambda: now[0])
  folder = tmp_path / "bucket" / "run"
  folder.parent.mkdir()
  with fake_gcs.serve(tmp_path) as server:
    for name, value in server.environment().items():
      monkeypatch.setenv(name, value)
    log = _open("gs://bucket/run", log_every=1, total_steps=1000)

    def count_lines_after(steps):
      _run(log, steps)
      return len(_read(folder))

    server.reset()
    assert count_lines_after(range(1, 100)) == 0
    assert not server.requests
    now[0] = 61
    assert count_lines_after([101]) == 100 + 24  # and evaluations
    log.sync()
    assert count_lines_after([102]) == 124
    log.sync()
    log.sync()
    assert len(_read(folder)) == 125
    # Each upload: a request that begins it and one for the bytes, of 2 files.
    assert len(server.requests) == 2 * 2 * 2
    log.close()
    assert len(list((folder / "tensorboard").iterdir())) == 1

    second = _open("gs://bucket/run", start_step=50)
    assert [line["step"] for line in _read(folder)][-1] == 50
    second.close()
    assert len(list((folder / "tensorboard").iterdir())) == 1
