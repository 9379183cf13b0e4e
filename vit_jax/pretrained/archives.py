"""npz, safetensors and TensorFlow checkpoints as {name: LazyArray}.

Files are untrusted: pickles are never loaded, names cannot refer to paths
outside, and every error names the file and its problem.
"""

import pathlib
import zipfile
import zlib
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from vit_jax import files
from vit_jax.errors import UserError, needs_extra, one_line
from vit_jax.pretrained.weights import LazyArray

# np.savez writes bfloat16, which NumPy lacks, as two raw bytes.
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def open_npz(path: pathlib.Path) -> dict[str, LazyArray]:
  """Returns {name: LazyArray} of an npz file.

  Raises:
    UserError: truncated, not a zip file, pickled objects, unsafe names.
  """
  try:
    archive = zipfile.ZipFile(path)
  except (zipfile.BadZipFile, OSError) as e:
    raise _damaged(path, "the archive", e) from e
  arrays = {}
  for info in archive.infolist():
    name = info.filename.removesuffix(".npy")
    if name == info.filename:
      raise UserError(
        f"{path}: its member {info.filename} is not a NumPy array; PyTorch "
        "pickles are not supported, give npz or safetensors"
      )
    shape, dtype = _read_header(path, archive, info)
    arrays[name] = LazyArray(
      shape,
      _BFLOAT16 if dtype == np.dtype("V2") else dtype,
      lambda info=info: _read_member(path, archive, info),
    )
  return arrays


def _damaged(path, what, error) -> UserError:
  return UserError(f"{path}: {what} is corrupt ({error}); fetch it again")


def _read_header(path, archive, info):
  try:
    with archive.open(info) as member:
      version = np.lib.format.read_magic(member)
      read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
      }[version]
      shape, _, dtype = read(member)
  except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as e:
    raise _damaged(path, info.filename, e) from e
  except (ValueError, KeyError) as e:
    raise UserError(f"{path}: {info.filename} is not a NumPy array") from e
  if dtype.hasobject:
    raise UserError(
      f"{path}: {info.filename} holds pickled Python objects, which are "
      "never unpickled, because that could run any code"
    )
  return shape, dtype


def _read_member(path, archive, info):
  try:
    with archive.open(info) as member:
      x = np.lib.format.read_array(member, allow_pickle=False)
  except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as e:
    raise _damaged(path, info.filename, e) from e
  return x.view(_BFLOAT16) if x.dtype == np.dtype("V2") else x


def write_npz(
  path: pathlib.Path, arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
  """Writes an npz file atomically, one array at a time."""
  with (
    files.atomic_file(path) as partial,
    zipfile.ZipFile(partial, "w", allowZip64=True) as archive,
  ):
    for name, x in arrays:
      # A fixed date makes files of equal weights identical.
      info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
      with archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array(
          member,
          x.view("V2") if x.dtype == _BFLOAT16 else x,
          allow_pickle=False,
        )


def open_safetensors(path: pathlib.Path) -> dict[str, LazyArray]:
  """Returns {name: LazyArray} of one file, or of all files that an index names.

  Args:
    path: a .safetensors file, or a model.safetensors.index.json.

  Raises:
    UserError: corrupt, or a part is missing.
  """
  if path.suffix != ".json":
    return _open_safetensors(path)
  arrays = {}
  index = files.read_json(path, "fetch it again")
  parts = index.get("weight_map")
  if not isinstance(parts, dict) or not parts:
    raise UserError(f"{path}: its weight_map names no files; fetch it again")
  for name in sorted(set(map(str, parts.values()))):
    if pathlib.Path(name).name != name:
      raise UserError(f"{path}: its part {name!r} is not a file beside it")
    if not (path.parent / name).exists():
      raise UserError(f"{path}: its part {name} is missing; fetch it")
    arrays |= _open_safetensors(path.parent / name)
  return arrays


def _open_safetensors(path):
  try:
    file = safetensors.safe_open(path, framework="numpy")
    arrays = {}
    names = file.keys()
    for name in names:
      if name.endswith(_COUNTERS):
        continue
      slices = file.get_slice(name)
      dtype = _SAFETENSORS_DTYPES.get(slices.get_dtype())
      if dtype is None:
        raise UserError(
          f"{path}: {name} has the type {slices.get_dtype()}; weights are "
          f"{', '.join(_SAFETENSORS_DTYPES)}"
        )
      arrays[name] = LazyArray(
        tuple(slices.get_shape()),
        dtype,
        lambda name=name: file.get_tensor(name),
      )
  except (OSError, safetensors.SafetensorError) as e:
    raise _damaged(path, "the file", e) from e
  return arrays


# Integers that are not weights: 0, 1, 2, ... of older versions of transformers,
# and PyTorch's number of updates of a BatchNorm.
_COUNTERS = ("embeddings.position_ids", ".num_batches_tracked")
_SAFETENSORS_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": _BFLOAT16,
}


def write_safetensors(
  path: pathlib.Path, arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
  """Writes a safetensors file atomically."""
  try:
    # Other libraries refuse files without this metadata.
    with files.atomic_file(path) as partial:
      safetensors.numpy.save_file(
        dict(arrays), partial, metadata={"format": "pt"}
      )
  except safetensors.SafetensorError as e:  # such as a full disk
    raise OSError(str(e)) from e


def find_tensorflow(path: pathlib.Path) -> pathlib.Path | None:
  """Returns the prefix of a TensorFlow checkpoint, None if there is none.

  A checkpoint is the files PREFIX.index and PREFIX.data-...

  Args:
    path: the prefix, PREFIX.index, or a folder with one checkpoint.

  Raises:
    UserError: a folder with several checkpoints.
  """
  if path.is_dir():
    found = sorted(path.glob("*.index"))
    if len(found) > 1:
      raise UserError(
        f"{path} holds {len(found)} checkpoints of TensorFlow; give one, such "
        f"as {found[-1]}"
      )
    return found[0].with_suffix("") if found else None
  if path.suffix == ".index" and path.exists():
    return path.with_suffix("")
  return path if path.with_name(f"{path.name}.index").exists() else None


def open_tensorflow(prefix: pathlib.Path) -> dict[str, LazyArray]:
  """Returns {name: LazyArray} of the variables of a TensorFlow checkpoint.

  Raises:
    UserError: corrupt or incomplete, or TensorFlow is not installed.
  """
  try:
    import tensorflow as tf
  except ImportError as e:
    raise needs_extra("a TensorFlow checkpoint", "tensorflow") from e
  try:
    reader = tf.train.load_checkpoint(str(prefix))
    shapes = reader.get_variable_to_shape_map()
    dtypes = reader.get_variable_to_dtype_map()
  except (tf.errors.OpError, ValueError, RuntimeError) as e:
    raise _damaged(prefix, "the checkpoint", one_line(e)) from e

  def read(name):
    try:
      return reader.get_tensor(name)
    except (tf.errors.OpError, ValueError, RuntimeError) as e:
      raise _damaged(prefix, name, one_line(e)) from e

  return {
    name: LazyArray(
      tuple(shape),
      np.dtype(dtypes[name].as_numpy_dtype),
      lambda name=name: read(name),
    )
    for name, shape in shapes.items()
  }
