"""How much memory reading a large file takes; minutes and gigabytes."""

import subprocess
import sys

import numpy as np
import pytest

from vit_jax import models
from vit_jax.pretrained import vision_transformer
from vit_jax.pretrained.weights import LazyArray, Weights

_MEASURE = """
import re, sys
import jax, jax.numpy as jnp
import vit_jax
jnp.zeros(3).block_until_ready()
from vit_jax.pretrained import load
# Not getrusage's, which begins with that of the process that started this one.
status = lambda: open("/proc/self/status").read()
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", status())[1]) * 1024
before = peak()
model = vit_jax.load(sys.argv[1])
jax.block_until_ready(model.params)
print(peak() - before)
"""


@pytest.mark.nightly
def test_reading_vit_h_14(tmp_path):
  options = {"variant": "ViT-H_14", "num_classes": 1000, "image_size": 224}
  weights = Weights(
    "test", "nowhere", {"variant": "ViT-H_14"}, (224, 224), 1000, {}
  )
  rng = np.random.default_rng(0)
  params = {
    path: LazyArray(
      x.shape,
      np.dtype(np.float32),
      lambda x=x: rng.standard_normal(x.shape, np.float32),
    )
    for path, x in weights.shapes().items()
  }
  assert sum(np.prod(x.shape) for x in params.values()) == 632_045_800
  assert models.create(**options).grid == (16, 16)
  file = tmp_path / "ViT-H_14.npz"
  vision_transformer.write(weights._replace(params=params), file)
  size = file.stat().st_size
  process = subprocess.run(
    [sys.executable, "-c", _MEASURE, str(file)],
    check=True,
    capture_output=True,
    text=True,
  )
  extra = int(process.stdout)
  print(f"{file.name}: {size / 1e9:.2f} GB, {extra / size:.2f} times in memory")
  file.unlink()
  # At least the parameters themselves: else nothing was measured.
  assert 0.98 * size < extra < 1.3 * size
