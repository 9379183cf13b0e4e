"""Checkpoints: Orbax saves and restores, this file says what and when.

A run folder holds

  config.json          the resolved configuration and the class names
  checkpoints/STEP/    the newest checkpoints: the whole training state
  best/STEP/           the one with the best evaluation metric so far

A checkpoint appears under its name only when it is complete: Orbax writes to a
temporary name and renames. Damage after that is noticed twice: files.json lists
the size of every file, and beside the state lies a fingerprint, one number for
each array, computed where the array lives and again from what was read.

The order of choices when a run starts:
  1. the newest checkpoint of its own that can be read and matches its
     fingerprint; those that cannot are moved to damaged/, never deleted;
  2. else the weights of `config.init_from`;
  3. else random weights from `config.seed`.
"""

import functools
import json
import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from vit_jax.errors import RunStopped, UserError
from vit_jax.state import flatten, unflatten

log = logging.getLogger(__name__)


def _digest(x):
  """Returns a uint32 that changes with any bit of x, or with its order."""
  bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    position += index * jnp.uint32(stride)
  # Each value is scrambled with its position (the finalizer of MurmurHash3, a
  # bijection), so that no single change can cancel out and several do so in
  # one of 2**32 cases. Sums of integers do not depend on the order, so neither
  # on the devices.
  h = bits.astype(jnp.uint32) ^ (position * jnp.uint32(0x9E3779B9))
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    h = (h ^ (h >> shift)) * jnp.uint32(factor)
  return jnp.sum(h ^ (h >> 16))


_digests = jax.jit(lambda arrays: [_digest(x) for x in arrays])


def fingerprint(tree) -> dict[str, int]:
  """Returns one 32-bit number for each array, the same on any mesh."""
  flat = flatten(tree)
  digests = jax.device_get(_digests(list(flat.values())))
  return {path: int(d) for path, d in zip(flat, digests, strict=True)}


