"""Checkpoints: the same bits again, on any mesh, and damage that is noticed."""

import errno
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import forks
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vit_jax import checkpoint, sharding
from vit_jax.errors import RunStopped, UserError
from vit_jax.state import TrainState, flatten


def _make_arrays(step, ema=True):
  """The arrays of a state, different at every step."""
  rng = np.random.default_rng(step)

  def draw():
    return {
      "head": {
        "kernel": rng.normal(size=(16, 8)).astype(np.float32),
        "bias": rng.normal(size=8).astype(np.float32),
      }
    }

  def low(tree):
    return jax.tree.map(lambda x: np.asarray(jnp.bfloat16(x)), tree)

  return TrainState(
    step=np.int32(step),
    params=draw(),
    opt_state=({"count": np.int32(step), "mu": low(draw())}, ()),
    ema=draw() if ema else None,
    rng=np.array([step, 7], np.uint32),
  )


def _place(arrays, devices=8, fsdp=1):
  mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
  return jax.device_put(arrays, sharding.tree_shardings(mesh, arrays))


def _abstract(devices=8, fsdp=1, ema=True):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _place(_make_arrays(0, ema), devices, fsdp),
  )


def _assert_identical(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  found, expected = flatten(found), flatten(expected)
  for path, x in expected.items():
    assert found[path].dtype == x.dtype, path
    assert np.asarray(found[path]).tobytes() == x.tobytes(), path


def _save_run(workdir, steps, keep=2, best=(), ema=True):
  """Makes a run folder with checkpoints; `best` are {step: metric}."""
  checkpoints = checkpoint.Checkpoints(workdir, keep)
  for step in steps:
    state = _place(_make_arrays(step, ema))
    if step in best:
      checkpoints.save_if_best(step, state, best[step])
    checkpoints.save(step, state)
  checkpoints.close()
  run = {"config": {"batch_size": 8}, "class_names": ["a", "b"]}
  (Path(workdir) / "config.json").write_text(json.dumps(run))


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
  """A run with checkpoints 10 and 20, and the best at 10; do not change it."""
  workdir = tmp_path_factory.mktemp("saved") / "run"
  _save_run(workdir, [10, 20], best={10: 0.5, 20: 0.4})
  return workdir


@pytest.fixture
def run(saved_run, tmp_path):
  """A copy of it, to change."""
  return shutil.copytree(saved_run, tmp_path / "run")


def _restore(workdir, **kwargs):
  checkpoints = checkpoint.Checkpoints(workdir, 2)
  state = checkpoints.restore(_abstract(**kwargs))
  checkpoints.close()
  return state


def _names(folder):
  return sorted(p.name for p in Path(folder).iterdir())


# --- the same bits ---


@pytest.mark.parametrize("ema", [False, True])
def test_a_state_comes_back_to_the_bit(tmp_path, ema):
  arrays = _make_arrays(3, ema)
  assert flatten(arrays)["opt_state/0/mu/head/bias"].dtype == jnp.bfloat16
  _save_run(tmp_path, [3], ema=ema)
  _assert_identical(_restore(tmp_path, ema=ema), arrays)


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 8), (2, 1), (2, 2), (1, 1)])
def test_a_state_comes_back_on_another_mesh(saved_run, devices, fsdp):
  state = _restore(saved_run, devices=devices, fsdp=fsdp)
  _assert_identical(state, _make_arrays(20))
  for path, x in flatten(_abstract(devices, fsdp)).items():
    assert flatten(state)[path].sharding == x.sharding, path


def test_from_eight_devices_to_two_to_fsdp(run):
  two = _restore(run, devices=2)
  checkpoints = checkpoint.Checkpoints(run, 2)
  checkpoints.save(21, two._replace(step=two.step + 1))
  checkpoints.close()
  expected = _make_arrays(20)._replace(step=np.int32(21))
  _assert_identical(_restore(run, fsdp=4), expected)


def test_nothing_is_written_before_something_is_saved(tmp_path):
  workdir = tmp_path / "run"
  checkpoints = checkpoint.Checkpoints(workdir, 2)
  assert checkpoints.restore(_abstract()) is None
  assert not workdir.exists()


def test_the_state_may_change_once_save_returns(tmp_path):
  # Saving is asynchronous and the next step donates the buffers.
  checkpoints = checkpoint.Checkpoints(tmp_path, 2)
  state = _place(_make_arrays(1))
  checkpoints.save(1, state)
  add = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
  jax.block_until_ready(add(state))
  checkpoints.close()
  _assert_identical(_restore(tmp_path), _make_arrays(1))


