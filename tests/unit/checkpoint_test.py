"""Checkpoints: the same bits again, on any mesh, and damage that is noticed."""

import errno
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from mistakes import named
from tiny_runs import wait_until_gone

from vit_jax import checkpoint, sharding
from vit_jax.errors import RunStopped, UserError
from vit_jax.pretrained import runs
from vit_jax.state import TrainState, flatten, make_key


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


# What `pretrained.runs` reads of a run beside its arrays.
_RUN = {
  "config": {
    "image_size": 8,
    "model": {"variant": "ViT-N_8"},
    "eval": {"preprocess": ""},
    "loss": {"name": "softmax"},
  },
  "class_names": ["a", "b"],
}


def _save_run(workdir, steps, keep=2, best=(), ema=True):
  """Adds checkpoints to a run folder; `best` are {step: metric}."""
  checkpoints = checkpoint.Checkpoints(workdir, keep)
  for step in steps:
    checkpoints.save(step, _place(_make_arrays(step, ema)))
    if step in best and checkpoints.is_best(best[step]):
      checkpoints.keep_best(step, best[step])
  checkpoints.close()
  (Path(workdir) / "config.json").write_text(json.dumps(_RUN))
  (Path(workdir) / "metrics.jsonl").write_text('{"step": 1}\n')


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
  return checkpoint.Checkpoints(workdir, 2).restore(_abstract(**kwargs))


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


def _best(workdir):
  folder, metric = checkpoint.read_best(workdir)
  return int(folder.name), metric


def test_the_newest_are_kept_and_the_best_beside_them(tmp_path):
  metrics = {1: 0.3, 2: 0.7, 3: 0.7, 4: float("nan"), 5: 0.6}
  _save_run(tmp_path, [1, 2, 3, 4, 5], keep=2, best=metrics)
  assert _names(tmp_path / "checkpoints") == ["2", "4", "5"]
  assert _best(tmp_path) == (2, 0.7), "equal is not better"
  # A run that resumes knows what its best was.
  _save_run(tmp_path, [6, 7, 8], keep=1, best={6: 0.65, 7: 0.75})
  assert _best(tmp_path) == (7, 0.75)
  assert _names(tmp_path / "checkpoints") == ["7", "8"]


def test_the_best_is_named_once_it_is_there(run):
  """A kill before that leaves the one before, whose step is kept so long."""
  checkpoints = checkpoint.Checkpoints(run, 1)
  assert checkpoints.is_best(0.6)
  checkpoints.save(30, _place(_make_arrays(30)))
  checkpoints.keep_best(30, 0.6)
  assert _best(run) == (10, 0.5)
  checkpoints.wait()
  assert _best(run) == (30, 0.6)
  assert _names(run / "checkpoints") == ["10", "30"]
  checkpoints.save(40, _place(_make_arrays(40)))
  checkpoints.close()
  assert _names(run / "checkpoints") == ["30", "40"]


def test_a_best_that_was_deleted_is_none(run):
  shutil.rmtree(run / "checkpoints" / "10")
  assert checkpoint.read_best(run) is None
  assert checkpoint.Checkpoints(run, 2).is_best(0.1)


def test_a_best_that_cannot_be_read_is_kept(run):
  (run / "best.json").write_text("{")
  before = _content(run)
  with pytest.raises(UserError, match=r"best.json is corrupt.*or delete it"):
    checkpoint.Checkpoints(run, 2).is_best(1)
  with pytest.raises(RunStopped, match=r"best.json is corrupt"):
    _save_run(run, [30])
  assert _content(run) == before


@pytest.fixture
def old_run(run):
  """As runs before 2026-12 kept the best one, in a folder of its own."""
  best = run / "best" / "10"
  shutil.copytree(run / "checkpoints" / "10", best)
  meta = json.loads((best / "meta" / "metadata").read_text())
  (best / "meta" / "metadata").write_text(json.dumps(meta | {"metric": 0.5}))
  (run / "best.json").unlink()
  return run


def test_the_best_of_an_old_run_is_found_and_surpassed(old_run):
  assert checkpoint.read_best(old_run) == (old_run / "best" / "10", 0.5)
  assert runs.read(old_run).source == f"{old_run}/best/10"
  _save_run(old_run, [30, 40], keep=1, best={30: 0.4, 40: 0.6})
  assert runs.read(old_run).source == f"{old_run}/checkpoints/40"
  assert _names(old_run / "best") == ["10"], "nothing of it is deleted"


def test_the_best_of_an_old_run_may_be_corrupt(old_run):
  (old_run / "best" / "10" / "meta" / "metadata").write_text("{")
  assert checkpoint.read_best(old_run) is None


# --- damage ---


def _files_of(folder):
  return sorted(
    str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
  )


def _content(folder):
  return {name: (folder / name).read_bytes() for name in _files_of(folder)}


