"""The `figures` command: the paper's figures, from any weights and runs.

Each is a picture (PNG), a drawing (SVG) and the numbers behind it (CSV). A
figure has a panel for each checkpoint.
"""

import csv
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vit_jax import attention_maps, preprocess, pretrained
from vit_jax.errors import UserError, suggest
from vit_jax.models import posemb, variants
from vit_jax.paper import data, flops
from vit_jax.paper.runs import Run, find_origin, find_runs, plain_name
from vit_jax.state import flatten
from vit_jax.steps import normalize

log = logging.getLogger(__name__)

BATCH_SIZE = 8
NUM_FILTERS = 28  # that the paper shows
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
  """

  label: str
  variant: str
  patch: int
  filters: Any
  positions: Any
  pictures: np.ndarray
  looks: attention_maps.Looks | None
  titles: list[str]


def make_figures(
  out: str,
  *,
  checkpoints: Sequence[str] = (),
  images: Sequence[str] = (),
  runs: str | None = None,
  only: Sequence[str] = (),
  image_size: int | None = None,
) -> list[str]:
  """Draws figures into a folder.

  Args:
    out: the folder; made where there is none. Nothing in it is overwritten.
    checkpoints: whatever `vit_jax.load` reads.
    images: paths of image files, for what depends on images.
    runs: a folder with runs at any depth, for curves and compute.
    only: names of `FIGURES`; empty for all that can be drawn.
    image_size: pixels; unset: each checkpoint's own.

  Returns:
    The paths of what was written.

  Raises:
    UserError: something given cannot be used, or a figure that was asked for
      cannot be drawn from it.
  """
  for name in only:
    if name not in FIGURES:
      raise UserError(
        f"there is no figure {name!r}{suggest(name, FIGURES)}; choices: "
        f"{', '.join(FIGURES)}"
      )
  if not checkpoints and not runs:
    raise UserError("nothing to draw from; give --checkpoint=SOURCE or --runs=")
  possible = [*(OF_WEIGHTS if checkpoints else ()), *(OF_RUNS if runs else ())]
  files = {
    name: [Path(out) / f"{name}.{kind}" for kind in ("png", "svg", "csv")]
    for name in only or possible
  }
  _check_free(out, itertools.chain(*files.values()))
  seen = [_read(source, images, image_size) for source in checkpoints]
  found = find_runs(runs) if runs else []
  written = []
  for name, paths in files.items():
    try:
      if name in OF_RUNS:
        drawing = OF_RUNS[name](found)
      else:
        drawing = OF_WEIGHTS[name](seen)
    except Nothing as e:
      if only:
        raise UserError(f"--only={name}: {e}") from e
      log.info("%s: left out: %s", name, e)
      continue
    try:
      _write(drawing, paths)
    except OSError as e:
      raise UserError(f"--out={out}: cannot be written: {e.strerror}") from e
    written += map(str, paths)
  return written


def _check_free(out, files):
  folder = Path(out)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"--out={out} is a file; give a folder")
  for file in files:
    if file.exists():
      raise UserError(f"{file} is there already; give another --out")


def _write(drawing, paths):
  """Writes a PNG, an SVG and a CSV, each whole or not at all."""
  png, svg, table = paths
  png.parent.mkdir(parents=True, exist_ok=True)
  # The same numbers give the same file: no date, no random names in it.
  style: dict[Any, Any] = {"svg.hashsalt": svg.name, "svg.fonttype": "none"}
  with matplotlib.rc_context(style):
    for path, options in ((png, {}), (svg, {"metadata": {"Date": None}})):
      _replace(path, lambda f, o=options, p=path: _save(drawing, f, p, o))
  _replace(table, lambda file: _write_csv(drawing, file))


def _save(drawing, file, path, options):
  kind = path.suffix.removeprefix(".")
  drawing.figure.savefig(file, format=kind, dpi=_DPI, **options)


def _write_csv(drawing, file):
  with open(file, "w", newline="", encoding="utf-8") as f:
    writer = csv.writer(f)
    writer.writerow(drawing.columns)
    writer.writerows(drawing.rows)


def _replace(path, write: Callable[[Path], Any]):
  temporary = path.with_name(path.name + ".tmp")
  write(temporary)
  os.replace(temporary, path)


# --- what is drawn ---


def _read(source, images, image_size) -> Checkpoint:
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
    label=_shorten(source),
    variant=about.variant,
    patch=about.patch,
    filters=filters,
    positions=read_positions(params, about),
    pictures=np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8),
    looks=looks,
    titles=titles,
  )


def _shorten(source):
  """Returns the last parts of a path: "finetune", "vit/checkpoints/100"."""
  parts = source.rstrip("/").split("/")
  is_step = len(parts) > 2 and parts[-1].isdigit()
  return "/".join(parts[-3 if is_step else -1 :])


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
  seen = _choose(seen, lambda c: c.looks, "it takes images and a transformer")
  count = len(seen[0].pictures)
  figure, axes = _make_grid(count, 1 + 2 * len(seen), 2.2)
  rows = []
  for i, (first, *others) in enumerate(axes):
    first.imshow(seen[0].pictures[i])
    first.set_title(f"image {i}", fontsize=8)
    for c, lit, plain in zip(seen, others[::2], others[1::2], strict=True):
      assert c.looks
      seen_here = c.looks.maps[i]
      lit.imshow(attention_maps.overlay(c.pictures[i], seen_here))
      plain.imshow(seen_here, vmin=0)
      lit.set_title(f"{c.label}\n{c.titles[i]}", fontsize=8)
      for (y, x), value in np.ndenumerate(seen_here):
        rows.append((c.label, i, y, x, float(value)))
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
    axis.set_title(
      f"{c.label}: {len(parts)} components, {variance.sum():.0%} of the "
      "variance",
      fontsize=8,
    )
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
  rows, drawn = [], None
  for c, axis in zip(seen, axes[0], strict=True):
    alike = compare_positions(c.positions)
    tiles = alike.reshape(-1, *alike.shape[2:])
    drawn = axis.imshow(_tile(list(tiles), alike.shape[1]), vmin=-1, vmax=1)
    axis.set_title(c.label, fontsize=8)
    for (y, x, other_y, other_x), value in np.ndenumerate(alike):
      rows.append((c.label, y, x, other_y, other_x, value))
  assert drawn
  figure.colorbar(drawn, ax=axes, label="cosine similarity", shrink=0.8)
  columns = ("checkpoint", "row", "column", "other_row", "other_column")
  return Drawing(figure, (*columns, "similarity"), rows)


def _draw_distances(seen: list[Checkpoint]) -> Drawing:
  """Figures 7, right, and 11: how far heads look, by depth."""
  seen = _choose(seen, lambda c: c.looks, "it takes images and a transformer")
  figure, axes = _make_grid(1, len(seen), 3.6, 3, pictures=False)
  rows = []
  for c, axis in zip(seen, axes[0], strict=True):
    assert c.looks
    by_layer = np.asarray(c.looks.distances, np.float64).mean(axis=0)
    for layer, heads in enumerate(by_layer):
      axis.scatter([layer] * len(heads), heads, s=10)
      rows += [(c.label, layer, h, x) for h, x in enumerate(heads)]
    axis.set_title(f"{c.label} ({c.variant})", fontsize=8)
    axis.set_xlabel("layer")
    axis.set_ylabel("mean attention distance, pixels")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
  columns = ("checkpoint", "layer", "head", "pixels")
  return Drawing(figure, columns, rows)


def _choose(seen, is_drawn, why):
  """Returns the checkpoints that a figure is about; Nothing if none is."""
  seen = [c for c in seen if isinstance(c, Checkpoint) and is_drawn(c)]
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


# --- runs ---


def _draw_curves(runs: list[Run]) -> Drawing:
  """What runs have measured at each step."""
  measured = [(run, *found) for run in runs for found in _read_metrics(run)]
  names = sorted({name for _, _, name, _ in measured}, key=_CURVES.index)
  if not names:
    raise Nothing("it takes runs that have measured something; give --runs=")
  figure, axes = _make_grid(1, len(names), 3.6, 3, pictures=False)
  labels = _name_runs(runs)
  for name, axis in zip(names, axes[0], strict=True):
    for i, run in enumerate(runs):
      points = [(s, x) for r, s, n, x in measured if r is run and n == name]
      if points:
        style = {"color": f"C{i}", "label": labels[run.path]}
        axis.plot(*zip(*points, strict=True), ".-", **style)
    axis.set_xlabel("step")
    axis.set_xlim(left=0)
    axis.set_title(name, fontsize=9)
  axes[0][0].legend(fontsize=7)
  rows = [(labels[run.path], *found) for run, *found in measured]
  return Drawing(figure, ("run", "step", "name", "value"), rows)


_CURVES = ("train/loss", "train/learning_rate", "eval/loss", "eval/accuracy")
_CURVES += ("eval/prec@1", "eval/lrap")


def _read_metrics(run):
  """Yields (step, name, value) of the metrics that have a curve."""
  for line in (run.path / "metrics.jsonl").read_text().splitlines():
    try:
      values = json.loads(line)
    except json.JSONDecodeError:
      continue  # is being written
    for name in _CURVES:
      if name in values:
        yield values["step"], name, values[name]


def _name_runs(runs):
  """Returns {path: what follows the folders that all runs are in}."""
  paths = [str(run.path) for run in runs]
  common = os.path.commonpath(paths) if len(paths) > 1 else ""
  return {
    run.path: os.path.relpath(path, common) if common else run.path.name
    for run, path in zip(runs, paths, strict=True)
  }


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
  written = origin.read_json("config.json")
  try:
    exaflops = flops.count_training(written, origin.total_steps)
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
