"""The Vision Transformer of arXiv 2010.11929, as Flax Linen modules.

Read it beside Section 3.1 and Figure 1 of the paper. Parameter names are those
of the published files. Parameters are float32; matrix products run in
`config.dtype`; LayerNorm statistics and softmax are float32, because bfloat16's
eight bits lose small attention weights and variances. Everything after the
pooling is float32: it is one vector an image.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import layers, posemb
from vit_jax.models.attention import MultiHeadDotProductAttention
from vit_jax.models.config import ViTConfig
from vit_jax.models.layers import Dense, LayerNorm, dropout
from vit_jax.models.resnet import hybrid_stem

# The published npz files were trained with the tanh approximation; PyTorch's
# default, and so what Hugging Face's and timm's weights expect, is erf.
ACTIVATIONS = {
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "gelu_erf": lambda x: nn.gelu(x, approximate=False),
}

# "dots" recomputes attention's own products.
REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class MlpBlock(nn.Module):
  """Two dense layers with GELU between them."""

  config: ViTConfig
  deterministic: bool = True

  @nn.compact
  def __call__(self, x, affine=None):
    """[... d] -> [... d]; `affine` see `LayerNorm`."""
    config, width, inner = self.config, x.shape[-1], self.config.mlp_dim
    init = nn.initializers.normal(1e-6)
    dense = functools.partial(Dense, config, bias_init=init)
    # XLA sums this bias's gradient where it makes it, beside a product.
    x = dense((width, inner), sum_by_product=False)(x, affine)
    x = ACTIVATIONS[config.activation](x)
    x = dropout(config, self.deterministic)(x)
    x = dense((inner, width))(x)
    return dropout(config, self.deterministic)(x)


class PositionEmbs(nn.Module):
  """One vector for each position, learned or computed.

  "learned" (1-D): one for each token, the class token included. "2d": one
  half-vector for each row and each column. "sincos2d": fixed waves. These two
  add nothing to the class token, which has no place in the image.
  """

  kind: str
  grid: tuple[int, int]

  @nn.compact
  def __call__(self, n, width):
    """Returns f32[1 n width]."""
    init = nn.initializers.normal(0.02)
    if self.kind == "learned":
      return self.param("pos_embedding", init, (1, n, width))
    if self.kind == "2d":
      tables = [
        self.param(f"pos_embedding_{axis}", init, (length, width // 2))
        for axis, length in zip("yx", self.grid, strict=True)
      ]
      tokens = posemb.join_axes(*tables)
    else:
      tokens = posemb.sincos_2d(self.grid, width)
    extra = n - tokens.shape[0]
    return jnp.pad(tokens, ((extra, 0), (0, 0)))[None]


class Encoder1DBlock(nn.Module):
  """Pre-LayerNorm transformer block (the paper, equations 2 and 3).

  With `first_only` only the first token is updated; the others serve as keys
  and values.
  """

  config: ViTConfig
  grid: tuple[int, int]
  num_tokens: int  # the others are padding
  first_only: bool = False
  deterministic: bool = True
  intermediates: bool = False

  @nn.compact
  def __call__(self, x, drop_path_rate, shared_positions):
    """[b*n d], all images' `pad_tokens` in a row -> the same, intermediates.

    With `first_only` of each image the first tokens alone.

    Args:
      x: the tokens.
      drop_path_rate: f32[], or None for no stochastic depth.
      shared_positions: f32[1 num_tokens d], added first, or None.
    """
    config, n = self.config, self.num_tokens
    b = x.shape[0] // layers.count_rows(config, n)

    def split(y):  # [b*n d] -> [b n d]
      return y.reshape(b, -1, y.shape[-1])

    def branch(y):
      if drop_path_rate is None or self.deterministic:
        return y
      key = self.make_rng("dropout")
      return layers.drop_path(split(y), drop_path_rate, key).reshape(x.shape)

    positions = shared_positions
    if config.pos_embedding_at == "every_layer":
      embed = PositionEmbs(config.pos_embedding, self.grid, name="posembed")
      positions = embed(n, x.shape[-1])
    if positions is not None:
      added = layers.pad_tokens(config, positions.astype(x.dtype))
      x = (split(x) + added).reshape(x.shape)
    y, affine = LayerNorm(config)(x)
    queries = keys = split(y)
    if self.first_only:
      # With as many rows as a register has, where there are registers.
      first = slice(0, layers.count_rows(config, 1))
      queries, x = keys[:, first], split(x)[:, first].reshape(-1, x.shape[-1])
    y, weights = MultiHeadDotProductAttention(
      config,
      config.pos_embedding == "relative",
      config.attention_dropout_rate,
      self.deterministic,
    )(queries, keys, n, self.intermediates, affine)
    attended = dropout(config, self.deterministic)(y.reshape(x.shape))
    x = layers.spread(x + branch(attended))
    mlp = MlpBlock(config, self.deterministic)(*LayerNorm(config)(x))
    x = layers.spread(x + branch(mlp))
    if not self.intermediates:
      return x, {}
    assert weights is not None
    return x, {
      "attention_weights": weights[:, :, :n, :n],
      "attention": split(attended)[:, :n],
      "mlp": split(mlp)[:, :n],
      "out": split(x)[:, :n],
    }


class Encoder(nn.Module):
  """Position embedding, the blocks, a last LayerNorm.

  With `first_only` only the first token is returned, and the last block, unless
  scanned, computes no other.
  """

  config: ViTConfig
  grid: tuple[int, int]
  deterministic: bool = True
  intermediates: bool = False
  first_only: bool = False

  @nn.compact
  def __call__(self, x):
    """[b n d] -> [b n d] or [b 1 d], intermediates by name."""
    config, (b, n, d) = self.config, x.shape
    x = layers.pad_tokens(config, x)
    shared = None
    kind, place = config.pos_embedding, config.pos_embedding_at
    if kind not in ("none", "relative") and place != "every_layer":
      shared = PositionEmbs(kind, self.grid, name="posembed_input")(n, d)
    if shared is not None and place == "input":
      # In float32, because its gradient is a sum over images.
      padding = ((0, 0), (0, x.shape[1] - n), (0, 0))
      x = (x + jnp.pad(shared, padding)).astype(x.dtype)
      shared = None
    x = dropout(config, self.deterministic)(x)
    out = {"embedded": x[:, :n]}
    x = layers.spread(x.reshape(-1, d))
    x, blocks = self.run_blocks(x, n, shared)
    for i, values in enumerate(blocks):
      out.update({f"block{i:02d}/{name}": v for name, v in values.items()})
    if self.first_only:
      x = x.reshape(b, -1, d)[:, 0]
    x, _ = LayerNorm(config, whole=True, name="encoder_norm")(x)
    x = x.reshape(b, -1, d)[:, :n]
    return x, out | {"encoded": x}

  def run_blocks(self, x, num_tokens, shared_positions):
    """Applies every block; returns x and each block's intermediates."""
    config, depth = self.config, self.config.num_layers
    highest = config.stochastic_depth_rate
    rates = jnp.linspace(0, highest, depth) if highest else None
    block = Encoder1DBlock
    if config.remat != "none":
      # Inside a scan XLA cannot merge the recomputation with the original.
      policy = REMAT_POLICIES[config.remat]
      block = nn.remat(block, policy=policy, prevent_cse=not config.scan)
    options = {
      "grid": self.grid,
      "num_tokens": num_tokens,
      "deterministic": self.deterministic,
      "intermediates": self.intermediates,
    }
    if not config.scan:
      blocks = []
      for i in range(depth):
        first_only = self.first_only and i == depth - 1
        rate = None if rates is None else rates[i]
        x, values = block(
          config, first_only=first_only, **options, name=f"encoderblock_{i}"
        )(x, rate, shared_positions)
        blocks.append(values)
      return x, blocks
    x, stacked = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
      length=depth,
    )(config, **options, name="encoderblock")(x, rates, shared_positions)
    return x, [jax.tree.map(lambda v, i=i: v[i], stacked) for i in range(depth)]


