"""Line charts as SVG that takes its colours and its width from the page."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Units of the viewBox. On a phone a chart is about as wide, so that its text,
# 11 units high, has the size that it says.
_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 34
# A line has at most so many points; more would only make the page large.
_POINTS = 250
# Above this ratio of the largest to the least value the axis is logarithmic.
_WIDE = 100
# Runs are told apart by these dashes, not by colour alone.
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4", "1 2", "10 2 2 2 2 2")
COLOURS = len(DASHES)


class Line(NamedTuple):
  """What is drawn of one run.

  Attributes:
    name: of the run.
    xs, ys: the points, at least one; xs ascend.
    style: 0 .. COLOURS - 1, or None for one in grey.
  """

  name: str
  xs: Sequence[float]
  ys: Sequence[float]
  style: int | None


class Chart(NamedTuple):
  """A drawn chart.

  Attributes:
    svg: its text.
    logarithmic: whether its vertical axis is.
    averaged: the most values that one point is the mean of.
  """

  svg: str
  logarithmic: bool
  averaged: int


def draw(title: str, x_label: str, lines: Sequence[Line]) -> Chart:
  """Draws lines over common axes.

  Args:
    title: what it shows; said by screen readers.
    x_label: under the horizontal axis.
    lines: at least one.
  """
  averaged = max(-(-len(line.xs) // _POINTS) for line in lines)
  told = html.escape(describe(title, lines))
  lines = [_thin(line) for line in lines]
  ys = [y for line in lines for y in line.ys]
  logarithmic = min(ys) > 0 and max(ys) / min(ys) > _WIDE
  ticks = choose_log_ticks(ys) if logarithmic else choose_ticks(ys)
  x_ticks = choose_ticks([0, *(x for line in lines for x in line.xs)])
  height = math.log10 if logarithmic else float
  low, high = height(ticks[0]), height(ticks[-1])

  def place_x(x):
    share = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

  def place_y(y):
    share = (height(y) - low) / (high - low)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

  parts = [
    f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
    f'aria-label="{told}">',
    *(_draw_row(place_y(y), format_tick(y)) for y in ticks),
    *(_draw_column(place_x(x), format_tick(x)) for x in x_ticks),
    f'<text class="label" x="{(_WIDTH + _LEFT) / 2:.0f}" y="{_HEIGHT - 4}" '
    f'text-anchor="middle">{html.escape(x_label)}</text>',
    # Grey ones first: they lie under those with names.
    *(
      _draw_line(line, place_x, place_y)
      for line in sorted(lines, key=lambda line: line.style is not None)
    ),
    "</svg>",
  ]
  return Chart("\n".join(parts), logarithmic, averaged)


def describe(title: str, lines: Sequence[Line]) -> str:
  """Returns what a chart shows, in words."""
  told = [
    f"{line.name}: from {format_value(line.ys[0])} to "
    f"{format_value(line.ys[-1])}, lowest {format_value(min(line.ys))}, "
    f"highest {format_value(max(line.ys))}"
    for line in lines
    if line.style is not None
  ]
  return f"{title}. " + "; ".join(told) + "."


def format_value(x: float) -> str:
  """Returns a number with four significant digits."""
  if abs(x) >= 1000:
    return f"{x:,.0f}"
  return f"{x:.4g}"


def draw_sample(style: int | None) -> str:
  """Returns the piece of line that stands for a run in a legend."""
  return (
    '<svg class="sample" viewBox="0 0 28 8" aria-hidden="true">'
    f'<path {_attributes(style)} d="M0 4H28"/></svg>'
  )


def _attributes(style):
  if style is None:
    return 'class="line other"'
  dash = f' stroke-dasharray="{DASHES[style]}"' if DASHES[style] else ""
  return f'class="line c{style}"{dash}'


def _thin(line):
  """Returns a line of few points, the means of as many values each."""
  many = -(-len(line.xs) // _POINTS)
  if many == 1:
    return line
  starts = np.arange(0, len(line.xs), many)
  counts = np.diff(starts, append=len(line.xs))
  xs, ys = (np.add.reduceat(v, starts) / counts for v in (line.xs, line.ys))
  return line._replace(xs=xs.tolist(), ys=ys.tolist())


def _draw_line(line, place_x, place_y):
  points = [
    f"{place_x(x):.1f} {place_y(y):.1f}"
    for x, y in zip(line.xs, line.ys, strict=True)
  ]
  path = f'<path {_attributes(line.style)} d="M{"L".join(points)}"/>'
  if len(points) > 12:
    return path
  # Few values are seen one by one; alone, one is no line at all.
  kind = "other" if line.style is None else f"c{line.style}"
  dots = [
    f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="3"/>'
    for x, y in (point.split() for point in points)
  ]
  return path + "".join(dots)


def _draw_row(y, text):
  return (
    f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
    f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
  )


def _draw_column(x, text):
  y = _HEIGHT - _BOTTOM
  anchor = "end" if x > _WIDTH - _RIGHT - 12 else "middle"
  return (
    f'<path class="grid" d="M{x:.1f} {y}v4"/>'
    f'<text x="{x:.1f}" y="{y + 15}" text-anchor="{anchor}">{text}</text>'
  )


def choose_ticks(values: Sequence[float]) -> list[float]:
  """Returns three to seven round numbers from below to above all values."""
  low, high = min(values), max(values)
  if low == high:
    low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
  rough = (high - low) / 5
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [n * step for n in range(first, last + 1)]


def choose_log_ticks(values: Sequence[float]) -> list[float]:
  """Returns powers of ten from below to above all values, at most seven."""
  low = math.floor(math.log10(min(values)))
  high = math.ceil(math.log10(max(values)))
  step = -(-(high - low) // 6)
  high = low + -(-(high - low) // step) * step
  return [10.0**n for n in range(low, high + 1, step)]


def format_tick(x: float) -> str:
  """Returns a round number, short."""
  if x and (abs(x) >= 1e6 or abs(x) < 1e-3):
    mantissa, exponent = f"{x:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  if abs(x) >= 1e4:
    return f"{x / 1e3:.4g}k"
  return f"{x:.6g}"
