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
  rope: tuple | None = None  # grid, base and the tokens before the patches


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
  rope_base=None,
):
  """Runs the network without dropout.

  Args:
    params: {path: array}, unrolled. What is there of biases, gates, factors,
      tokens and normalisations is used, and nothing else.
    images: [b h w 3] in [-1, 1].
    patch: pixels along a side of a patch, or cells of the stem's output.
    classifier: "token", "gap", "map" or "token+gap".
    units: of a hybrid's stem; None for no stem.
    activation: "gelu_tanh", "gelu_erf", "gelu_quick" or "silu".
    layer_norm_epsilon: added to variances.
    pos_embedding: "learned", "2d", "sincos2d", "relative" or "none".
    pos_embedding_at: "input", "every_layer" or "every_layer_shared".
    rope_base: of DINOv3's rotary embedding; None for none.

  Returns:
    {name: float64 array} with "logits" and everything on the way there.
  """
  p = {path: np.asarray(x, np.float64) for path, x in params.items()}
  out = {}
  x = np.asarray(images, np.float64)
  if units is not None:
    out |= reference_resnet.run_stem(p, x, units)
    x = list(out.values())[-1]
  x = out["stem"] = _embed_patches(p, x, patch)
  grid = x.shape[1:3]
  x = x.reshape(len(x), -1, x.shape[-1])
  prefix = [p[name] for name in ("cls", "dist", "registers") if name in p]
  prefix = [np.repeat(tokens, len(x), axis=0) for tokens in prefix]
  x = np.concatenate([*prefix, x], axis=1)
  count = x.shape[1] - grid[0] * grid[1]
  rope = rope_base and (grid, rope_base, count)
  numerics = _Numerics(activation, layer_norm_epsilon, rope)

  shape = x.shape[1:]

  def embed_positions(prefix):
    return _embed_positions(_sub(p, prefix), pos_embedding, grid, shape)

  if pos_embedding_at == "input":
    x = x + embed_positions("Transformer/posembed_input")
  if "Transformer/pre_norm/scale" in p:
    x = _layer_norm(_sub(p, "Transformer/pre_norm"), x, numerics)
  out["embedded"] = x
  for i in range(_count_blocks(p)):
    block = f"Transformer/encoderblock_{i}"
    if pos_embedding_at == "every_layer":
      x = x + embed_positions(f"{block}/posembed")
    elif pos_embedding_at == "every_layer_shared":
      x = x + embed_positions("Transformer/posembed_input")
    x, values = _run_block(_sub(p, block), x, numerics)
    out |= {f"block{i:02d}/{name}": v for name, v in values.items()}
  if "Transformer/encoder_norm/scale" in p:
    x = _layer_norm(_sub(p, "Transformer/encoder_norm"), x, numerics)
  tokens = out["encoded"] = x
  mean = x[:, count:].mean(axis=1)
  if classifier == "token":
    x = x[:, 0]
  elif classifier == "gap":
    x = mean
  elif classifier == "token+gap":
    x = np.concatenate([x[:, 0], mean], axis=1)
  else:
    head = _sub(p, "MAPHead_0")
    x, out["pooling_weights"] = _pool_by_attention(head, x, numerics)
  if "fc_norm/scale" in p:
    x = _layer_norm(_sub(p, "fc_norm"), x, numerics)
  out["pooled"] = x
  if "projection/kernel" in p:
    x = out["projected"] = x @ p["projection/kernel"]
  if "pre_logits/kernel" in p:
    x = out["pre_logits"] = np.tanh(_dense(_sub(p, "pre_logits"), x))
  x = _dense(_sub(p, "head"), x)
  if "head_dist/kernel" in p:
    second = _dense(_sub(p, "head_dist"), tokens[:, 1])
    out |= {"logits_cls": x, "logits_dist": second}
    x = (x + second) / 2
  out["logits"] = x
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
  """Returns [n d]; of the kinds only "learned" has some for other tokens."""
  if kind == "learned" and "pos_embedding" in p:
    table, count = p["pos_embedding"][0], grid[0] * grid[1]
    rows = len(table) - count
    none = np.zeros((shape[0] - len(table), shape[1]))
    return np.concatenate([table[:rows], none, table[rows:]])
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
      out[:, i, j] = piece.reshape(b, -1) @ kernel
      if "embedding/bias" in p:
        out[:, i, j] += p["embedding/bias"]
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
  if numerics.activation in ("gelu_quick", "silu"):
    return x / (1 + np.exp(-x * {"g": 1.702, "s": 1}[numerics.activation[0]]))
  if numerics.activation == "gelu_erf":
    return x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))
  assert numerics.activation == "gelu_tanh", numerics
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def _attend(p, x_query, x, numerics, rotates=False):
  _, heads, size = p["query/kernel"].shape
  out, weights = 0, []

  def project(name, x, a):
    y = x @ p[f"{name}/kernel"][:, a]
    if f"{name}/bias" in p:
      y = y + p[f"{name}/bias"][a]
    if f"{name}_norm/scale" in p:
      y = _layer_norm(_sub(p, f"{name}_norm"), y, numerics)
    if rotates and numerics.rope and name != "value":
      y = _rotate(y, *numerics.rope)
    return y

  for a in range(heads):
    query = project("query", x_query, a)
    key, value = project("key", x, a), project("value", x, a)
    logits = query @ key.swapaxes(1, 2) / np.sqrt(size)
    if "relative_embedding" in p:
      table = p["relative_embedding"][:, a]
      logits = logits + _relate(query / np.sqrt(size), table)
    weights.append(_softmax(logits))
    out = out + weights[-1] @ value @ p["out/kernel"][a]
  return out + p["out/bias"], np.stack(weights, axis=1)


