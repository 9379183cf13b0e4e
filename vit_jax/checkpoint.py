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
  1. the newest checkpoint of its own that is not corrupt;
  2. where there are none, the weights of `config.init_from`;
  3. else random weights from `config.seed`.

Corrupt is what does not decode or does not match its fingerprint. It is skipped
and moved to damaged/, never deleted. Any other failure ends the run and changes
nothing: a full memory, a server that does not answer, another version.
"""

import errno
import json
import logging
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from vit_jax import files
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


class Corrupt(Exception):
  """The data of a checkpoint do not decode, or not to what was saved."""


class Checkpoints:
  """The checkpoints of one run folder.

  What is there is read from the folder each time: a person may delete a
  checkpoint while the run goes on.
  """

  def __init__(self, workdir, keep: int):
    """Remembers the folder; it is made when something is saved.

    Args:
      workdir: the run folder.
      keep: how many of the newest to keep; the best is kept beside them.
    """
    self.workdir = absolute(workdir)
    self._keep = keep
    self._undeletable = set()
    self._managers = {}  # made at the first save, by all processes together

  def steps(self) -> list[int]:
    """Returns the steps of the complete checkpoints, oldest first."""
    return list_steps(self.workdir)

  def clear_unfinished(self) -> None:
    """Deletes what a killed process left half-written."""
    if jax.process_index() == 0:
      for kind in ("checkpoints", "best"):
        for folder in (self.workdir / kind).glob("*.orbax-checkpoint-tmp*"):
          self._delete(folder)

  def save(self, step: int, state) -> None:
    """Starts to save the state; returns once it is off the devices.

    Raises:
      RunStopped: this or the save before it could not be written.
    """
    # The best must not be older than the newest: a run that is killed here
    # would never save it again.
    self.wait()
    self._save("checkpoints", step, state, {})

  def save_if_best(self, step: int, state, metric: float) -> None:
    """Saves the state apart if its metric is above all before it.

    Raises:
      RunStopped: the best one of before could not be read.
    """
    if "best" in self._managers:
      self._try(None, self._managers["best"].wait_until_finished)
    best, error = -math.inf, None
    if jax.process_index() == 0:
      try:
        best = max(self._best_metrics().values(), default=-math.inf)
      except RunStopped as e:
        error = e
    is_best, failed = _from_process_0(metric > best, error is not None)
    if failed:
      raise error or RunStopped("process 0 could not read the best checkpoint")
    if is_best:
      self._save("best", step, state, {"metric": metric})

  def _best_metrics(self) -> dict[int, float]:
    """Returns {step: metric} of the best checkpoints: one, or after a kill two.

    Corrupt ones are moved away.
    """
    found = {}
    for step in list_steps(self.workdir, "best"):
      folder = self.workdir / "best" / str(step)
      meta, error = _attempt(lambda folder=folder: _read_meta(folder))
      if error is None:
        found[step] = meta["metric"]
      elif isinstance(error, Corrupt):
        log.warning("best checkpoint %d is corrupt (%s)", step, error)
        self._set_aside(folder)
      else:
        raise _not_read(folder, error)
    return found

  def restore(self, abstract_state):
    """Returns the newest state that can be read, or None if there is none.

    Corrupt checkpoints are skipped. They are moved to damaged/ once an older
    one has been read, so that their steps can be saved again.

    Args:
      abstract_state: shapes, dtypes and shardings; the mesh need not be the
        one that the state was saved from.

    Raises:
      UserError: a checkpoint holds another state, of other code or data.
      RunStopped: a checkpoint could not be read, or all are corrupt. Nothing
        has been moved.
    """
    corrupt = []
    for step in reversed(self.steps()):
      folder = self.workdir / "checkpoints" / str(step)
      state, error = _attempt(lambda f=folder: _restore(f, abstract_state))
      error = self._agree(folder, error)
      if error is None:
        if jax.process_index() == 0:
          for damaged in corrupt:
            self._set_aside(damaged)
        return state
      if not isinstance(error, Corrupt):
        raise error
      log.warning("checkpoint %d is corrupt (%s)", step, error)
      corrupt.append(folder)
    if corrupt:
      raise RunStopped(
        f"every checkpoint in {self.workdir} is corrupt: "
        f"{', '.join(f.name for f in corrupt)}; nothing was moved; restore one "
        "from a copy, or train again in another --workdir"
      )
    return None

  def wait(self) -> None:
    """Returns when everything that was saved is on disk."""
    for manager in self._managers.values():
      self._try(None, manager.wait_until_finished)
    if self._managers and jax.process_index() == 0:
      self._try(None, self._seal_and_delete)

  def close(self) -> None:
    """Waits, and releases the folder."""
    self.wait()
    for manager in self._managers.values():
      manager.close()

  def _save(self, kind, step, state, extra):
    # A run that was resumed may come to a step that it has saved before: that
    # is the same state. Process 0 alone looks, and the others wait for it: it
    # may be deleting old checkpoints, which they must not meet half gone.
    is_first = jax.process_index() == 0
    (exists,) = _from_process_0(
      is_first and step in list_steps(self.workdir, kind)
    )
    if exists:
      return
    if kind not in self._managers:
      self._managers[kind] = _open(self.workdir / kind)
    manager = self._managers[kind]
    manager.reload()  # a person may have deleted some
    # Plain nested dictionaries: any reader can take one subtree by name.
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(unflatten(flatten(state))),
      meta=ocp.args.JsonSave({"fingerprint": fingerprint(state), **extra}),
    )
    # By force, because Orbax saves nothing older than what it has: a run that
    # fell back may well meet a new best before the step of the last one.
    self._try(step, lambda: manager.save(step, args=args, force=True))

  def _seal_and_delete(self):
    """Lists the files of new checkpoints, and deletes old ones."""
    for kind in ("checkpoints", "best"):
      for step in list_steps(self.workdir, kind):
        _seal(self.workdir / kind / str(step))
    for step in self.steps()[: -self._keep]:
      self._delete(self.workdir / "checkpoints" / str(step))
    if len(list_steps(self.workdir, "best")) > 1:
      metrics = self._best_metrics()
      for step in sorted(metrics, key=metrics.__getitem__)[:-1]:
        self._delete(self.workdir / "best" / str(step))

  def _delete(self, folder):
    """Deletes a checkpoint; one that cannot be deleted costs only room."""
    if folder in self._undeletable:
      return
    try:
      folder.rmtree()
    except OSError as e:
      self._undeletable.add(folder)
      log.warning("could not delete %s: %s", folder, first_line(e))

  def _set_aside(self, folder):
    """Moves a corrupt checkpoint away, so that its step can be saved again."""
    target = self.workdir / "damaged" / f"{folder.parent.name}-{folder.name}"
    while target.exists():
      target = target.with_name(target.name + "-again")
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    log.warning("moved it to %s; nothing is deleted", target)

  def _agree(self, folder, error):
    """Returns what all processes do about what each has met: an error or None.

    One may meet an error and another none, and they must not go separate ways.
    """
    if error is not None and not isinstance(error, (Corrupt, UserError)):
      error = _not_read(folder, error)
    if jax.process_count() == 1:
      return error
    kinds = (Corrupt, UserError, RunStopped)
    kind = sum(i for i, k in enumerate(kinds, 1) if isinstance(error, k))
    worst = int(multihost_utils.process_allgather(np.array(kind)).max())
    if worst == kind:
      return error
    return kinds[worst - 1](f"another process could not read {folder}")

  def _try(self, step, write):
    """Runs `write`; what goes wrong becomes one line that says what is safe."""
    try:
      write()
    except Exception as e:
      safe = self.steps()
      room = "make room and " if _is_full(e) else ""
      raise RunStopped(
        f"could not write a checkpoint to {self.workdir}"
        f"{f' at step {step}' if step is not None else ''}: {first_line(e)}; "
        f"intact checkpoints: {', '.join(map(str, safe)) or 'none'}; "
        f"{room}run the same command again"
      ) from e


def _not_read(folder, error) -> RunStopped:
  return RunStopped(
    f"could not read {folder}: {first_line(error)}; nothing was changed; mend "
    "that, then the same command resumes"
  )


def _from_process_0(*values: bool) -> list[bool]:
  """Returns what process 0 has given, on every process."""
  if jax.process_count() == 1:
    return list(values)
  return multihost_utils.broadcast_one_to_all(np.array(values)).tolist()


# How often something is read, and the seconds between: a network, a server and
# a disk may fail for a moment.
_PAUSES = (0.5, 2.0, 8.0)
# What says that bytes were read and are wrong, in the words of TensorStore and
# of Orbax.
_DECODE_ERRORS = re.compile(
  r"DATA_LOSS|FAILED_PRECONDITION|NOT_FOUND|decod|pars|checksum|CRC-?32|corrupt|truncated",
  re.I,
)


def _attempt(read) -> tuple[Any, Exception | None]:
  """Returns (what `read` returns, None) or (None, the error), after retries."""
  for pause in (*_PAUSES, None):
    try:
      return read(), None
    except (Corrupt, UserError) as e:
      return None, e
    except Exception as e:
      if _is_decode_error(e):
        return None, Corrupt(first_line(e))
      if pause is None or not _is_input_error(e):
        return None, e
      log.warning("could not read: %s; trying again", first_line(e))
      time.sleep(pause)
  raise AssertionError("the last attempt returns")


def _chain(error):
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _is_decode_error(error) -> bool:
  """Returns whether bytes were read, and do not say what they should."""
  if _is_input_error(error):
    return False
  return any(
    isinstance(e, (json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError))
    or (isinstance(e, ValueError) and _DECODE_ERRORS.search(str(e)))
    for e in _chain(error)
  )


def _is_input_error(error) -> bool:
  """Returns whether a disk, a server or a network failed."""
  return any(
    (isinstance(e, OSError) and e.errno not in (None, errno.ENOENT))
    or re.search(r"UNAVAILABLE|DEADLINE_EXCEEDED|HTTP\D*(429|50[0-4])", str(e))
    or isinstance(e, (ConnectionError, TimeoutError))
    for e in _chain(error)
  )


def _is_full(error) -> bool:
  full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  words = tuple(os.strerror(number) for number in full)
  return any(
    getattr(e, "errno", None) in full or any(w in str(e) for w in words)
    for e in _chain(error)
  )


def list_steps(workdir, kind: str = "checkpoints") -> list[int]:
  """Returns the steps of the complete checkpoints of a run, oldest first.

  Without a manager, whose making waits for all processes.
  """
  folder = absolute(workdir) / kind
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or its type's name.

  A long one loses its middle: what went wrong stands at its ends, and long
  paths between.
  """
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  return line if len(line) <= 200 else f"{line[:60]} ... {line[-120:]}"


