"""Published values beside those of weights."""

import json

import numpy as np
import pytest
from mistakes import named
from PIL import Image
from random_models import random_weights

from vit_jax import pretrained
from vit_jax.__main__ import main
from vit_jax.evaluation import verify

_VARIANT = "ViT-w16d2m24h2_16"
_DINOV3 = {
  "pos_embedding": "none",
  "rope": "dinov3",
  "registers": 4,
  "layer_scale_init": 1e-5,
  "mlp": "gated",
}


@pytest.mark.ci
def test_values_are_compared(tmp_path, monkeypatch, capsys):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (224, 224, 3)).astype(np.uint8)
  image = str(tmp_path / "picture.png")
  Image.fromarray(pixels).save(image)
  folder = str(tmp_path / "model")
  weights = random_weights(_VARIANT, 224, 0, **_DINOV3)
  pretrained.write(weights, folder, "orbax")
  model = pretrained.load(folder)
  batch = np.float32(pixels[None]) / 127.5 - 1
  cls = np.asarray(model.features(batch, what="cls"), float)[0, :5]
  patch = np.asarray(model.features(batch, what="patches"), float)
  patch = patch[0, 0, 0, :5]
  published = {(_VARIANT, "gated"): ("toy", [*cls], [*patch])}
  monkeypatch.setattr(verify, "PUBLISHED", published)
  assert main(["verify", folder, f"--image={image}"]) == 0
  assert "toy\n" in (printed := capsys.readouterr().out)
  assert "the same: they differ by 0.0000" in printed
  published[_VARIANT, "gated"] = ("toy", [*cls], [*(patch + 0.2)])
  assert main(["verify", folder, f"--image={image}", "--json"]) == 1
  found = json.loads(capsys.readouterr().out)
  assert not found["equal"]
  assert found["difference"] == pytest.approx(0.2, abs=1e-4)


def test_another_model_is_named():
  with named("ViT-N_8-digits", "DINOv3 ViT-S/16"):
    verify.verify("ViT-N_8-digits", "picture.jpg")
