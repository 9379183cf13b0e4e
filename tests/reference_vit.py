"""The Vision Transformer once more, in NumPy float64, from the paper's text.

It shares no code with vit_jax and knows only the parameters' names. Slow and
plain on purpose: this is what the fast one is compared with.
"""

from typing import NamedTuple

import numpy as np
import reference_resnet
import scipy.special
from reference_resnet import sub as _sub


class _Numerics(NamedTuple):
  """What files of different origins disagree about."""

  activation: str
  epsilon: float


def apply(
  params,
  images,
  *,
  patch,
  classifier,
  units=None,
  activation="gelu_tanh",
  layer_norm_epsilon=1e-6,
  pos_embedding="learned",
  pos_embedding_at="input",
):
  """Runs the network without dropout.

  Args:
    params: {path: array}, unrolled. A position embedding is what is there.
    images: [b h w 3] in [-1, 1].
    patch: pixels along a side of a patch, or cells of the stem's output.
    classifier: "token", "gap" or "map".
    units: of a hybrid's stem; None for no stem.
    activation: "gelu_tanh" or "gelu_erf".
    layer_norm_epsilon: added to variances.
    pos_embedding: "learned", "2d", "sincos2d", "relative" or "none".
    pos_embedding_at: "input", "every_layer" or "every_layer_shared".

  Returns:
    {name: float64 array} with "logits" and everything on the way there.
  """
  p = {path: np.asarray(x, np.float64) for path, x in params.items()}
  numerics = _Numerics(activation, layer_norm_epsilon)
  out = {}
  x = np.asarray(images, np.float64)
  if units is not None:
    out |= reference_resnet.run_stem(p, x, units)
    x = list(out.values())[-1]
  x = out["stem"] = _embed_patches(p, x, patch)
  grid = x.shape[1:3]
  x = x.reshape(len(x), -1, x.shape[-1])
  if classifier == "token":
    cls = np.repeat(p["cls"], len(x), axis=0)
    x = np.concatenate([cls, x], axis=1)

  shape = x.shape[1:]

  def embed_positions(prefix):
    return _embed_positions(_sub(p, prefix), pos_embedding, grid, shape)

  if pos_embedding_at == "input":
    x = x + embed_positions("Transformer/posembed_input")
  out["embedded"] = x
  for i in range(_count_blocks(p)):
    block = f"Transformer/encoderblock_{i}"
    if pos_embedding_at == "every_layer":
      x = x + embed_positions(f"{block}/posembed")
    elif pos_embedding_at == "every_layer_shared":
      x = x + embed_positions("Transformer/posembed_input")
    x, values = _run_block(_sub(p, block), x, numerics)
    out |= {f"block{i:02d}/{name}": v for name, v in values.items()}
  x = _layer_norm(_sub(p, "Transformer/encoder_norm"), x, numerics)
  out["encoded"] = x
  if classifier == "token":
    x = x[:, 0]
  elif classifier == "gap":
    x = x.mean(axis=1)
  else:
    head = _sub(p, "MAPHead_0")
    x, out["pooling_weights"] = _pool_by_attention(head, x, numerics)
  out["pooled"] = x
  if "pre_logits/kernel" in p:
    x = out["pre_logits"] = np.tanh(_dense(_sub(p, "pre_logits"), x))
  out["logits"] = _dense(_sub(p, "head"), x)
  return out


def sincos_2d(grid, width):
  """Returns [h*w d]: sin x, cos x, sin y and cos y, each of d/4 waves."""
  count = width // 4
  rows = []
  for y in range(grid[0]):
    for x in range(grid[1]):
      row = []
      for function, position in (
        (np.sin, x),
        (np.cos, x),
        (np.sin, y),
        (np.cos, y),
      ):
        for i in range(count):
          row.append(function(position / 10_000 ** (i / (count - 1))))
      rows.append(row)
  return np.array(rows)


