"""A synthetic JFT-like data set, without a download.

It has invented letters (`glyph_017`), plane shapes, textures and colours. An
image shows one or two glyphs, sometimes over a shape, on a coloured and
textured background, and has a label for everything that it shows. The set is
multi-label, and long-tailed because glyphs, shapes, textures and colours have
Zipf-like frequencies. It has neither digits nor fonts.
The images never change; see `vit_jax.data.drawn`.
"""

import functools
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vit_jax.data.drawn import SIZE, DrawnBuilder, Draws

NUM_GLYPHS = 250
SEED = 2020

# Frequent ones first, here and below. Glyphs are light and backgrounds dark, as
# on a blackboard.
INKS = {
  "white": (243, 243, 243),
  "yellow": (240, 225, 90),
  "cyan": (110, 225, 235),
  "pink": (245, 165, 200),
  "orange": (245, 165, 70),
  "lime": (170, 235, 90),
  "silver": (185, 185, 190),
  "lilac": (190, 165, 245),
}
GROUNDS = {
  "black": (12, 12, 12),
  "charcoal": (64, 64, 66),
  "navy": (20, 30, 105),
  "green": (20, 85, 40),
  "maroon": (115, 20, 35),
  "brown": (90, 55, 25),
  "purple": (80, 30, 115),
  "teal": (10, 90, 95),
}
TEXTURES = (
  *("plain", "gradient", "noise", "stripes", "checks"),
  *("dots", "grid", "rings", "waves"),
)
SHAPES = (
  *("disc", "square", "ring", "diamond", "bar"),
  *("frame", "cross", "crescent", "triangle"),
)
STROKE_COUNTS = ("one_stroke", "two_strokes", "three_strokes")
STROKE_WEIGHTS = ("thin", "medium", "thick")
ORIENTATIONS = ("horizontal", "falling", "vertical", "rising")
PLACES = tuple(
  f"{row}_{column}"
  for row in ("top", "middle", "bottom")
  for column in ("left", "center", "right")
)
PARTS = tuple(f"{o}_at_{place}" for place in PLACES for o in ORIENTATIONS)
LAYOUTS = ("side_by_side", "stacked")
CLASS_NAMES = (
  *(f"glyph_{g:03d}" for g in range(NUM_GLYPHS)),
  *(f"{color}_glyph" for color in INKS),
  *(f"{color}_ground" for color in GROUNDS),
  *TEXTURES,
  *SHAPES,
  *STROKE_COUNTS,
  *STROKE_WEIGHTS,
  *LAYOUTS,
  *PARTS,
  "loop",
  "corner",
  "coarse",
)

# Of one image: two glyphs and their stroke counts, ink, ground, texture, shape,
# weight, layout, the last three names, and every part.
MAX_LABELS = 13 + len(PARTS)

_STROKES = 3  # at most, in a glyph
_POINTS = 24  # of a stroke


@functools.cache
def glyph_prototypes() -> dict[str, Any]:
  """Returns the shape of each glyph before handwriting variation.

  A stroke is a curve given by its heading, `heading + turn * t + bend * 4t(1-t)
  + angle * [t > corner]` for t in [0, 1], and its length: lines, arcs, hooks,
  loops and zigzags. Its point at fraction `own` lies on the stroke before it,
  at fraction `joint`, moved by `gap`. All arrays are [glyph, stroke(, 2)].
  """
  draws = Draws(SEED * 4 + 1, np.arange(NUM_GLYPHS))
  shape = (_STROKES,)
  sign = np.where(draws.uniform(-1, 1, shape) < 0, -1.0, 1.0)
  kind = draws.uniform(0, 1, shape)
  arc, loop = (kind > 0.4) & (kind < 0.75), kind >= 0.75
  turn = sign * np.where(
    loop,
    draws.uniform(5.0, 7.5, shape),
    np.where(arc, draws.uniform(1.2, 4.5, shape), draws.uniform(0, 0.6, shape)),
  )
  corner = ~loop & (draws.uniform(0, 1, shape) < 0.3)
  angle = np.where(draws.uniform(-1, 1, shape) < 0, -1.0, 1.0)
  angle = angle * draws.uniform(1.2, 2.7, shape)
  count = np.searchsorted([0.3, 0.75], draws.uniform(0, 1)) + 1
  exists = np.arange(_STROKES) < count[:, None]
  return {
    "exists": exists,
    "loop": (loop & exists).any(1),
    "corner": (corner & exists).any(1),
    "heading": draws.uniform(0, 2 * np.pi, shape),
    "turn": turn,
    "bend": np.where(loop, 0.3, 1.0) * draws.uniform(-0.8, 0.8, shape),
    "angle": np.where(corner, angle, 0.0),
    "at": draws.uniform(0.25, 0.75, shape),
    "length": (1.0 + 0.22 * np.abs(turn)) * draws.uniform(0.6, 1.4, shape),
    "joint": draws.uniform(0, 1, shape),
    "own": draws.integer(0, 3, shape) / 2,
    "gap": np.where(
      draws.uniform(0, 1, shape)[..., None] < 0.7,
      0.0,
      draws.uniform(-0.5, 0.5, (*shape, 2)),
    ),
  }