class MAPHead(nn.Module):
  """Multi-head attention pooling (arXiv 2106.04560, Section 3.2)."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x, weights=False):
    """[b n d] -> [b d], and the weights f32[b a n] if they are wanted."""
    init = nn.initializers.xavier_uniform()
    probe = self.param("probe", init, (1, 1, x.shape[-1]))
    probe = jnp.tile(probe.astype(x.dtype), (x.shape[0], 1, 1))
    attend = MultiHeadDotProductAttention(self.config)
    x, seen = attend(probe, x, x.shape[1], weights)
    x = x + MlpBlock(self.config)(*LayerNorm(self.config)(x))
    return x[:, 0], None if seen is None or not weights else seen[:, :, 0]


class VisionTransformer(nn.Module):
  """Images to logits; with `units` the hybrid, whose patches are a ResNet's."""

  config: ViTConfig

  @nn.compact
  def __call__(self, images, *, train=False, intermediates=False):
    """[b h w 3] in [-1, 1] -> f32[b k] and the intermediates by name.

    Without classes the representation f32[b d] takes the logits' place.
    """
    config = self.config
    x, out = self.embed(images)
    first_only = config.classifier == "token" and not intermediates
    x, encoder_out = self.encode(x, train, intermediates, first_only)
    out |= encoder_out
    x, weights = self.pool(x, intermediates)
    if weights is not None:
      out["pooling_weights"] = weights
    x = out["pooled"] = x.astype(jnp.float32)
    if width := config.representation_width:
      x = out["pre_logits"] = nn.tanh(nn.Dense(width, name="pre_logits")(x))
    if config.num_classes:
      x = out["logits"] = layers.make_head(config)(x)
    return x, out

  def embed(self, images):
    """[b h w 3] -> patch embeddings [b h' w' d], intermediates by name."""
    config, out = self.config, {}
    x = images.astype(config.dtype)
    if config.units is not None:
      x, out = hybrid_stem(config, x)
    patch = (config.patch_size, config.patch_size)
    x = nn.Conv(
      config.hidden_size,
      patch,
      strides=patch,
      padding="VALID",
      dtype=x.dtype,
      conv_general_dilated=layers.convolve,
      name="embedding",
    )(x)
    return x, out | {"stem": x}

  def encode(self, x, train, intermediates, first_only=False):
    """[b h' w' d] -> tokens [b n d], or the first [b 1 d]; intermediates."""
    (b, *grid, d) = x.shape
    x = x.reshape(b, -1, d)
    if self.config.classifier == "token":
      cls = self.param("cls", nn.initializers.zeros, (1, 1, d))
      cls = jnp.tile(cls.astype(x.dtype), (b, 1, 1))
      x = jnp.concatenate([cls, x], axis=1)
    return Encoder(
      self.config,
      tuple(grid),
      deterministic=not train,
      intermediates=intermediates,
      first_only=first_only,
      name="Transformer",
    )(x)

  def pool(self, x, weights):
    """[b n d] -> [b d], and MAPHead's weights f32[b a n] if they are wanted."""
    if self.config.classifier == "token":
      return x[:, 0], None
    if self.config.classifier == "gap":
      return x.mean(axis=1, dtype=jnp.float32), None
    return MAPHead(self.config, name="MAPHead_0")(x, weights)
