"""Data sets: listed, built, checked and shown."""

import concurrent.futures
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_jax import data
from vit_jax.data import builders, preprocess
from vit_jax.errors import UserError
from vit_jax.tools.build_data import labelled, own_files

_MIN_CELL = 96  # pixels: smaller images are enlarged to be seen


# --- list ---


def list_datasets(data_dir: str | None = None) -> list[dict]:
  """Returns the prepared data sets, then the other built-in ones.

  Returns:
    [{"name", "version", "format", "splits": {split: examples}}]; built-in ones
    that are not prepared have None for all but the name.
  """
  prepared = _find_prepared(resolve(data_dir))
  names = {p["name"].partition("/")[0] for p in prepared}
  missing = [n for n in builders.names() if n not in names]
  unprepared = {"version": None, "format": None, "splits": None}
  return prepared + [{"name": name, **unprepared} for name in missing]


def resolve(data_dir: str | None) -> Path:
  """Returns the folder of TFDS data sets; None: TFDS's default."""
  if data_dir is None:
    data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
  return Path(data_dir).expanduser()


def _find_prepared(root):
  """Reads the summaries that TFDS leaves in name/[config/]version/."""
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


# --- build ---


def build(
  name: str,
  *,
  images: str,
  labels: str | None = None,
  classes: str | None = None,
  min_confidence: float = 0.0,
  against: list[str] | None = None,
  holdout: float = 0.0,
  workers: int | None = None,
  data_dir: str | None = None,
) -> tuple[Path, dict]:
  """Makes a multi-label data set of your images, or resumes making it.

  Args:
    name: of the new data set.
    images: a folder, tar or Parquet files, or "tfds:DATASET:SPLIT"; see
      `data.own_files`.
    labels: a CSV or JSON-lines file; None for a data set's own.
    classes: a file with a class a line; None: those that occur.
    min_confidence: labels of less are left out.
    against: "DATASET:SPLIT", test sets whose images must not be in it.
    holdout: part of the images that become the split "test".
    workers: processes; None: one a core.
    data_dir: where TFDS data sets are.

  Returns:
    Its folder, and the content of report.json.

  Raises:
    UserError: nothing to read, bad labels, or a name that is taken.
    RunStopped: the disk is full, or a worker died; the same call goes on.
  """
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise UserError(
      f"{name!r} is no name of a data set; use lower-case letters, digits and _"
    )
  if not 0 <= holdout < 1:
    raise UserError(f"--holdout is {holdout}; it must be in [0, 1)")
  root = str(resolve(data_dir))
  pairs = [own_files.parse_pair(text, "--against") for text in against or []]
  if images.startswith(own_files.TFDS):
    if labels or classes or min_confidence:
      raise UserError(f"--images {images} has labels of its own; leave others")
    class_names, by_image = own_files.open_set(images, root).class_names, None
  elif labels:
    class_names, by_image = own_files.read_labels(
      labels, classes, min_confidence
    )
  else:
    raise UserError("--labels is missing: a CSV or JSON-lines file")
  plan = labelled.Plan(name, images, class_names, by_image, pairs, holdout)
  folder = labelled.build(plan, root, workers)
  return folder, json.loads((folder / "report.json").read_text())


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
    num_examples: how many of each split, evenly spread; 0 for all.

  Yields:
    For each split it and {"split", "examples", "checked", "height", "width",
    "label_counts", "traits", "faults"}: height and width are (least, most) in
    pixels, label_counts int[k] of the checked ones, traits {what users may not
    expect: how many}, faults a line for each example that cannot be used.

  Raises:
    UserError: no such data set or split.
  """
  task = data.find_task(name)
  for part in [split] if split else _choose_splits(name, task, data_dir):
    faults = []
    source = data.get_source(name, part, data_dir, faults)
    yield source, _check_split(source, num_examples, faults)


def _choose_splits(name, task, data_dir):
  """Those of VTAB's names that overlap least, else all that there are."""
  if task and "train800val200" in task.splits:
    return ["train800val200", "test"]
  return list(data.list_splits(name, data_dir))


def _check_split(source, num_examples, faults):
  """Returns a summary, see `check`; adds to `faults`."""
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
  labels = np.array([label for ls, *_ in checked for label in ls], int)
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
  try:
    image = preprocess.open_image(encoded, "image")
    if image.has_transparency_data:
      traits.append("with transparency, put on white")
    if preprocess.read_turn(image).any():
      traits.append("turned upright as their EXIF says")
    if image.mode.startswith("I") and np.asarray(image).max() < 4096:
      traits.append("16-bit with values below 4,096, so nearly black")
  except Exception:  # Pillow may not read what TensorFlow does
    return traits
  return traits


# --- show ---


def show(
  name: str,
  split: str = "train",
  *,
  preprocess: str = "inception_crop(size)|flip_lr",
  image_size: int | tuple[int, int] = 224,
  output: str = "show.png",
  columns: int = 6,
  rows: int = 4,
  seed: int = 0,
  data_dir: str | None = None,
) -> tuple[Path, int]:
  """Writes a PNG grid of images as the model sees them while training.

  Args:
    name, split, data_dir: what to show.
    preprocess, image_size: what is done to it.
    output: the file to write.
    columns, rows: of the grid.
    seed: decides the choice and the augmentation, as `config.seed` does.

  Returns:
    The file, and the number of images.

  Raises:
    UserError: as for training; the file cannot be written.
  """
  source = data.get_source(name, split, data_dir)
  count = columns * rows
  batches = data.train_batches(
    [(source, 1.0)],
    seed=seed,
    batch_size=count,
    rows=np.arange(count),
    preprocess=preprocess,
    image_size=image_size,
    start_step=0,
    num_steps=1,
  )
  batch = next(batches)
  captions = [
    ", ".join(source.class_names[k] for k in labels if k >= 0)
    for labels in batch["labels"]
  ]
  grid = _draw_grid(batch["image"], captions, columns)
  file = Path(output).expanduser()
  try:
    grid.save(file, "PNG")
  except OSError as e:
    raise UserError(f"{file} cannot be written: {e.strerror}") from e
  return file, count


def _draw_grid(images, captions, columns):
  """Returns a PIL image; captions that are too long lose their end."""
  height, width = images.shape[1:3]
  scale = max(1, -(-_MIN_CELL // min(height, width)))
  height, width = height * scale, width * scale
  margin, line = 4, 14
  cell_height, cell_width = height + line + margin, width + margin
  num_rows = -(-len(images) // columns)
  grid = Image.new(
    "RGB",
    (columns * cell_width + margin, num_rows * cell_height + margin),
    "white",
  )
  draw, font = ImageDraw.Draw(grid), ImageFont.load_default()
  for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
    y = i // columns * cell_height + margin
    x = i % columns * cell_width + margin
    pixels = Image.fromarray(image)
    grid.paste(pixels.resize((width, height), Image.Resampling.NEAREST), (x, y))
    draw.text((x, y + height), _fit(caption, width, font), "black", font)
  return grid


def _fit(caption, width, font):
  if font.getlength(caption) <= width:
    return caption
  while caption and font.getlength(caption + "...") > width:
    caption = caption[:-1]
  return caption + "..."
