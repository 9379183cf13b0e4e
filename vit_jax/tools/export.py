"""The `export` command: a model as a file that runs without this project.

The folder OUT has the model with its weights, in float32 and for any batch
size, and export.json, which describes its input. The model takes `images`
f32[b h w 3] and returns `logits` f32[b k] and `probabilities` f32[b k], by
softmax or sigmoids as in training. Preprocessing is left to the caller;
export.json lists the operations.

The file is loaded and run before the folder gets its final name.
"""

import contextlib
import functools
import importlib.util
import io
import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax import export as jax_export

import vit_jax
from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.errors import UserError, check_choice, check_free, needs_extra
from vit_jax.files import atomic_folder, make_path, write_json
from vit_jax.pretrained.warmstart import match_layout

# The largest allowed difference of logits, in their standard deviations.
TOLERANCE = 1e-4
# Platforms that a program is compiled for: those of JAX's own wheels.
PLATFORMS = ("cpu", "cuda", "tpu")
_OPSET = 21
# Most bytes of weights, because Protobuf and flatbuffers have 31-bit offsets.
# A SavedModel has weights in separate files.
_LIMIT = 2_000_000_000


def export(
  source: str,
  out: str,
  to: str,
  *,
  image_size: int | tuple[int, int] | None = None,
  resize: str | None = None,
) -> dict[str, Any]:
  """Writes the model at `source` to the folder `out`.

  Args:
    source: whatever `vit_jax.load` reads.
    out: the folder to write; it must not exist.
    to: one of `FORMATS`.
    image_size, resize: as in `vit_jax.load`.

  Returns:
    The content of export.json.

  Raises:
    UserError: `out` exists, the format is unknown or its library is missing,
      the model has no head, or the file gives other logits than the model.
  """
  check_choice("--to", to, FORMATS)
  form = FORMATS[to]
  folder = make_path(out)
  check_free(folder)
  for library in form.libraries:
    if importlib.util.find_spec(library) is None:
      raise needs_extra(f"--to={to}", library)
  try:
    with atomic_folder(folder) as partial:
      model = _load(source, image_size, resize, to)
      about = {
        "format": to,
        "file": form.file,
        "source": source,
        **describe(model),
        "versions": {"vit_jax": vit_jax.__version__, "jax": jax.__version__},
      }
      apply = functools.partial(_apply, model)
      form.write(apply, model.params, about, partial)
      about["parity"] = _compare(model, form.read(partial), to)
      files = (f for f in partial.rglob("*") if f.is_file())
      about["bytes"] = sum(f.stat().st_size for f in files)
      write_json(partial / "export.json", about)
  except OSError as e:
    raise UserError(f"{folder} cannot be written: {e.strerror or e}") from e
  return about


def _load(source, image_size, resize, to):
  """Returns the model in float32, with unrolled blocks."""
  weights = pretrained.read(source, resize)
  weights = weights._replace(
    params=match_layout(weights.params, scan=False),
    model={**weights.model, "scan": False, "remat": "none"},
  )
  model = pretrained.assemble(weights, image_size=image_size, dtype="float32")
  if not model.config.num_classes:
    raise UserError(
      f"{source} has no head and so no logits to export; fine-tune it first"
    )
  size = sum(x.nbytes for x in jax.tree.leaves(model.params))
  if to != "saved_model" and size > _LIMIT:
    raise UserError(
      f"{model.config.variant} has {size / 1e9:.1f} GB of weights; a file of "
      f"{to} holds {_LIMIT / 1e9:.0f} at most: use --to=saved_model"
    )
  return model


def _apply(model, params, images):
  """Returns what is exported, {name: array}."""
  # Without this, GPUs and TPUs would round the operands of float32 matmuls.
  with jax.default_matmul_precision("highest"):
    logits = model.model.apply(params, images)
  return {"logits": logits, "probabilities": model.to_probabilities(logits)}


