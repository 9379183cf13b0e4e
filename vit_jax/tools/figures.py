"""The `figures` command: the paper's figures, from any weights and runs.

Each is a picture (PNG), a drawing (SVG) and the numbers behind it (CSV). A
figure has a panel for each checkpoint.
"""

import contextlib
import csv
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.errors import UserError, check_choice, check_folder, check_free
from vit_jax.evaluation import attention_maps
from vit_jax.files import atomic_file
from vit_jax.models import posemb, variants
from vit_jax.state import flatten
from vit_jax.tools.paper import data, flops
from vit_jax.tools.paper.pretraining import plain_name
from vit_jax.tools.runs import Run, find_origin, find_runs
from vit_jax.training.steps import normalize

log = logging.getLogger(__name__)

BATCH_SIZE = 8
NUM_FILTERS = 28  # that the paper shows
_MOST_PICTURES = 16  # of a rollout; its CSV has all
_MOST_NAMES = 10  # of runs; with more, colours are no help
_DPI = 150
_MARKERS = {"ViT": "o", "hybrid": "^", "ResNet": "s"}


class Drawing(NamedTuple):
  """A figure: how it looks, and its numbers.

  Attributes:
    figure: matplotlib's.
    columns: names of the numbers.
    rows: the numbers.
  """

  figure: Figure
  columns: tuple[str, ...]
  rows: Iterable[tuple]


class Nothing(Exception):
  """There is nothing to draw; says why."""


class Checkpoint(NamedTuple):
  """What the figures need of a checkpoint; the weights themselves are gone.

  Attributes:
    label: short name.
    variant: of the model.
    patch: pixels along a side of a token.
    filters: f32[p p 3 d], the patch embedding's kernel; None where patches are
      not of pixels.
    positions: f32[h w d], None where there are none.
    pictures: u8[n h w 3], the images as the model gets them.
    looks: of the images; None without images or for a ResNet.
    titles: the class of each image and its probability.
    files: the name of each image.
  """

  label: str
  variant: str
  patch: int
  filters: Any
  positions: Any
  pictures: np.ndarray
  looks: attention_maps.Looks | None
  titles: list[str]
  files: list[str]


def make_figures(
  out: str,
  *,
  checkpoints: Sequence[str] = (),
  images: Sequence[str] = (),
  runs: str | None = None,
  only: Sequence[str] = (),
  image_size: int | tuple[int, int] | None = None,
) -> list[str]:
  """Draws figures into a folder.

  Args:
    out: the folder; made where there is none. Nothing in it is overwritten.
    checkpoints: whatever `vit_jax.load` reads.
    images: paths of image files, for what depends on images.
    runs: a folder with runs at any depth, for curves and compute.
    only: names of `FIGURES`; empty for all that can be drawn.
    image_size: pixels, or (h, w); unset: each checkpoint's own.

  Returns:
    The paths of what was written.

  Raises:
    UserError: something given cannot be used, or a figure that was asked for
      cannot be drawn from it.
  """
  for name in only:
    check_choice("--only", name, FIGURES)
  if images and not checkpoints:
    raise UserError("images are for what weights see; give --checkpoint=SOURCE")
  if not checkpoints and not runs:
    raise UserError("nothing to draw from; give --checkpoint=SOURCE or --runs=")
  possible = [*(OF_WEIGHTS if checkpoints else ()), *(OF_RUNS if runs else ())]
  files = {
    name: [Path(out) / f"{name}.{kind}" for kind in ("png", "svg", "csv")]
    for name in only or possible
  }
  _check_free(out, itertools.chain(*files.values()))
  labels = _name_checkpoints(checkpoints)
  seen = [
    _read(source, label, images, image_size)
    for source, label in zip(checkpoints, labels, strict=True)
  ]
  drawings = _draw(files, seen, find_runs([runs]) if runs else [], bool(only))
  try:
    _write([(drawings[name], files[name]) for name in drawings])
  except OSError as e:
    raise UserError(f"--out={out}: cannot be written: {e.strerror}") from e
  return [str(path) for name in drawings for path in files[name]]


def _check_free(out, files):
  check_folder(Path(out), "--out")
  for file in files:
    check_free(file)


