"""The `data list`, `data check` and `data show` commands."""

import concurrent.futures
import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vit_jax import data
from vit_jax.data import preprocess
from vit_jax.data.preparation import find_data_dir
from vit_jax.errors import UserError

_COLUMNS, NUM_SHOWN = 6, 24  # of the grid that `show` draws
_MIN_CELL = 96  # pixels; smaller images are enlarged
_MARGIN, _LINE = 4, 14  # pixels, around images and for the words below


# --- list ---


def list_datasets(data_dir: str | None = None) -> list[dict]:
  """Returns the prepared data sets.

  Returns:
    [{"name", "version", "format", "splits": {split: examples}}].
  """
  root = find_data_dir(data_dir)
  # TFDS writes these summaries to name/[config/]version/.
  files = {*root.glob("*/*/dataset_info.json")}
  files |= {*root.glob("*/*/*/dataset_info.json")}
  found = []
  for file in sorted(files):
    if "incomplete" in file.parent.name:
      continue
    info = json.loads(file.read_text())
    formats = [info.get("fileFormat"), *info.get("alternativeFileFormats", ())]
    ready = "array_record" in formats
    found.append(
      {
        "name": "/".join(file.parent.parent.relative_to(root).parts),
        "version": info["version"],
        "format": "array_record" if ready else formats[0],
        "splits": {
          split["name"]: sum(map(int, split.get("shardLengths", ())))
          for split in info.get("splits", ())
        },
      }
    )
  return found


# --- check ---


def check(
  name: str,
  split: str | None = None,
  data_dir: str | None = None,
  num_examples: int = 1000,
) -> Iterator[tuple[data.Source, dict]]:
  """Decodes examples and checks their labels.

  Args:
    name: a data set.
    split: one split or a part of one; None for all splits.
    data_dir: where TFDS data sets are.
    num_examples: examples to check in each split, evenly spaced; 0 for all.

  Yields:
    (source, summary) of each split. The summary has "split", "examples",
    "checked", and "height" and "width" as (least, most) in pixels. Of the
    checked examples it has "label_counts" int[k], "traits" {unexpected
    property: count} and "faults", a line for each unusable example.

  Raises:
    UserError: no such data set or split.
  """
  for part in [split] if split else data.list_splits(name, data_dir):
    faults = []
    source = data.get_source(name, part, data_dir, faults)
    yield source, _check_split(source, num_examples, faults)


def _check_split(source, num_examples, faults):
  """Returns the summary for `check`; appends to `faults`."""
  count = min(num_examples or source.num_examples, source.num_examples)
  indices = np.arange(count) * source.num_examples // max(count, 1)

  def check_example(index):
    try:
      encoded, labels, pixels = source.check_example(index)
    except UserError as e:
      faults.append(str(e))
      return None
    return labels, pixels.shape[:2], _find_traits(encoded, pixels)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    checked = [x for x in pool.map(check_example, indices.tolist()) if x]
  most = 1 if source.soft else None  # the most probable label
  labels = np.array([label for ls, *_ in checked for label in ls[:most]], int)
  sizes = [size for _, size, _ in checked] or [(0, 0)]
  heights, widths = zip(*sizes, strict=True)
  return {
    "split": source.split,
    "examples": source.num_examples,
    "checked": len(checked),
    "height": (min(heights), max(heights)),
    "width": (min(widths), max(widths)),
    "label_counts": np.bincount(labels, minlength=source.num_classes),
    "traits": Counter(trait for *_, traits in checked for trait in traits),
    "faults": faults,
  }


def _find_traits(encoded, pixels):
  """Returns properties that users may not expect."""
  traits = []
  if (pixels == pixels[0, 0]).all():
    traits.append("of one colour")
  with contextlib.suppress(Exception):  # Pillow rejects some that TF reads
    image = preprocess.open_image(encoded, "image")
    if image.has_transparency_data:
      traits.append("with transparency, put on white")
    if preprocess.read_turn(image).any():
      traits.append("rotated upright by their EXIF orientation")
    if image.mode.startswith("I") and np.asarray(image).max() < 4096:
      traits.append("16-bit with values below 4,096, so nearly black")
  return traits


# --- show ---


def show(
  name: str,
  split: str,
  *,
  preprocess: str,
  image_size: int | tuple[int, int],
  output: str,
  seed: int = 0,
  data_dir: str | None = None,
) -> Path:
  """Writes a PNG grid of training images after preprocessing.

  Args:
    name, split, data_dir: see `data.get_source`.
    preprocess, image_size: see `data.train_batches`.
    output: the file to write.
    seed: of the image order and the augmentation, like `config.seed`.

  Returns:
    The path of the file.

  Raises:
    UserError: as for training, or the file cannot be written.
  """
  source = data.get_source(name, split, data_dir)
  batches = data.train_batches(
    [(source, 1.0)],
    seed=seed,
    batch_size=NUM_SHOWN,
    rows=np.arange(NUM_SHOWN),
    preprocess=preprocess,
    image_size=image_size,
    start_step=0,
    num_steps=1,
  )
  batch = next(batches)
  most = 1 if source.soft else None  # the most probable label
  captions = [
    ", ".join(source.class_names[k] for k in labels[:most] if k >= 0)
    for labels in batch["labels"]
  ]
  grid = _draw_grid(batch["image"], captions)
  file = Path(output).expanduser()
  try:
    grid.save(file, "PNG")
  except OSError as e:
    raise UserError(f"{file} cannot be written: {e.strerror}") from e
  return file


def _draw_grid(images, captions):
  """Returns a PIL image; long captions are cut off."""
  scale = max(1, -(-_MIN_CELL // min(images.shape[1:3])))
  height, width = (side * scale for side in images.shape[1:3])
  cell = width + _MARGIN, height + _LINE + _MARGIN
  rows = NUM_SHOWN // _COLUMNS
  size = _COLUMNS * cell[0] + _MARGIN, rows * cell[1] + _MARGIN
  grid = Image.new("RGB", size, "white")
  for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
    shown = Image.new("RGB", (width, height + _LINE), "white")
    pixels = Image.fromarray(image)
    shown.paste(pixels.resize((width, height), Image.Resampling.NEAREST))
    ImageDraw.Draw(shown).text((0, height), caption, "black")
    row, column = divmod(i, _COLUMNS)
    grid.paste(shown, (column * cell[0] + _MARGIN, row * cell[1] + _MARGIN))
  return grid
