"""The Vision Transformer of arXiv 2010.11929, as Flax Linen modules.

Parameter names are those of the published files. Parameters are float32;
matrix products run in `dtype`; LayerNorm statistics and softmax are float32,
because bfloat16's eight bits lose small attention weights and variances.
Everything after the pooling is float32: it is one vector an image.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# What a rematerialised block keeps for the backward pass. "dots": the results
# of its weight products (attention's own products are recomputed), "full":
# nothing but the block's input.
REMAT_POLICIES = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


def drop_path(x, rate, key):
  """Drops whole examples of a residual branch (arXiv 1603.09382).

  Args:
    x: [b n d], the branch.
    rate: probability of dropping, a scalar that may be traced.
    key: PRNG key.
  """
  keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
  return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


class MlpBlock(nn.Module):
  """Two dense layers with GELU (tanh approximation) between them."""

  mlp_dim: int
  dropout_rate: float = 0.0
  deterministic: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[b n d] -> [b n d]."""
    width = x.shape[-1]
    inits = {
      "kernel_init": nn.initializers.xavier_uniform(),
      "bias_init": nn.initializers.normal(1e-6),
      "dtype": self.dtype,
    }
    x = nn.Dense(self.mlp_dim, **inits)(x)
    x = nn.gelu(x, approximate=True)
    x = nn.Dropout(self.dropout_rate)(x, self.deterministic)
    x = nn.Dense(width, **inits)(x)
    return nn.Dropout(self.dropout_rate)(x, self.deterministic)


class MultiHeadDotProductAttention(nn.Module):
  """Multi-head attention with a float32 softmax.

  Query, key and value are three projections: one fused product costs layout
  copies on TPU, and the published files keep them apart.
  """

  num_heads: int
  dropout_rate: float = 0.0  # of the attention weights
  deterministic: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs_q, inputs_kv):
    """[b q d] attends to [b n d] -> [b q d] and the weights f32[b a q n]."""
    width = inputs_q.shape[-1]
    # Of the flattened shape [d d], not of one head's.
    kernel_init = nn.initializers.xavier_uniform()
    heads = (self.num_heads, width // self.num_heads)

    def project(name, x):
      return nn.DenseGeneral(
        heads, dtype=self.dtype, kernel_init=kernel_init, name=name
      )(x)

    query, key, value = (
      project("query", inputs_q),
      project("key", inputs_kv),
      project("value", inputs_kv),
    )
    query = query / jnp.sqrt(heads[1]).astype(self.dtype)
    scores = jnp.einsum(
      "bqad,bnad->baqn", query, key, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(scores, axis=-1)
    dropped = nn.Dropout(self.dropout_rate)(weights, self.deterministic)
    x = jnp.einsum("baqn,bnad->bqad", dropped.astype(self.dtype), value)
    out = nn.DenseGeneral(
      width,
      axis=(-2, -1),
      dtype=self.dtype,
      kernel_init=kernel_init,
      name="out",
    )(x)
    return out, weights


class Encoder1DBlock(nn.Module):
  """Pre-LayerNorm transformer block."""

  num_heads: int
  mlp_dim: int
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth: bool = False
  deterministic: bool = True
  intermediates: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, drop_path_rate):
    """[b n d], f32[] -> [b n d], intermediates by name (empty if not asked)."""
    options = {"deterministic": self.deterministic, "dtype": self.dtype}

    def branch(y):
      if not self.stochastic_depth or self.deterministic:
        return y
      return drop_path(y, drop_path_rate, self.make_rng("dropout"))

    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
    y, weights = MultiHeadDotProductAttention(
      self.num_heads, self.attention_dropout_rate, **options
    )(y, y)
    attention = nn.Dropout(self.dropout_rate)(y, self.deterministic)
    x = x + branch(attention)
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
    mlp = MlpBlock(self.mlp_dim, self.dropout_rate, **options)(y)
    x = x + branch(mlp)
    if not self.intermediates:
      return x, {}
    return x, {
      "attention_weights": weights,
      "attention": attention,
      "mlp": mlp,
      "out": x,
    }


class AddPositionEmbs(nn.Module):
  """Adds one learned vector to each position."""

  @nn.compact
  def __call__(self, x):
    """[b n d] -> [b n d]."""
    embedding = self.param(
      "pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:])
    )
    return x + embedding.astype(x.dtype)


class Encoder(nn.Module):
  """Position embedding, the blocks, a last LayerNorm."""

  num_layers: int
  num_heads: int
  mlp_dim: int
  pos_embedding: str = "learned"
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth_rate: float = 0.0
  deterministic: bool = True
  intermediates: bool = False
  scan: bool = False
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[b n d] -> [b n d], intermediates by name."""
    if self.pos_embedding == "learned":
      x = AddPositionEmbs(name="posembed_input")(x)
    x = nn.Dropout(self.dropout_rate)(x, self.deterministic)
    out = {"embedded": x}
    x, blocks = self.run_blocks(x)
    for i, values in enumerate(blocks):
      out.update({f"block{i:02d}/{name}": v for name, v in values.items()})
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="encoder_norm")(x)
    return x, out | {"encoded": x}

  def run_blocks(self, x):
    """Applies every block; returns x and each block's intermediates."""
    rates = jnp.linspace(0, self.stochastic_depth_rate, self.num_layers)
    options = {
      "num_heads": self.num_heads,
      "mlp_dim": self.mlp_dim,
      "dropout_rate": self.dropout_rate,
      "attention_dropout_rate": self.attention_dropout_rate,
      "stochastic_depth": self.stochastic_depth_rate > 0,
      "deterministic": self.deterministic,
      "intermediates": self.intermediates,
      "dtype": self.dtype,
    }
    block = Encoder1DBlock
    if self.remat != "none":
      # Inside a scan XLA cannot merge the recomputation with the original.
      block = nn.remat(
        block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan
      )
    if not self.scan:
      blocks = []
      for i in range(self.num_layers):
        x, values = block(**options, name=f"encoderblock_{i}")(x, rates[i])
        blocks.append(values)
      return x, blocks
    x, stacked = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      length=self.num_layers,
    )(**options, name="encoderblock")(x, rates)
    return x, [
      jax.tree.map(lambda v, i=i: v[i], stacked) for i in range(self.num_layers)
    ]


