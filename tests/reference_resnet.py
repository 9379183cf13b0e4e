"""The two residual networks once more, in NumPy float64: stem and baseline.

Written from the papers (arXiv 1912.11370 for BiT, 2010.11929 Section 3.1 for
the stem) and from the published weights' conventions. It shares no code with
vit_jax and knows only the parameters' names. Slow and plain on purpose.
"""

import numpy as np

# The two families differ in the numbers that keep divisors from zero.
STEM_NORM_EPSILON = 1e-6  # added to a variance
STEM_KERNEL_EPSILON = 1e-5  # added to a standard deviation
BIT_NORM_EPSILON = 1e-5  # added to a variance
BIT_KERNEL_EPSILON = 1e-10  # added to a variance


def run_stem(params, images, units):
  """Runs the ResNet under a hybrid: root and post-activation stages.

  Args:
    params: {path: array}; those of the encoder are ignored.
    images: [b h w 3] in [-1, 1].
    units: of each stage, () for the root alone.

  Returns:
    {name: float64 array [b h w c]}: "root" and "stage1", "stage2", ...
  """
  p = {path: np.asarray(x, np.float64) for path, x in params.items()}
  x = _stem_conv(p["conv_root/kernel"], np.asarray(images, np.float64), 2)
  x = _relu(_stem_norm(p, "gn_root", x))
  x = _max_pool(_pad(x, *(_same_padding(n, 3, 2) for n in x.shape[1:3])))
  out = {"root": x}
  for b, count in enumerate(units, start=1):
    for u in range(1, count + 1):
      stride = 2 if b > 1 and u == 1 else 1
      x = _stem_unit(sub(p, f"block{b}/unit{u}"), x, stride)
    out[f"stage{b}"] = x
  return out


def apply_bit(params, images, units):
  """Runs a whole ResNet-v2 with GroupNorm and standardised kernels.

  Args:
    params: {path: array}.
    images: [b h w 3] in [-1, 1].
    units: of each stage.

  Returns:
    {name: float64 array}: "root", "stage1", ..., "pooled" [b c] and "logits".
  """
  p = {path: np.asarray(x, np.float64) for path, x in params.items()}
  kernel = p["root_block/conv_root/kernel"]
  x = _bit_conv(kernel, np.asarray(images, np.float64), 2)
  # The zeros of the border are candidates for the maximum: nothing has made
  # the values positive yet.
  x = _max_pool(_pad(x, (1, 1), (1, 1)))
  out = {"root": x}
  for b, count in enumerate(units, start=1):
    for u in range(1, count + 1):
      stride = 2 if b > 1 and u == 1 else 1
      x = _bit_unit(sub(p, f"block{b}/unit{u:02d}"), x, stride)
    out[f"stage{b}"] = x
  x = _relu(_bit_norm(p, "norm-pre-head", x))
  x = out["pooled"] = x.mean(axis=(1, 2))
  if "head/kernel" in p:
    out["logits"] = x @ p["head/kernel"] + p["head/bias"]
  return out


def sub(p, prefix):
  """Returns the parameters under a prefix, without it."""
  n = len(prefix) + 1
  return {k[n:]: x for k, x in p.items() if k.startswith(prefix + "/")}


def _stem_unit(p, x, stride):
  shortcut = x
  if "conv_proj/kernel" in p:
    shortcut = _stem_conv(p["conv_proj/kernel"], x, stride)
    shortcut = _stem_norm(p, "gn_proj", shortcut)
  y = _relu(_stem_norm(p, "gn1", _stem_conv(p["conv1/kernel"], x, 1)))
  y = _relu(_stem_norm(p, "gn2", _stem_conv(p["conv2/kernel"], y, stride)))
  y = _stem_norm(p, "gn3", _stem_conv(p["conv3/kernel"], y, 1))
  return _relu(shortcut + y)


def _bit_unit(p, x, stride):
  y = _relu(_bit_norm(p, "gn1", x))
  shortcut = x
  if "conv_proj/kernel" in p:
    shortcut = _bit_conv(p["conv_proj/kernel"], y, stride)
  y = _relu(_bit_norm(p, "gn2", _bit_conv(p["conv1/kernel"], y, 1)))
  y = _relu(_bit_norm(p, "gn3", _bit_conv(p["conv2/kernel"], y, stride)))
  return shortcut + _bit_conv(p["conv3/kernel"], y, 1)


def _stem_conv(kernel, x, stride):
  """With TensorFlow's SAME padding, which leaves an odd pixel for the end."""
  deviation = kernel.std(axis=(0, 1, 2)) + STEM_KERNEL_EPSILON
  kernel = (kernel - kernel.mean(axis=(0, 1, 2))) / deviation
  sizes = zip(x.shape[1:3], kernel.shape[:2], strict=True)
  padding = [_same_padding(n, k, stride) for n, k in sizes]
  return _convolve(_pad(x, *padding), kernel, stride)


def _bit_conv(kernel, x, stride):
  """With as many zeros on each side as a kernel reaches over."""
  deviation = np.sqrt(kernel.var(axis=(0, 1, 2)) + BIT_KERNEL_EPSILON)
  kernel = (kernel - kernel.mean(axis=(0, 1, 2))) / deviation
  rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
  return _convolve(_pad(x, (rows, rows), (columns, columns)), kernel, stride)


def _stem_norm(p, name, x):
  return _group_norm(sub(p, name), x, STEM_NORM_EPSILON)


def _bit_norm(p, name, x):
  return _group_norm(sub(p, name), x, BIT_NORM_EPSILON)


def _group_norm(p, x, epsilon):
  """One mean and variance for each of 32 groups of neighbouring channels."""
  out = np.empty_like(x)
  size = x.shape[-1] // 32
  for start in range(0, x.shape[-1], size):
    group = x[..., start : start + size]
    mean = group.mean(axis=(1, 2, 3), keepdims=True)
    variance = group.var(axis=(1, 2, 3), keepdims=True)
    out[..., start : start + size] = (group - mean) / np.sqrt(
      variance + epsilon
    )
  return out * p["scale"] + p["bias"]


def _relu(x):
  return np.maximum(x, 0)


def _same_padding(size, window, stride):
  """Returns what makes ceil(size / stride) windows fit: (before, after)."""
  count = -(-size // stride)
  total = max((count - 1) * stride + window - size, 0)
  return total // 2, total - total // 2


def _pad(x, rows, columns):
  return np.pad(x, ((0, 0), rows, columns, (0, 0)))


def _convolve(x, kernel, stride):
  height, width = kernel.shape[:2]
  out = 0
  for i in range(height):
    for j in range(width):
      out = out + _shift(x, i, j, (height, width), stride) @ kernel[i, j]
  return out


def _max_pool(x):
  """3x3 windows at a stride of 2 of an input that is padded already."""
  windows = [_shift(x, i, j, (3, 3), 2) for i in range(3) for j in range(3)]
  return np.max(windows, axis=0)


def _shift(x, i, j, window, stride):
  """Returns pixel (i, j) of every window that fits whole into x."""
  rows = x.shape[1] - window[0] + 1
  columns = x.shape[2] - window[1] + 1
  return x[:, i : i + rows : stride, j : j + columns : stride]
