"""The `data` command: list, prepare, build, check and show data sets."""

import concurrent.futures
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_jax import data
from vit_jax.data import benchmarks, builders, preprocess
from vit_jax.data.folder import FolderSource
from vit_jax.errors import UserError
from vit_jax.tools.build_data import labelled, own_files

_MIN_CELL = 96  # pixels: smaller images are enlarged to be seen


# --- list ---


def list_datasets(data_dir: str | None = None) -> list[dict]:
  """Prints what is built in, and what is prepared.

  Returns:
    [{"name", "version", "format", "splits": {split: examples}}], prepared
    ones; built-in ones that are not have None for all but the name.
  """
  root = _resolve(data_dir)
  prepared = _find_prepared(root)
  names = {p["name"].partition("/")[0] for p in prepared}
  missing = [n for n in builders.names() if n not in names]
  print(f"prepared in {root}:")
  for p in prepared:
    splits = ", ".join(f"{k} {n:,}" for k, n in p["splits"].items())
    note = "" if p["format"] == "array_record" else f"  [{p['format']}]"
    print(f"  {p['name']}:{p['version']}  {splits}{note}")
  if not prepared:
    print("  nothing yet")
  for name in missing:
    how = "run `vit-jax data prepare"
    if name in benchmarks.BY_HAND:
      how = "by hand: see `vit-jax data check"
    print(f"built in: {name}  ({how} {name}`)")
  _print_tasks({p["name"] for p in prepared if p["format"] == "array_record"})
  print("folders of images by class: folder:PATH")
  print("ObjectNet, as it was unpacked: objectnet:PATH/images")
  print("to download: any image data set of tensorflow.org/datasets/catalog")
  unprepared = {"version": None, "format": None, "splits": None}
  return prepared + [{"name": name, **unprepared} for name in missing]


def _print_tasks(ready):
  """Prints the tasks by group, with what they wait for."""
  for title, prefix, groups in (
    ("VTAB-1k", data.VTAB, benchmarks.GROUPS),
    ("mini-VTAB, without a download", data.MINI, benchmarks.GROUPS),
    ("other test sets of the paper", "", ("",)),
  ):
    names = list(data.list_tasks(prefix)) if prefix else benchmarks.list_plain()
    splits = ", ".join(names[0].splits)
    print(f"{title}{f' (splits {splits})' if splits else ''}:")
    for group in groups:
      for task in (t for t in names if t.group == group):
        print(f"  {group:13}{task.name:27} {_say_state(task, ready)}")


def _say_state(task, ready):
  dataset = task.dataset.partition(":")[0]
  name = dataset.partition("/")[0]
  if dataset in ready:
    return "ready"
  if name in builders.names():
    return f"run `vit-jax data prepare {task.name}`"
  if name in benchmarks.BY_HAND:
    return f"by hand: see `vit-jax data check {task.name}`"
  return "to download"


