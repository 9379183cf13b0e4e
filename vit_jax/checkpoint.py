"""Checkpoints, saved and restored by Orbax, with detection of corruption.

Orbax writes checkpoints/STEP/ of a run folder under a temporary name, then
renames it. A fingerprint beside the state detects later corruption. It has one
number for each array, computed on the devices before saving and again from what
was read.

A checkpoint that does not decode or match its fingerprint is corrupt. It is
skipped and moved to damaged/, never deleted. Any other failure, such as a lack
of memory or an unreachable server, ends the run and changes nothing.
"""

import contextlib
import errno
import importlib
import json
import logging
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vit_jax import files
from vit_jax.distributed import gather
from vit_jax.errors import RunStopped, UserError, needs_extra, one_line
from vit_jax.state import flatten, unflatten

log = logging.getLogger(__name__)

_policies = ocp.checkpoint_managers


@jax.jit
def _digest(x):
  """Returns a uint32 that changes with any bit of x, or with its order."""
  bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    position += index * jnp.uint32(stride)
  # Each value is hashed with its position (the finalizer of MurmurHash3, a
  # bijection), so that a single change always shows; several cancel out in one
  # of 2**32 cases. Integer sums do not depend on their order or the devices.
  h = bits.astype(jnp.uint32) ^ (position * jnp.uint32(0x9E3779B9))
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    h = (h ^ (h >> shift)) * jnp.uint32(factor)
  return jnp.sum(h ^ (h >> 16))


def fingerprint(tree) -> dict[str, int]:
  """Returns one 32-bit number for each array, the same on any mesh."""
  flat = flatten(tree)
  # One program for each shape: one for all arrays would compile for longer. On
  # CPUs one at a time, because programs with collectives can take each other's
  # threads and wait for ever, as with fsdp=2 on two cores.
  wait = jax.device_get if jax.default_backend() == "cpu" else lambda x: x
  digests = jax.device_get([wait(_digest(x)) for x in flat.values()])
  return {path: int(d) for path, d in zip(flat, digests, strict=True)}


class Corrupt(Exception):
  """The data of a checkpoint do not decode, or differ from what was saved."""


# Exceptions of reading a checkpoint, the most severe last.
_KINDS = (Corrupt, UserError, RunStopped)