class Checkpoints:
  """The checkpoints of one run folder."""

  def __init__(self, workdir, keep: int):
    """Remembers the folder; it is made when something is saved.

    Args:
      workdir: the run folder.
      keep: how many of the newest to keep; the best is kept beside them.
    """
    self.workdir = absolute(workdir)
    self._keep = keep

  @functools.cached_property
  def _newest(self):
    return _open(self.workdir / "checkpoints", self._keep)

  @functools.cached_property
  def _best(self):
    return _open(self.workdir / "best", 1)

  def steps(self) -> list[int]:
    """Returns the steps of the complete checkpoints, oldest first."""
    return sorted(self._newest.all_steps())

  def save(self, step: int, state) -> None:
    """Starts to save the state; returns once it is off the devices.

    Raises:
      RunStopped: this or the save before it could not be written.
    """
    # The best must not be older than the newest: a run that is killed here
    # would never save it again.
    self.wait()
    self._save(self._newest, step, state, {})

  def save_if_best(self, step: int, state, metric: float) -> None:
    """Saves the state apart if its metric is above all before it."""
    if metric > self._best_metric():
      self._save(self._best, step, state, {"metric": metric})

  def _best_metric(self) -> float:
    step = self._best.latest_step()
    if step is None:
      return -math.inf
    try:
      args = ocp.args.Composite(meta=ocp.args.JsonRestore())
      return self._best.restore(step, args=args)["meta"]["metric"]
    except Exception as e:
      log.warning("best checkpoint %d is damaged (%s)", step, first_line(e))
      self._set_aside(self._best, step)
      return -math.inf

  def restore(self, abstract_state):
    """Returns the newest state that can be read, or None if there is none.

    Args:
      abstract_state: shapes, dtypes and shardings; the mesh need not be the
        one that the state was saved from.
    """
    if not (self.workdir / "checkpoints").exists():
      return None
    for step in reversed(self.steps()):
      try:
        state = _restore(self._newest, step, abstract_state)
      except Exception as e:
        log.warning(
          "checkpoint %d is damaged (%s); falling back to the one before",
          step,
          first_line(e),
        )
        self._set_aside(self._newest, step)
      else:
        return state
    return None

  def wait(self) -> None:
    """Returns when everything that was saved is on disk."""
    for manager in (self._best, self._newest):
      self._try(None, manager.wait_until_finished)
      if jax.process_index() == 0:
        for step in manager.all_steps():
          self._try(step, lambda m=manager, s=step: _seal(m.directory / str(s)))

  def close(self) -> None:
    """Waits, and releases the folder."""
    self.wait()
    self._best.close()
    self._newest.close()

  def _save(self, manager, step, state, extra):
    # Plain nested dictionaries: any reader can take one subtree by name.
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(unflatten(flatten(state))),
      meta=ocp.args.JsonSave({"fingerprint": fingerprint(state), **extra}),
    )
    # By force, because Orbax saves nothing older than what it has: a run that
    # fell back may well meet a new best before the step of the last one.
    self._try(step, lambda: manager.save(step, args=args, force=True))

  def _set_aside(self, manager, step):
    """Moves a damaged checkpoint away, so that its step can be saved again."""
    source = manager.directory / str(step)
    target = self.workdir / "damaged" / f"{source.parent.name}-{step}"
    if jax.process_index() == 0:
      while target.exists():
        target = target.with_name(target.name + "-again")
      target.parent.mkdir(exist_ok=True)
      source.rename(target)
      log.warning("moved it to %s; nothing is deleted", target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"set aside {step}")
    manager.reload()

  def _try(self, step, write):
    """Runs `write`; what goes wrong becomes one line that says what is safe."""
    try:
      write()
    except Exception as e:
      safe = self.steps()
      raise RunStopped(
        f"could not write a checkpoint to {self.workdir}"
        f"{f' at step {step}' if step is not None else ''}: {first_line(e)}; "
        f"intact checkpoints: {', '.join(map(str, safe)) or 'none'}; "
        "make room and run the same command again"
      ) from e


def list_steps(workdir) -> list[int]:
  """Returns the steps of the complete checkpoints of a run, oldest first.

  Without a manager, whose making waits for all processes.
  """
  folder = absolute(workdir) / "checkpoints"
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or its type's name.

  A long one loses its middle: what went wrong stands at its ends, and long
  paths between.
  """
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  return line if len(line) <= 200 else f"{line[:60]} ... {line[-120:]}"


def _open(directory, keep):
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    item_names=("state", "meta"),
  )


def _seal(directory):
  """Lists the files and sizes of a complete checkpoint in its files.json."""
  listing = directory / "files.json"
  if not listing.exists():
    sizes = {
      str(f.relative_to(directory)): f.stat().length for f in _files(directory)
    }
    write_atomically(listing, json.dumps(sizes, indent=1))


def _files(directory):
  for path in sorted(directory.iterdir()):
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def _check_files(directory):
  """Raises OSError if a file is not as long as it was when it was written.

  A run that was killed right after saving has no list; the fingerprint is
  then the only guard.
  """
  listing = directory / "files.json"
  if not listing.exists():
    return
  try:
    sizes = json.loads(listing.read_text())
  except ValueError as e:
    raise OSError(f"files.json does not parse: {e}") from e
  for name, size in sizes.items():
    file = directory / name
    found = file.stat().length if file.exists() else 0
    if found != size:
      raise OSError(f"{name} has {found} bytes, {size} were written")


def write_atomically(path, text: str) -> None:
  """Writes a text file so that it is there whole or not at all."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text, encoding="utf-8")
  temporary.replace(path)


def absolute(path) -> epath.Path:
  """Returns a local path or gs:// address as an absolute epath.Path."""
  path = epath.Path(path).expanduser()
  # `absolute` puts the working directory before gs:// too.
  return path if path.is_absolute() else path.absolute()


