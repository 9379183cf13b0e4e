"""The demo: what it shows, and the page itself in a real browser.

In the browser the command runs as a user starts it, in a process of its own,
and everything is done through the page.
"""

import os
import signal
import socket
import sys
import time
import types

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
from vit_jax.pretrained.weights import as_lazy
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


def write_image(file, mode="RGB", **options):
  """Writes an image file with smooth random colours; returns its path."""
  coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
  Image.fromarray(coarse).resize((70, 50)).convert(mode).save(file, **options)
  return str(file)


# --- what it shows ---


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
def test_heads_and_attention(tmp_path):
  zeros = {"head/kernel": np.zeros((16, 5), np.float32)}
  with pytest.raises(UserError, match="has no trained head"):
    demo.Viewer(write(tmp_path / "zeros", params=zeros))
  resnet = demo.Viewer(write(tmp_path / "resnet", "RNx1"))
  file = write_image(tmp_path / "bird.png")
  classes, _, seen = resnet.view(file, "", (32, 32))
  assert len(classes) == 5
  assert seen is None


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
  monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
  with socket.create_server(("127.0.0.1", 0)) as taken:
    assert "in use" in run(f"--port={taken.getsockname()[1]}")
  assert "give another --host or --port" in run("--host=192.0.2.1")
  assert "is not a run" in run()


# --- the page ---


class Served:
  """The command, running; `uploads` is where uploaded files are."""

  def __init__(self, checkpoint, folder):
    self.uploads = folder
    # The server asks for nothing on the internet, see `close`.
    self._proxy = socket.create_server(("127.0.0.1", 0))
    proxy = f"http://127.0.0.1:{self._proxy.getsockname()[1]}"
    port = find_port()
    self.url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "vit_jax", "demo"]
    self.process = Process(
      [*command, f"--checkpoint={checkpoint}", f"--port={port}"],
      {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "TMPDIR": str(self.uploads),
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1"),
      },
    )
    deadline = time.monotonic() + 120
    while self.process.is_running() and not self.process.stdout():
      assert time.monotonic() < deadline
      time.sleep(0.1)

  def close(self):
    """Ends it; what was uploaded is gone then."""
    assert [path for path in self.uploads.rglob("*") if path.is_file()]
    self.process.send(signal.SIGTERM)
    assert self.process.wait() == 0, self.process.stderr()
    assert not [path for path in self.uploads.rglob("*") if path.is_file()]
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
  # Gradio stops reading its queue's event stream when nothing is due, and an
  # upload may be complete before the stream of its progress is opened.
  names = ("queue/data", "upload_progress")
  streams = [f"{served.url}gradio_api/{name}?" for name in names]

  def open_one(**options):
    page = open_page(served.url, streams=streams, **options)
    page.get_by_label("Drop an image file here to upload").wait_for()
    return page

  return open_one


# What the page shows: [[class, percent], ...].
READ = """() => [...document.querySelectorAll('dt')].map(x => [
  x.innerText.trim(), x.parentElement.querySelector('dd').innerText.trim()])"""


def give(page, file):
  """Uploads a file in place of what is there."""
  if page.get_by_label("Remove Image").count():
    page.get_by_label("Remove Image").click()
    page.wait_for_function(f"() => !({READ})().length")
  page.locator("input[type=file]").first.set_input_files(file)


def read(page, old=()):
  """Waits until the page shows classes other than `old`, and returns them."""
  page.wait_for_function(
    f"x => ({READ})().length && String(({READ})()) != String(x)", arg=old
  )
  return page.evaluate(READ)


def as_shown(classes):
  """Returns what the page shows for classes of `predict`."""
  return [[c["name"], f"{c['probability'] * 100 + 1e-9:.0f}%"] for c in classes]


@pytest.mark.ci
def test_uploads_are_judged_as_by_predict(open_demo, checkpoint, tmp_path):
  turned = Image.Exif()
  turned[0x0112] = 6
  files = [  # which gradio's own reading would change
    write_image(tmp_path / "turned.jpg", exif=turned),
    write_image(tmp_path / "print.jpg", "CMYK"),
    write_image(tmp_path / "deep.png", "I;16"),
  ]
  page = open_demo()
  for file in files:
    give(page, file)
    (expected,) = predict(checkpoint, [file], top=demo.TOP)
    assert read(page) == as_shown(expected["classes"]), file
  # Another resolution changes the classes.
  old = page.evaluate(READ)
  page.get_by_label("64 x 64 px").check()
  viewer = demo.Viewer(checkpoint)
  assert viewer.sizes == [(16, 16), (24, 24), (32, 32), (48, 48), (64, 64)]
  found, pixels, seen = viewer.view(file, "", (64, 64))
  assert seen is not None
  assert pixels.shape == seen.shape
  assert seen.shape == (512, 512, 3)
  assert read(page, old) == as_shown(found)
  # A file that is not an image; its name is not HTML.
  bad = tmp_path / "<b>bold.png"
  bad.write_bytes(b"no")
  give(page, bad)
  page.get_by_text("<b>bold.png: not a readable image").wait_for()
  give(page, file)
  assert read(page) == as_shown(found)


@pytest.mark.ci
def test_phone_in_the_dark(open_demo, tmp_path):
  file = write_image(tmp_path / "bird.jpg")
  page = open_demo(size=PHONE, dark=True)
  give(page, file)
  read(page)
  assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
  light = """([selector, key]) => getComputedStyle(
    document.querySelector(selector))[key].match(/[0-9.]+/g).slice(0, 3)
    .reduce((sum, x) => sum + Number(x), 0) / 765"""
  assert page.evaluate(light, ["body", "backgroundColor"]) < 0.2
  assert page.evaluate(light, ["dt", "color"]) > 0.7
  told = page.locator("body").aria_snapshot()
  for line in (
    'heading "ViT-w16d2m24h2_8: image classification" [level=1]',
    'button "Paste from clipboard"',
    'radio "32 x 32 px" [checked]',
    'meter "crane"',
    'img "The picture that was given"',
    'img "The preprocessed image"',
    'img "The preprocessed image, darkened by the attention map"',
  ):
    assert line in told, line
