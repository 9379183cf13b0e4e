"""Pretrained weights, read and written in the formats of several projects.

`read` detects the format by content and returns lazy arrays under our names;
`load` returns a callable model.
"""

import pathlib
import shutil
import tempfile

from vit_jax import files
from vit_jax.errors import RunStopped, UserError, check_choice, check_free
from vit_jax.models import variants
from vit_jax.pretrained import (
  archives,
  big_vision,
  bit,
  efficientnet,
  embedded,
  fetch,
  hub,
  huggingface,
  positions,
  runs,
  timm,
  vision_transformer,
)
from vit_jax.pretrained.loaded import Config as Config
from vit_jax.pretrained.loaded import Pretrained as Pretrained
from vit_jax.pretrained.loaded import assemble as assemble
from vit_jax.pretrained.loaded import check_numerics as check_numerics
from vit_jax.pretrained.loaded import describe as describe
from vit_jax.pretrained.loaded import fold_normalization as fold_normalization
from vit_jax.pretrained.loaded import rescale as rescale
from vit_jax.pretrained.warmstart import match_layout
from vit_jax.pretrained.weights import Weights

# Prefixes of parameters in optimizer dumps and in big_vision's training states.
# Arrays without the prefix are not weights.
_PREFIXES = ("opt/target/", "params/", "")
_NPZ_FORMATS = (vision_transformer, big_vision, bit)


def load(
  source: str,
  *,
  image_size: int | tuple[int, int] | None = None,
  num_classes: int | None = None,
  dtype: str | None = None,
  resize: str | None = None,
) -> Pretrained:
  """Returns a model with published, converted or your own weights.

  Example::

    model = vit_jax.load("ViT-B_16.npz", image_size=384)
    logits = model(images)  # f32[b 384 384 3] in [-1, 1] -> f32[b k]

  Args:
    source: a file (npz, safetensors) or a folder (Hugging Face, timm, a run or
      checkpoint of ours). For EfficientNets also the prefix or folder of a
      TensorFlow checkpoint. A gs:// or https:// address, or a published name.
      A model of the Hugging Face hub: "google/vit-base-patch16-224",
      "hf:OWNER/NAME@REVISION", "timm:vit_base_patch16_224.augreg_in21k".
    image_size: pixels, an integer or (h, w); default: the file's. Position
      embeddings are resized to it.
    num_classes: default: the file's. Another number makes a new head of zeros;
      0 means no head.
    dtype: of the matmuls; default: float32, or that of the run.
    resize: how position embeddings are resized, see `read`.

  Raises:
    UserError: `source` is missing, corrupt, of an unknown format, or does not
      fit these arguments.
  """
  return assemble(
    read(source, resize),
    image_size=image_size,
    num_classes=num_classes,
    dtype=dtype,
  )


def read(
  source: str, resize: str | None = None, *, arrays: bool = True
) -> Weights:
  """Returns the weights at `source`, with lazy arrays.

  Args:
    source: see `load`.
    resize: how position embeddings are resized, one of `positions.METHODS`:
      "corner_aligned" (the paper's code), "timm", "huggingface", "dinov2"
      (Meta's without registers), "bilinear", "bilinear_antialiased" or "cpe"
      (C-RADIO); default: the method of the file's authors.
    arrays: False omits the arrays of a run, which are not lazy.

  Raises:
    UserError: `source` is missing, corrupt, or of an unknown format.
  """
  if resize is not None:
    check_choice("resize", resize, positions.METHODS)
  weights = _read(source, arrays)
  weights = weights._replace(resize=resize or weights.resize)
  if any(weights.cut_off()):
    note = (
      "images of {}x{} are not a whole number of patches: {} pixels at the "
      "bottom and {} to the right are cut off, as by its authors"
    ).format(*weights.image_size, *weights.cut_off())
    weights = weights._replace(notes=(*weights.notes, note))
  return weights


def _read(source, arrays):
  where = fetch.locate(str(source))
  if runs.matches(where.path):
    return runs.read(where.path, arrays=arrays)
  path = pathlib.Path(where.path)
  if checkpoint := archives.find_tensorflow(path):
    return efficientnet.read_tensorflow(checkpoint)
  if path.is_dir():
    return _read_safetensors(_find_safetensors(path))
  if _sniff(path) == "npz":
    return _read_npz(path, where.part)
  return embedded.restore(_read_safetensors(path))


