"""Line charts of the metrics of runs, for a figure and for an HTML page."""

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vit_jax.tools.runs import COUNTS, Run

# Metric -> its title, in this order; others follow under their own names.
TITLES = {
  "train/loss": "Training loss",
  "eval/accuracy": "Accuracy on the test set",
  "eval/accuracy@5": "Top-5 accuracy on the test set",
  "eval/prec@1": "Precision at 1 on the test set",
  "eval/lrap": "Label ranking average precision on the test set",
  "eval/r2": "Explained variance on the test set",
  "eval/loss": "Loss on the test set",
  "train/learning_rate": "Learning rate",
  "train/gradient_norm": "Gradient norm",
  "speed/images_per_second": "Images per second",
}
# Constants, and metrics that another chart shows.
_NO_CURVE = {
  "eval/trivial_loss",
  "eval/trivial_accuracy",
  "speed/images_per_second_per_device",
}
# Runs differ in dashes, not only in colour; further runs are grey.
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4", "1 2", "10 2 2 2 2 2")
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C9")
_OTHERS = "#8a919c"
_MOST_POINTS = 250  # of a line; more would only make the file large
_FEW_POINTS = 12  # each has a dot
_WIDE = 100  # with a larger ratio of values, the axis is logarithmic
# Low values that do not determine the axis: the last learning rate is almost 0.
_LOWEST = 0.1
# Placeholders in matplotlib's SVG -> variables of the page's style sheet.
_ON_PAGE = {f"#c0000{i}": f"var(--c{i})" for i in range(len(DASHES))} | {
  _OTHERS: "var(--other)",
  "#c1000a": "var(--soft)",
  "#c1000b": "var(--edge)",
}
_PAGE_STYLE: dict[Any, Any] = {
  "svg.fonttype": "none",  # text stays text
  **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
  **dict.fromkeys(("text.color", "axes.labelcolor"), "#c1000a"),
  **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), "#c1000a"),
  **dict.fromkeys(("axes.edgecolor", "grid.color"), "#c1000b"),
  **dict.fromkeys(("xtick.color", "ytick.color"), "#c1000b"),
}


def list_metrics(runs: Sequence[Run]) -> list[str]:
  """Returns the metrics with more than one value in a run, in order."""
  lengths = dict.fromkeys(TITLES, 0)
  for run in runs:
    for name, points in run.series.items():
      lengths[name] = max(lengths.get(name, 0), len(points))
  hidden = {*_NO_CURVE, *(x for x in lengths if x.split("/")[-1] in COUNTS)}
  return [x for x, n in lengths.items() if n > 1 and x not in hidden]


def plot(
  axis,
  name: str,
  runs: Sequence[tuple[int, Run]],
  colours: Sequence[str] = COLOURS,
) -> None:
  """Draws a metric of runs by step.

  `runs` has (i, run), where i selects colour and dashes; grey from 8 on.
  """
  drawn = [(i, run) for i, run in runs if name in run.series]
  for i, run in reversed(drawn):  # the first ones on top
    xs, ys = _average(run.series[name])
    dashes = DASHES[i] if i < len(DASHES) else ""
    axis.plot(
      xs,
      ys,
      color=colours[i] if i < len(DASHES) else _OTHERS,
      linestyle=(0, [float(x) for x in dashes.split()]) if dashes else "-",
      marker="o" if len(xs) <= _FEW_POINTS else "",
      markersize=3,
      label=run.name,
    )
  values = [y for _, run in drawn for _, y in run.series[name]]
  low = np.quantile(values, _LOWEST)
  if min(values) > 0 and max(values) > _WIDE * low:
    axis.set_yscale("log")
    axis.set_ylim(bottom=max(axis.get_ylim()[0], low / 10))
    axis.yaxis.set_minor_formatter("")
  axis.yaxis.set_major_formatter("{x:g}")
  axis.xaxis.set_major_formatter("{x:g}")
  axis.set(xlabel="step", xlim=(0, None))
  axis.grid(axis="y")


def _average(points):
  """Returns xs and ys, at most `_MOST_POINTS`: means of neighbouring values."""
  values = np.array(points, np.float64)
  many = -(-len(values) // _MOST_POINTS)
  starts = np.arange(0, len(values), many)
  counts = np.diff(starts, append=len(values))
  return (np.add.reduceat(values, starts) / counts[:, None]).T


def draw_svg(
  name: str, runs: Sequence[tuple[int, Run]], description: str, number: int
) -> str:
  """Returns a chart as an SVG element, its colours the page's variables.

  Args:
    name: of the metric.
    runs: see `plot`.
    description: a text for screen readers.
    number: unique in the page, for the ids of the element's parts.
  """
  file = io.StringIO()
  with matplotlib.rc_context(_PAGE_STYLE):
    figure = Figure((5, 3), layout="constrained")
    plot(figure.subplots(), name, runs, [*_ON_PAGE])
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=unsaid)
  svg = file.getvalue()
  for placeholder, variable in _ON_PAGE.items():
    svg = svg.replace(placeholder, variable)
  svg = re.sub(r'((?<= id=")|(?<=url\(#)|(?<=href="#))', f"chart{number}-", svg)
  view = re.findall(r'viewBox="[^"]+"', svg)[0]
  inside = svg[svg.index(">", svg.index("<svg")) + 1 :]
  title = html.escape(TITLES.get(name, name))
  return (
    f'<svg class="chart" role="img" {view} aria-labelledby="title{number} '
    f'text{number}"><title id="title{number}">{title}</title>'
    f'<desc id="text{number}">{html.escape(description)}</desc>{inside}'
  )