@pytest.mark.parametrize("change", ["half", "missing", "flipped"])
def test_a_damaged_file_is_noticed_or_means_nothing(
  change, saved_run, tmp_path, caplog
):
  """Whatever happens to a file, never is another state taken for this one."""
  names = _files_of(saved_run / "checkpoints" / "20")
  if change == "flipped":
    names = [name for name in names if "/d/" in name]  # the arrays
  noticed = set()
  for i, name in enumerate(names):
    copy = shutil.copytree(saved_run, tmp_path / str(i))
    newest = copy / "checkpoints" / "20"
    content = bytearray((newest / name).read_bytes())
    middle = len(content) // 2
    (newest / name).unlink()
    if change == "half":
      (newest / name).write_bytes(content[:middle])
    elif change == "flipped":
      content[middle] ^= 0x10
      (newest / name).write_bytes(content)
    damaged = _content(newest)
    caplog.clear()
    state = _restore(copy)
    if "checkpoint 20 is corrupt" not in caplog.text:
      _assert_identical(state, _make_arrays(20))
      continue
    noticed.add(name)
    _assert_identical(state, _make_arrays(10))
    # Moved, not deleted.
    assert _names(copy / "checkpoints") == ["10"], name
    assert _content(copy / "damaged" / "checkpoints-20") == damaged, name
  if change != "flipped":
    files = {"meta/metadata", "state/_METADATA", "state/manifest.ocdbt"}
    assert noticed >= files
  assert any(name.startswith("state/d/") for name in noticed)


def test_a_damaged_step_can_be_saved_again_and_damaged_again(run, caplog):
  for _ in range(2):
    file = _largest_file(run / "checkpoints" / "20")
    file.write_bytes(b"")
    _assert_identical(_restore(run), _make_arrays(10))
    _save_run(run, [20])
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
  """Of those that are read: Orbax leaves others behind."""
  return max(folder.glob("state/d/*"), key=os.path.getsize)


def test_a_flipped_bit_is_noticed(run, tmp_path, caplog):
  # Through Orbax, which itself checks no sum of the arrays' contents: an array
  # with one bit changed is written where the original was.
  arrays = _make_arrays(20)
  arrays.params["head"]["kernel"].view(np.uint32)[3, 4] ^= 1
  checkpoints = checkpoint.Checkpoints(tmp_path / "other", 1)
  checkpoints.save(20, _place(arrays))
  checkpoints.close()
  newest = run / "checkpoints" / "20"
  shutil.rmtree(newest / "state")
  shutil.copytree(tmp_path / "other/checkpoints/20/state", newest / "state")
  _assert_identical(_restore(run), _make_arrays(10))
  assert "params/head/kernel" in caplog.text


def test_a_half_written_checkpoint_is_ignored_and_replaced(run):
  # What a kill leaves: a folder that was not renamed yet.
  newest = run / "checkpoints" / "20"
  half = run / "checkpoints" / "30.orbax-checkpoint-tmp"
  shutil.copytree(newest / "state", half / "state.orbax-checkpoint-tmp")
  assert checkpoint.Checkpoints(run, 2).steps() == [10, 20]
  shutil.copytree(half, half.with_name("40.orbax-checkpoint-tmp"))
  assert runs.read(run / "checkpoints" / "20")
  checkpoints = checkpoint.Checkpoints(run, 1)
  _assert_identical(checkpoints.restore(_abstract()), _make_arrays(20))
  checkpoints.open()
  for step in (30, 40):
    wait_until_gone(half.with_name(f"{step}.orbax-checkpoint-tmp"))
  assert _names(run / "checkpoints") == ["10", "20"]
  checkpoints.save(30, _place(_make_arrays(30)))
  checkpoints.close()
  _assert_identical(_restore(run), _make_arrays(30))
  assert _names(run / "checkpoints") == ["10", "30"]
  assert not (run / "damaged").exists()


# --- failures that are not damage ---