# --- which are kept ---


def test_the_newest_are_kept_and_the_best_beside_them(tmp_path):
  metrics = {1: 0.3, 2: 0.7, 3: 0.7, 4: float("nan"), 5: 0.6}
  _save_run(tmp_path, [1, 2, 3, 4, 5], keep=2, best=metrics)
  assert _names(tmp_path / "checkpoints") == ["4", "5"]
  assert _names(tmp_path / "best") == ["2"], "equal is not better"
  # A run that goes on knows what its best was.
  checkpoints = checkpoint.Checkpoints(tmp_path, 2)
  checkpoints.save_if_best(6, _place(_make_arrays(6)), 0.65)
  checkpoints.save_if_best(7, _place(_make_arrays(7)), 0.75)
  checkpoints.close()
  assert _names(tmp_path / "best") == ["7"]
  assert checkpoint.Checkpoints(tmp_path, 2).steps() == [4, 5]


def test_a_better_metric_at_an_earlier_step_is_kept(tmp_path):
  # A run that fell back, and evaluates at other steps than before.
  _save_run(tmp_path, [10], best={10: 0.5})
  checkpoints = checkpoint.Checkpoints(tmp_path, 2)
  checkpoints.save_if_best(7, _place(_make_arrays(7)), 0.6)
  checkpoints.close()
  assert _names(tmp_path / "best") == ["7"]


def test_a_damaged_best_is_set_aside_and_replaced(run, caplog):
  (run / "best" / "10" / "meta" / "metadata").write_text("")
  checkpoints = checkpoint.Checkpoints(run, 2)
  checkpoints.save_if_best(30, _place(_make_arrays(30)), 0.1)
  checkpoints.close()
  assert "best checkpoint 10 is corrupt" in caplog.text
  assert _names(run / "best") == ["30"]
  assert _names(run / "damaged") == ["best-10"]


# --- damage ---


def _files_of(folder):
  return sorted(
    str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
  )


def _content(folder):
  return {name: (folder / name).read_bytes() for name in _files_of(folder)}