def describe(model: pretrained.Pretrained) -> dict[str, Any]:
  """Returns the description of a model's input and outputs for its callers."""
  config = model.config
  output = {"dtype": "float32", "shape": ["batch", config.num_classes]}
  steps = []
  for name, arguments in preprocess.parse(
    config.preprocess, config.image_size, evaluation=True
  ):
    method = {"resize": "bilinear", "resize_small": "area"}.get(name)
    step = {"op": name, **({"method": method} if method else {}), **arguments}
    if "size" in step:
      step["size"] = preprocess.as_pair(step["size"])
    steps.append(step)
  return {
    "variant": config.variant,
    "input": {
      "name": "images",
      "dtype": "float32",
      "layout": "NHWC",
      "shape": ["batch", *config.image_size, 3],
      "channels": "RGB",
      "range": [-1, 1],
      # x = (pixel - mean) / std, of pixels from 0 to 255.
      "mean": [127.5] * 3,
      "std": [127.5] * 3,
    },
    "preprocessing": steps,
    "outputs": {"logits": output, "probabilities": output},
    "loss": config.loss,
    "class_names": config.class_names,
  }


def _compare(model, run, to):
  """Compares model and file on batches of 0, 1 and 3 images.

  Raises:
    UserError: the logits differ.
  """
  rng = np.random.default_rng(0)
  found, expected = [], []
  for count in (0, 1, 3):
    shape = (count, *model.config.image_size, 3)
    images = rng.uniform(-1, 1, shape).astype(np.float32)
    found.append(run(images)["logits"])
    with jax.default_matmul_precision("highest"):
      expected.append(np.asarray(model(images)))
  found, expected = np.concatenate(found), np.concatenate(expected)
  spread, worst = float(expected.std()), float(np.abs(found - expected).max())
  # Not `>`, which is false for NaN.
  if not worst <= TOLERANCE * spread:
    raise UserError(
      f"--to={to} gives other logits than {model.config.variant}; they differ "
      f"by {worst / max(spread, 1e-30):.1g} standard deviations, "
      f"{TOLERANCE:.0g} is allowed; nothing was written"
    )
  return {
    "largest_difference": worst,
    "standard_deviation_of_logits": spread,
    "device": jax.devices()[0].device_kind,
  }


class Format(NamedTuple):
  """A file format for export."""

  file: str  # to load from the folder; "." for the folder itself
  libraries: tuple[str, ...]  # required to write and run it, from an extra
  # (apply, params, about, folder) -> None, where apply(params, images) returns
  # {name: array} and `about` is the content of export.json so far.
  write: Callable[..., None]
  read: Callable[..., Callable[..., Any]]  # folder -> images -> {"logits": ...}


def _join(shape):
  """Returns a symbolic shape for JAX, "batch - 1, 224, 224, 3".

  It has "- 1" because JAX's symbols are at least 1 and a batch may be empty.
  """
  return ", ".join(["batch - 1", *map(str, shape[1:])])


def _fill(apply):
  """Returns `apply` that accepts an empty batch, by padding it to one image."""

  def run(params, images):
    n = images.shape[0]
    padding = [(0, core.max_dim(n, 1) - n), (0, 0), (0, 0), (0, 0)]
    found = apply(params, jnp.pad(images, padding))
    return {name: x[:n] for name, x in found.items()}

  return run


# --- StableHLO, by jax.export ---


def _write_stablehlo(apply, params, about, folder):
  run = jax.jit(lambda images: _fill(apply)(params, images))
  shape = jax_export.symbolic_shape(_join(about["input"]["shape"]))
  spec = jax.ShapeDtypeStruct(shape, np.float32)
  exported = jax_export.export(run, platforms=PLATFORMS)(spec)
  (folder / "model.stablehlo").write_bytes(exported.serialize())


def _read_stablehlo(folder):
  data = bytearray((folder / "model.stablehlo").read_bytes())
  return jax_export.deserialize(data).call


# --- TensorFlow's SavedModel, by JAX's own jax2tf ---