def _draw(names, seen, runs, all_wanted) -> dict[str, Drawing]:
  """Returns the figures that can be drawn.

  Raises:
    UserError: there is none, or one is missing of which all are wanted.
  """
  drawings, missing = {}, []
  for name in names:
    try:
      if name in OF_RUNS:
        drawings[name] = OF_RUNS[name](runs)
      else:
        drawings[name] = OF_WEIGHTS[name](seen)
    except Nothing as e:
      missing.append(f"{name}: {e}")
  if missing and (all_wanted or not drawings):
    raise UserError(f"cannot be drawn: {'; '.join(missing)}")
  for reason in missing:
    log.info("left out: %s", reason)
  return drawings


def _write(drawings):
  """Writes [(drawing, its PNG, SVG and CSV)], all of it or nothing."""
  with contextlib.ExitStack() as stack:  # renames when all are written
    for drawing, paths in drawings:
      paths[0].parent.mkdir(parents=True, exist_ok=True)
      png, svg, table = (stack.enter_context(atomic_file(p)) for p in paths)
      # The same numbers give the same file: no date, no random names in it.
      style: dict[Any, Any] = {
        "svg.hashsalt": paths[1].name,
        "svg.fonttype": "none",
      }
      with matplotlib.rc_context(style):
        drawing.figure.savefig(png, format="png", dpi=_DPI)
        drawing.figure.savefig(
          svg, format="svg", dpi=_DPI, metadata={"Date": None}
        )
      _write_csv(drawing, table)


def _write_csv(drawing, file):
  with open(file, "w", newline="", encoding="utf-8") as f:
    writer = csv.writer(f)
    writer.writerow(drawing.columns)
    writer.writerows(drawing.rows)


# --- what is drawn ---


def _read(source, label, images, image_size) -> Checkpoint:
  """Loads a checkpoint, runs it, and forgets it but for what is drawn."""
  model = pretrained.load(source, image_size=image_size)
  about = model.config
  pixels = [
    preprocess.preprocess_image(image, about.preprocess, about.image_size)
    for image in images
  ]
  looks, titles = None, ["" for _ in images]
  if pixels and model.model.num_layers:
    looks = _look(model, np.stack(pixels))
    if about.num_classes:
      titles = [_title(about, row) for row in looks.probabilities]
  params = flatten(model.params)
  sizes = variants.parse(about.variant)
  filters = None
  if sizes.encoder and sizes.units is None:
    filters = np.asarray(params["embedding/kernel"])
  return Checkpoint(
    label=label,
    variant=about.variant,
    patch=about.patch,
    filters=filters,
    positions=read_positions(params, about),
    pictures=np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8),
    looks=looks,
    titles=titles,
    files=[_cut(image.rsplit("/", 1)[-1]) for image in images],
  )


def _cut(name, most=28):
  """Returns a name that fits above a picture."""
  return name if len(name) <= most else f"{name[: most // 2]}...{name[-9:]}"


def _name_checkpoints(sources):
  """Returns as much of the end of each source as tells them apart."""
  parts = [source.rstrip("/").split("/") for source in sources]
  # The folder of a step says nothing without the run's.
  steps = any(len(p) > 2 and p[-1].isdigit() for p in parts)
  deepest = max(map(len, parts), default=1)
  for depth in range(3 if steps else 1, deepest + 1):
    names = ["/".join(p[-depth:]) for p in parts]
    if len({*names}) == len(names):
      return names
  return list(sources)


def _look(model, pixels):
  """Runs `attention_maps.make_look` in batches of one size."""
  look = attention_maps.make_look(model)
  size = min(BATCH_SIZE, len(pixels))
  batches = []
  for start in range(0, len(pixels), size):
    batch = pixels[start : start + size]
    padding = [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)]
    looks = look(normalize(jnp.pad(batch, padding)))
    batches.append([np.asarray(x)[: len(batch)] for x in looks])
  return attention_maps.Looks(*map(np.concatenate, zip(*batches, strict=True)))


def _title(about, probabilities):
  best = int(np.argmax(probabilities))
  name = about.class_names[best] if about.class_names else f"class {best}"
  return f"{name} {probabilities[best]:.0%}"