class MAPHead(nn.Module):
  """Multi-head attention pooling (arXiv 2106.04560, Section 3.2)."""

  num_heads: int
  mlp_dim: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[b n d] -> [b d]."""
    probe = self.param(
      "probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1])
    )
    probe = jnp.tile(probe.astype(x.dtype), (x.shape[0], 1, 1))
    x, _ = MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype)(
      probe, x
    )
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
    x = x + MlpBlock(self.mlp_dim, dtype=self.dtype)(y)
    return x[:, 0]


class VisionTransformer(nn.Module):
  """Images to logits."""

  num_classes: int
  patch_size: int
  hidden_size: int
  num_layers: int
  mlp_dim: int
  num_heads: int
  classifier: str = "token"
  representation_size: int = 0
  pos_embedding: str = "learned"
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth_rate: float = 0.0
  head_bias_init: float = 0.0
  scan: bool = False
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, *, train=False, intermediates=False):
    """[b h w 3] in [-1, 1] -> f32[b k] and the intermediates by name."""
    x = nn.Conv(
      self.hidden_size,
      (self.patch_size, self.patch_size),
      strides=(self.patch_size, self.patch_size),
      padding="VALID",
      dtype=self.dtype,
      name="embedding",
    )(images.astype(self.dtype))
    out = {"stem": x}
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    if self.classifier == "token":
      cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
      cls = jnp.tile(cls.astype(x.dtype), (x.shape[0], 1, 1))
      x = jnp.concatenate([cls, x], axis=1)
    x, encoder_out = Encoder(
      self.num_layers,
      self.num_heads,
      self.mlp_dim,
      self.pos_embedding,
      self.dropout_rate,
      self.attention_dropout_rate,
      self.stochastic_depth_rate,
      deterministic=not train,
      intermediates=intermediates,
      scan=self.scan,
      remat=self.remat,
      dtype=self.dtype,
      name="Transformer",
    )(x)
    out |= encoder_out
    x = out["pooled"] = self.pool(x).astype(jnp.float32)
    if self.representation_size:
      x = nn.tanh(nn.Dense(self.representation_size, name="pre_logits")(x))
      out["pre_logits"] = x
    logits = nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.zeros,
      bias_init=nn.initializers.constant(self.head_bias_init),
      name="head",
    )(x)
    return logits, out | {"logits": logits}

  def pool(self, x):
    """[b n d] -> [b d]."""
    if self.classifier == "token":
      return x[:, 0]
    if self.classifier == "gap":
      return x.mean(axis=1, dtype=jnp.float32)
    return MAPHead(
      self.num_heads, self.mlp_dim, dtype=self.dtype, name="MAPHead_0"
    )(x)
