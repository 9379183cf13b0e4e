"""The `export` command: a model as a file that runs without this project.

OUT is a folder: the program with its weights, float32, for any batch size, and
export.json with what a consumer must know. Its outputs are `logits` f32[b k]
and `probabilities` f32[b k], a softmax or sigmoids as the model was trained.
Its input `images` is what the model takes, f32[b h w 3] in [-1, 1], or with
`preprocess` u8[b H W 3], pictures of any size, which are then prepared and
classified as `predict` does.

What is written is read again and run before it gets its name: nothing is left
that computes something else than the model.
"""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vit_jax
from vit_jax import pretrained
from vit_jax.data import preprocess as numpy_preprocess
from vit_jax.errors import UserError, check_choice, check_free
from vit_jax.files import atomic_folder
from vit_jax.pretrained.warmstart import match_layout
from vit_jax.tools.export import formats, pictures
from vit_jax.training.steps import normalize

DESCRIPTION = "export.json"

# The largest difference of logits, in units of their standard deviation.
TOLERANCE = 1e-4
# Elsewhere than on CPUs products of float32 are rounded, unless this is said.
_EXACT = "highest"


def export(
  source: str,
  out: str,
  to: str,
  *,
  image_size: int | tuple[int, int] | None = None,
  preprocess: bool = False,
) -> dict[str, Any]:
  """Writes the model at `source` to the folder `out`.

  Args:
    source: whatever `vit_jax.load` reads.
    out: the folder to write; nothing may be there.
    to: one of `formats.FORMATS`.
    image_size: in pixels, as of `vit_jax.load`.
    preprocess: whether it takes pictures as they are decoded.

  Returns:
    What export.json says.

  Raises:
    UserError: something at `out`, an unknown or missing format, no model with
      a head at `source`, or a file that does not compute what the model does.
  """
  check_choice("--to", to, formats.FORMATS)
  form = formats.FORMATS[to]
  folder = _choose_folder(out)
  form.require()
  with _atomic(folder) as partial:
    model = _load(source, image_size)
    _check_size(model, form, to)
    graph = _make_graph(model, preprocess)
    form.write(graph, partial)
    parity = _compare(model, form.read(partial), to, preprocess)
    about = _describe(source, model, graph, form, preprocess) | parity
    files = (f for f in partial.rglob("*") if f.is_file())
    about["bytes"] = sum(f.stat().st_size for f in files)
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (partial / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
  return about


@contextlib.contextmanager
def _atomic(folder):
  """Does `atomic_folder`; a failure to write is a UserError."""
  try:
    with atomic_folder(folder) as partial:
      yield partial
  except OSError as e:
    raise UserError(f"{folder} cannot be written: {e.strerror or e}") from e


def _choose_folder(out):
  if "://" in out:
    raise UserError(f"{out} is no local folder; export there, then copy")
  folder = pathlib.Path(out)
  check_free(out)
  return folder


def _load(source, image_size):
  """Returns the model in float32, with its blocks one after the other."""
  weights = pretrained.read(source)
  weights = weights._replace(
    params=match_layout(weights.params, scan=False),
    model={**weights.model, "scan": False, "remat": "none"},
  )
  model = pretrained.assemble(weights, image_size=image_size, dtype="float32")
  if not model.config.num_classes:
    raise UserError(
      f"{source} has no head and so no logits to export; fine-tune it first"
    )
  config = model.config
  # With numbers where it says `size`.
  text = numpy_preprocess.rescale(
    config.preprocess, config.image_size, config.image_size
  )
  config = config._replace(preprocess=text)
  return dataclasses.replace(model, config=config)


def _check_size(model, form, to):
  size = 4 * sum(x.size for x in jax.tree.leaves(model.params))
  if form.limit and size > form.limit:
    raise UserError(
      f"{model.config.variant} has {size / 1e9:.1f} GB of weights; a file of "
      f"{to} holds {form.limit / 1e9:.0f} at most: use --to=saved_model"
    )


def _make_graph(model, preprocess):
  """Returns what is written."""
  about = model.config

  def apply(params, images):
    if preprocess:
      images = normalize(
        pictures.prepare(images, about.preprocess, about.image_size)
      )
    logits = model.model.apply(params, images)
    return {
      "logits": logits,
      "probabilities": model.to_probabilities(logits),
    }

  def apply_exactly(params, images):
    with jax.default_matmul_precision(_EXACT):
      return apply(params, images)

  size = ("height", "width") if preprocess else about.image_size
  dtype = np.dtype(np.uint8 if preprocess else np.float32)
  return formats.Graph(apply_exactly, model.params, ("batch", *size, 3), dtype)


def _compare(model, run, to, preprocess):
  """Runs model and file on the same images.

  Raises:
    UserError: the logits differ.
  """
  found, expected = [], []
  examples = _draw_examples(model.config, preprocess)
  for given, prepared in examples:
    found.append(run(given))
    with jax.default_matmul_precision(_EXACT):
      expected.append(np.asarray(model(prepared)))
  spread = float(np.concatenate(expected).std())
  worst = max(
    float(np.abs(x["logits"] - y).max())
    for x, y in zip(found, expected, strict=True)
  )
  # Not `>`, which is false of what is no number.
  if not worst <= TOLERANCE * spread:
    raise UserError(
      f"--to={to} gives other logits than {model.config.variant}: by "
      f"{worst / max(spread, 1e-30):.1g} of their spread, {TOLERANCE:.0g} is "
      "allowed; nothing was written"
    )
  return {
    "parity": {
      "largest_difference": worst,
      "standard_deviation_of_logits": spread,
      "input_shapes": [list(given.shape) for given, _ in examples],
      "device": jax.devices()[0].device_kind,
    }
  }


def _draw_examples(about, preprocess):
  """Returns [(what the file takes, what the model takes)]: one image, three.

  Pictures have whole multiples of the size that they are first resized to.
  Then no arithmetic rounds, and nobody has to halve what lies between two
  levels.
  """
  rng = np.random.default_rng(0)
  if not preprocess:
    shapes = [(b, *about.image_size, 3) for b in (1, 3)]
    drawn = [rng.uniform(-1, 1, shape).astype(np.float32) for shape in shapes]
    return [(x, x) for x in drawn]
  text, size = about.preprocess, about.image_size
  _, arguments = numpy_preprocess.parse(text, size)[0]
  height, width = numpy_preprocess.as_pair(next(iter(arguments.values())))
  examples = []
  for shape in ((1, 2 * height, 4 * width, 3), (3, 6 * height, 3 * width, 3)):
    drawn = rng.integers(0, 256, shape, np.uint8)
    pixels = [
      numpy_preprocess.preprocess_image(picture, text, size)
      for picture in drawn
    ]
    examples.append((drawn, normalize(jnp.stack(pixels))))
  return examples


def _describe(source, model, graph, form, preprocess):
  """Returns what a consumer must know."""
  about = model.config
  classes = ["batch", about.num_classes]
  return {
    "format": form.name,
    "file": form.file,
    "source": source,
    "variant": about.variant,
    "input": {
      "name": "images",
      "dtype": graph.dtype.name,
      "shape": list(graph.shape),
      "range": [0, 255] if preprocess else [-1, 1],
      "channels": "RGB",
    },
    "preprocessing": {
      "included": preprocess,
      "operations": about.preprocess,
      "normalization": "(x - 127.5) / 127.5",
    },
    "outputs": {
      name: {"dtype": "float32", "shape": classes}
      for name in ("logits", "probabilities")
    },
    "loss": about.loss,
    "class_names": about.class_names,
    "versions": {"vit_jax": vit_jax.__version__, **form.versions()},
  }