def _open(directory):
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(create=True),
    item_names=("state", "meta"),
  )


def _seal(directory):
  """Lists the files and sizes of a complete checkpoint in its files.json."""
  listing = directory / "files.json"
  if not listing.exists():
    sizes = {
      str(f.relative_to(directory)): f.stat().length for f in _files(directory)
    }
    files.write_json(listing, sizes)


def _files(directory):
  for path in sorted(directory.iterdir()):
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def _check_files(directory):
  """Raises Corrupt if a file is not as long as it was when it was written.

  A run that was killed right after saving has no list; the fingerprint is
  then the only guard.
  """
  listing = directory / "files.json"
  if not listing.exists():
    return
  try:
    sizes = json.loads(listing.read_text())
  except ValueError as e:
    raise Corrupt(f"files.json does not parse: {e}") from e
  for name, size in sizes.items():
    file = directory / name
    found = file.stat().length if file.exists() else 0
    if found != size:
      raise Corrupt(f"{name} has {found} bytes, {size} were written")


def absolute(path) -> epath.Path:
  """Returns a local path or gs:// address as an absolute epath.Path."""
  path = epath.Path(path).expanduser()
  # `absolute` puts the working directory before gs:// too.
  return path if path.is_absolute() else path.absolute()


def _restore(folder, abstract_state):
  """Returns the state of one checkpoint, on the devices.

  With Orbax's handlers alone: a Checkpointer waits for the other processes,
  one of which may have failed.
  """
  _check_files(folder)
  meta = _read_meta(folder)
  wanted = unflatten(flatten(abstract_state))
  handler = ocp.PyTreeCheckpointHandler()
  _check_tree(folder, handler, flatten(abstract_state))
  restored = handler.restore(
    folder / "state",
    args=ocp.args.PyTreeRestore(
      item=wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    ),
  )
  flat = flatten(restored)
  _verify(flat, meta["fingerprint"])
  structure = jax.tree.structure(abstract_state)
  return structure.unflatten([flat[path] for path in flatten(abstract_state)])


