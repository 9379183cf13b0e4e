"""The `export` command: a model as a file that runs without this project.

OUT is a folder: the model with its weights, float32, for any batch size, and
export.json with what its input must be. It takes `images` f32[b h w 3] and
returns `logits` f32[b k] and `probabilities` f32[b k], a softmax or sigmoids as
the model was trained. Preparing images is left to the caller: export.json lists
the operations.

The file is read again and run before the folder gets its name.
"""

import contextlib
import importlib.util
import io
import json
import logging
import pathlib
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

# The largest difference of logits, in units of their standard deviation.
TOLERANCE = 1e-4
# Devices that a program is compiled for: those of JAX's own wheels.
PLATFORMS = ("cpu", "cuda", "tpu")
_OPSET = 21
# JAX's symbols are at least 1, and a batch may be empty.
_ANY_BATCH = "batch - 1"
# Bytes of weights: Protobuf and flatbuffers have offsets of 31 bits.
# A SavedModel has them in files of their own.
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
    out: the folder to write; nothing may be there.
    to: one of `FORMATS`.
    image_size, resize: as of `vit_jax.load`.

  Returns:
    The content of export.json.

  Raises:
    UserError: something at `out`, an unknown or missing format, no model with
      a head at `source`, or a file that does not compute what the model does.
  """
  check_choice("--to", to, FORMATS)
  form = FORMATS[to]
  folder = make_path(out)
  check_free(folder)
  for library in form.libraries:
    if importlib.util.find_spec(library) is None:
      raise needs_extra(f"--to={to}", library)
  with _atomic(folder) as partial:
    model = _load(source, image_size, resize)
    _check_size(model, to)
    about = {
      "format": to,
      "file": form.file,
      "source": source,
      **describe(model),
      "versions": {"vit_jax": vit_jax.__version__, "jax": jax.__version__},
    }
    form.write(_make_apply(model), model.params, about, partial)
    about["parity"] = _compare(model, form.read(partial), to)
    files = (f for f in partial.rglob("*") if f.is_file())
    about["bytes"] = sum(f.stat().st_size for f in files)
    write_json(partial / "export.json", about)
  return about


@contextlib.contextmanager
def _atomic(folder):
  """As `atomic_folder`; a failure to write is a UserError."""
  try:
    with atomic_folder(folder) as partial:
      yield partial
  except OSError as e:
    raise UserError(f"{folder} cannot be written: {e.strerror or e}") from e


def _load(source, image_size, resize):
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
  return model


def _check_size(model, to):
  size = 4 * sum(x.size for x in jax.tree.leaves(model.params))
  if to != "saved_model" and size > _LIMIT:
    raise UserError(
      f"{model.config.variant} has {size / 1e9:.1f} GB of weights; a file of "
      f"{to} holds {_LIMIT / 1e9:.0f} at most: use --to=saved_model"
    )


def _make_apply(model):
  """Returns the exported function, (params, images) -> {name: array}."""

  def apply(params, images):
    # Without this, GPUs and TPUs would round the operands of float32 matmuls.
    with jax.default_matmul_precision("highest"):
      logits = model.model.apply(params, images)
    return {
      "logits": logits,
      "probabilities": model.to_probabilities(logits),
    }

  return apply


def describe(model: pretrained.Pretrained) -> dict[str, Any]:
  """Returns what a caller must know of a model: its input and its outputs."""
  config = model.config
  ops = preprocess.parse(config.preprocess, config.image_size, evaluation=True)
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
    "preprocessing": [_describe_op(*op) for op in ops],
    "outputs": {
      name: {"dtype": "float32", "shape": ["batch", config.num_classes]}
      for name in ("logits", "probabilities")
    },
    "loss": config.loss,
    "class_names": config.class_names,
  }


def _describe_op(name, arguments):
  """Returns an operation of a preprocessing string with all its arguments."""
  methods = {"resize": "bilinear", "resize_small": "area"}
  found = {"op": name, **arguments}
  if name in methods:
    found.setdefault("method", methods[name])
  if "size" in found:
    found["size"] = preprocess.as_pair(found["size"])
  return found


def _compare(model, run, to):
  """Runs model and file on no image, on one and on three.

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
  # Not `>`, which is false of NaN.
  if not worst <= TOLERANCE * spread:
    raise UserError(
      f"--to={to} gives other logits than {model.config.variant}: by "
      f"{worst / max(spread, 1e-30):.1g} of their standard deviation, "
      f"{TOLERANCE:.0g} is allowed; nothing was written"
    )
  return {
    "largest_difference": worst,
    "standard_deviation_of_logits": spread,
    "device": jax.devices()[0].device_kind,
  }


