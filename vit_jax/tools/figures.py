"""The `figures` command: the paper's figures, from any weights and runs.

Each figure is written as PNG, as SVG and as its numbers in CSV. It has a panel
for each checkpoint.
"""

import contextlib
import csv
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.errors import UserError, check_choice, check_folder, check_free
from vit_jax.evaluation import attention_maps
from vit_jax.files import atomic_file, make_path
from vit_jax.models import posemb, variants
from vit_jax.state import flatten
from vit_jax.tools import charts
from vit_jax.tools.paper import data, flops
from vit_jax.tools.paper.protocol import plain_name
from vit_jax.tools.runs import Run, find_origin, find_runs, name_paths
from vit_jax.training.steps import normalize

log = logging.getLogger(__name__)

BATCH_SIZE = 8
NUM_FILTERS = 28  # as in the paper
_MOST_PICTURES = 16  # of a rollout; its CSV has all
_DPI = 150
_FONT: dict[Any, Any] = {"font.size": 8}  # panels are 2 to 4 inches wide
_LOOKING = "images, and a model with attention; convolutions have none"
_MARKERS = {"ViT": "o", "hybrid": "^", "ResNet": "s", "EfficientNet": "D"}


# A matplotlib figure, and the columns and rows of its numbers.
Drawing = tuple[Figure, tuple[str, ...], Iterable[tuple]]


class Checkpoint(NamedTuple):
  """A checkpoint's data for the figures."""

  label: str
  variant: str
  filters: Any  # f32[p p 3 d] of the embedding, None if it is not of pixels
  positions: Any  # f32[h w d], None without position embeddings
  pictures: list[np.ndarray]  # u8[h w 3], preprocessed
  looks: attention_maps.Looks | None  # None without images or for a ResNet
  titles: list[str]  # of each image: its name, its class


def make_figures(
  out: str,
  *,
  checkpoints: Sequence[str] = (),
  images: Sequence[str] = (),
  runs: str | None = None,
  only: Sequence[str] = (),
  image_size: int | tuple[int, int] | None = None,
  resize: str | None = None,
) -> list[str]:
  """Draws figures into a folder; returns the paths of what was written.

  Args:
    out: the folder; made where there is none. Nothing in it is overwritten.
    checkpoints: whatever `vit_jax.load` reads.
    images: paths of image files, for figures of attention.
    runs: a folder with runs at any depth, for curves and compute.
    only: names of `FIGURES`; empty for all that can be drawn.
    image_size, resize: as in `vit_jax.load`, for each checkpoint.

  Raises:
    UserError: an unusable argument, or a requested figure that cannot be drawn.
  """
  for name in only:
    check_choice("--only", name, FIGURES)
  if images and not checkpoints:
    raise UserError("images need a checkpoint; give --checkpoint=SOURCE")
  if not checkpoints and not runs:
    raise UserError("nothing to draw from; give --checkpoint=SOURCE or --runs=")
  possible = [*(OF_WEIGHTS if checkpoints else ()), *(OF_RUNS if runs else ())]
  folder = make_path(out)
  check_folder(folder, "--out")
  files = {
    name: [folder / f"{name}.{kind}" for kind in ("png", "svg", "csv")]
    for name in only or possible
  }
  for file in itertools.chain(*files.values()):
    check_free(file)
  seen = [
    _read(source, label, images, image_size, resize)
    for source, label in zip(checkpoints, name_paths(checkpoints), strict=True)
  ]
  found = find_runs([runs]) if runs else []
  drawings, missing = {}, []
  for name in files:
    try:
      draw = OF_WEIGHTS.get(name)
      with matplotlib.rc_context(_FONT):
        drawings[name] = draw(seen) if draw else OF_RUNS[name](found)
    except UserError as e:
      missing.append(f"{name}: {e}")
  if missing and (only or not drawings):
    raise UserError(f"cannot be drawn: {'; '.join(missing)}")
  for reason in missing:
    log.info("left out: %s", reason)
  try:
    with contextlib.ExitStack() as stack:  # renames files when all are written
      for name, drawing in drawings.items():
        paths = [stack.enter_context(atomic_file(file)) for file in files[name]]
        _write(drawing, name, *paths)
  except OSError as e:
    raise UserError(f"--out={out}: cannot be written: {e.strerror}") from e
  return [str(path) for name in drawings for path in files[name]]