def _write_saved_model(apply, params, about, folder):
  # Imported here because no other format needs TensorFlow.
  import tensorflow as tf
  from jax.experimental import jax2tf

  shape = about["input"]["shape"]
  module: Any = tf.Module()
  # Variables, because a TensorFlow graph with constants is limited to 2 GB.
  module.params = tf.nest.map_structure(
    lambda x: tf.Variable(tf.constant(np.asarray(x)), trainable=False), params
  )
  converted = jax2tf.convert(
    _fill(apply),
    polymorphic_shapes=[None, f"({_join(shape)})"],
    native_serialization_platforms=PLATFORMS,
    with_gradient=False,
  )
  module.run = tf.function(
    lambda images: converted(module.params, images),
    autograph=False,
    input_signature=[tf.TensorSpec([None, *shape[1:]], name="images")],
  )
  with _quiet():
    tf.saved_model.save(module, str(folder), signatures=module.run)


def _read_saved_model(folder):
  import tensorflow as tf

  # The function below keeps it alive, because its variables are freed with it.
  loaded = tf.saved_model.load(str(folder))
  return lambda images: loaded.signatures["serving_default"](
    images=tf.constant(images)
  )


# --- ONNX, by jax2onnx ---


def _write_onnx(apply, params, about, folder):
  with _quiet():
    import jax2onnx  # pyright: ignore[reportMissingImports]

    try:
      model = jax2onnx.to_onnx(
        lambda images: tuple(apply(params, images).values()),
        [tuple(about["input"]["shape"])],
        opset=_OPSET,
        input_names=["images"],
        output_names=list(about["outputs"]),
      )
    except Exception as e:  # JAX's internals raise errors of any type
      reason = (str(e).splitlines() or [""])[0]
      raise UserError(
        "--to=onnx: jax2onnx cannot convert this model with the versions that "
        f"are installed ({type(e).__name__}: {reason}); constraints.txt has "
        "those that are tested"
      ) from e
  _allow_empty(model)
  for key, value in about.items():
    text = value if isinstance(value, str) else json.dumps(value)
    model.metadata_props.add(key=key, value=text)
  (folder / "model.onnx").write_bytes(model.SerializeToString())


# The padding of `_fill`, around a graph whose names have the prefix any_.
_AROUND = """
around (float images) => (float logits, float probabilities)
<int64[1] zero = {0}, int64[1] one = {1}, int64[4] zeros = {0, 0, 0, 0}> {
  count = Shape <start = 0, end = 1> (images)
  difference = Sub (one, count)
  missing = Max (difference, zero)
  pads = Concat <axis = 0> (zeros, missing, zero, zero, zero)
  any_images = Pad (images, pads)
  logits = Slice (any_logits, zero, count, zero)
  probabilities = Slice (any_probabilities, zero, count, zero)
}"""


def _allow_empty(model):
  """Makes an ONNX model accept an empty batch.

  Otherwise ONNX Runtime divides by zero in a reshape, which kills the process.
  """
  import onnx  # pyright: ignore[reportMissingImports]

  around = onnx.parser.parse_graph(_AROUND)
  graph = onnx.compose.add_prefix(model, "any_", inplace=True).graph
  for value in (*graph.input, *graph.output):
    value.name = value.name.removeprefix("any_")
  nodes = [*around.node[:5], *graph.node, *around.node[5:]]
  del graph.node[:]
  graph.node.extend(nodes)
  graph.initializer.extend(around.initializer)


def _read_onnx(folder):
  import onnxruntime  # pyright: ignore[reportMissingImports]

  file, providers = str(folder / "model.onnx"), ["CPUExecutionProvider"]
  session = onnxruntime.InferenceSession(file, providers=providers)
  return lambda x: {"logits": session.run(["logits"], {"images": x})[0]}


@contextlib.contextmanager
def _quiet():
  """Silences what the converters log and print, up to errors."""
  logging.disable(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.disable(logging.NOTSET)


FORMATS = {
  "stablehlo": Format(
    "model.stablehlo", ("flatbuffers",), _write_stablehlo, _read_stablehlo
  ),
  "saved_model": Format(
    ".", ("tensorflow",), _write_saved_model, _read_saved_model
  ),
  "onnx": Format(
    "model.onnx", ("jax2onnx", "onnxruntime"), _write_onnx, _read_onnx
  ),
}