def read_positions(params, about: pretrained.Config) -> np.ndarray | None:
  """Returns the position embedding of each patch, f32[h w d].

  Args:
    params: {path: array}.
    about: the model they are of.

  Returns:
    None where nothing is added to patches ("relative", "none", a ResNet). Of
    embeddings that each layer has of its own, the first layer's.
  """
  if about.pos_embedding == "sincos2d":
    flat = posemb.sincos_2d(about.grid, params["embedding/bias"].shape[0])
    return flat.reshape(*about.grid, -1)
  by_name = {}
  for path, x in sorted(params.items()):
    by_name.setdefault(path.rpartition("/")[2], np.asarray(x))
  if about.pos_embedding == "learned":
    # Scanned layers have theirs on a leading axis.
    x = by_name["pos_embedding"]
    tokens = x.reshape(-1, *x.shape[-2:])[0]
    patches = tokens[len(tokens) - math.prod(about.grid) :]
    return patches.reshape(*about.grid, -1)
  if about.pos_embedding == "2d":
    tables = (by_name[f"pos_embedding_{axis}"] for axis in "yx")
    rows, columns = (x.reshape(-1, *x.shape[-2:])[0] for x in tables)
    return np.asarray(posemb.join_axes(rows, columns)).reshape(*about.grid, -1)
  return None


def compare_positions(positions: np.ndarray) -> np.ndarray:
  """f32[h w d] -> cosine similarities f64[h w h w] (Figures 7 and 10)."""
  x = np.asarray(positions, np.float64)
  x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  return np.einsum("hwd,uvd->hwuv", x, x)


def find_components(filters: np.ndarray, count: int):
  """Returns the principal components of filters, and their parts of variance.

  Args:
    filters: f32[p p 3 d], d filters.
    count: of components; fewer where there are fewer.

  Returns:
    f64[count p p 3], of length 1 and with the largest value positive (the sign
    of a component means nothing), and f64[count].
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
  seen = _choose_looking(seen)
  shown = seen[0].pictures[:_MOST_PICTURES]
  figure, axes = _make_grid(len(shown), 1 + 2 * len(seen), 2.2)
  for i, (first, *others) in enumerate(axes):
    first.imshow(shown[i])
    _set_title(first, f"image {i}\n{seen[0].files[i]}")
    for c, lit, plain in zip(seen, others[::2], others[1::2], strict=True):
      assert c.looks
      lit.imshow(attention_maps.overlay(c.pictures[i], c.looks.maps[i]))
      plain.imshow(c.looks.maps[i], vmin=0)
      _set_title(lit, f"{c.label}\n{c.titles[i]}")
      _set_title(plain, "attention of each patch")
  rows = (
    (c.label, *place, float(value))
    for c in seen
    if c.looks
    for place, value in np.ndenumerate(c.looks.maps)
  )
  columns = ("checkpoint", "image", "row", "column", "attention")
  return Drawing(figure, columns, rows)


def _draw_filters(seen: list[Checkpoint]) -> Drawing:
  """Figure 7, left: principal components of the patch embedding's filters."""
  why = "it takes a plain ViT, whose patches are of pixels"
  seen = _choose(seen, lambda c: c.filters is not None, why)
  across = 7
  figure, axes = _make_grid(1, len(seen), 3.6, 2.4)
  rows = []
  for c, axis in zip(seen, axes[0], strict=True):
    parts, variance = find_components(c.filters, NUM_FILTERS)
    axis.imshow(_tile([_stretch(x) for x in parts], across))
    share = f"{variance.sum():.0%} of the variance"
    _set_title(axis, f"{c.label}: {len(parts)} components, {share}")
    for i, part in enumerate(parts):
      for (y, x, channel), value in np.ndenumerate(part):
        row = (c.label, i, variance[i], y, x, "rgb"[channel], value)
        rows.append(row)
  columns = ("checkpoint", "component", "variance", "row", "column", "channel")
  return Drawing(figure, (*columns, "value"), rows)


def _stretch(x):
  """Scales a component to [0, 1], zero to the middle."""
  return 0.5 + x / (2 * max(np.abs(x).max(), 1e-12))