def _rotate(x, grid, base, count):
  """[b n h]: channels j and j + h/2 of each patch are turned as a complex."""
  half = x.shape[-1] // 2
  turned = x[..., :half] + 1j * x[..., half:]
  for i in range(grid[0] * grid[1]):
    place = [
      2 * (at + 0.5) / n - 1
      for at, n in zip(divmod(i, grid[1]), grid, strict=True)
    ]
    for j in range(half):
      axis, wave = divmod(j, half // 2)
      angle = 2 * np.pi * place[axis] / base ** (wave / (half // 2))
      turned[:, count + i, j] *= np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], axis=-1)


def _relate(query, table):
  """Returns [b q k]: the query times the embedding of its distance to k."""
  b, n, _ = query.shape
  out = np.empty((b, n, n))
  for q in range(n):
    for k in range(n):
      out[:, q, k] = query[:, q] @ table[k - q + n - 1]
  return out


def _run_mlp(p, x, numerics):
  if "gate/kernel" in p:
    gate = _activate(_dense(_sub(p, "gate"), x), numerics)
    return _dense(_sub(p, "Dense_1"), gate * _dense(_sub(p, "Dense_0"), x))
  x = _activate(_dense(_sub(p, "Dense_0"), x), numerics)
  return _dense(_sub(p, "Dense_1"), x)


def _run_block(p, x, numerics):
  y = _layer_norm(_sub(p, "LayerNorm_0"), x, numerics)
  own = _sub(p, "MultiHeadDotProductAttention_0")
  attention, weights = _attend(own, y, y, numerics, rotates=True)
  x = x + attention * p.get("LayerScale_0/scale", 1)
  y = _layer_norm(_sub(p, "LayerNorm_1"), x, numerics)
  mlp = _run_mlp(_sub(p, "MlpBlock_0"), y, numerics)
  x = x + mlp * p.get("LayerScale_1/scale", 1)
  return x, {
    "attention_weights": weights,
    "attention": attention,
    "mlp": mlp,
    "out": x,
  }


def _pool_by_attention(p, x, numerics):
  probe = np.repeat(p["probe"], len(x), axis=0)
  own = _sub(p, "MultiHeadDotProductAttention_0")
  x, weights = _attend(own, probe, x, numerics)
  y = _layer_norm(_sub(p, "LayerNorm_0"), x, numerics)
  mlp = _run_mlp(_sub(p, "MlpBlock_0"), y, numerics)
  return (x + mlp)[:, 0], weights[:, :, 0]
