"""Measures `vit-jax data build`; docs/your_images.md has the results.

  python benchmarks/data_build.py

draws a test set and 20,000 images, some of which are altered copies of test
images, builds the set, and prints a table. If apache-beam is installed, it also
builds the set with Beam. If scikit-image is installed, it also searches for
altered copies of photographs from scikit-image and scikit-learn (PHOTOS=1 runs
only this part). tests/unit/tools/labelled_test.py uses fewer images.
"""

import os

if __name__ == "__main__":
  os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as the workers of a build have it

import concurrent.futures
import hashlib
import importlib.util
import io
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn import datasets as sklearn_datasets

from vit_jax.data.catalog import get_source
from vit_jax.tools.build_data import near_duplicates

_REPO = Path(__file__).parents[1]
_CHUNK = 250  # images that a process draws or decodes at a time
_MOST = 8  # pixels cropped off a side, at most
_INDEX = 50_000  # test images of ImageNet

# Changes of copies, all equally frequent.
KINDS = (
  *(f"resized by {x}" for x in (0.4, 0.7, 1.5, 2)),
  *(f"encoded anew, JPEG quality {x}" for x in (30, 60, 90)),
  f"cropped by 0 to {_MOST} pixels a side",
  "mirrored",
  "resized by 0.4 to 2, JPEG quality 30 to 90",
  "cropped, mirrored",
  "cropped, mirrored, resized by 0.4 to 2, JPEG quality 30 to 90",
)
RUINS = ("cut short", "a text", "empty")
# Files of scikit-image that are photographs.
PHOTOS = {
  "of things": (
    *("astronaut", "camera", "chelsea", "coffee", "coins", "ihc", "moon"),
    *("motorcycle_left", "retina", "rocket"),
  ),
  "of textures, text, stars, a cell": (
    *("brick", "cell", "grass", "gravel", "hubble_deep_field", "page", "text"),
  ),
}
_BEAM = (
  "--beam_runner=DirectRunner",
  "--beam_options=direct_running_mode=multi_processing,direct_num_workers=",
)


# --- pictures ---


def draw(seed: int) -> Image.Image:
  """Returns a picture of 200 to 500 pixels: ground, shapes, texture, grain."""
  rng = np.random.default_rng(seed)
  size = tuple(rng.integers(200, 501, 2).tolist())

  def noise(cells):
    grid = rng.integers(0, 256, (cells, cells, 3), np.uint8)
    return Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)

  picture = noise(int(rng.integers(2, 7)))
  pen = ImageDraw.Draw(picture)
  for _ in range(rng.integers(0, 9)):
    (x, y), (w, h) = rng.uniform(-0.1, 0.9, 2), rng.uniform(0.05, 0.5, 2)
    box = np.array([x, y, x + w, y + h]) * (size * 2)
    shape = (pen.ellipse, pen.rectangle)[rng.integers(2)]
    shape(box.tolist(), fill=tuple(rng.integers(0, 256, 3).tolist()))
  texture = noise(int(rng.integers(16, 65)))
  picture = Image.blend(picture, texture, rng.uniform(0.05, 0.3))
  grain = Image.frombytes("RGB", size, rng.bytes(3 * size[0] * size[1]))
  return Image.blend(picture, grain, rng.uniform(0.02, 0.08))


def change(image: Image.Image, kind: str, seed: int) -> tuple[Image.Image, int]:
  """Returns a copy, changed as one of KINDS, and its JPEG quality."""
  rng = np.random.default_rng(seed)
  quality, scale = 92, 1.0
  if "cropped" in kind:
    left, top, right, bottom = rng.integers(0, _MOST + 1, 4).tolist()
    box = (left, top, image.width - right, image.height - bottom)
    image = image.crop(box)
  if "mirrored" in kind:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if "0.4 to 2" in kind:
    scale = rng.uniform(0.4, 2)
  elif "resized" in kind:
    scale = float(kind.split()[-1])
  if scale != 1:
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
  if "30 to 90" in kind:
    quality = int(rng.integers(30, 91))
  elif "quality" in kind:
    quality = int(kind.split()[-1])
  return image, quality