def _write(drawing: Drawing, name, png, svg, table):
  figure, columns, rows = drawing
  # Without a date and random names, the same numbers give the same file.
  style: dict[Any, Any] = {"svg.hashsalt": name, "svg.fonttype": "none"}
  Path(png).parent.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context(_FONT | style):
    figure.savefig(png, format="png", dpi=_DPI)
    figure.savefig(svg, format="svg", dpi=_DPI, metadata={"Date": None})
  with open(table, "w", newline="", encoding="utf-8") as f:
    csv.writer(f).writerows([columns, *rows])


# --- checkpoints ---


def _read(source, label, images, image_size, resize) -> Checkpoint:
  """Loads a checkpoint, runs it, and keeps only what is drawn."""
  model = pretrained.load(source, image_size=image_size, resize=resize)
  about = model.config
  pictures = [
    preprocess.preprocess_image(image, about.preprocess, about.image_size)
    for image in images
  ]
  looks, titles = None, [Path(image).name[-28:] for image in images]
  if pictures and model.model.num_layers:
    look = attention_maps.make_look(model)
    batches = [
      look(normalize(np.stack(pictures[i : i + BATCH_SIZE])))
      for i in range(0, len(pictures), BATCH_SIZE)
    ]
    parts = map(np.concatenate, zip(*batches, strict=True))
    looks = attention_maps.Looks(*parts)
    for i, row in enumerate(looks.probabilities if about.num_classes else ()):
      best = int(np.argmax(row))
      name = about.class_names[best] if about.class_names else f"class {best}"
      titles[i] += f"\nprediction: {name}, {row[best]:.0%}"
  params = flatten(model.params)
  is_plain = variants.parse(about.variant).kind == "ViT"
  filters = params["embedding/kernel"] if is_plain else None
  positions = read_positions(params, about)
  return Checkpoint(
    label, about.variant, filters, positions, pictures, looks, titles
  )


def read_positions(params, about: pretrained.Config) -> np.ndarray | None:
  """Returns the position embedding of each patch, f32[h w d].

  None if nothing is added to patches ("relative", "none", a ResNet). If each
  layer has its own embedding, it is the first layer's. `params` is {path:
  array}.
  """

  def find(name):
    paths = (path for path in sorted(params) if path.split("/")[-1] == name)
    x = np.asarray(params[next(paths)])
    # Scanned layers are stacked along a leading axis.
    return x.reshape(-1, *x.shape[-2:])[0]

  if about.pos_embedding == "sincos2d":
    flat = posemb.sincos_2d(about.grid, params["embedding/bias"].shape[0])
  elif about.pos_embedding == "learned":
    flat = find("pos_embedding")[-math.prod(about.grid) :]
  elif about.pos_embedding == "2d":
    flat = posemb.join_axes(find("pos_embedding_y"), find("pos_embedding_x"))
  else:
    return None
  return np.asarray(flat).reshape(*about.grid, -1)


def compare_positions(positions: np.ndarray) -> np.ndarray:
  """Returns cosine similarities f64[h w h w] of f32[h w d] (Figures 7, 10)."""
  x = np.asarray(positions, np.float64)
  x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  return np.einsum("hwd,uvd->hwuv", x, x)


def find_components(filters: np.ndarray, count: int):
  """Returns principal components of filters, and their explained variance.

  f32[p p 3 d] -> f64[count p p 3], of unit norm, and f64[count], fractions of
  the variance. Signs are arbitrary, so the largest value is made positive.
  """
  rows = np.asarray(filters, np.float64).reshape(-1, filters.shape[-1]).T
  rows = rows - rows.mean(axis=0)
  _, values, components = np.linalg.svd(rows, full_matrices=False)
  variance = values**2 / np.sum(values**2)
  components = components[:count]
  largest = np.abs(components).argmax(axis=1)[:, None]
  components *= np.sign(np.take_along_axis(components, largest, axis=1))
  return components.reshape(-1, *filters.shape[:3]), variance[:count]


def _draw_rollout(seen: list[Checkpoint]) -> Drawing:
  """Figures 6 and 14: attention from the output to the input."""
  seen = _choose(seen, "looks", _LOOKING)
  shown = seen[0].pictures[:_MOST_PICTURES]
  figure, axes = _make_grid(len(shown), 1 + 2 * len(seen), 2.2)
  for i, (first, *others) in enumerate(axes):
    first.imshow(shown[i])
    _set_title(first, f"image {i}: model input")
    for c, lit, plain in zip(seen, others[::2], others[1::2], strict=True):
      assert c.looks
      lit.imshow(attention_maps.overlay(c.pictures[i], c.looks.maps[i]))
      plain.imshow(c.looks.maps[i], vmin=0)
      _set_title(lit, f"{c.label}\n{c.titles[i]}")
      _set_title(plain, "attention of each patch")
  rows = _list_numbers(seen, [c.looks and c.looks.maps for c in seen])
  columns = ("checkpoint", "image", "row", "column", "attention")
  return figure, columns, rows