def _embed_positions(p, kind, grid, shape):
  """Returns [n d]; of the kinds only "learned" has one for a class token."""
  if kind == "learned" and "pos_embedding" in p:
    return p["pos_embedding"][0]
  out = np.zeros(shape)
  patches = out[shape[0] - grid[0] * grid[1] :]
  if kind == "2d":
    half = shape[1] // 2
    for i, token in enumerate(patches):
      y, x = divmod(i, grid[1])
      token[:half] = p["pos_embedding_x"][x]
      token[half:] = p["pos_embedding_y"][y]
  elif kind == "sincos2d":
    patches[:] = sincos_2d(grid, shape[1])
  return out


def _count_blocks(p):
  return len({k.split("/")[1] for k in p if "/encoderblock_" in k})


def _embed_patches(p, images, patch):
  b, h, w, c = images.shape
  rows, columns = h // patch, w // patch
  out = np.empty((b, rows, columns, p["embedding/kernel"].shape[-1]))
  kernel = p["embedding/kernel"].reshape(patch * patch * c, -1)
  for i in range(rows):
    for j in range(columns):
      piece = images[
        :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch
      ]
      out[:, i, j] = piece.reshape(b, -1) @ kernel + p["embedding/bias"]
  return out


def _dense(p, x):
  return x @ p["kernel"] + p["bias"]


def _layer_norm(p, x, numerics):
  mean = x.mean(axis=-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
  x = (x - mean) / np.sqrt(variance + numerics.epsilon)
  return x * p["scale"] + p["bias"]


def _activate(x, numerics):
  """The published weights' tanh approximation, or PyTorch's exact function."""
  if numerics.activation == "gelu_erf":
    return x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))
  assert numerics.activation == "gelu_tanh", numerics
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def _attend(p, x_query, x):
  heads, size = p["query/bias"].shape
  out, weights = 0, []
  for a in range(heads):
    query = x_query @ p["query/kernel"][:, a] + p["query/bias"][a]
    key = x @ p["key/kernel"][:, a] + p["key/bias"][a]
    value = x @ p["value/kernel"][:, a] + p["value/bias"][a]
    logits = query @ key.swapaxes(1, 2) / np.sqrt(size)
    if "relative_embedding" in p:
      table = p["relative_embedding"][:, a]
      logits = logits + _relate(query / np.sqrt(size), table)
    weights.append(_softmax(logits))
    out = out + weights[-1] @ value @ p["out/kernel"][a]
  return out + p["out/bias"], np.stack(weights, axis=1)


def _relate(query, table):
  """Returns [b q k]: the query times the embedding of its distance to k."""
  b, n, _ = query.shape
  out = np.empty((b, n, n))
  for q in range(n):
    for k in range(n):
      out[:, q, k] = query[:, q] @ table[k - q + n - 1]
  return out


def _run_mlp(p, x, numerics):
  x = _activate(_dense(_sub(p, "Dense_0"), x), numerics)
  return _dense(_sub(p, "Dense_1"), x)


def _run_block(p, x, numerics):
  y = _layer_norm(_sub(p, "LayerNorm_0"), x, numerics)
  attention, weights = _attend(_sub(p, "MultiHeadDotProductAttention_0"), y, y)
  x = x + attention
  y = _layer_norm(_sub(p, "LayerNorm_1"), x, numerics)
  mlp = _run_mlp(_sub(p, "MlpBlock_0"), y, numerics)
  return x + mlp, {
    "attention_weights": weights,
    "attention": attention,
    "mlp": mlp,
    "out": x + mlp,
  }


def _pool_by_attention(p, x, numerics):
  probe = np.repeat(p["probe"], len(x), axis=0)
  x, weights = _attend(_sub(p, "MultiHeadDotProductAttention_0"), probe, x)
  y = _layer_norm(_sub(p, "LayerNorm_0"), x, numerics)
  mlp = _run_mlp(_sub(p, "MlpBlock_0"), y, numerics)
  return (x + mlp)[:, 0], weights[:, :, 0]