def _resolve(data_dir):
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
) -> dict:
  """Makes a multi-label data set of one's own images, or goes on with it.

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
    What report.json says.

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
  root = str(_resolve(data_dir))
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
  report = json.loads((folder / "report.json").read_text())
  for what, found in report.items():
    count = found if isinstance(found, int) else len(found)
    print(f"{what:20}{count:,}")
  print(f"{name} is ready in {folder}; report.json lists what was left out")
  return report


# --- prepare ---


def prepare(name: str, data_dir: str | None = None) -> Path:
  """Has a TFDS data set ready in ArrayRecord; prints where it is.

  Returns:
    Its folder.

  Raises:
    UserError: unknown data set, or it could not be had (why).
  """
  folder = data.prepare(name, data_dir)
  print(f"{name} is ready in {folder}")
  return folder


# --- check ---


def check(
  name: str,
  split: str | None = None,
  data_dir: str | None = None,
  num_examples: int = 1000,
) -> list[dict]:
  """Decodes examples and checks their labels; prints a summary.

  Of a data set that is not there it prints what is missing, what is to be
  fetched by hand, and where that goes.

  Args:
    name: a data set.
    split: one split or a part of one; None for all splits.
    data_dir: where TFDS data sets are.
    num_examples: how many of each split, evenly spread; 0 for all.

  Returns:
    [{"split", "examples", "checked", "height", "width", "label_counts",
    "traits"}]: height and width are (least, most) in pixels, label_counts
    int[k] of the checked ones, traits {what users may not expect: how many}.

  Raises:
    UserError: no such data set or split; examples at fault, after they have all
      been printed.
  """
  task = data.find_task(name)
  if not name.startswith((data.FOLDER, data.OBJECTNET)):
    _print_needs(name, task, data.find_needs(name, data_dir))
  splits = [split] if split else _choose_splits(name, task, data_dir)
  summaries, faults = [], []
  for i, split in enumerate(splits):
    source = data.get_source(name, split, data_dir, faults)
    if i == 0:
      labels = f"up to {source.max_labels} labels" if source.multilabel else "1"
      print(
        f"{name}: {source.num_classes:,} classes "
        f"({_shorten(source.class_names)}), labels an image: {labels}"
      )
      if isinstance(source, FolderSource) and source.left_out:
        _print(f"  {source.describe_left_out()}")
    summary = _check_split(source, num_examples, faults)
    _print_summary(summary, source)
    summaries.append(summary)
  if len(faults) > 1:
    for fault in faults:
      _print(f"at fault: {fault}")
    raise UserError(f"{name}: {len(faults):,} examples are at fault, see above")
  if faults:
    raise UserError(faults[0])
  return summaries


def _print(text):
  """Prints text, also with names of files that are not UTF-8."""
  print(text.encode(errors="backslashreplace").decode())


def _print_needs(name, task, needs):
  if task:
    print(f"{name} is {task.title}{task.group and ', ' + task.group}")
    for split, text in task.splits.items():
      print(f"  {split}: {text}")
  if needs.state == "ready":
    print(f"prepared in {needs.folder}")
    return
  print(f"not ready ({needs.state}): {needs.folder}")
  if needs.state == "to convert":
    return
  for package in needs.packages:
    print(f"  takes the Python package {package}, which is not installed")
  if needs.manual_folder is None:
    print("  all of it is downloaded or made by `vit-jax data prepare`")
    return
  print(f"  fetched by hand, into {needs.manual_folder}:")
  for file, there in needs.manual_files.items():
    print(f"    {file}  {'there' if there else 'missing'}")
  print(f"  TFDS says: {needs.instructions}")


def _choose_splits(name, task, data_dir):
  """Those of VTAB's names that overlap least, else all that there are."""
  if task and "train800val200" in task.splits:
    return ["train800val200", "test"]
  return list(data.list_splits(name, data_dir))


def _check_split(source, num_examples, faults):
  """Returns what `check` does; adds a line to `faults` for each fault."""
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


def _print_summary(summary, source):
  counts = summary["label_counts"]
  rarest, commonest = int(counts.argmin()), int(counts.argmax())
  names = source.class_names
  print(
    f"  {summary['split']}: {summary['examples']:,} examples, "
    f"{summary['checked']:,} checked and sound\n"
    f"    height {_range(summary['height'])}, width "
    f"{_range(summary['width'])} pixels\n"
    f"    of these, {counts[rarest]:,} show {names[rarest]!r} (the fewest) "
    f"and {counts[commonest]:,} {names[commonest]!r} (the most)"
  )
  for trait, count in summary["traits"].most_common():
    print(f"    {count:,} {trait}")


def _range(pair):
  low, high = pair
  return str(low) if low == high else f"{low} to {high}"


def _shorten(names, limit=5):
  more = ", ..." if len(names) > limit else ""
  return ", ".join(names[:limit]) + more


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
) -> Path:
  """Writes a PNG grid of images as the model sees them while training.

  Args:
    name, split, data_dir: what to show.
    preprocess, image_size: what is done to it.
    output: the file to write.
    columns, rows: of the grid.
    seed: decides the choice and the augmentation, as `config.seed` does.

  Returns:
    The file.

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
  print(f"{count} images of {name} {split} are in {file}")
  return file


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