def _list_numbers(seen, arrays):
  """Yields (label, *index, value) of an array of each checkpoint."""
  for c, array in zip(seen, arrays, strict=True):
    for place, value in np.ndenumerate(array):
      yield (c.label, *place, float(value))


def _draw_filters(seen: list[Checkpoint]) -> Drawing:
  """Figure 7, left: principal components of the patch embedding's filters."""
  seen = _choose(seen, "filters", "a plain ViT, whose patches are of pixels")
  figure, axes = _make_grid(1, len(seen), 3.6, 2.4)
  rows = []
  for c, axis in zip(seen, axes[0], strict=True):
    parts, variance = find_components(c.filters, NUM_FILTERS)
    scale = np.abs(parts).max(axis=(1, 2, 3), keepdims=True)
    axis.imshow(_tile(0.5 + parts / (2 * np.maximum(scale, 1e-12)), 7, 1))
    share = f"{variance.sum():.0%} of the variance"
    _set_title(axis, f"{c.label}: {len(parts)} components, {share}")
    for (i, y, x, channel), value in np.ndenumerate(parts):
      rows.append((c.label, i, variance[i], y, x, "rgb"[channel], value))
  columns = ("checkpoint", "component", "variance", "row", "column", "channel")
  return figure, (*columns, "value"), rows


def _tile(pictures, across, margin):
  """Returns pictures [n h w ...] as tiles, separated by lines of `margin`."""
  blank = -len(pictures) % across
  sides = [(0, blank), (1, 0), (1, 0), (0, 0)][: pictures.ndim]
  x = np.pad(pictures, sides, constant_values=margin)
  rows = [np.hstack([*x[i : i + across]]) for i in range(0, len(x), across)]
  return np.vstack(rows)[1:, 1:]


def _draw_positions(seen: list[Checkpoint]) -> Drawing:
  """Figures 7, middle, and 10: similarity of position embeddings."""
  seen = _choose(seen, "positions", "a model that adds position embeddings")
  figure, axes = _make_grid(1, len(seen), 4)
  similarities = [compare_positions(c.positions) for c in seen]
  for c, axis, alike in zip(seen, axes[0], similarities, strict=True):
    tiles = _tile(alike.reshape(-1, *alike.shape[2:]), alike.shape[1], np.nan)
    axis.imshow(tiles, vmin=-1, vmax=1)
    _set_title(axis, c.label)
  drawn = axes[0, 0].images[0]
  figure.colorbar(drawn, ax=axes, label="cosine similarity", shrink=0.8)
  rows = _list_numbers(seen, similarities)
  columns = ("checkpoint", "row", "column", "other_row", "other_column")
  return figure, (*columns, "similarity"), rows


def _draw_distances(seen: list[Checkpoint]) -> Drawing:
  """Figures 7, right, and 11: attention distance by depth."""
  seen = _choose(seen, "looks", _LOOKING)
  figure, axes = _make_grid(1, len(seen), 3.6, 3, pictures=False)
  distances = [c.looks.distances for c in seen if c.looks]
  means = [np.asarray(x, np.float64).mean(axis=0) for x in distances]
  for c, axis, by_layer in zip(seen, axes[0], means, strict=True):
    axis.plot(by_layer, ".")
    _set_title(axis, f"{c.label} ({c.variant})")
    axis.set(xlabel="layer", ylabel="mean attention distance, pixels")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
  rows = _list_numbers(seen, means)
  return figure, ("checkpoint", "layer", "head", "pixels"), rows


def _choose(seen, attribute, needed):
  """Returns the checkpoints that have an attribute; raises if none has."""
  chosen = [c for c in seen if getattr(c, attribute) is not None]
  if not chosen:
    raise UserError(f"it needs {needed}")
  return chosen


def _make_grid(down, across, width, height=None, pictures=True):
  """Returns a figure and its axes [down across], so many inches each."""
  size = (width * across, (height or width) * down)
  figure = Figure(size, layout="constrained")
  axes = figure.subplots(down, across, squeeze=False)
  for axis in axes.flat if pictures else ():
    axis.set_axis_off()
  return figure, axes


