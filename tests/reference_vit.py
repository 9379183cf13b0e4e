"""The Vision Transformer once more, in NumPy float64, from the paper's text.

It shares no code with vit_jax and knows only the parameters' names. Slow and
plain on purpose: this is what the fast one is compared with.
"""

import numpy as np


def apply(params, images, *, patch, classifier):
  """Runs the network without dropout.

  Args:
    params: {path: array}, unrolled.
    images: [b h w 3] in [-1, 1].
    patch: pixels along a side of a patch.
    classifier: "token", "gap" or "map".

  Returns:
    {name: float64 array} with "logits" and everything on the way there.
  """
  p = {path: np.asarray(x, np.float64) for path, x in params.items()}
  out = {}
  x = out["stem"] = _embed_patches(p, np.asarray(images, np.float64), patch)
  x = x.reshape(len(x), -1, x.shape[-1])
  if classifier == "token":
    cls = np.repeat(p["cls"], len(x), axis=0)
    x = np.concatenate([cls, x], axis=1)
  if "Transformer/posembed_input/pos_embedding" in p:
    x = x + p["Transformer/posembed_input/pos_embedding"]
  out["embedded"] = x
  for i in range(_count_blocks(p)):
    block = _sub(p, f"Transformer/encoderblock_{i}")
    x, values = _run_block(block, x)
    out |= {f"block{i:02d}/{name}": v for name, v in values.items()}
  x = out["encoded"] = _layer_norm(_sub(p, "Transformer/encoder_norm"), x)
  if classifier == "token":
    x = x[:, 0]
  elif classifier == "gap":
    x = x.mean(axis=1)
  else:
    x = _pool_by_attention(_sub(p, "MAPHead_0"), x)
  out["pooled"] = x
  if "pre_logits/kernel" in p:
    x = out["pre_logits"] = np.tanh(_dense(_sub(p, "pre_logits"), x))
  out["logits"] = _dense(_sub(p, "head"), x)
  return out


def _sub(p, prefix):
  n = len(prefix) + 1
  return {k[n:]: x for k, x in p.items() if k.startswith(prefix + "/")}


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


def _layer_norm(p, x):
  mean = x.mean(axis=-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def _gelu(x):
  """The tanh approximation, as the published weights were trained with."""
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
    weights.append(_softmax(query @ key.swapaxes(1, 2) / np.sqrt(size)))
    out = out + weights[-1] @ value @ p["out/kernel"][a]
  return out + p["out/bias"], np.stack(weights, axis=1)


def _run_mlp(p, x):
  return _dense(_sub(p, "Dense_1"), _gelu(_dense(_sub(p, "Dense_0"), x)))


def _run_block(p, x):
  y = _layer_norm(_sub(p, "LayerNorm_0"), x)
  attention, weights = _attend(_sub(p, "MultiHeadDotProductAttention_0"), y, y)
  x = x + attention
  mlp = _run_mlp(_sub(p, "MlpBlock_0"), _layer_norm(_sub(p, "LayerNorm_1"), x))
  return x + mlp, {
    "attention_weights": weights,
    "attention": attention,
    "mlp": mlp,
    "out": x + mlp,
  }


def _pool_by_attention(p, x):
  probe = np.repeat(p["probe"], len(x), axis=0)
  x, _ = _attend(_sub(p, "MultiHeadDotProductAttention_0"), probe, x)
  mlp = _run_mlp(_sub(p, "MlpBlock_0"), _layer_norm(_sub(p, "LayerNorm_0"), x))
  return (x + mlp)[:, 0]
