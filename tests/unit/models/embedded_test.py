"""The model in the package: found by its name, right, and known by commands."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

import vit_jax
from vit_jax.__main__ import main
from vit_jax.data import preprocess
from vit_jax.data.builders import digits
from vit_jax.errors import UserError
from vit_jax.pretrained import embedded, fetch

NAME = "ViT-N_8-digits"


def _held_out():
  """Returns u8[797 8 8] and their labels, from scikit-learn."""
  given = datasets.load_digits()
  chosen = digits.choose_test(given.target)
  pixels = np.rint(given.images[chosen] * (255 / 16)).astype(np.uint8)
  return pixels, given.target[chosen]


@pytest.mark.ci
def test_accuracy_is_that_of_the_float32_run():
  model = vit_jax.load(NAME)
  assert model.config.class_names == list("0123456789")
  assert (model.config.preprocess, model.notes) == ("resize(size)", ())
  pixels, labels = _held_out()
  images = [
    preprocess.preprocess_image(image, model.config.preprocess, 48)
    for image in pixels
  ]
  logits = model(np.stack(images).astype(np.float32) / 127.5 - 1)
  right = (np.argmax(logits, axis=1) == labels).sum()
  assert (right, len(labels)) == (748, 797)  # 93.9 %: docs/first_steps.md


def test_predict_needs_nothing_but_the_name(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(fetch, "_fetch", None)  # no download
  pixels, labels = _held_out()
  for i in range(8):
    Image.fromarray(pixels[i]).save(f"{i}.png")
  files = [f"{i}.png" for i in range(8)]
  assert main(["predict", f"--checkpoint={NAME}", *files, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  names = [row["classes"][0]["name"] for row in found]
  assert sum(map(str.__eq__, names, map(str, labels))) >= 7


def test_listed_and_suggested(capsys):
  assert main(["inspect"]) == 0
  listed = capsys.readouterr().out.splitlines()
  assert [x.split(None, 1)[1] for x in listed if x.startswith(NAME)] == [
    "in the package: no download"
  ]
  with pytest.raises(UserError, match=f"did you mean '{NAME}'"):
    vit_jax.load("ViT-N8-digits")


def test_its_digest_can_be_asked_for():
  file = embedded.MODELS[NAME]
  assert file.stat().st_size < 1.7e6
  digest = hashlib.sha256(file.read_bytes()).hexdigest()
  assert fetch.locate(f"{NAME}#sha256={digest}").path == str(file)
  with pytest.raises(UserError, match="SHA-256"):
    fetch.locate(f"{NAME}#sha256={'0' * 64}")


def test_resized_as_our_runs_are():
  model = vit_jax.load(NAME, image_size=(64, 96))
  assert model.config.grid == (8, 12)
  assert model.config.resize == "corner_aligned"
  assert model.report  # its lines name the model, not a path of this machine
  assert str(embedded.MODELS[NAME].parent.parent) not in str(model.report)