def _set_title(axis, text):
  # "$" in a name does not start a formula.
  axis.set_title(text, fontsize=8, parse_math=False)


# --- runs ---


def _draw_curves(runs: list[Run]) -> Drawing:
  """Metrics of runs by step."""
  metrics = charts.list_metrics(runs)
  if not metrics:
    raise UserError("it needs runs with metrics; give --runs=")
  down = -(-len(metrics) // 3)
  figure, axes = _make_grid(down, min(3, len(metrics)), 3.6, 3, pictures=False)
  for axis in axes.flat[len(metrics) :]:
    axis.set_axis_off()
  lines = {}
  for name, axis in zip(metrics, axes.flat, strict=False):
    charts.plot(axis, name, list(enumerate(runs)))
    _set_title(axis, name)
    lines |= {line.get_label(): line for line in axis.get_lines()}
  names = [run.name for run in runs[: len(charts.DASHES)] if run.name in lines]
  handles = [lines[name] for name in names]
  legend = figure.legend(handles, names, loc="outside lower center", ncols=2)
  for text in legend.get_texts():
    text.set(parse_math=False, fontsize=7)
  rows = (
    (run.name, step, name, value)
    for run in runs
    for name in metrics
    for step, value in run.series.get(name, ())
  )
  return figure, ("run", "step", "name", "value"), rows


def _draw_compute(runs: list[Run]) -> Drawing:
  """Figure 5: accuracy after fine-tuning against pre-training compute."""
  points = [p for run in runs if (p := _place_run(run, runs))]
  if not points:
    raise UserError(
      "it needs finished fine-tunings, and the finished runs that they started "
      "from, below one --runs folder"
    )
  datasets = list(dict.fromkeys(dataset for dataset, *_ in points))
  points += [p for p in _list_paper() if p[0] in datasets]
  figure, axes = _make_grid(1, len(datasets), 4, pictures=False)
  for dataset, axis in zip(datasets, axes[0], strict=True):
    for whose, kind in dict.fromkeys(p[1:3] for p in points if p[0] == dataset):
      chosen = [p[4:] for p in points if p[:3] == (dataset, whose, kind)]
      axis.scatter(
        *zip(*chosen, strict=True),
        marker=_MARKERS[kind],
        facecolors="C0" if whose == "ours" else "none",
        edgecolors="C0" if whose == "ours" else "gray",
        label=f"{kind}, {whose}",
      )
    axis.set_xscale("log")
    axis.set(xlabel="exaFLOPs of pre-training, counted", ylabel="accuracy, %")
    axis.set_title(dataset, fontsize=9)
    axis.legend(fontsize=7)
  columns = ("dataset", "whose", "kind", "model", "exaflops", "accuracy")
  return figure, columns, points


def _place_run(run, runs):
  """Returns a fine-tuning as a row of the figure, None for other runs."""
  origin = find_origin(run, runs)
  accuracy = run.results.get("accuracy")
  if origin is None or not origin.finished or accuracy is None:
    return None
  try:
    exaflops = flops.count_training(origin.written, origin.total_steps)
  except UserError as e:
    log.info("compute: %s: left out: %s", origin.path, e)
    return None
  variant = origin.config["model.variant"]
  dataset = plain_name(run.config["train.dataset"])
  return (
    dataset,
    "ours",
    variants.parse(variant).kind,
    variant,
    exaflops,
    100 * accuracy,
  )


def _list_paper():
  """Yields the rows of Table 6."""
  for row in data.load()["table6"]["rows"]:
    variant = data.variant_of(row["name"])
    for name, value in row["values"].items():
      dataset = data.load()["measures"][name]["dataset"]
      kind = variants.parse(variant).kind
      yield dataset, "the paper", kind, variant, row["exaflops"], value


# Functions of checkpoints and of runs.
OF_WEIGHTS: dict[str, Callable[[list[Checkpoint]], Drawing]] = {
  "rollout": _draw_rollout,
  "filters": _draw_filters,
  "positions": _draw_positions,
  "distances": _draw_distances,
}
OF_RUNS: dict[str, Callable[[list[Run]], Drawing]] = {
  "curves": _draw_curves,
  "compute": _draw_compute,
}
FIGURES = OF_WEIGHTS | OF_RUNS