class Checkpoints:
  """The checkpoints of one run folder."""

  def __init__(self, workdir, keep: int):
    """Keeps the newest `keep` checkpoints of a run folder, and the best."""
    self.workdir = absolute(workdir)
    # `keep_best` sets the steps of the second.
    latest, best = _policies.LatestN(keep), _policies.CustomSteps([])
    self._preserved: list[Any] = [latest, best]
    self._manager: Any = None
    self._saving = self._best = None

  def steps(self) -> list[int]:
    """Returns the steps of the complete checkpoints, oldest first."""
    return list_steps(self.workdir)

  def open(self) -> None:
    """Prepares to save; all processes must call it.

    Checkpoints that a killed process left incomplete are deleted in the
    background.

    Raises:
      RunStopped: the folder cannot be read or written.
    """
    if self._manager is not None:
      return
    with self._writing():
      if best := read_best(self.workdir):
        self._preserved[1] = _policies.CustomSteps([int(best[0].name)])
      self._manager = ocp.CheckpointManager(
        self.workdir / "checkpoints",
        options=ocp.CheckpointManagerOptions(
          preservation_policy=_policies.AnyPreservationPolicy(self._preserved),
          cleanup_tmp_directories=True,
        ),
        item_names=("state", "meta"),
      )

  def save(self, step: int, state) -> None:
    """Starts saving the state; returns once it is copied off the devices.

    Raises:
      RunStopped: this or the previous checkpoint could not be written.
    """
    self.wait()
    # Plain nested dictionaries: any reader can take one subtree by name.
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(unflatten(flatten(state))),
      meta=ocp.args.JsonSave({"fingerprint": fingerprint(state)}),
    )
    self.open()
    with self._writing(f" at step {step}"):
      self._manager.save(step, args=args, force=True)
    self._saving = step

  def is_best(self, metric: float) -> bool:
    """Returns whether a metric is above that of the best checkpoint."""
    self.wait()
    best = read_best(self.workdir) if jax.process_index() == 0 else None
    return gather(best is None or bool(metric > best[1]))[0]

  def keep_best(self, step: int, metric: float) -> None:
    """Keeps the checkpoint of a saved step as the best one."""
    # `wait` writes best.json once the checkpoint is on the disk.
    self._best = {"step": step, "metric": metric}
    self._preserved[1] = _policies.CustomSteps([step])

  def restore(self, abstract_state):
    """Returns the newest state that can be read, or None if there is none.

    Corrupt checkpoints are skipped. They are moved to damaged/ once an older
    one has been read, so that their steps can be saved again.

    Args:
      abstract_state: shapes, dtypes and shardings, on any mesh.

    Raises:
      UserError: a checkpoint holds another state, of other code or data.
      RunStopped: a checkpoint could not be read, or all are corrupt. Nothing
        has been moved.
    """
    corrupt = []
    for step in reversed(self.steps()):
      folder = self.workdir / "checkpoints" / str(step)
      state = error = None
      try:
        state = _read(folder, lambda f: _restore(f, abstract_state))
      except _KINDS as e:
        error = e
      error = _agree(folder, error)
      if error is None:
        if jax.process_index() == 0:
          self._set_aside(corrupt)
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
    """Waits until all saves are on the disk, then writes best.json."""
    if self._manager is not None:
      with self._writing():
        try:
          self._manager.wait_until_finished()
        except Exception as e:
          if self._saving not in self.steps():
            raise
          log.warning("could not delete an old checkpoint: %s", one_line(e))
    if self._best and jax.process_index() == 0:
      with self._writing():
        files.write_json(self.workdir / "best.json", self._best)
    self._best = None

  def close(self) -> None:
    """Waits for the last save, and releases the folder."""
    self.wait()
    if self._manager is not None:
      self._manager.close()

  def _set_aside(self, folders):
    """Moves corrupt checkpoints away, because their steps are saved again."""
    for folder in folders:
      target = self.workdir / "damaged" / f"checkpoints-{folder.name}"
      while target.exists():
        target = target.with_name(target.name + "-again")
      target.parent.mkdir(exist_ok=True)
      folder.rename(target)
      log.warning("moved it to %s; nothing is deleted", target)

  @contextlib.contextmanager
  def _writing(self, when=""):
    """Raises any exception as a RunStopped that lists intact checkpoints."""
    try:
      yield
    except Exception as e:
      intact = ", ".join(map(str, self.steps())) or "none"
      raise RunStopped(
        f"could not write a checkpoint to {self.workdir}{when}: {one_line(e)}; "
        f"intact checkpoints: {intact}; fix that, then the same command resumes"
      ) from e


def _agree(folder, error):
  """Returns the most severe error of all processes, or None."""
  kind = sum(i for i, k in enumerate(_KINDS, 1) if isinstance(error, k))
  worst = max(gather(kind))
  if worst == kind:
    return error
  return _KINDS[worst - 1](f"another process could not read {folder}")


# Seconds to wait before a read is retried after a disk or network error.
_PAUSES = (0.5, 2.0, 8.0)
# Messages of such errors; error code 2 is that of a missing file.
_STORAGE_ERRORS = re.compile(
  r"UNAVAILABLE|DEADLINE_EXCEEDED|HTTP\D*(429|50[0-4])|os_error_code='(?!2')"
)
# Messages of TensorStore and Orbax for bytes that were read but are wrong.
_CONTENT_ERRORS = re.compile(
  r"DATA_LOSS|FAILED_PRECONDITION|NOT_FOUND|OUT_OF_RANGE|decod|pars|checksum"
  r"|CRC-?32|corrupt|truncated",
  re.I,
)


def _read(folder, read: Callable[[Any], Any]) -> Any:
  """Returns `read(folder)`; retries after disk and network errors.

  Raises:
    Corrupt: its data do not decode, or differ from what was saved.
    RunStopped: it could not be read.
  """
  for pause in (*_PAUSES, None):
    try:
      return read(folder)
    except (Corrupt, UserError):
      raise
    except Exception as e:
      chain: list[BaseException] = [e]
      while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
      is_storage = any(map(_is_of_storage, chain))
      if not is_storage and any(map(_is_of_contents, chain)):
        raise Corrupt(one_line(e)) from e
      if pause is None or not is_storage:
        raise RunStopped(
          f"could not read {folder}: {one_line(e)}; nothing was changed; fix "
          "that, then the same command resumes"
        ) from e
      log.warning("could not read: %s; trying again", one_line(e))
      time.sleep(pause)


def _is_of_storage(e) -> bool:
  """Returns whether an error means that a disk, server or network failed."""
  numbered = isinstance(e, OSError) and e.errno not in (None, errno.ENOENT)
  network = isinstance(e, (ConnectionError, TimeoutError))
  return numbered or network or bool(_STORAGE_ERRORS.search(str(e)))