def trace_glyphs(proto: dict[str, np.ndarray], draws: Draws) -> np.ndarray:
  """Returns handwritten variants: float64[n stroke point 2], within [-1, 1].

  The strokes' turns, lengths and joints vary. Then the whole glyph is rotated,
  sheared, stretched, warped, centred and scaled.
  """
  shape = (_STROKES,)
  t = (np.arange(_POINTS) + 0.5) / _POINTS
  at = proto["at"] + draws.uniform(-0.1, 0.1, shape)
  angle = proto["angle"] * draws.uniform(0.8, 1.2, shape)
  turn = proto["turn"] * draws.uniform(0.85, 1.15, shape)
  turn = turn + draws.uniform(-0.25, 0.25, shape)
  bend = proto["bend"] + draws.uniform(-0.2, 0.2, shape)
  heading = (
    proto["heading"]
    + draws.uniform(-0.2, 0.2, shape)
    - 0.5 * (turn - proto["turn"])
  )
  heading = (
    heading[..., None]
    + turn[..., None] * t
    + bend[..., None] * 4 * t * (1 - t)
    + np.where(t > at[..., None], angle[..., None], 0.0)
  )
  length = proto["length"] * draws.uniform(0.8, 1.25, shape)
  step = (length / _POINTS)[..., None]
  path = np.stack([np.cos(heading) * step, np.sin(heading) * step], -1)
  path = np.cumsum(path, axis=2)  # [n stroke point 2]

  rows = np.arange(len(path))
  joint = proto["joint"] + draws.uniform(-0.1, 0.1, shape)
  joint = np.clip((joint * _POINTS).astype(int), 0, _POINTS - 1)
  own = (proto["own"] * (_POINTS - 1)).astype(int)
  for s in range(1, _STROKES):
    target = path[rows, s - 1, joint[:, s]] + proto["gap"][:, s]
    path[:, s] += (target - path[rows, s, own[:, s]])[:, None]
  # Strokes that do not exist coincide with the first one.
  path = np.where(proto["exists"][:, :, None, None], path, path[:, :1])
  return _scale_to_unit(_deform(_scale_to_unit(path), draws))