def _restore(manager, step, abstract_state):
  restored, error = {}, None
  try:
    _check_files(manager.directory / str(step))
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(unflatten(flatten(abstract_state))),
        meta=ocp.args.JsonRestore(),
      ),
    )
  except Exception as e:
    error = e
  # One process may meet the damage and another not: they must agree before
  # any of them computes with the others.
  if jax.process_count() > 1:
    bad = multihost_utils.process_allgather(np.array(error is not None))
    error = error or (OSError("another process failed") if bad.any() else None)
  if error:
    raise error
  flat = flatten(restored["state"])
  _verify(flat, restored["meta"]["fingerprint"])
  structure = jax.tree.structure(abstract_state)
  return structure.unflatten([flat[path] for path in flatten(abstract_state)])


def _verify(flat, expected):
  found = fingerprint(flat)
  wrong = [path for path in found if found[path] != expected.get(path)]
  if wrong:
    raise OSError(f"contents differ from what was saved: {wrong[0]}")


class Weights(NamedTuple):
  """Parameters read from a checkpoint, and where they came from.

  Attributes:
    params: {path: array}, the Polyak average where the run kept one.
    run: the contents of the run's config.json.
    source: the checkpoint's folder.
  """

  params: dict[str, np.ndarray]
  run: dict[str, Any]
  source: epath.Path


def locate(path) -> tuple[epath.Path, list[epath.Path]]:
  """Returns the run folder and its checkpoints, the preferred one first.

  Args:
    path: a run folder (its best checkpoint if it kept one, else its newest) or
      one checkpoint's folder, such as RUN/checkpoints/1000.

  Raises:
    UserError: there is no checkpoint at `path`.
  """
  path = absolute(path)
  if not path.exists():
    raise UserError(
      f"no checkpoint at {path}: it does not exist; give a run folder or one "
      "of its checkpoints/STEP"
    )
  if path.name.isdigit() and (path.parent.parent / "config.json").exists():
    return path.parent.parent, [path]
  found = [
    sorted((p for p in (path / kind).glob("*") if p.name.isdigit()), key=_step)
    for kind in ("checkpoints", "best")
  ]
  candidates = [p for group in found for p in group][::-1]
  if not (path / "config.json").exists() or not candidates:
    raise UserError(
      f"no checkpoint at {path}: a run folder has config.json and checkpoints "
      "or best; train one with `vit-jax train`"
    )
  return path, candidates


def _step(path):
  return int(path.name)


def load_weights(path) -> Weights:
  """Reads parameters on the host; damaged checkpoints are passed over.

  Raises:
    UserError: nothing readable at `path`.
  """
  workdir, candidates = locate(path)
  run = json.loads((workdir / "config.json").read_text())
  for candidate in candidates:
    try:
      _check_files(candidate)
      return Weights(_read_params(candidate), run, candidate)
    except Exception as e:
      log.warning("cannot read %s (%s)", candidate, first_line(e))
  raise UserError(
    f"no readable checkpoint at {path}: {len(candidates)} tried; "
    "run the training command again to make a new one"
  )


def _read_params(directory):
  """Reads `ema` if the checkpoint has one, else `params`: {path: array}."""
  handler = ocp.PyTreeCheckpointHandler()
  # The handler's own: a Checkpointer also looks for a file that is of the whole
  # step, and warns that it is not there.
  tree = handler.metadata(directory / "state").tree
  with ocp.Checkpointer(handler) as reader:
    name = "ema" if "ema" in tree else "params"
    to_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    args = ocp.args.PyTreeRestore(
      item={name: tree[name]},
      restore_args={name: jax.tree.map(lambda _: to_numpy, tree[name])},
      partial_restore=True,
    )
    flat = flatten(reader.restore(directory / "state", args=args))
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    meta = reader.restore(directory / "meta")
  _verify(flat, meta["fingerprint"])
  return {path.removeprefix(f"{name}/"): x for path, x in flat.items()}