def _tile(pictures, across):
  """Lays pictures [h w ...] out with white between them."""
  height, width = pictures[0].shape[:2]
  down = -(-len(pictures) // across)
  gap = max(1, round(height / 12))
  shape = (down * (height + gap) - gap, across * (width + gap) - gap)
  canvas = np.full((*shape, *pictures[0].shape[2:]), np.nan)
  for i, picture in enumerate(pictures):
    top, left = (
      at * (side + gap)
      for at, side in zip(divmod(i, across), (height, width), strict=True)
    )
    canvas[top : top + height, left : left + width] = picture
  return np.nan_to_num(canvas, nan=1.0) if canvas.ndim == 3 else canvas


def _draw_positions(seen: list[Checkpoint]) -> Drawing:
  """Figures 7, middle, and 10: how alike the position embeddings are."""
  why = "it takes a model that adds position embeddings"
  seen = _choose(seen, lambda c: c.positions is not None, why)
  figure, axes = _make_grid(1, len(seen), 4)
  similarities = [compare_positions(c.positions) for c in seen]
  drawn = None
  for c, axis, alike in zip(seen, axes[0], similarities, strict=True):
    tiles = alike.reshape(-1, *alike.shape[2:])
    drawn = axis.imshow(_tile(list(tiles), alike.shape[1]), vmin=-1, vmax=1)
    _set_title(axis, c.label)
  assert drawn
  figure.colorbar(drawn, ax=axes, label="cosine similarity", shrink=0.8)
  rows = (
    (c.label, *place, value)
    for c, alike in zip(seen, similarities, strict=True)
    for place, value in np.ndenumerate(alike)
  )
  columns = ("checkpoint", "row", "column", "other_row", "other_column")
  return Drawing(figure, (*columns, "similarity"), rows)


def _draw_distances(seen: list[Checkpoint]) -> Drawing:
  """Figures 7, right, and 11: how far heads look, by depth."""
  seen = _choose_looking(seen)
  figure, axes = _make_grid(1, len(seen), 3.6, 3, pictures=False)
  rows = []
  for c, axis in zip(seen, axes[0], strict=True):
    assert c.looks
    by_layer = np.asarray(c.looks.distances, np.float64).mean(axis=0)
    for layer, heads in enumerate(by_layer):
      axis.scatter([layer] * len(heads), heads, s=10)
      rows += [(c.label, layer, h, x) for h, x in enumerate(heads)]
    _set_title(axis, f"{c.label} ({c.variant})")
    axis.set_xlabel("layer")
    axis.set_ylabel("mean attention distance, pixels")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
  columns = ("checkpoint", "layer", "head", "pixels")
  return Drawing(figure, columns, rows)


def _choose_looking(seen):
  """Returns the checkpoints that have looked at images."""
  if not any(len(c.pictures) for c in seen):
    raise Nothing("it takes images; name some")
  return _choose(seen, lambda c: c.looks, "a ResNet has no attention")


def _choose(seen, is_drawn, why):
  """Returns the checkpoints that a figure is about; Nothing if none is."""
  seen = [c for c in seen if is_drawn(c)]
  if not seen:
    raise Nothing(why)
  return seen


def _make_grid(down, across, width, height=None, pictures=True):
  """Returns a figure and its axes [down across], so many inches each."""
  size = (width * across, (height or width) * down)
  figure = Figure(size, layout="constrained")
  axes = figure.subplots(down, across, squeeze=False)
  for axis in axes.flat:
    if pictures:
      axis.set_axis_off()
  return figure, axes


def _set_title(axis, text):
  # A name may have "$" in it, which is no formula.
  axis.set_title(text, fontsize=8, parse_math=False)


# --- runs ---


_CURVES = ("train/loss", "train/learning_rate", "eval/loss", "eval/accuracy")
_CURVES += ("eval/prec@1", "eval/lrap")


def _draw_curves(runs: list[Run]) -> Drawing:
  """What runs have measured at each step."""
  curves = _read_curves(runs)
  if not curves:
    raise Nothing("it takes runs that have measured something; give --runs=")
  # One point is no curve, but if there is nothing else.
  lengths = dict.fromkeys(_CURVES, 0)
  for (metric, _), points in curves.items():
    lengths[metric] = max(lengths.get(metric, 0), len(points))
  least = min(2, max(lengths.values()))
  metrics = [metric for metric in lengths if lengths[metric] >= least]
  down = -(-len(metrics) // 3)
  figure, axes = _make_grid(down, min(3, len(metrics)), 3.6, 3, pictures=False)
  by_metric = dict(zip(metrics, axes.flat, strict=False))
  for axis in axes.flat[len(metrics) :]:
    axis.set_axis_off()
  for metric, axis in by_metric.items():
    axis.set_xlabel("step")
    axis.set_title(metric, fontsize=9)
  labels = list(dict.fromkeys(label for _, label in curves))
  few = len(labels) <= _MOST_NAMES
  colours = colormaps["tab10" if few else "viridis"]
  lines = {}
  for (metric, label), points in curves.items():
    if metric not in metrics:
      continue
    i = labels.index(label)
    (lines[label],) = by_metric[metric].plot(
      *zip(*points, strict=True),
      ".-",
      color=colours(i if few else i / len(labels)),
    )
  for metric, axis in by_metric.items():
    axis.set_xlim(left=0)
    if metric.endswith("loss"):
      axis.set_yscale("log")
  _add_names(figure, lines)
  rows = (
    (label, step, metric, value)
    for (metric, label), points in curves.items()
    for step, value in points
  )
  return Drawing(figure, ("run", "step", "name", "value"), rows)


def _read_curves(runs):
  """Returns {(metric, name of the run): [(step, value)]}."""
  curves = {}
  for run in runs:
    known = {name: run.series[name] for name in run.series if name in _CURVES}
    for metric, points in {**known, **run.other_series}.items():
      curves[metric, run.name] = points
  return curves


def _add_names(figure, lines):
  """Puts the names of {name: line} below a figure, unless they are many."""
  if len(lines) > _MOST_NAMES:
    figure.supxlabel(f"{len(lines)} runs, the later ones lighter", fontsize=8)
    return
  legend = figure.legend(
    lines.values(), lines.keys(), loc="outside lower center", ncols=2
  )
  for text in legend.get_texts():
    text.set(parse_math=False, fontsize=7)


def _draw_compute(runs: list[Run]) -> Drawing:
  """Figure 5: accuracy after fine-tuning against what pre-training took."""
  points = [p for run in runs if (p := _place_run(run, runs))]
  if not points:
    raise Nothing(
      "it takes finished fine-tunings, and the finished runs that they started "
      "from, below one --runs folder"
    )
  datasets = list(dict.fromkeys(dataset for dataset, *_ in points))
  points += [p for p in _list_paper() if p[0] in datasets]
  figure, axes = _make_grid(1, len(datasets), 4, pictures=False)
  for dataset, axis in zip(datasets, axes[0], strict=True):
    for group in dict.fromkeys(point[1:3] for point in points):
      chosen = [p[4:] for p in points if p[0] == dataset and p[1:3] == group]
      if chosen:
        _scatter(axis, group, chosen)
    axis.set_xscale("log")
    axis.set_xlabel("exaFLOPs of pre-training, counted")
    axis.set_ylabel("accuracy, %")
    axis.set_title(dataset, fontsize=9)
    axis.legend(fontsize=7)
  columns = ("dataset", "whose", "kind", "model", "exaflops", "accuracy")
  return Drawing(figure, columns, points)


def _scatter(axis, group, points):
  whose, kind = group
  style = {"facecolors": "none", "edgecolors": "gray"}
  style = style if whose == "the paper" else {}
  axis.scatter(
    *zip(*points, strict=True),
    marker=_MARKERS[kind],
    label=f"{kind}, {whose}",
    **style,
  )


def _place_run(run, runs):
  """Returns a fine-tuning as a row of the figure, None for another run."""
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
  return dataset, "ours", _kind(variant), variant, exaflops, 100 * accuracy


def _list_paper():
  """Yields the rows of Table 6."""
  for row in data.load()["table6"]["rows"]:
    variant = row.get("variant") or data.variant_of(row["name"])
    for name, value in row["values"].items():
      dataset = data.load()["measures"][name].get("dataset")
      if value is not None:
        kind = _kind(variant)
        yield dataset, "the paper", kind, variant, row["exaflops"], value


def _kind(variant):
  sizes = variants.parse(variant)
  if sizes.encoder is None:
    return "ResNet"
  return "ViT" if sizes.units is None else "hybrid"


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