# Subfolders with weights: of a Trainer's output folder, of a model in the hub's
# cache, and of that cache.
_BELOW = ("*", "snapshots/*", "models--*/snapshots/*")


def _find_safetensors(folder):
  """Returns a folder's weights file, or raises a UserError with advice."""
  for name in ("model.safetensors.index.json", "model.safetensors"):
    if (folder / name).exists():
      return folder / name
  found = sorted(folder.glob("*.safetensors"))
  if len(found) == 1:
    return found[0]
  inner = {
    file.parent
    for below in _BELOW
    for file in folder.glob(f"{below}/*.safetensors")
  }
  inner |= set(filter(runs.matches, folder.iterdir()))
  main = folder / "refs" / "main"  # names the snapshot of a cached model
  latest = main.read_text().strip() if main.exists() else None

  def order(path):  # checkpoint-1000 after checkpoint-500
    return path.name == latest, len(path.name), path.name

  below = sorted(inner, key=order)
  advice = below[-1] if below else "a run, a folder of these two, or a file"
  raise UserError(
    f"{folder} is not a run, nor a folder of Hugging Face or timm: it holds "
    f"{len(found) or 'no'} safetensors files; give {advice}"
  )


def write(weights: Weights, out: str, to: str) -> list[str]:
  """Writes weights in another format.

  Reads the result again, and deletes it if it is a different model.

  Args:
    weights: from `read`.
    out: the path to write, which must not exist.
    to: one of `FORMATS`.

  Returns:
    Notes for the user, one line each, such as fields that the format drops.

  Raises:
    UserError: the format cannot represent the model.
    RunStopped: writing failed.
  """
  check_choice("--to", to, FORMATS)
  path = files.make_path(out)
  check_free(path)
  if to != "orbax":
    try:
      _check(weights, to)
    except UserError as e:
      raise UserError(f"{e}; --to=orbax keeps everything") from e
  try:
    if to == "orbax":
      weights, notes = _fold(weights, to)
      runs.write(weights, out)
      return notes
    if not files.is_remote(path):
      return _write_file(weights, path, to)
    with tempfile.TemporaryDirectory() as folder:
      local = pathlib.Path(folder) / path.name
      notes = _write_file(weights, local, to)
      files.upload(local, path)
      return notes
  except OSError as e:
    raise RunStopped(
      f"could not write {out}: {e.strerror or e}; nothing is left of it"
    ) from e


def push(weights: Weights, out: str, to: str) -> tuple[str, list[str]]:
  """Writes weights and uploads them to the Hugging Face hub.

  Args:
    weights: from `read`.
    out: "hf:OWNER/NAME"; a new repository is private.
    to: "hf" or "timm".

  Returns:
    The repository's address, and what `write` returns.

  Raises:
    UserError: see `write`; also an invalid name, no write permission, or no
      network.
  """
  check_choice("--to", to, hub.FORMATS)
  repo = hub.parse(out)
  if not repo:
    raise UserError(f"{out} is not a model of the hub; give hf:OWNER/NAME")
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "model"
    notes = write(weights, str(path), to)
    return hub.upload(path, repo, to, weights), notes


def _check(weights, to):
  """Raises a UserError that names what a format cannot represent."""
  if "mpp_head/kernel" in weights.params:
    raise UserError(
      f"{weights.source} was trained on masked patches: {to} has no place for "
      "its head; fine-tune it first"
    )
  module = _find_module(weights, to)
  if module is not bit:
    module.check(weights)


def _find_module(weights, to):
  """Returns the module that writes a format, or raises a UserError."""
  kind = variants.parse(weights.model["variant"]).kind
  only, module = _CONVOLUTIONAL.get(kind, (to, _MODULES[to]))
  if to != only:
    raise UserError(f"{to} has no {kind}s such as {weights.model['variant']}")
  return module


def _fold(weights, to):
  """Returns weights for pixels in [-1, 1], and notes."""
  standard, notes = fold_normalization(weights), list(weights.notes)
  if standard is not weights:
    notes.append(
      f"{to} has no mean and standard deviation of pixels; they are folded "
      "into the patch embedding"
    )
  return standard, notes


