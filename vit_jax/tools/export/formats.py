"""The formats: how each is written, and how it is run."""

import contextlib
import importlib.metadata
import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax import export as jax_export

from vit_jax.errors import UserError, needs_extra
from vit_jax.tools.export import lowering

# JAX's symbols are 1 at least, and a batch may be empty.
_ANY_BATCH = "batch - 1"
# Of every device that JAX's own wheels are for.
PLATFORMS = ("cpu", "cuda", "tpu")
_OPSET = 21


class Graph(NamedTuple):
  """What is written.

  Attributes:
    apply: (params, images) -> {name: array}.
    params: nested dictionary of float32 arrays.
    shape: of the images; names stand for what may be any number.
    dtype: of the images.
  """

  apply: Callable[[Any, Any], dict[str, jax.Array]]
  params: Any
  shape: tuple[str | int, ...]
  dtype: np.dtype

  def symbolic(self, batch: str = "batch") -> jax.ShapeDtypeStruct:
    """Returns the images' shape with JAX's symbols for the names."""
    shape = jax_export.symbolic_shape(self.describe(batch))
    return jax.ShapeDtypeStruct(shape, self.dtype)

  def describe(self, batch: str) -> str:
    """Returns the images' shape as JAX reads it."""
    return ", ".join([batch, *map(str, self.shape[1:])])

  def apply_to_any(self, params, images) -> dict[str, jax.Array]:
    """Does what `apply` does, also for an empty batch, which gets one image."""
    n = images.shape[0]
    rows = core.max_dim(n, 1)
    padding = jnp.zeros((rows - n, *images.shape[1:]), images.dtype)
    found = self.apply(params, jnp.concatenate([images, padding]))
    return {name: x[:n] for name, x in found.items()}


class Format(NamedTuple):
  """One of `FORMATS`.

  Attributes:
    name: what --to calls it.
    file: what is read in the folder; "." for the folder itself.
    limit: bytes of weights that fit, 0 for any number.
    packages: what writes and runs it.
    write: (graph, folder) -> None.
    read: folder -> a function of images that returns {name: array}.
  """

  name: str
  file: str
  limit: int
  packages: tuple[str, ...]
  write: Callable[[Graph, pathlib.Path], None]
  read: Callable[[pathlib.Path], Callable[[np.ndarray], dict[str, Any]]]

  def require(self) -> None:
    """Raises a UserError if one of the packages is not installed."""
    try:
      self.versions()
    except importlib.metadata.PackageNotFoundError as e:
      raise needs_extra(f"--to={self.name}", e.name) from e

  def versions(self) -> dict[str, str]:
    """Returns {package: version}."""
    return {name: _find_version(name) for name in self.packages}


def _find_version(package):
  if package == "tensorflow":  # one library under two names
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      return importlib.metadata.version("tensorflow-cpu")
  return importlib.metadata.version(package)


# --- StableHLO, by jax.export ---


def _write_stablehlo(graph, folder):
  run = jax.jit(lambda images: graph.apply_to_any(graph.params, images))
  shape = graph.symbolic(_ANY_BATCH)
  exported = jax_export.export(run, platforms=PLATFORMS)(shape)
  (folder / "model.stablehlo").write_bytes(exported.serialize())


def _read_stablehlo(folder):
  data = bytearray((folder / "model.stablehlo").read_bytes())
  exported = jax_export.deserialize(data)

  def run(images) -> dict[str, Any]:
    return exported.call(images)  # pyright: ignore[reportReturnType]

  return run


# --- TensorFlow's SavedModel, by JAX's own jax2tf ---


def _write_saved_model(graph, folder):
  # Imported here: no other command and no other format waits for TensorFlow.
  import tensorflow as tf
  from jax.experimental import jax2tf

  module: Any = tf.Module()
  # Not constants, as a program of TensorFlow ends at 2 GB.
  module.params = tf.nest.map_structure(
    lambda x: tf.Variable(tf.constant(np.asarray(x)), trainable=False),
    graph.params,
  )
  apply = jax2tf.convert(
    graph.apply_to_any,
    polymorphic_shapes=[None, f"({graph.describe(_ANY_BATCH)})"],
    native_serialization_platforms=PLATFORMS,
    with_gradient=False,
  )
  sides = [side if isinstance(side, int) else None for side in graph.shape]
  spec = tf.TensorSpec(sides, graph.dtype, name="images")
  module.run = tf.function(
    lambda images: apply(module.params, images),
    autograph=False,
    input_signature=[spec],
  )
  with _quiet("absl", "tensorflow"):
    tf.saved_model.save(module, str(folder), signatures=module.run)