def find_parts(path: np.ndarray, exists: np.ndarray) -> np.ndarray:
  """Returns which of PARTS each glyph has: bool[n part].

  A part is one of four directions in one ninth of the glyph. A glyph has it if
  its ink there runs that way for at least an eighth of its height (or width).
  """
  step = np.diff(path, axis=2)
  length = np.sqrt((step**2).sum(-1)) * exists[:, :, None]
  # y grows downwards: a falling stroke goes right and down.
  eighth = np.floor(np.arctan2(step[..., 1], step[..., 0]) * (8 / np.pi))
  orientation = ((eighth.astype(int) + 1) // 2) % 4
  middle = (path[:, :, 1:] + path[:, :, :-1]) / 2
  column, row = np.moveaxis(np.clip(np.floor(middle * 1.5 + 1.5), 0, 2), -1, 0)
  part = ((3 * row + column) * 4 + orientation).astype(int)
  n = len(path)
  total = np.zeros((n, len(PARTS)))
  np.add.at(
    total,
    (np.arange(n)[:, None], part.reshape(n, -1)),
    length.reshape(n, -1),
  )
  return total > 0.25


def _scale_to_unit(path: np.ndarray) -> np.ndarray:
  low, high = path.min((1, 2), keepdims=True), path.max((1, 2), keepdims=True)
  half = np.maximum((high - low) / 2, 1e-3).max(-1, keepdims=True)
  return (path - (low + high) / 2) / half


def _deform(path: np.ndarray, draws: Draws) -> np.ndarray:
  """Rotates, shears, stretches and bends the plane, a little."""
  x, y = path[..., 0], path[..., 1]
  warp = draws.uniform(-0.15, 0.15, (6, 1, 1))
  x, y = (
    x + warp[:, 0] * y * y + warp[:, 1] * x * y + warp[:, 2] * x * x,
    y + warp[:, 3] * x * x + warp[:, 4] * x * y + warp[:, 5] * y * y,
  )
  x = x * draws.uniform(0.75, 1.25, (1, 1))
  x = x + y * draws.uniform(-0.25, 0.25, (1, 1))
  turn = draws.uniform(-0.2, 0.2, (1, 1))
  return np.stack(
    [
      x * np.cos(turn) - y * np.sin(turn),
      x * np.sin(turn) + y * np.cos(turn),
    ],
    -1,
  )


def draw_strokes(path, exists, sigma, gain, grid: int) -> np.ndarray:
  """Draws strokes on a square canvas of `grid` pixels, then enlarges it.

  Args:
    path: float64[n stroke point 2], (x, y) in pixels of a SIZE x SIZE image.
    exists: bool[n stroke].
    sigma: float64[n], the pen's radius in the same pixels.
    gain: float64[n], the saturation in the middle of a stroke.
    grid: pixels across the canvas, a power of two, at most SIZE.

  Returns:
    int32[n SIZE SIZE], opacity in 0..255.
  """
  n = len(path)
  shrink = grid / SIZE
  sigma = np.maximum(sigma * shrink, 0.45)[:, None, None]
  # A stroke is a chain of separable bumps, so a glyph is one matmul.
  step = np.diff(path, axis=2, append=path[:, :, -1:])
  step = np.sqrt((step**2).sum(-1)) * shrink
  step[:, :, -1] = step[:, :, -2]
  weight = exists[:, :, None] * np.minimum(
    gain[:, None, None] * step, 2 * sigma
  )
  weight = (weight / (2.5 * sigma)).reshape(n, _STROKES * _POINTS, 1)
  center = (path * shrink).reshape(n, _STROKES * _POINTS, 2)
  pixel = np.arange(grid) + 0.5
  across = _bump((pixel - center[:, :, :1]) / sigma)
  down = _bump((pixel - center[:, :, 1:]) / sigma)
  # Small integers, so that the matmul is exact in float32 in any order.
  across = np.rint(64 * across).astype(np.float32)
  down = np.rint(256 * down * weight).astype(np.float32)
  ink = np.matmul(down.transpose(0, 2, 1), across)
  ink = np.minimum(np.floor(ink * (255 / 16384)), 255).astype(np.float32)
  up = _bilinear_matrix(grid)
  return np.matmul(np.matmul(up, ink), up.T).astype(np.int32)


def _bump(z: np.ndarray) -> np.ndarray:
  """Approximates exp(-z^2 / 2) by a polynomial: the same bits everywhere."""
  z = np.maximum(1 - z * z * 0.125, 0)
  z = z * z
  return z * z


@functools.cache
def _bilinear_matrix(grid: int) -> np.ndarray:
  """Returns float32[SIZE grid], multiples of 1/16 or coarser if grid >= 4."""
  x = np.clip((np.arange(SIZE) + 0.5) * (grid / SIZE) - 0.5, 0, grid - 1)
  return np.maximum(1 - np.abs(x[:, None] - np.arange(grid)), 0).astype(
    np.float32
  )


def draw_textures(texture: np.ndarray, draws: Draws) -> np.ndarray:
  """Returns int32[n SIZE SIZE], 0..255, for texture[n] of TEXTURES."""
  x, y = np.arange(SIZE), np.arange(SIZE)[:, None]
  fx, fy = (draws.integer(-42, 43, (1, 1)) for _ in range(2))
  fx = fx + np.where(np.abs(fx) + np.abs(fy) < 16, 20, 0)
  px, py = (draws.integer(0, 256, (1, 1)) for _ in range(2))
  u = (x * fx + y * fy + px) & 255
  v = (y * fx - x * fy + py) & 255
  coarse = draws.bits((8, 8)).astype(np.int64) & 255
  fine = (draws.bits((SIZE, SIZE // 8)).view(np.uint8)).astype(np.int64)
  coarse = coarse.repeat(SIZE // 8, 1).repeat(SIZE // 8, 2)
  radius = np.sqrt((x - (px >> 3)) ** 2 + (y - (py >> 3)) ** 2)
  radius = (radius * (np.abs(fx) + 20)).astype(np.int64) & 255
  bent = (u + 3 * np.abs(((x * 16) & 127) - 64)) & 255
  values = {
    "plain": 0 * u,
    "gradient": np.clip((x * fx + y * fy + 4 * px - 512) // 8 + 128, 0, 255),
    "noise": (coarse + fine.reshape(-1, SIZE, SIZE)) >> 1,
    "stripes": 255 * (u < 128),
    "checks": 255 * ((u < 128) ^ (v < 128)),
    "dots": 255 * ((u - 128) ** 2 + (v - 128) ** 2 < 75**2),
    "grid": 255 * ((u < 60) | (v < 60)),
    "rings": 255 * (radius < 128),
    "waves": 255 * (bent < 128),
  }
  return np.choose(
    texture[:, None, None], [values[name] for name in TEXTURES]
  ).astype(np.int32)


def draw_shapes(shape: np.ndarray, draws: Draws) -> np.ndarray:
  """Returns bool[n SIZE SIZE] for shape[n] of SHAPES, random place and size."""
  # In eighths of a pixel.
  r = draws.integer(6 * 8, 15 * 8, (1, 1))
  x, y = np.arange(SIZE) * 8 + 4, (np.arange(SIZE) * 8 + 4)[:, None]
  x = x - draws.integer(8 * 8, 24 * 8, (1, 1))
  y = y - draws.integer(8 * 8, 24 * 8, (1, 1))
  thin = (r * draws.integer(30, 50, (1, 1))) // 100
  distance, side = x * x + y * y, np.maximum(np.abs(x), np.abs(y))
  near_axis = np.minimum(np.abs(x), np.abs(y))
  values = {
    "disc": distance < r * r,
    "square": side < r,
    "ring": (distance < r * r) & (distance > (r - thin) ** 2),
    "diamond": np.abs(x) + np.abs(y) < r,
    "bar": (np.abs(x) < r) & (np.abs(y) < thin),
    "frame": (side < r) & (side > r - thin),
    "cross": (side < r) & (near_axis < thin),
    "crescent": (distance < r * r) & ((x - thin) ** 2 + y * y > r * r),
    "triangle": (y < r) & (2 * np.abs(x) < y + r),
  }
  return np.choose(shape[:, None, None], [values[name] for name in SHAPES])


def draw_images(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Draws images `index`[n].

  Returns:
    (uint8[n SIZE SIZE 3], labels bool[n class]).
  """
  draws = Draws(SEED * 4 + 2, index)
  labels = np.zeros((len(index), len(CLASS_NAMES)), bool)
  image = draw_grounds(draws, labels)
  return draw_glyphs(image, draws, labels), labels


def draw_grounds(draws: Draws, labels: np.ndarray) -> np.ndarray:
  """Draws dark backgrounds, some with a shape, and sets their labels.

  Returns int32[n SIZE SIZE 3].
  """
  texture = draws.zipf(len(TEXTURES), 0.5)
  ground = draws.zipf(len(GROUNDS), 0.5)
  image = _tint(GROUNDS, ground, draws)
  other = _tint(GROUNDS, draws.integer(0, len(GROUNDS)), draws)
  mix = draws.integer(10, 80, (1, 1))
  image = _blend(image, other, (draw_textures(texture, draws) * mix) >> 8)

  shape = draws.zipf(len(SHAPES))
  has_shape = draws.uniform(0, 1) < 0.2
  opacity = draw_shapes(shape, draws) * has_shape[:, None, None]
  opacity = opacity * draws.integer(80, 256, (1, 1))
  other = _tint(GROUNDS, draws.integer(0, len(GROUNDS)), draws)
  image = _blend(image, other, opacity)

  _label(labels, [f"{color}_ground" for color in GROUNDS], ground)
  _label(labels, TEXTURES, texture)
  _label(labels, SHAPES, np.where(has_shape, shape, -1))
  return image


def draw_glyphs(
  image: np.ndarray, draws: Draws, labels: np.ndarray
) -> np.ndarray:
  """Draws one glyph or two on int32[n SIZE SIZE 3] and sets their labels.

  Returns uint8[n SIZE SIZE 3].
  """
  n = len(labels)
  ink = draws.zipf(len(INKS), 0.5)
  layout = np.searchsorted([0.9, 0.95], draws.uniform(0, 1)) - 1  # -1: single
  sigma = draws.uniform(1.0, 2.6)
  gain = draws.uniform(1.0, 3.0)
  # Half of the drawings are as coarse as 8 x 8 pixels.
  resolution = np.searchsorted([0.5, 0.85], draws.uniform(0, 1))
  color = _tint(INKS, ink, draws)
  glyphs = [draws.zipf(NUM_GLYPHS, 8.0) for _ in range(2)]
  for which, glyph in enumerate(glyphs):
    shown = (layout >= 0) | (which == 0)
    proto = {k: v[glyph] for k, v in glyph_prototypes().items()}
    path = trace_glyphs(proto, draws)
    parts = find_parts(path, proto["exists"])
    path = _place(path, layout, which, draws)
    opacity = np.zeros((n, SIZE, SIZE), np.int32)
    for k, grid in enumerate((8, 16, 32)):
      i = np.flatnonzero(shown & (resolution == k))
      opacity[i] = draw_strokes(
        path[i], proto["exists"][i], sigma[i], gain[i], grid
      )
    strength = draws.integer(180, 257, (1, 1))
    image = _blend(image, color, (opacity * strength) >> 8)

    _label(labels, CLASS_NAMES, np.where(shown, glyph, -1))
    count = proto["exists"].sum(1)
    _label(labels, STROKE_COUNTS, np.where(shown, count - 1, -1))
    for name in ("loop", "corner"):
      _label(labels, [name], np.where(shown & proto[name], 0, -1))
    first = CLASS_NAMES.index(PARTS[0])
    labels[:, first : first + len(PARTS)] |= parts & shown[:, None]
  _label(labels, [f"{color}_glyph" for color in INKS], ink)
  _label(labels, STROKE_WEIGHTS, np.searchsorted([1.5, 2.1], sigma))
  _label(labels, LAYOUTS, layout)
  _label(labels, ["coarse"], np.where(resolution == 0, 0, -1))
  return image.astype(np.uint8)


def _label(labels: np.ndarray, names, which: np.ndarray) -> None:
  """Sets the label names[which[i]] in row i, unless which[i] is -1."""
  rows = np.flatnonzero(which >= 0)
  labels[rows, CLASS_NAMES.index(names[0]) + which[rows]] = True


def _tint(colors: dict, color: np.ndarray, draws: Draws) -> np.ndarray:
  """Returns int32[n 1 1 3]: the palette's color[n], lightened or darkened."""
  palette = np.array(list(colors.values()), np.int32)
  jitter = draws.integer(-24, 25, (3,)) + draws.integer(-24, 25, (1,))
  tinted = np.clip(palette[color] + jitter, 0, 255)
  return tinted.astype(np.int32)[:, None, None, :]


def _blend(under, over, opacity) -> np.ndarray:
  """Paints `over` on `under`; opacity int[n h w] in 0..255."""
  opacity = opacity[..., None].astype(np.int32)
  return under + ((over - under) * opacity + 127) // 255


def _place(path, layout, which: int, draws: Draws) -> np.ndarray:
  """Scales and moves glyphs to their places: pixels, [n stroke point 2]."""
  single = layout < 0
  half = np.where(single, draws.uniform(10.5, 16), draws.uniform(5, 8))
  room = np.where(single, 16.5 - half, 16.5 - half - 6)
  center = 16 + np.maximum(room, 0)[:, None] * draws.uniform(-1, 1, (2,))
  side = 2 * which - 1
  center[:, 0] = np.where(layout == 0, 16 + 7.5 * side, center[:, 0])
  center[:, 1] = np.where(layout == 1, 16 + 7.5 * side, center[:, 1])
  return center[:, None, None] + half[:, None, None, None] * path


class JftLike(DrawnBuilder):
  """Synthetic JFT-like images: multi-label, long-tailed.

  Invented glyphs, shapes, textures and colours. Each image has a label for
  everything that it shows; frequencies follow Zipf-like laws. A stand-in for
  JFT, small enough to pre-train on in minutes.
  """

  SIZES: ClassVar = {"train": 40_000, "test": 2_000}
  LABELS: ClassVar = {
    "labels": tfds.features.Sequence(
      tfds.features.ClassLabel(names=list(CLASS_NAMES))
    )
  }
  METADATA: ClassVar = {"max_labels": MAX_LABELS}
  SHUFFLED = True

  def draw(self, index):
    for image, labels in zip(*draw_images(index), strict=True):
      yield image, np.flatnonzero(labels).tolist()