_FAILURES = {
  **{
    errno.errorcode[number]: OSError(number, os.strerror(number))
    for number in (
      *(errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT),
      *(errno.EMFILE, errno.ENOTCONN, errno.ENETUNREACH, errno.EBUSY),
      errno.ENOSPC,
    )
  },
  "a disk": ValueError("FAILED_PRECONDITION: busy [os_error_code='16']"),
  "a server": ValueError("UNAVAILABLE: parsing HTTP response code: 503"),
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
def test_what_cannot_be_read_or_written_costs_nothing(
  name, run, monkeypatch, quick
):
  """Nor is it taken for corrupt; then the newest is resumed from."""
  before = _content(run)
  assert {"metrics.jsonl", "best.json"} < before.keys()
  for module, place in (
    (checkpoint, "_read_meta"),
    (ocp.PyTreeCheckpointHandler, "restore"),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(module, place, _fail(_FAILURES[name]))
      for read in (_restore, runs.read):
        with pytest.raises(RunStopped) as stopped:
          read(run)
        message = str(stopped.value)
        assert f"{run}/checkpoints/{20 if read is _restore else 10}" in message
        assert "nothing was changed" in message
        assert "\n" not in message
    assert _content(run) == before
  checkpoints = checkpoint.Checkpoints(run, 2)
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, "save", _fail(_FAILURES[name]))
    with pytest.raises(RunStopped, match=r"at step 30: .*: 10, 20;"):
      checkpoints.save(30, _place(_make_arrays(30)))
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
  with pytest.raises(checkpoint.Corrupt):
    checkpoint._read(tmp_path, _fail(error))


@pytest.mark.parametrize(
  ("theirs", "expected"), [(0, 20), (1, 10), (2, UserError), (3, RunStopped)]
)
def test_one_process_of_two_that_fails_decides_for_both(
  theirs, expected, run, monkeypatch
):
  """This one reads well; the other has met nothing, damage, or a failure."""
  before = _content(run)
  answers = [theirs, 0]
  monkeypatch.setattr(checkpoint, "gather", lambda kind: [kind, answers.pop(0)])
  if isinstance(expected, int):
    _assert_identical(_restore(run), _make_arrays(expected))
    assert (run / "damaged").exists() == (expected == 10)
    return
  with pytest.raises(expected, match=r"another process .*checkpoints/20"):
    _restore(run)
  assert _content(run) == before


def test_why_nothing_is_written_is_one_line(run, monkeypatch):
  error = OSError("No space left on device\nand more")
  monkeypatch.setattr(ocp.CheckpointManager, "save", _fail(error))
  with pytest.raises(RunStopped) as stopped:
    _save_run(run, [30])
  words = "at step 30: No space left on device and more; intact checkpoints: "
  assert f"{words}10, 20;" in str(stopped.value)


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
    with named(words):
      checkpoint.Checkpoints(run, 2).restore(abstract)
    assert _content(run) == before


def test_keys_do_not_depend_on_the_environment():
  with jax.default_prng_impl("rbg"):  # as JAX_DEFAULT_PRNG_IMPL
    key = make_key(3)
  expected = jax.random.key(3, impl="threefry2x32")
  np.testing.assert_array_equal(*map(jax.random.key_data, (key, expected)))


# --- what people and earlier runs leave in the folder ---


def test_a_checkpoint_may_be_deleted_while_the_run_goes_on(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, 2)
  for step in (1, 2, 3, 4):
    checkpoints.save(step, _place(_make_arrays(step)))
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "2", ignore_errors=True)
  checkpoints.close()
  assert _names(tmp_path / "checkpoints") == ["3", "4"]


def test_a_checkpoint_that_cannot_be_deleted_costs_only_room(tmp_path, caplog):
  _save_run(tmp_path / "run", [1, 2])
  folder = tmp_path / "run" / "checkpoints"
  (folder / "1").rename(tmp_path / "elsewhere")
  (folder / "1").symlink_to(tmp_path / "elsewhere")
  _save_run(tmp_path / "run", [3, 4, 5])
  assert {"1", "4", "5"} <= {*_names(folder)}
  assert "could not delete an old checkpoint" in caplog.text


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
    np.testing.assert_array_equal(weights.params[path].read(), x)
  assert weights.source == str(source)
  assert weights.class_names == ["a", "b"]


def test_weights_are_the_averages_of_the_best(saved_run):
  _assert_weights(runs.read(saved_run), 10, saved_run / "checkpoints" / "10")


def test_weights_of_a_given_step(saved_run):
  folder = saved_run / "checkpoints" / "20"
  _assert_weights(runs.read(folder), 20, folder)


def test_weights_of_a_run_without_best_are_the_newest(tmp_path):
  # 100 is newer than 99, though not in the alphabet.
  _save_run(tmp_path, [99, 100], ema=False)
  folder = tmp_path / "checkpoints" / "100"
  _assert_weights(runs.read(tmp_path), 100, folder, "params")


def test_corrupt_weights_are_skipped(run, caplog):
  best, newest = (run / "checkpoints" / step for step in ("10", "20"))
  _largest_file(best).write_bytes(b"")
  _assert_weights(runs.read(run), 20, newest)
  assert f"{best} is corrupt" in caplog.text
  # Reading moves nothing.
  assert not (run / "damaged").exists()
  with pytest.raises(UserError, match=r"no readable checkpoint.*1 tried"):
    runs.read(best)


def test_no_weights_is_one_clear_line(tmp_path, saved_run):
  empty = tmp_path / "empty"
  empty.mkdir()
  for path, words in (
    (tmp_path / "nowhere", "does not exist"),
    (empty, "config.json and checkpoints"),
    (saved_run / "checkpoints" / "30", "does not exist"),
    (saved_run / "checkpoints", "a run folder has config.json"),
  ):
    with named(words, str(path)):
      runs.read(path)


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


def test_a_bucket_needs_a_library(monkeypatch):
  checkpoint.check_address("/a/local/folder")
  monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
  checkpoint.check_address("/a/local/folder")
  with pytest.raises(UserError, match=r"gs://b/run .*'vit_jax\[gcs\]'"):
    checkpoint.check_address("gs://b/run")
