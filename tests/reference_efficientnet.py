"""An EfficientNet in NumPy, float64, one kernel tap at a time.

Written from the paper (arXiv 1905.11946) and the names of the parameters;
independent of vit_jax. `BLOCKS` are those of EfficientNet-N.
"""

import math

import numpy as np

EPSILON = 1e-3
MOMENTUM = 0.99
# Kernel size, strides, expansion, width in, width out.
BLOCKS = (
  (3, 1, 1, 8, 8),
  (3, 2, 6, 8, 8),
  (5, 2, 6, 8, 16),
  (3, 2, 6, 16, 24),
  (3, 1, 6, 24, 24),
  (5, 1, 6, 24, 32),
  (5, 1, 6, 32, 32),
  (5, 2, 6, 32, 48),
  (5, 1, 6, 48, 48),
  (3, 1, 6, 48, 80),
)


def _pad(x, size, strides):
  """Pads as TensorFlow's "SAME": the odd pixel at the end."""
  widths = [(0, 0)]
  for side in x.shape[1:3]:
    total = max((math.ceil(side / strides) - 1) * strides + size - side, 0)
    widths.append((total // 2, total - total // 2))
  return np.pad(x, (*widths, (0, 0)))


def convolve(x, kernel, strides=1):
  """[b h w i] with [k k i o]; with [k k 1 i] each channel by itself."""
  size, out = kernel.shape[0], [-(-s // strides) for s in x.shape[1:3]]
  padded, total = _pad(x, size, strides), 0
  for i, j in np.ndindex(size, size):
    rows = slice(i, i + (out[0] - 1) * strides + 1, strides)
    columns = slice(j, j + (out[1] - 1) * strides + 1, strides)
    part = padded[:, rows, columns]
    alone = kernel.shape[2] == 1
    total = total + (part * kernel[i, j, 0] if alone else part @ kernel[i, j])
  return total


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def swish(x):
  return x * sigmoid(x)


def apply(params, images, *, train=False):
  """Returns {name: array} of what is on the way, and the new statistics.

  Args:
    params: {path: array}.
    images: [b h w 3] in [-1, 1].
    train: whether the batch's own statistics normalise; nothing is dropped.
  """
  p = {path: np.asarray(x, np.float64) for path, x in params.items()}
  new = {}

  def normalize(x, name):
    mean, var = p[f"{name}/mean"], p[f"{name}/var"]
    if train:
      now = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
      for key, value in now.items():
        old = p[f"{name}/{key}"]
        new[f"{name}/{key}"] = MOMENTUM * old + (1 - MOMENTUM) * value
      mean, var = now["mean"], now["var"]
    x = (x - mean) / np.sqrt(var + EPSILON)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]

  def layer(x, name, strides=1):
    x = convolve(x, p[f"{name}_conv/kernel"], strides)
    return normalize(x, f"{name}_norm")

  def dense(x, name):
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

  x = (np.asarray(images, np.float64) - p["pixels/mean"]) / p["pixels/std"]
  x = swish(layer(x, "stem", 2))
  out = {"stem": x}
  for i, (size, strides, expansion, inputs, outputs) in enumerate(BLOCKS):
    name, before = f"block{i:02d}", x
    if expansion != 1:
      x = swish(layer(x, f"{name}/expand"))
    assert p[f"{name}/depthwise_conv/kernel"].shape[0] == size
    x = swish(layer(x, f"{name}/depthwise", strides))
    gate = swish(dense(x.mean((1, 2)), f"{name}/se_reduce"))
    gate = sigmoid(dense(gate, f"{name}/se_expand"))
    x = layer(x * gate[:, None, None], f"{name}/project")
    if strides == 1 and inputs == outputs:
      x = x + before
    out[f"{name}/out"] = x
  x = out["pooled"] = swish(layer(x, "head")).mean((1, 2))
  out["logits"] = dense(x, "head")
  return out, new