def _is_of_contents(e) -> bool:
  """Returns whether an error means that the bytes are corrupt."""
  wrong = (json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError)
  worded = isinstance(e, ValueError) and _CONTENT_ERRORS.search(str(e))
  return isinstance(e, wrong) or bool(worded)


def check_address(workdir) -> None:
  """Raises a UserError if the library for a gs:// address is missing."""
  if str(workdir).startswith("gs://"):
    try:  # Orbax imports it when it lists or deletes checkpoints there
      importlib.import_module("google.cloud.storage")
    except ImportError as e:
      library = "google.cloud.storage"
      raise needs_extra(f"--workdir={workdir}", library) from e


def absolute(path) -> epath.Path:
  """Returns a local path or gs:// address as an absolute epath.Path."""
  path = epath.Path(path).expanduser()
  # `absolute` puts the working directory before gs:// too.
  return path if path.is_absolute() else path.absolute()


def list_steps(workdir, kind: str = "checkpoints") -> list[int]:
  """Returns the steps of complete checkpoints, oldest first."""
  folder = absolute(workdir) / kind
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def read_best(workdir) -> tuple[epath.Path, float] | None:
  """Returns the folder and the metric of the best checkpoint, None for none.

  Raises:
    UserError: best.json cannot be read.
    RunStopped: the best checkpoint of an old run could not be read.
  """
  file = absolute(workdir) / "best.json"
  if file.exists():
    best = files.read_json(file, "restore it from a copy, or delete it")
    folder = file.parent / "checkpoints" / str(best["step"])
    return (folder, best["metric"]) if folder.exists() else None
  # Runs from before 2026-12 have the best one in a separate folder.
  for step in reversed(list_steps(workdir, "best")):
    folder = file.parent / "best" / str(step)
    with contextlib.suppress(Corrupt):
      return folder, _read(folder, _read_meta)["metric"]
  return None


def _restore(folder, abstract_state):
  """Returns the state of one checkpoint, on the devices."""
  wanted = flatten(abstract_state)
  _check_tree(folder, wanted)
  tree = unflatten(wanted)
  how = ocp.checkpoint_utils.construct_restore_args(tree)
  flat = _load(folder, tree, how)
  structure = jax.tree.structure(abstract_state)
  return structure.unflatten([flat[path] for path in wanted])


def read_params(folder) -> dict[str, np.ndarray]:
  """Returns {path: array} of a checkpoint's parameters, or of their average.

  Raises:
    Corrupt: they do not decode, or differ from what was saved.
    RunStopped: they could not be read.
  """

  def read(folder):
    tree = _list_arrays(folder)
    name = "ema" if "ema" in tree else "params"
    to_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    how = {name: jax.tree.map(lambda _: to_numpy, tree[name])}
    flat = _load(folder, {name: tree[name]}, how, partial_restore=True)
    return {path.removeprefix(f"{name}/"): x for path, x in flat.items()}

  return _read(folder, read)


def _load(folder, tree, restore_args, **options) -> dict[str, Any]:
  """Returns {path: array} of a checkpoint, checked against its fingerprint."""
  expected = _read_meta(folder)["fingerprint"]
  args = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, **options)
  # A Checkpointer would wait for other processes, one of which may have failed.
  handler = ocp.PyTreeCheckpointHandler()
  flat = flatten(handler.restore(folder / "state", args=args))
  for path, digest in fingerprint(flat).items():
    if digest != expected.get(path):
      raise Corrupt(f"contents differ from what was saved: {path}")
  return flat


def _list_arrays(folder):
  """Returns the nested shapes and dtypes of a checkpoint."""
  return ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree


def _read_meta(folder) -> dict[str, Any]:
  return json.loads((folder / "meta" / "metadata").read_text())


def _check_tree(folder, wanted):
  """Raises a UserError unless a checkpoint has these arrays."""
  found = flatten(_list_arrays(folder))
  for path in sorted(found.keys() | wanted.keys()):
    there, here = (
      f"{np.dtype(x.dtype).name}{list(x.shape)}" if x is not None else "none"
      for x in (found.get(path), wanted.get(path))
    )
    if there != here:
      raise UserError(
        f"{folder} holds another state ({path} {there} there, {here} here); "
        "nothing was changed; resume with the versions, data and JAX settings "
        "it was trained with, or start another --workdir from it with "
        "config.init_from"
      )
