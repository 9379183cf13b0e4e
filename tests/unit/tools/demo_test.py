"""The demo: what it shows, and the page itself in a real browser.

In the browser the command runs as a user starts it, in a process of its own,
and everything is done through the page.
"""

import base64
import hashlib
import io
import os
import shutil
import signal
import socket
import sys
import time

import numpy as np
import pytest
from browser import PHONE
from PIL import Image
from random_models import random_weights
from tiny_runs import REPO, Process, find_port

from vit_jax import pretrained
from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.evaluation.predict import predict
from vit_jax.state import as_lazy, flatten
from vit_jax.tools import demo

# One that HTML and two that a dictionary would make something else of.
NAMES = ["crane", "a <b>wren</b> & co", "crane", "${1+1}", "tern, bird"]


def make_weights(variant="ViT-w16d2m24h2_8", **changes):
  """Returns random weights for images of 32 pixels."""
  weights = random_weights(variant, 32, len(NAMES))
  params = {path: as_lazy(x) for path, x in changes.pop("params", {}).items()}
  return weights._replace(
    class_names=NAMES,
    preprocess="resize_small(40)|central_crop(size)",
    params={**weights.params, **params},
  )._replace(**changes)


def write(folder, *args, **kwargs):
  pretrained.write(make_weights(*args, **kwargs), str(folder), "orbax")
  return str(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
  return write(tmp_path_factory.mktemp("demo") / "vit")


def encode(kind="PNG", mode="RGB", shape=(50, 70), seed=0, **options):
  """Returns the bytes of an image file with smooth random colours."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
  image = Image.fromarray(coarse).resize(shape[::-1]).convert(mode)
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


# --- what it shows ---


@pytest.mark.ci
def test_classes_are_those_of_predict(checkpoint, tmp_path):
  file = tmp_path / "bird.jpg"
  file.write_bytes(encode("JPEG"))
  copy = shutil.copytree(checkpoint, tmp_path / "copy")
  viewer = demo.Viewer(str(copy))
  shutil.rmtree(copy)  # as where a run writes a better one
  found = viewer.view(file.read_bytes(), "bird.jpg", (32, 32))
  assert found.classes == predict(checkpoint, [str(file)])[0]["classes"]
  assert found.seen.shape == (480, 480, 3)
  # Another resolution shows as much of the picture, and moves both.
  assert viewer.sizes == [(16, 16), (24, 24), (32, 32), (48, 48), (64, 64)]
  other = viewer.view(file.read_bytes(), "bird.jpg", (64, 64))
  assert other.classes != found.classes
  assert not np.array_equal(other.seen, found.seen)
  # There is one set of weights, but for the position embedding.
  first, second = (
    flatten(viewer._at(size)[0].params) for size in ((32, 32), (64, 64))
  )
  (own,) = (path for path in first if first[path] is not second[path])
  assert own.endswith("pos_embedding")


def test_sizes_are_whole_patches_and_not_too_many():
  about = pretrained.describe(make_weights())
  list_sizes = demo.list_sizes
  wide = about._replace(grid=(2, 3), image_size=(16, 24))
  assert list_sizes(wide) == [(8, 16), (16, 16), (16, 24), (24, 32), (32, 48)]
  # ViT-L/16 at 512 pixels: 1,024 patches, twice as far they would be 4,096.
  large = about._replace(patch=16, grid=(32, 32), image_size=(512, 512))
  assert list_sizes(large) == [(256, 256), (384, 384), (512, 512)]
  # The checkpoint's own is there whatever it is.
  huge = about._replace(patch=14, grid=(64, 64), image_size=(896, 896))
  assert list_sizes(huge)[-1] == (896, 896)


@pytest.mark.ci
def test_what_a_checkpoint_cannot_show(tmp_path):
  encoded = encode()
  zeros = {"head/kernel": np.zeros((16, 5), np.float32)}
  viewer = demo.Viewer(write(tmp_path / "zeros", params=zeros))
  assert "the head is all zeros" in viewer.note
  found = viewer.view(encoded, "", (32, 32))
  assert not found.classes
  assert found.seen is not None

  resnet = demo.Viewer(write(tmp_path / "resnet", "RNx1"))
  assert resnet.note == (
    "RNx1 is a ResNet, which has no attention: classes only"
  )
  found = resnet.view(encoded, "", (32, 32))
  assert len(found.classes) == 5
  assert found.seen is None


@pytest.mark.ci
def test_nothing_to_show(tmp_path):
  params = {
    name: x
    for name, x in make_weights("RNx1").params.items()
    if not name.startswith("head/")
  }
  weights = make_weights("RNx1", num_classes=0, class_names=None)
  weights = weights._replace(params=params)
  pretrained.write(weights, str(tmp_path / "bare"), "orbax")
  with pytest.raises(UserError, match=r"no head: .*; and RNx1 is a ResNet"):
    demo.Viewer(str(tmp_path / "bare"))


def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path):
  def run(*args):
    assert main(["demo", f"--checkpoint={tmp_path}", *args]) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    return line

  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    assert run() == (
      "error: vit-jax demo needs gradio, which is not installed: "
      "pip install 'vit_jax[demo]'"
    )
  monkeypatch.setattr(demo, "_import_gradio", lambda: None)
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    line = run(f"--port={port}")
    assert f"nothing can listen at 127.0.0.1, port {port}: " in line
    assert "in use" in line
  assert "give another --host or --port" in run("--host=192.0.2.1")
  assert "give another --host or --port" in run("--port=70000")
  assert "no checkpoint at" in run()


# --- the page ---


class Served:
  """The command, running.

  Attributes:
    url: of the page.
    uploads: the folder where uploaded files are.
    process: the command.
  """

  def __init__(self, checkpoint, folder):
    self.uploads = folder / "uploads"
    # Whom it asks for anything on the internet: nobody, see `close`.
    self._proxy = socket.create_server(("127.0.0.1", 0))
    proxy = f"http://127.0.0.1:{self._proxy.getsockname()[1]}"
    port = find_port()
    self.url = f"http://127.0.0.1:{port}/"
    self.process = Process(
      [
        *(sys.executable, "-m", "vit_jax", "demo"),
        *(f"--checkpoint={checkpoint}", f"--port={port}"),
      ],
      {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "GRADIO_TEMP_DIR": str(self.uploads),
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1"),
      },
    )
    deadline = time.monotonic() + 120
    while self.process.is_running() and not self.process.stdout():
      assert time.monotonic() < deadline
      time.sleep(0.1)

  def close(self, how=signal.SIGINT):
    """Ends it, with Ctrl-C or otherwise; what was uploaded is gone then."""
    self.process.send(how)
    assert self.process.wait() == 0, self.process.stderr()
    assert not [path for path in self.uploads.rglob("*") if path.is_file()]
    assert (
      self.process.stdout() == f"{self.url} shows the demo; Ctrl-C ends it\n"
    )
    assert "Traceback" not in self.process.stderr()
    self._proxy.setblocking(False)
    with self._proxy, pytest.raises(BlockingIOError):
      self._proxy.accept()


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
  served = Served(checkpoint, tmp_path_factory.mktemp("served"))
  yield served
  served.close()


@pytest.fixture
def open_demo(served, open_page):
  """Opens the page."""
  return lambda **options: open_served(served, open_page, **options)


def open_served(served, open_page, **options):
  # Gradio stops reading its queue's event stream when nothing is due, and an
  # upload may be complete before the stream of its progress is opened.
  names = ("queue/data", "upload_progress")
  streams = [f"{served.url}gradio_api/{name}?" for name in names]
  page = open_page(served.url, streams=streams, **options)
  page.get_by_text("Drop, paste or choose a picture.").wait_for()
  page.get_by_label("Drop an image file here to upload").wait_for()
  return page


# What the page shows: [[class, percent], ...] or a message or null, and the
# address of the map or null.
READ = """() => {
  const box = document.querySelector('#classes');
  const rows = [...box.querySelectorAll('tr')].map(row =>
    [...row.querySelectorAll('th, td:last-child')].map(x => x.innerText));
  const map = document.querySelector('img[alt^="What the model is given"]');
  const message = box.querySelector('[role=alert]');
  return [rows.length ? rows : message && message.innerText, map && map.src];
}"""
NEWS = f"""old => {{
  const [text, map] = ({READ})();
  return (typeof text == 'string' && text != old[0])
    || (text && String(text) != String(old[0]) && map && map != old[1]);
}}"""


def give(page, file):
  """Uploads a file in place of what is there; returns what the page shows."""
  if page.get_by_label("Remove Image").count():
    remove(page)
  page.locator("input[type=file]").first.set_input_files(file)
  return wait_for_news(page, [None, None])


def remove(page):
  page.get_by_label("Remove Image").click()
  page.get_by_text("Drop, paste or choose a picture.").wait_for()


def wait_for_news(page, old):
  """Waits until the page shows other than `old`, and returns it."""
  page.wait_for_function(NEWS, arg=old)
  return page.evaluate(READ)


def judge(checkpoint, file):
  """Returns what the page has to say of a file, by `predict`."""
  (found,) = predict(checkpoint, [str(file)], top=demo.TOP)
  if "error" in found:
    return found["error"].replace(str(file), file.name)
  return as_shown(found["classes"])


def as_shown(classes):
  return [[c["name"], f"{c['probability']:.2%}"] for c in classes]


def make_turn():
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  return exif


def make_animation():
  later = Image.new("RGB", (70, 50), "blue")
  return encode("GIF", save_all=True, append_images=[later])


def make_huge():
  file = io.BytesIO()
  Image.new("1", (10_100, 10_000)).save(file, "PNG")
  return file.getvalue()


PICTURES = {
  "bird.jpg": lambda: encode("JPEG", quality=60),
  "turned.jpg": lambda: encode("JPEG", exif=make_turn()),
  "print.jpg": lambda: encode("JPEG", "CMYK"),
  "deep.png": lambda: encode("PNG", "I;16"),
  "clear.png": lambda: encode("PNG", "RGBA"),
  "moving.gif": make_animation,
  "tiny.png": lambda: encode(shape=(1, 1)),
  "strip.webp": lambda: encode("WEBP", shape=(9, 300)),
  "text.jpg": lambda: b"This is no picture, whatever its name says.",
  "empty.png": lambda: b"",
  "cut.jpg": lambda: encode("JPEG", shape=(64, 64))[:-300],
  "<b>bold.png": lambda: b"no",
  "huge.png": make_huge,
}
GOOD = tuple(PICTURES)[:8]
SAYS = {
  "text.jpg": "text.jpg: not a readable image (UnidentifiedImageError); give a "
  "whole JPEG, PNG or WebP file",
  "huge.png": "huge.png: 10100x10000 is too many pixels, the limit is "
  "89,478,485; give a smaller image",
}


@pytest.mark.ci
def test_uploads_are_judged_as_by_predict(
  served, open_demo, checkpoint, tmp_path
):
  page = open_demo()
  for name, make in PICTURES.items():
    file = tmp_path / name
    file.write_bytes(make())
    found, _ = give(page, file)
    assert found == judge(checkpoint, file), name
    assert (name in GOOD) == isinstance(found, list)
    assert found == SAYS.get(name, found)
  # Where gradio's own reading would have changed it, too.
  given = {hashlib.sha256(f.read_bytes()).digest() for f in tmp_path.iterdir()}
  kept = [f for f in served.uploads.rglob("*") if f.is_file()]
  assert given <= {hashlib.sha256(f.read_bytes()).digest() for f in kept}
  # After what was no picture the next one is judged as ever.
  good = tmp_path / "bird.jpg"
  assert give(page, good)[0] == judge(checkpoint, good)
  remove(page)
  assert page.evaluate(READ) == [None, None]
  assert "Traceback" not in served.process.stderr()


@pytest.mark.ci
def test_resolution_moves_classes_and_map(open_demo, checkpoint, tmp_path):
  file = tmp_path / "bird.jpg"
  file.write_bytes(encode("JPEG"))
  page = open_demo()
  found = {"32 px": give(page, file)}
  for label in ("64 px", "16 px", "32 px"):
    old = page.evaluate(READ)
    page.get_by_label(label).check()
    again = wait_for_news(page, old)
    assert again == found.setdefault(label, again)
  assert len({str(classes) for classes, _ in found.values()}) == 3
  assert len({seen for _, seen in found.values()}) == 3
  viewer = demo.Viewer(checkpoint)
  expected = viewer.view(file.read_bytes(), "", (64, 64)).classes
  assert found["64 px"][0] == as_shown(expected)


@pytest.mark.ci
def test_by_keyboard_alone(open_demo, tmp_path):
  file = tmp_path / "bird.jpg"
  file.write_bytes(encode("JPEG"))
  page = open_demo()

  def tab_to(selector):
    for _ in range(20):
      page.keyboard.press("Tab")
      if page.evaluate("s => document.activeElement.matches(s)", selector):
        return
    raise AssertionError(f"no way to {selector}")

  tab_to("button[aria-label^=Drop]")
  # Gradio draws the button some time before it listens to it.
  chosen = []
  page.on("filechooser", lambda chooser: chosen.append(chooser))
  for _ in range(30):
    page.keyboard.press("Enter")
    page.wait_for_timeout(1000)
    if chosen:
      break
  chosen[0].set_files(file)
  old = wait_for_news(page, [None, None])
  # To gradio each choice is a stop of its own.
  tab_to("input[type=radio]:checked")
  page.keyboard.press("Tab")
  page.keyboard.press("Space")
  wait_for_news(page, old)
  assert page.get_by_label("48 px").is_checked()


@pytest.mark.ci
def test_pasted_from_the_clipboard(open_demo, checkpoint, tmp_path):
  file = tmp_path / "bird.png"
  file.write_bytes(encode())
  page = open_demo()
  page.context.grant_permissions(["clipboard-read", "clipboard-write"])
  copy = """async data => {
    const blob = await (await fetch('data:image/png;base64,' + data)).blob();
    await navigator.clipboard.write([new ClipboardItem({[blob.type]: blob})]);
  }"""
  page.evaluate(copy, base64.b64encode(file.read_bytes()).decode())
  page.get_by_label("Paste from clipboard").click()
  assert wait_for_news(page, [None, None])[0] == judge(checkpoint, file)


@pytest.mark.ci
def test_phone_in_the_dark(open_demo, tmp_path):
  file = tmp_path / "bird.jpg"
  file.write_bytes(encode("JPEG"))
  page = open_demo(size=PHONE, dark=True)
  give(page, file)
  assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
  light = """([selector, key]) => getComputedStyle(
    document.querySelector(selector))[key].match(/[0-9.]+/g).slice(0, 3)
    .reduce((sum, x) => sum + Number(x), 0) / 765"""
  assert page.evaluate(light, ["body", "backgroundColor"]) < 0.2
  assert page.evaluate(light, ["#classes th", "color"]) > 0.7


@pytest.mark.ci
def test_resnet_has_classes_only(tmp_path, open_page):
  """And SIGTERM ends the command while a page is open, and it computes."""
  checkpoint = write(tmp_path / "resnet", "RNx1")
  file = tmp_path / "bird.jpg"
  file.write_bytes(encode("JPEG"))
  served = Served(checkpoint, tmp_path)
  page = open_served(served, open_page)
  page.locator("input[type=file]").first.set_input_files(file)
  page.locator("#classes table").wait_for()
  assert page.evaluate(READ) == [judge(checkpoint, file), None]
  text = "RNx1 is a ResNet, which has no attention: classes only"
  assert page.get_by_text(text).is_visible()
  assert not page.get_by_text("Where the model looks").is_visible()
  page.get_by_label("64 px").check()
  served.close(signal.SIGTERM)