def _read_meta(folder) -> dict[str, Any]:
  """Returns what stands beside the state: the fingerprint, the metric."""
  return json.loads((folder / "meta" / "metadata").read_text())


def _check_tree(folder, handler, wanted):
  """Raises a UserError unless a checkpoint has these arrays."""

  def describe(x):
    return f"{np.dtype(x.dtype).name}{list(x.shape)}"

  found = flatten(handler.metadata(folder / "state").tree)
  found = {path: describe(x) for path, x in found.items()}
  wanted = {path: describe(x) for path, x in wanted.items()}
  different = [
    f"{path} {found.get(path, 'none')} there, {wanted.get(path, 'none')} here"
    for path in sorted(found.keys() | wanted.keys())
    if found.get(path) != wanted.get(path)
  ]
  if different:
    more = f" and {len(different) - 1} more" if different[1:] else ""
    raise UserError(
      f"{folder} holds another state ({different[0]}{more}); nothing was "
      "changed; resume with the versions, data and JAX settings it was trained "
      "with, or start another --workdir from it with config.init_from"
    )


def _verify(flat, expected):
  found = fingerprint(flat)
  wrong = [path for path in found if found[path] != expected.get(path)]
  if wrong:
    raise Corrupt(f"contents differ from what was saved: {wrong[0]}")


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
  """Reads parameters on the host; corrupt checkpoints are skipped.

  Raises:
    UserError: no checkpoint at `path`, or all of them are corrupt.
    RunStopped: a checkpoint could not be read.
  """
  workdir, candidates = locate(path)
  run = files.read_json(workdir / "config.json")
  for candidate in candidates:
    params, error = _attempt(lambda folder=candidate: _read_params(folder))
    if error is None:
      return Weights(params, run, candidate)
    if not isinstance(error, Corrupt):
      raise RunStopped(
        f"could not read {candidate}: {first_line(error)}"
      ) from error
    log.warning("%s is corrupt (%s)", candidate, error)
  raise UserError(
    f"no readable checkpoint at {path}: {len(candidates)} tried; "
    "run the training command again to make a new one"
  )


def _read_params(directory):
  """Reads `ema` if the checkpoint has one, else `params`: {path: array}."""
  _check_files(directory)
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
  _verify(flat, _read_meta(directory)["fingerprint"])
  return {path.removeprefix(f"{name}/"): x for path, x in flat.items()}