def _read_saved_model(folder):
  import tensorflow as tf

  # Kept alive by the function below: its variables go when it does.
  loaded = tf.saved_model.load(str(folder))

  def run(images):
    found = loaded.signatures["serving_default"](images=tf.constant(images))
    return {name: x.numpy() for name, x in found.items()}

  return run


# --- ONNX, by jax2onnx ---


def _write_onnx(graph, folder):
  with _quiet("jax2onnx", "onnx_ir"):
    import jax2onnx  # pyright: ignore[reportMissingImports]

    spec = graph.symbolic()
    run = lowering.make_plain(
      lambda images: graph.apply(graph.params, images), spec
    )
    try:
      model = jax2onnx.to_onnx(
        run,
        [spec],
        opset=_OPSET,
        input_names=["images"],
        output_names=["logits", "probabilities"],
      )
    except Exception as e:  # it raises whatever JAX's inner workings raise
      reason = (str(e).splitlines() or [""])[0]
      raise UserError(
        "--to=onnx: jax2onnx cannot convert this model with the versions that "
        f"are installed ({type(e).__name__}: {reason}); constraints.txt has "
        "those that are tested"
      ) from e
  _allow_empty(model)
  (folder / "model.onnx").write_bytes(model.SerializeToString())


def _allow_empty(model):
  """Has an ONNX graph do what `Graph.apply_to_any` does.

  ONNX Runtime reshapes an empty batch with a division by zero, which ends the
  process.
  """
  from onnx import TensorProto, helper  # pyright: ignore[reportMissingImports]

  graph = model.graph
  inner = {"images", *(output.name for output in graph.output)}
  for node in graph.node:
    for names in (node.input, node.output):
      names[:] = [f"any_{name}" if name in inner else name for name in names]
  for name, values in {"zero": [0], "one": [1], "zeros": [0] * 4}.items():
    graph.initializer.append(
      helper.make_tensor(
        f"any_{name}", TensorProto.INT64, [len(values)], values
      )
    )
  make = helper.make_node
  before = [
    make("Shape", ["images"], ["any_count"], start=0, end=1),
    make("Sub", ["any_one", "any_count"], ["any_difference"]),
    make("Max", ["any_difference", "any_zero"], ["any_missing"]),
    # Rows that are added at the beginning of each axis, and at its end.
    make(
      "Concat",
      ["any_zeros", "any_missing", *["any_zero"] * 3],
      ["any_pads"],
      axis=0,
    ),
    make("Pad", ["images", "any_pads"], ["any_images"]),
  ]
  after = [
    make(
      "Slice",
      [f"any_{output.name}", "any_zero", "any_count", "any_zero"],
      [output.name],
    )
    for output in graph.output
  ]
  nodes = [*before, *graph.node, *after]
  del graph.node[:]
  graph.node.extend(nodes)


def _read_onnx(folder):
  import onnxruntime  # pyright: ignore[reportMissingImports]

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # errors
  session = onnxruntime.InferenceSession(
    str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
  )
  names = [output.name for output in session.get_outputs()]

  def run(images):
    found = session.run(names, {"images": images})
    return dict(zip(names, found, strict=True))

  return run


@contextlib.contextmanager
def _quiet(*names):
  """Has loggers say nothing but what is critical."""
  loggers = [logging.getLogger(name) for name in names]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


# Both of protobuf and flatbuffers: offsets of 31 bits. Beside the weights there
# is little.
_LIMIT = 2_000_000_000

FORMATS = {
  form.name: form
  for form in (
    Format(
      "stablehlo",
      "model.stablehlo",
      _LIMIT,
      ("jax", "flatbuffers"),
      _write_stablehlo,
      _read_stablehlo,
    ),
    Format(
      "saved_model",
      ".",
      0,
      ("jax", "tensorflow"),
      _write_saved_model,
      _read_saved_model,
    ),
    Format(
      "onnx",
      "model.onnx",
      _LIMIT,
      ("jax", "jax2onnx", "onnxruntime"),
      _write_onnx,
      _read_onnx,
    ),
  )
}