def test_every_truncated_file_is_noticed(saved_run, tmp_path, caplog):
  names = _files_of(saved_run / "checkpoints" / "20")
  assert len(names) > 10
  for i, name in enumerate(names):
    whole = (saved_run / "checkpoints" / "20" / name).read_bytes()
    if not whole:
      continue
    copy = shutil.copytree(saved_run, tmp_path / str(i))
    newest = copy / "checkpoints" / "20"
    (newest / name).write_bytes(whole[: len(whole) // 2])
    damaged = _content(newest)
    caplog.clear()
    _assert_identical(_restore(copy), _make_arrays(10))
    assert "checkpoint 20 is corrupt" in caplog.text, name
    assert name in caplog.text, caplog.text
    assert _names(copy / "checkpoints") == ["10"], name
    # Moved, not deleted.
    assert _content(copy / "damaged" / "checkpoints-20") == damaged, name


def test_a_missing_file_is_noticed(run, caplog):
  (run / "checkpoints" / "20" / "meta" / "metadata").unlink()
  _assert_identical(_restore(run), _make_arrays(10))
  assert "meta/metadata" in caplog.text


def test_a_damaged_step_can_be_saved_again_and_damaged_again(run, caplog):
  for _ in range(2):
    file = _largest_file(run / "checkpoints" / "20")
    file.write_bytes(b"")
    _assert_identical(_restore(run), _make_arrays(10))
    checkpoints = checkpoint.Checkpoints(run, 2)
    checkpoints.save(20, _place(_make_arrays(20)))
    checkpoints.close()
    _assert_identical(_restore(run), _make_arrays(20))
  assert len(_names(run / "damaged")) == 2
  assert "nothing is deleted" in caplog.text


def test_a_run_does_not_begin_anew_where_all_are_corrupt(run):
  for step in (10, 20):
    _largest_file(run / "checkpoints" / str(step)).write_bytes(b"")
  before = _content(run)
  with pytest.raises(RunStopped, match=r"corrupt: 20, 10; nothing was moved"):
    _restore(run)
  assert _content(run) == before


def _largest_file(folder):
  return max((folder / n for n in _files_of(folder)), key=os.path.getsize)


def test_a_flipped_bit_is_noticed(saved_run, tmp_path, caplog):
  # Through Orbax, which itself checks no sum of the arrays' contents: an array
  # with one bit changed is written where the original was.
  workdir = shutil.copytree(saved_run, tmp_path / "run")
  arrays = _make_arrays(20)
  arrays.params["head"]["kernel"].view(np.uint32)[3, 4] ^= 1
  other = tmp_path / "other"
  checkpoints = checkpoint.Checkpoints(other, 1)
  checkpoints.save(20, _place(arrays))
  checkpoints.close()
  newest = workdir / "checkpoints" / "20"
  shutil.rmtree(newest / "state")
  shutil.copytree(other / "checkpoints" / "20" / "state", newest / "state")
  (newest / "files.json").unlink()
  _assert_identical(_restore(workdir), _make_arrays(10))
  assert "params/head/kernel" in caplog.text


def test_flipped_bytes_of_the_array_files_are_noticed(
  saved_run, tmp_path, caplog
):
  newest = saved_run / "checkpoints" / "20"
  files = [n for n in _files_of(newest) if "/d/" in n]
  assert files
  noticed = []
  for i, name in enumerate(files):
    copy = shutil.copytree(saved_run, tmp_path / str(i))
    file = copy / "checkpoints" / "20" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)
    caplog.clear()
    state = _restore(copy)
    # Either the fingerprint or the reader noticed, or the byte means nothing.
    noticed.append("is corrupt" in caplog.text)
    _assert_identical(state, _make_arrays(10 if noticed[-1] else 20))
  assert any(noticed)


def test_a_half_written_checkpoint_is_ignored_and_replaced(run):
  # What a kill leaves: a folder that was not renamed yet.
  newest = run / "checkpoints" / "20"
  half = run / "checkpoints" / "30.orbax-checkpoint-tmp"
  shutil.copytree(newest / "state", half / "state.orbax-checkpoint-tmp")
  assert checkpoint.Checkpoints(run, 2).steps() == [10, 20]
  assert checkpoint.load_weights(run / "checkpoints" / "20")
  checkpoints = checkpoint.Checkpoints(run, 2)
  _assert_identical(checkpoints.restore(_abstract()), _make_arrays(20))
  checkpoints.save(30, _place(_make_arrays(30)))
  checkpoints.close()
  _assert_identical(_restore(run), _make_arrays(30))
  assert _names(run / "checkpoints") == ["20", "30"]
  assert not (run / "damaged").exists()


# --- failures that are not damage ---


_FAILURES = {
  **{
    errno.errorcode[number]: OSError(number, os.strerror(number))
    for number in (
      *(errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT),
      *(errno.EMFILE, errno.ENOTCONN, errno.ENETUNREACH, errno.EBUSY),
    )
  },
  "a busy server": ValueError("UNAVAILABLE: HTTP response code: 503"),
  "a slow server": ValueError("DEADLINE_EXCEEDED: no answer"),
  "no permission": ValueError("PERMISSION_DENIED: 403"),
  "a full device": RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
  "a full memory": MemoryError(),
  "another version": TypeError("unexpected keyword argument 'x'"),
  "a bug": KeyError("x"),
}


@pytest.fixture
def quick(monkeypatch):
  """Tries again at once."""
  monkeypatch.setattr(checkpoint, "_PAUSES", (0, 0))


def _fail(error):
  def fail(*_, **__):
    raise error

  return fail


@pytest.mark.parametrize("name", _FAILURES)
def test_what_cannot_be_read_is_not_taken_for_corrupt(
  name, run, monkeypatch, quick
):
  before = _content(run)
  for place in ("_read_meta", "_check_files", "_check_tree"):
    with monkeypatch.context() as patch:
      patch.setattr(checkpoint, place, _fail(_FAILURES[name]))
      with pytest.raises(RunStopped) as stopped:
        _restore(run)
    message = str(stopped.value)
    assert f"{run}/checkpoints/20" in message
    assert "nothing was changed" in message
    assert "\n" not in message
    assert _content(run) == before
  _assert_identical(_restore(run), _make_arrays(20))


def test_a_failure_that_passes_is_not_noticed(run, monkeypatch, quick):
  read, failures = checkpoint._read_meta, [_FAILURES["EIO"]] * 2

  def read_meta(folder):
    if failures:
      raise failures.pop()
    return read(folder)

  monkeypatch.setattr(checkpoint, "_read_meta", read_meta)
  _assert_identical(_restore(run), _make_arrays(20))
  assert not failures


@pytest.mark.parametrize("step", [500, 503])
def test_a_step_like_a_servers_answer_is_no_failure_of_one(step, tmp_path):
  """What a file that does not decode is called says nothing about why."""
  error = ValueError(f"DATA_LOSS: {tmp_path}/http/checkpoints/{step}: CRC-32C")
  _, found = checkpoint._attempt(_fail(error))
  assert isinstance(found, checkpoint.Corrupt)


@pytest.mark.parametrize(
  ("theirs", "expected"), [(0, 20), (1, 10), (2, UserError), (3, RunStopped)]
)
def test_one_process_of_two_that_fails_decides_for_both(
  theirs, expected, run, monkeypatch
):
  """This one reads well; the other has met nothing, damage, or a failure."""
  before = _content(run)
  answers = [theirs, 0]
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    checkpoint.multihost_utils,
    "process_allgather",
    lambda kind: np.array([kind, answers.pop(0)]),
  )
  if isinstance(expected, int):
    _assert_identical(_restore(run), _make_arrays(expected))
    assert (run / "damaged").exists() == (expected == 10)
    return
  with pytest.raises(expected, match=r"another process .*checkpoints/20"):
    _restore(run)
  assert _content(run) == before