# --- files ---


def make_files(root: Path, images: int, tests: int, workers: int) -> dict:
  """Writes root/tests, root/images and a labels file for each.

  Returns:
    {name: kind} of the images that are copies or ruined. One in 20 is a copy,
    one in 300 cannot be read.
  """
  planted = {}
  for i in range(0, images, 20):
    planted[i] = KINDS[i // 20 % len(KINDS)]
  for i in range(7, images, 300):
    planted[i] = RUINS[i // 300 % len(RUINS)]
  jobs = [(root, "tests", i, {}) for i in range(0, tests, _CHUNK)]
  jobs += [(root, "images", i, planted) for i in range(0, images, _CHUNK)]
  jobs = [(*job, images, tests) for job in jobs]
  for name, count in (("tests", tests), ("images", images)):
    rows = [f"{_name(i)},label{i % 5}\n" for i in range(count)]
    (root / f"{name}.csv").write_text("image,label\n" + "".join(rows))
  with _open_pool(workers) as pool:
    list(pool.map(_make_some, jobs))
  return {_name(i): kind for i, kind in planted.items()}


def _open_pool(workers):
  return concurrent.futures.ProcessPoolExecutor(
    workers, mp_context=multiprocessing.get_context("spawn")
  )


def _name(i):
  return f"{i % 100:02}/{i:06}.jpg"


def _make_some(job):
  root, which, start, planted, images, tests = job
  first = images if which == "tests" else 0  # other seeds: other pictures
  count = tests if which == "tests" else images
  for i in range(start, min(start + _CHUNK, count)):
    file = root / which / _name(i)
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = planted.get(i)
    if kind in KINDS:
      image, quality = change(draw(images + i // 20 % tests), kind, i)
    else:
      image, quality = draw(first + i), 75 + i % 20
    image.save(file, "JPEG", quality=quality)
    if kind in RUINS:
      whole = file.read_bytes()
      ruins = (whole[: len(whole) * 2 // 3], b"This is no image.", b"")
      file.write_bytes(ruins[RUINS.index(kind)])


# --- the build ---


def build(root: Path, name: str, source: str, *options: str) -> np.ndarray:
  """Runs the command; returns its wall-clock and CPU seconds."""
  command = [sys.executable, "-m", "vit_jax", "data", "build", name]
  command += [f"--images={root / source}", f"--labels={root / source}.csv"]
  command += [f"--data_dir={root / 'data'}", *options]
  env = os.environ | {"PYTHONPATH": str(_REPO)}
  start = _read_clocks()
  subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
  return _read_clocks() - start


def _read_clocks():
  used = os.times()
  return np.array([used.elapsed, used.children_user + used.children_system])


def read_report(root: Path, name: str) -> dict:
  """Returns the report of a build, which lists skipped images."""
  file = root / "data" / name / "1.0.0" / "report.json"
  return json.loads(file.read_text())


def count_differences(root: Path, name: str, other: str) -> int:
  """Returns how many examples are in only one of two data sets."""
  one, two = (Counter(read_all(root, x, "train")) for x in (name, other))
  return ((one - two) + (two - one)).total()


def read_all(root: Path, name: str, split: str) -> list[tuple[str, str]]:
  """Returns (digest of the encoded image, labels) of a split's examples.

  Bytes of records are not compared, because Protocol Buffers do not specify the
  order of features.
  """
  source = get_source(name, split, str(root / "data"))
  examples = map(source.read_example, range(source.num_examples))
  return [
    (hashlib.sha256(x).hexdigest(), str(labels)) for x, labels in examples
  ]


# --- speeds ---


def measure_decoding(folder: Path, workers: int) -> float:
  """Returns images/s of decoding alone, with this many processes."""
  files = sorted(folder.rglob("*.jpg"))
  chunks = [files[i : i + _CHUNK] for i in range(0, len(files), _CHUNK)]
  with _open_pool(workers) as pool:
    list(pool.map(_decode_some, [[]] * workers))  # all have started
    start = time.monotonic()
    list(pool.map(_decode_some, chunks))
    return len(files) / (time.monotonic() - start)


def _decode_some(files):
  for file in files:
    try:
      Image.open(file).convert("RGB")
    except Exception:  # of corrupt files
      continue


def measure_comparing(folder: Path, tests: int) -> float:
  """Returns images/s of near-duplicate search alone, in one process."""
  rng = np.random.default_rng(0)

  def make_one():
    cells = rng.integers(3, 17)
    grid = rng.integers(0, 256, (cells, cells, 3), np.uint8)
    return near_duplicates.make_thumbnail(Image.fromarray(grid))

  thumbnails = np.stack([make_one() for _ in range(tests)])
  index = near_duplicates.Index.make([""] * tests, thumbnails)
  files = [file for file in sorted(folder.rglob("*.jpg")) if _is_whole(file)]
  asked = [near_duplicates.make_thumbnail(Image.open(f)) for f in files[:640]]
  start = time.monotonic()
  for i in range(0, len(asked), 32):
    index.find(np.stack(asked[i : i + 32]))
  return len(asked) / (time.monotonic() - start)


def _is_whole(file):
  return file.read_bytes().endswith(b"\xff\xd9")


def count_digits() -> tuple[int, int]:
  """Searches for near-duplicates of half of the digits in the other half.

  Returns:
    How many are found, and of how many.
  """
  pixels = (sklearn_datasets.load_digits().images * 255 / 16).astype(np.uint8)
  thumbnails = np.stack(
    [near_duplicates.make_thumbnail(Image.fromarray(x)) for x in pixels]
  )
  half = len(pixels) // 2
  index = near_duplicates.Index.make([""] * half, thumbnails[:half])
  found = index.find(thumbnails[half:])
  return sum(twin is not None for twin in found), len(found)


# --- photographs ---


def list_photos() -> list[tuple[str, Image.Image]]:
  """Returns photographs of scikit-image and scikit-learn, and their quarters.

  Each comes with its key in PHOTOS. A quarter is not a copy of the whole.
  """
  import skimage

  photos = [
    (group, Image.open(file).convert("RGB"))
    for group, names in PHOTOS.items()
    for file in sorted((Path(skimage.__file__).parent / "data").iterdir())
    if file.stem in names
  ]
  samples = sklearn_datasets.load_sample_images().images
  photos += [("of things", Image.fromarray(pixels)) for pixels in samples]
  found = []
  for group, photo in photos:
    width, height = photo.size
    x, y = width // 2, height // 2
    boxes = [(0, 0, x, y), (x, 0, width, y)]
    boxes += [(0, y, x, height), (x, y, width, height)]
    found += [(group, part) for part in (photo, *map(photo.crop, boxes))]
  return found


def measure_photos() -> dict:
  """Searches for altered copies of photographs, among them and among others.

  Returns:
    {kind: {group of PHOTOS: [found, of]}}; "false": others that were found.
  """
  photos = list_photos()
  originals = [near_duplicates.make_thumbnail(photo) for _, photo in photos]
  found = {kind: {x: [0, 0] for x in PHOTOS} for kind in (*KINDS, "false")}
  for half in (0, 1):
    names = range(half, len(photos), 2)
    index = near_duplicates.Index.make(names, [originals[i] for i in names])
    for k, kind in enumerate(KINDS):
      for i, (group, photo) in enumerate(photos):
        image, quality = change(photo, kind, 1000 * k + i)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        thumbnail = near_duplicates.make_thumbnail(Image.open(out))
        [twin] = index.find(thumbnail[None])
        is_in = i % 2 == half
        count = found[kind if is_in else "false"][group]
        count[0] += bool(twin) and (not is_in or twin[0] == str(i))
        count[1] += 1
  return found


# --- all of it ---


def measure(root: Path, images: int, tests: int, workers: int) -> dict:
  """Returns all measurements; see `format_tables`."""
  planted = make_files(root, images, tests, workers)
  own = f"--workers={workers}"
  build(root, "tests", "tests", own)
  seconds = build(root, "whole", "images", own, "--against=tests:train")
  report = read_report(root, "whole")
  twins = {name: twin for name, twin, _ in report["twins"]}
  copies = {n: kind for n, kind in planted.items() if kind in KINDS}
  originals = _list_originals(root, tests)
  right = {
    n
    for n in copies
    if originals.get(twins.get(n)) == _name(int(Path(n).stem) // 20 % tests)
  }
  return {
    "images": images,
    "tests": tests,
    "workers": workers,
    "whole": seconds / images,
    **measure_beam(root, images, workers),
    "decoding": measure_decoding(root / "images", workers),
    "comparing": measure_comparing(root / "images", _INDEX),
    "ruined": sum(kind in RUINS for kind in planted.values()),
    "listed": len({n for n, _ in report["unreadable"]} & planted.keys()),
    "unreadable": len(report["unreadable"]),
    "found": {
      kind: [sum(copies[n] == kind for n in names) for names in (right, copies)]
      for kind in KINDS
    },
    "false": len(twins.keys() - copies.keys()),
    "strangers": images - len(planted),
    "digits": count_digits(),
  }


def measure_beam(root: Path, images: int, workers: int) -> dict:
  """Builds the set with Apache Beam; {} if that is not installed."""
  if not importlib.util.find_spec("apache_beam"):
    return {}
  beam = (_BEAM[0], f"{_BEAM[1]}{workers}", "--against=tests:train")
  seconds = build(root, "beam", "images", *beam)
  same = read_report(root, "beam") == read_report(root, "whole")
  assert same, "Beam's report differs"
  different = count_differences(root, "beam", "whole")
  return {"beam": seconds / images, "different": different}


def _list_originals(root, tests) -> dict[str, str]:
  """Returns {name in the index: file name} of the test images."""
  source = get_source("tests", "train", str(root / "data"))
  names = {
    hashlib.sha256((root / "tests" / _name(i)).read_bytes()).digest(): _name(i)
    for i in range(tests)
  }
  return {
    f"tests:train:{i}": names[hashlib.sha256(encoded).digest()]
    for i in range(source.num_examples)
    for encoded, _ in [source.read_example(i)]
  }


def format_builds(x: dict) -> dict:
  """Returns rows of a table."""

  def say(seconds):
    return f"{1 / seconds[0]:.0f} images/s, {1000 * seconds[1]:.1f} ms of CPU"

  name = f"{x['images']:,} JPEGs, {x['workers']} processes"
  rows = {name: say(x["whole"])}
  if "beam" in x:
    rows[f"{name} of Beam's DirectRunner"] = say(x["beam"])
    rows["examples that only one of the two has"] = x["different"]
  return rows


def format_photos(x: dict) -> str:
  """Returns Markdown."""
  rows = [("copies found", *PHOTOS), ("---",) * (1 + len(PHOTOS))]
  for kind, groups in x.items():
    name = "false alarms: other photographs" if kind == "false" else kind
    rows.append((name, *(f"{n} of {of:,}" for n, of in groups.values())))
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def format_tables(x: dict) -> str:
  """Returns Markdown."""

  def say(speed):
    return f"{speed:.0f} images/s"

  wrong, digits = x["digits"]
  rows = {
    "": "",
    "---": "---",
    **format_builds(x),
    "decoding alone, as many processes": say(x["decoding"]),
    f"comparing with {_INDEX:,} test images, one process": say(x["comparing"]),
    "unreadable files listed": f"{x['listed']} of {x['ruined']}",
    **{
      f"copies found: {kind}": f"{right} of {count}"
      for kind, (right, count) in x["found"].items()
    },
    "false alarms: other pictures": f"{x['false']} of {x['strangers']:,}",
    "false alarms: other digits of 8 x 8 pixels": f"{wrong} of {digits}",
  }
  return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


if __name__ == "__main__":
  if importlib.util.find_spec("skimage"):
    print(format_photos(measure_photos()))
  if "PHOTOS" not in os.environ:
    with tempfile.TemporaryDirectory() as folder:
      found = measure(Path(folder), 20_000, tests=1_000, workers=os.cpu_count())
    print(format_tables(found))