class Format(NamedTuple):
  """One of `FORMATS`.

  Attributes:
    file: to read in the folder; "." for the folder itself.
    libraries: that write and run it, of an extra.
    write: (apply, params, about, folder) -> None, where apply(params, images)
      returns {name: array} and `about` is the content of export.json so far.
    read: folder -> a function of images that returns {name: array}.
  """

  file: str
  libraries: tuple[str, ...]
  write: Callable[..., None]
  read: Callable[[pathlib.Path], Callable[..., Any]]


def _join(shape):
  """Returns a shape as JAX reads it, "batch - 1, 224, 224, 3"."""
  return ", ".join([_ANY_BATCH, *map(str, shape[1:])])


def _fill(apply):
  """Returns `apply` that also takes an empty batch, as which one image runs."""

  def run(params, images):
    n = images.shape[0]
    missing = core.max_dim(n, 1) - n
    padding = jnp.zeros((missing, *images.shape[1:]), images.dtype)
    found = apply(params, jnp.concatenate([images, padding]))
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
  # Imported here: no other format needs TensorFlow.
  import tensorflow as tf
  from jax.experimental import jax2tf

  shape = about["input"]["shape"]
  module: Any = tf.Module()
  # Variables, because a TensorFlow graph with constants ends at 2 GB.
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

  # Kept alive by the function below, because its variables end with it.
  loaded = tf.saved_model.load(str(folder))

  def run(images):
    found = loaded.signatures["serving_default"](images=tf.constant(images))
    return {name: x.numpy() for name, x in found.items()}

  return run


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
    except Exception as e:  # it raises whatever JAX's inner workings raise
      reason = (str(e).splitlines() or [""])[0]
      raise UserError(
        "--to=onnx: jax2onnx cannot convert this model with the versions that "
        f"are installed ({type(e).__name__}: {reason}); constraints.txt has "
        "those that are tested"
      ) from e
  _allow_empty(model.graph)
  for key, value in about.items():
    text = value if isinstance(value, str) else json.dumps(value)
    model.metadata_props.add(key=key, value=text)
  (folder / "model.onnx").write_bytes(model.SerializeToString())


def _allow_empty(graph):
  """Has an ONNX graph do what `_fill` does.

  ONNX Runtime reshapes an empty batch with a division by zero, which ends the
  process.
  """
  from onnx import TensorProto, helper  # pyright: ignore[reportMissingImports]

  outputs = [output.name for output in graph.output]
  for node in graph.node:
    for names in (node.input, node.output):
      inner = {"images", *outputs}
      names[:] = [f"any_{name}" if name in inner else name for name in names]
  for name, values in {"zero": [0], "one": [1], "zeros": [0] * 4}.items():
    graph.initializer.append(
      helper.make_tensor(
        f"any_{name}", TensorProto.INT64, [len(values)], values
      )
    )
  make = helper.make_node
  # Rows that are added at the beginning of each axis, and at its end.
  pads = ["any_zeros", "any_missing", *["any_zero"] * 3]
  before = [
    make("Shape", ["images"], ["any_count"], start=0, end=1),
    make("Sub", ["any_one", "any_count"], ["any_difference"]),
    make("Max", ["any_difference", "any_zero"], ["any_missing"]),
    make("Concat", pads, ["any_pads"], axis=0),
    make("Pad", ["images", "any_pads"], ["any_images"]),
  ]
  after = [
    make("Slice", [f"any_{name}", "any_zero", "any_count", "any_zero"], [name])
    for name in outputs
  ]
  nodes = [*before, *graph.node, *after]
  del graph.node[:]
  graph.node.extend(nodes)


def _read_onnx(folder):
  import onnxruntime  # pyright: ignore[reportMissingImports]

  session = onnxruntime.InferenceSession(
    str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
  )
  names = [output.name for output in session.get_outputs()]
  return lambda x: dict(
    zip(names, session.run(names, {"images": x}), strict=True)
  )


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