@pytest.mark.parametrize("name", _FAILURES)
def test_a_best_that_cannot_be_read_is_kept(name, run, monkeypatch, quick):
  before = _content(run)
  monkeypatch.setattr(checkpoint, "_read_meta", _fail(_FAILURES[name]))
  checkpoints = checkpoint.Checkpoints(run, 2)
  with pytest.raises(RunStopped, match="best/10"):
    checkpoints.save_if_best(30, _place(_make_arrays(30)), 0.1)
  assert _content(run) == before


@pytest.mark.parametrize("name", _FAILURES)
def test_what_cannot_be_written_costs_nothing(name, run, monkeypatch):
  before = _content(run)
  checkpoints = checkpoint.Checkpoints(run, 2)
  monkeypatch.setattr(ocp.CheckpointManager, "save", _fail(_FAILURES[name]))
  with pytest.raises(RunStopped, match="intact checkpoints: 10, 20;") as e:
    checkpoints.save(30, _place(_make_arrays(30)))
  assert "make room" not in str(e.value)
  assert _content(run) == before
  _assert_identical(_restore(run), _make_arrays(20))


def test_no_process_looks_while_the_first_deletes(run, monkeypatch):
  """Another one that met a checkpoint half gone ended the run."""
  order = []

  def note(name, result=None):
    return lambda *_, **__: order.append(name) or result

  checkpoints = checkpoint.Checkpoints(run, 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(checkpoint, "_open", note("open", ocp.CheckpointManager))
  monkeypatch.setattr(checkpoint, "list_steps", note("list", []))
  monkeypatch.setattr(checkpoint, "_from_process_0", note("agree", [False]))
  for name in ("reload", "save"):
    monkeypatch.setattr(ocp.CheckpointManager, name, note(name))
  checkpoints.save(30, _place(_make_arrays(30)))
  assert order == ["agree", "open", "reload", "save"]


def test_another_state_is_named_and_nothing_is_moved(run):
  before = _content(run)
  wanted = _abstract()
  more = wanted._replace(opt_state=(*wanted.opt_state, {"scale": wanted.step}))
  kernel = wanted.params["head"]["kernel"]
  other = {
    "head": {**wanted.params["head"], "kernel": kernel.update(shape=(16, 9))}
  }
  for abstract, words in (
    (more, "opt_state/2/scale none there, int32[] here"),
    (
      wanted._replace(params=other),
      "params/head/kernel float32[16, 8] there, float32[16, 9] here",
    ),
  ):
    with pytest.raises(UserError) as error:
      checkpoint.Checkpoints(run, 2).restore(abstract)
    assert words in str(error.value)
    assert _content(run) == before


# --- what people and earlier runs leave in the folder ---


def test_a_checkpoint_may_be_deleted_while_the_run_goes_on(tmp_path):
  _save_run(tmp_path, [1, 2], keep=3)
  checkpoints = checkpoint.Checkpoints(tmp_path, 3)
  checkpoints.save(3, _place(_make_arrays(3)))
  checkpoints.wait()
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  checkpoints.save(4, _place(_make_arrays(4)))
  checkpoints.close()
  assert _names(tmp_path / "checkpoints") == ["1", "3", "4"]


def test_a_checkpoint_that_cannot_be_deleted_costs_only_room(tmp_path, caplog):
  _save_run(tmp_path / "run", [1, 2])
  folder = tmp_path / "run" / "checkpoints"
  (folder / "1").rename(tmp_path / "elsewhere")
  (folder / "1").symlink_to(tmp_path / "elsewhere")
  checkpoints = checkpoint.Checkpoints(tmp_path / "run", 2)
  for step in (3, 4):
    checkpoints.save(step, _place(_make_arrays(step)))
  checkpoints.close()
  assert _names(folder) == ["1", "3", "4"]
  assert caplog.text.count("could not delete") == 1


def test_a_step_of_best_that_is_there_is_kept(run):
  # After a resume on other devices the metric may be better by a rounding.
  checkpoints = checkpoint.Checkpoints(run, 2)
  checkpoints.save_if_best(10, _place(_make_arrays(10)), 0.5000001)
  checkpoints.close()
  assert _names(run / "best") == ["10"]


def test_what_a_kill_left_is_cleared(run):
  for kind in ("checkpoints", "best"):
    shutil.copytree(run / "best" / "10", run / kind / "30.orbax-checkpoint-tmp")
  checkpoint.Checkpoints(run, 2).clear_unfinished()
  assert _names(run / "checkpoints") == ["10", "20"]
  assert _names(run / "best") == ["10"]


# --- no room ---


# The limit is lifted before the message is written, to a file too.
_SAVE_AGAIN = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
import checkpoint_test as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
try:
  t._save_again({workdir!r})
except t.RunStopped as e:
  resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
  print("STOPPED", e)
"""


def _save_again(workdir):
  checkpoints = checkpoint.Checkpoints(workdir, 5)
  assert checkpoints.steps() == [10, 20]
  checkpoints.save(30, _place(_make_arrays(30)))
  checkpoints.close()


def _check_stopped(message, workdir):
  assert "could not write a checkpoint" in message
  assert str(workdir) in message
  assert "intact checkpoints: 10, 20" in message


def test_a_file_too_large_stops_the_run_and_spares_the_rest(run, fork_server):
  before = _content(run)
  tests = str(Path(__file__).parent)
  code = _SAVE_AGAIN.format(tests=tests, workdir=str(run))
  done = forks.run(["-c", code])
  stopped = [x for x in done.stdout.splitlines() if x.startswith("STOPPED")]
  assert len(stopped) == 1, done.stdout + done.stderr
  _check_stopped(stopped[0], run)
  after = _content(run)
  assert {name: after[name] for name in before} == before
  _assert_identical(_restore(run), _make_arrays(20))


def test_a_full_disk_stops_the_run_and_spares_the_rest(saved_run, tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
  mounted = subprocess.run(["mount", *options], capture_output=True)
  if mounted.returncode:
    pytest.skip("may not mount a small disk")
  try:
    run = shutil.copytree(saved_run, disk / "run")
    room = shutil.disk_usage(disk).free
    (disk / "full").write_bytes(bytes(room - 8192))
    with pytest.raises(RunStopped) as error:
      _save_again(run)
    _check_stopped(str(error.value), run)
    (disk / "full").unlink()
    _assert_identical(_restore(run), _make_arrays(20))
    _save_again(run)
    _assert_identical(_restore(run), _make_arrays(30))
  finally:
    subprocess.run(["umount", str(disk)], check=True)


# --- the fingerprint ---


def _digest(x):
  return checkpoint.fingerprint({"x": jnp.asarray(x)})["x"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_fingerprint_changes_with_any_bit(dtype):
  x = np.array(jnp.asarray(np.arange(6).reshape(2, 3), dtype))
  expected = _digest(x)
  bits = x.view(f"uint{8 * x.itemsize}")
  for i in range(x.size):
    for bit in range(8 * x.itemsize):
      bits.flat[i] ^= bits.dtype.type(1 << bit)
      assert _digest(x) != expected, (i, bit)
      bits.flat[i] ^= bits.dtype.type(1 << bit)
  assert _digest(x) == expected


def test_fingerprint_changes_with_the_order():
  x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
  assert _digest(x) != _digest(x.T)
  assert _digest(x) != _digest(x[::-1])
  # Round numbers, far apart: their bits differ in high places only, which
  # multiplying by the position alone would push out of 32 bits.
  x = np.ones(4096, np.float32)
  seen = set()
  for i in range(0, 4096, 16):
    x[i] = 2
    seen.add(_digest(x))
    x[i] = 1
  assert len(seen) == 256


def test_fingerprint_tells_zeros_apart():
  zeros = np.zeros(4, np.float32)
  assert _digest(zeros) != _digest(-zeros)


def test_fingerprint_is_the_same_on_every_mesh():
  arrays = _make_arrays(5)
  expected = checkpoint.fingerprint(_place(arrays, 1))
  for devices, fsdp in ((8, 1), (8, 8), (2, 2)):
    assert checkpoint.fingerprint(_place(arrays, devices, fsdp)) == expected
  assert checkpoint.fingerprint(arrays) == expected


# --- weights ---


def _assert_weights(weights, step, source, name="ema"):
  expected = flatten(getattr(_make_arrays(step, name == "ema"), name))
  assert weights.params.keys() == expected.keys()
  for path, x in expected.items():
    assert isinstance(weights.params[path], np.ndarray)
    np.testing.assert_array_equal(weights.params[path], x)
  assert str(weights.source) == str(source)
  assert weights.run["class_names"] == ["a", "b"]


def test_weights_are_the_averages_of_the_best(saved_run):
  weights = checkpoint.load_weights(saved_run)
  _assert_weights(weights, 10, saved_run / "best" / "10")


def test_weights_of_a_given_step(saved_run):
  for path in ("checkpoints/20", "checkpoints/10", "best/10"):
    weights = checkpoint.load_weights(saved_run / path)
    _assert_weights(weights, int(path[-2:]), saved_run / path)


def test_weights_of_a_run_without_best_are_the_newest(tmp_path):
  # 100 is newer than 99, though not in the alphabet.
  _save_run(tmp_path, [99, 100], ema=False)
  weights = checkpoint.load_weights(tmp_path)
  _assert_weights(weights, 100, tmp_path / "checkpoints" / "100", "params")


def test_damaged_weights_are_passed_over(run, caplog):
  _largest_file(run / "best" / "10").write_bytes(b"")
  _assert_weights(checkpoint.load_weights(run), 20, run / "checkpoints" / "20")
  assert "is corrupt" in caplog.text
  assert str(run / "best" / "10") in caplog.text
  (run / "checkpoints" / "20" / "files.json").unlink()
  _largest_file(run / "checkpoints" / "20").write_bytes(b"")
  _assert_weights(checkpoint.load_weights(run), 10, run / "checkpoints" / "10")
  # Reading moves nothing.
  assert not (run / "damaged").exists()
  with pytest.raises(UserError, match=r"no readable checkpoint.*1 tried"):
    checkpoint.load_weights(run / "best" / "10")


def test_no_weights_is_one_clear_line(tmp_path, saved_run):
  empty = tmp_path / "empty"
  empty.mkdir()
  for path, words in (
    (tmp_path / "nowhere", "does not exist"),
    (empty, "config.json and checkpoints"),
    (saved_run / "checkpoints" / "30", "does not exist"),
    (saved_run / "checkpoints", "a run folder has config.json"),
  ):
    with pytest.raises(UserError) as error:
      checkpoint.load_weights(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_stopped_names_its_cause(run, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError("No space left on device\nand more")

  checkpoints = checkpoint.Checkpoints(run, 2)
  monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
  with pytest.raises(RunStopped) as error:
    checkpoints.save(30, _place(_make_arrays(30)))
  message = str(error.value)
  assert "at step 30: No space left on device; " in message
  assert "\n" not in message
  checkpoints.close()


@pytest.fixture(autouse=True)
def _quiet():
  logging.getLogger("absl").setLevel(logging.ERROR)


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    ("gs://bucket/run", "gs://bucket/run"),
    ("/runs/b16", "/runs/b16"),
    ("runs/b16", f"{os.getcwd()}/runs/b16"),
    ("~/b16", os.path.expanduser("~/b16")),
  ],
)
def test_addresses_are_absolute_as_they_are(given, expected):
  """A bucket is no folder of the working directory."""
  found = checkpoint.absolute(given)
  assert str(found) == expected
  assert str(found / "config.json") == f"{expected}/config.json"
  assert str(checkpoint.absolute(found)) == expected