def _write_file(weights, path, to):
  """Writes a file or folder of weights and reads it again; returns notes."""
  notes = list(weights.notes)
  if to not in ("hf", "timm"):
    weights, notes = _fold(weights, to)
  params = match_layout(weights.params, scan=False)
  model = {**weights.model, "scan": False}
  weights = weights._replace(params=params, model=model)
  _find_module(weights, to).write(weights, path)
  try:
    return notes + _compare(weights, read(str(path)), to)
  except UserError as e:
    (shutil.rmtree if path.is_dir() else pathlib.Path.unlink)(path)
    raise UserError(f"{to} cannot represent this model: {e}") from e


# Fields of `Config` that a format may drop. All others must be preserved.
_LOST = {
  "preprocess": "preprocessing",
  "loss": "loss",
  "class_names": "class names",
  "resize": "way to resize position embeddings",
}


def _compare(weights, found, to) -> list[str]:
  """Returns a note for each field that the round trip changed.

  Raises:
    UserError: a field that must be preserved has changed.
  """
  old, new = describe(weights)._asdict(), describe(found)._asdict()
  ignored = {"origin"}
  if _find_module(weights, to) is bit:  # it does not store the size
    ignored |= {"grid", "image_size"}
  elif old["image_size"] == new["image_size"]:
    for about in (old, new):  # replaces `size` by numbers
      size = about["image_size"]
      about["preprocess"] = rescale(about["preprocess"], size, size)
  if old["pos_embedding"] != "learned":
    ignored.add("resize")
  notes = []
  for name in old:
    if name in ignored or old[name] == new[name]:
      continue
    if name not in _LOST:
      raise UserError(f"{name} {old[name]} is read as {new[name]}")
    notes.append(
      f"{to} does not keep the {_LOST[name]}; after conversion it is "
      f"{'none' if new[name] is None else repr(new[name])}"
    )
  return notes


_MODULES = {
  "npz": vision_transformer,
  "big_vision": big_vision,
  "hf": huggingface,
  "timm": timm,
}
# The only supported format of each, and its module.
_CONVOLUTIONAL = {
  "ResNet": ("npz", bit),
  "EfficientNet": ("timm", efficientnet),
}
FORMATS = (*_MODULES, "orbax")


def _sniff(path) -> str:
  """Returns "npz" or "safetensors", depending on a file's first bytes."""
  with open(path, "rb") as f:
    start = f.read(9)
  if start.startswith(b"PK"):
    return "npz"
  # Eight bytes of length, then a JSON header.
  if len(start) == 9 and start[8:] == b"{":
    return "safetensors"
  if start.startswith(b"\x80"):
    raise UserError(
      f"{path} is a pickle, which can run any code when it is read; give "
      "npz or safetensors"
    )
  raise UserError(
    f"{path} is neither npz nor safetensors, or it is corrupt; fetch it again"
  )


def _read_safetensors(path):
  arrays = archives.open_safetensors(path)
  config, preprocessor = (
    files.read_json(file, "fetch it again") if file.exists() else None
    for file in (
      path.parent / "config.json",
      path.parent / "preprocessor_config.json",
    )
  )
  if huggingface.matches(arrays, config):
    return huggingface.read(str(path), arrays, config, preprocessor)
  if efficientnet.matches(arrays, config):
    return efficientnet.read(str(path), arrays, config)
  if timm.matches(arrays, config):
    return timm.read(str(path), arrays, config)
  raise _unknown(path, arrays, "the ViTs of Hugging Face and timm")


def _read_npz(path, part):
  arrays = archives.open_npz(path)
  source = str(path)
  for prefix in _PREFIXES:
    prefix = f"{prefix}{part}/" if part else prefix
    stripped = {
      name.removeprefix(prefix): x
      for name, x in arrays.items()
      if name.startswith(prefix)
    }
    for reader in _NPZ_FORMATS:
      if reader.matches(stripped):
        return reader.read(source, stripped)
  parts = sorted(
    {
      name.split("/")[-3]
      for name in arrays
      if name.endswith("embedding/kernel") and name.count("/") >= 2
    }
  )
  if parts:
    raise UserError(
      f"{path} holds the models {', '.join(parts)}; choose one: "
      f"{path}:{parts[0]}"
    )
  raise _unknown(path, arrays, "ViT, big_vision and BiT")


def _unknown(path, arrays, known) -> UserError:
  names = ", ".join(sorted(arrays)[:3]) or "none"
  return UserError(
    f"{path} is of no known format: its arrays are {names}, ...; known are "
    f"{known}"
  )
