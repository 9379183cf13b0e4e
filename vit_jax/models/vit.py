"""The Vision Transformer of arXiv 2010.11929, as Flax Linen modules.

Read it beside Section 3.1 and Figure 1 of the paper. Parameter names are those
of the published files. Parameters are float32; matmuls run in `config.dtype`;
LayerNorm statistics and softmax are float32, because bfloat16's eight bits lose
small attention weights and variances. Everything after the pooling is float32,
because it is only one vector per image.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models import layers, posemb
from vit_jax.models.attention import MultiHeadDotProductAttention
from vit_jax.models.config import ViTConfig
from vit_jax.models.layers import Dense, LayerNorm, LayerScale, dropout
from vit_jax.models.resnet import hybrid_stem

# The published npz files were trained with the tanh approximation; PyTorch's
# default, and so what Hugging Face's and timm's weights expect, is erf.
ACTIVATIONS = {
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "gelu_erf": lambda x: nn.gelu(x, approximate=False),
  "gelu_quick": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP
  "silu": nn.silu,
}

REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.save_only_these_names(layers.SAVED),
  "full": jax.checkpoint_policies.nothing_saveable,
}


class MlpBlock(nn.Module):
  """Two dense layers with GELU between them, or a gate (arXiv 2002.05202)."""

  config: ViTConfig
  deterministic: bool = True

  @nn.compact
  def __call__(self, x, affine=None):
    """[... d] -> [... d]; `affine` see `LayerNorm`."""
    config, width, inner = self.config, x.shape[-1], self.config.mlp_dim
    init = nn.initializers.normal(1e-6)
    dense = functools.partial(Dense, config, bias_init=init)
    # XLA sums this bias's gradient where it is computed, beside a matmul.
    widen = functools.partial(dense, (width, inner), sum_by_product=False)
    activate = ACTIVATIONS[config.activation]
    if config.mlp == "gated":
      gate = activate(layers.save(config, widen(name="gate")(x, affine)))
      x = gate * layers.save(config, widen()(x, affine))
    else:
      x = activate(layers.save(config, widen()(x, affine)))
    x = dropout(config, self.deterministic)(x)
    x = dense((inner, width), fsdp_axis=1)(x)
    return dropout(config, self.deterministic)(x)


class PositionEmbs(nn.Module):
  """One vector for each position, learned or computed.

  "learned" (1-D): one for each token, the class token included. "2d": one
  half-vector for each row and each column. "sincos2d": fixed waves. These two
  add nothing to the tokens before the patches, which have no place in the
  image; "learned" does as `prefix_positions` specifies.
  """

  config: ViTConfig
  grid: tuple[int, int]

  @nn.compact
  def __call__(self, n, width):
    """Returns f32[1 n width]."""
    init, kind, rows = (
      nn.initializers.normal(0.02),
      self.config.pos_embedding,
      0,
    )
    extra = n - self.grid[0] * self.grid[1]
    if kind == "learned":
      rows = self.config.num_prefix_positions
      shape = (1, n - extra + rows, width)
      tokens = self.param("pos_embedding", init, shape)
      if rows == extra:
        return tokens
      tokens = tokens[0]
    elif kind == "2d":
      tables = [
        self.param(f"pos_embedding_{axis}", init, (length, width // 2))
        for axis, length in zip("yx", self.grid, strict=True)
      ]
      tokens = posemb.join_axes(*tables)
    else:
      tokens = posemb.sincos_2d(self.grid, width)
    none = jnp.zeros((extra - rows, width))
    return jnp.concatenate([tokens[:rows], none, tokens[rows:]])[None]


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
  intermediates: bool | str = False

  @nn.compact
  def __call__(self, x, drop_path_rate, shared_positions):
    """[b*n d], the padded tokens of all images -> the same, intermediates.

    With `first_only` returns only the first tokens of each image.

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
      if config.layer_scale_init:
        y = LayerScale(config)(y)
      if drop_path_rate is None or self.deterministic:
        return y
      key = self.make_rng("dropout")
      return layers.drop_path(split(y), drop_path_rate, key).reshape(x.shape)

    positions = shared_positions
    if config.pos_embedding_at == "every_layer":
      embed = PositionEmbs(config, self.grid, name="posembed")
      positions = embed(n, x.shape[-1])
    if positions is not None:
      added = layers.pad_tokens(config, positions.astype(x.dtype))
      x = (split(x) + added).reshape(x.shape)
    y, x, affine = LayerNorm(config)(x)
    queries = keys = split(y)
    if self.first_only:
      # As many rows as a register has, in the TPU layout.
      first = slice(0, layers.count_rows(config, 1))
      queries, x = keys[:, first], split(x)[:, first].reshape(-1, x.shape[-1])
    y, weights = MultiHeadDotProductAttention(
      config,
      config.pos_embedding == "relative",
      find_angles(config, self.grid, keys.shape[1]),
      config.attention_dropout_rate,
      self.deterministic,
    )(queries, keys, n, self.intermediates is True, affine)
    attended = dropout(config, self.deterministic)(y.reshape(x.shape))
    x = layers.spread(x + branch(attended))
    y, x, affine = LayerNorm(config)(x)
    mlp = MlpBlock(config, self.deterministic)(y, affine)
    x = layers.spread(x + branch(mlp))
    if not self.intermediates:
      return x, {}
    if self.intermediates == "tokens":
      return x, {"out": split(x)[:, :n]}
    assert weights is not None
    return x, {
      "attention_weights": weights[:, :, :n, :n],
      "attention": split(attended)[:, :n],
      "mlp": split(mlp)[:, :n],
      "out": split(x)[:, :n],
    }


def find_angles(config, grid, rows):
  """Returns the angles f64[rows d/a/2] of rotary embedding, or None."""
  if config.rope == "none":
    return None
  head_dim = config.hidden_size // config.num_heads
  angles = posemb.dinov3_angles(grid, head_dim, config.rope_base)
  after = rows - config.num_prefix - len(angles)
  return np.pad(angles, ((config.num_prefix, after), (0, 0)))


class Encoder(nn.Module):
  """Position embedding, the blocks, a last LayerNorm.

  With `first_only` only the first token is returned, and the last block, unless
  scanned, updates only this one.
  """

  config: ViTConfig
  grid: tuple[int, int]
  deterministic: bool = True
  intermediates: bool | str = False
  first_only: bool = False

  @nn.compact
  def __call__(self, x):
    """[b n d] -> [b n d] or [b 1 d], intermediates by name."""
    config, (b, n, d) = self.config, x.shape
    x = layers.pad_tokens(config, x)
    shared = None
    kind, place = config.pos_embedding, config.pos_embedding_at
    if kind not in ("none", "relative") and place != "every_layer":
      shared = PositionEmbs(config, self.grid, name="posembed_input")(n, d)
    if shared is not None and place == "input":
      # In float32, because its gradient is a sum over images.
      padding = ((0, 0), (0, x.shape[1] - n), (0, 0))
      x = (x + jnp.pad(shared, padding)).astype(x.dtype)
      shared = None
    x = dropout(config, self.deterministic)(x)
    if config.pre_norm:
      x, *_ = LayerNorm(config, whole=True, name="pre_norm")(x)
    out = {"embedded": x[:, :n]}
    x = layers.spread(x.reshape(-1, d))
    x, blocks = self.run_blocks(x, n, shared)
    for i, values in enumerate(blocks):
      out.update({f"block{i:02d}/{name}": v for name, v in values.items()})
    if self.first_only:
      x = x.reshape(b, -1, d)[:, 0]
    norm: Any = LayerNorm(config, whole=True, name="encoder_norm")
    if config.final_norm != "tokens":
      norm = lambda x: (x,)  # noqa: E731
    if self.intermediates == "tokens":
      out |= {
        f"{name[:7]}/encoded": norm(x)[0]
        for name, x in out.items()
        if name.endswith("/out")
      }
    x = norm(x)[0].reshape(b, -1, d)[:, :n]
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
    """[b n d] -> [b d], and the weights f32[b a n], None without `weights`."""
    config = dataclasses.replace(
      self.config,
      num_heads=self.config.map_heads or self.config.num_heads,
      **{"qkv_bias": "all", "qk_norm": False, "mlp": "plain"},
    )
    init = nn.initializers.xavier_uniform()
    probe = self.param("probe", init, (1, 1, x.shape[-1]))
    probe = jnp.tile(probe.astype(x.dtype), (x.shape[0], 1, 1))
    attend = MultiHeadDotProductAttention(config)
    x, seen = attend(probe, x, x.shape[1], weights)
    y, x, affine = LayerNorm(config)(x)
    x = x + MlpBlock(config)(y, affine)
    return x[:, 0], None if seen is None or not weights else seen[:, :, 0]


class VisionTransformer(nn.Module):
  """Images to logits; with `units` a hybrid, on the output of a ResNet."""

  config: ViTConfig

  @nn.compact
  def __call__(self, images, *, train=False, intermediates=False):
    """[b h w 3] in [-1, 1] -> f32[b k] and the intermediates by name.

    Without classes the representation f32[b d] takes the logits' place.
    `intermediates` "tokens" omits attention weights, so that kernels may be
    used, and has each block's tokens after the last LayerNorm. With a
    distillation token the logits are the mean of "logits_cls" and
    "logits_dist", from two heads.
    """
    config = self.config
    x, out = self.embed(images)
    first_only = config.classifier == "token" and not (
      intermediates or config.distillation_token
    )
    x, encoder_out = self.encode(x, train, intermediates, first_only)
    out |= encoder_out
    tokens, (x, weights) = x, self.pool(x, intermediates is True)
    if weights is not None:
      out["pooling_weights"] = weights
    x = x.astype(jnp.float32)
    if config.final_norm == "pooled":
      float32 = dataclasses.replace(config, dtype="float32")
      x, *_ = LayerNorm(float32, name="fc_norm")(x)
    out["pooled"] = x
    if width := config.projection_size:
      x = out["projected"] = nn.Dense(width, use_bias=False, name="projection")(
        x
      )
    if width := config.representation_width:
      x = out["pre_logits"] = nn.tanh(nn.Dense(width, name="pre_logits")(x))
    if config.num_classes:
      x = layers.make_head(config)(x)
      if config.distillation_token:
        second = layers.make_head(config, "head_dist")
        second = second(tokens[:, 1].astype(jnp.float32))
        out |= {"logits_cls": x, "logits_dist": second}
        x = (x + second) / 2
      out["logits"] = x
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
      use_bias=config.patch_bias,
      dtype=x.dtype,
      conv_general_dilated=layers.convolve,
      name="embedding",
    )(x)
    return x, out | {"stem": x}

  def encode(self, x, train, intermediates, first_only=False):
    """[b h' w' d] -> tokens [b n d], or the first [b 1 d]; intermediates."""
    (b, *grid, d) = x.shape
    x = x.reshape(b, -1, d)
    prefix = {
      "cls": (self.config.has_class_token, nn.initializers.zeros),
      "dist": (self.config.distillation_token, nn.initializers.zeros),
      "registers": (self.config.registers, nn.initializers.normal(1e-6)),
    }
    tokens = [
      jnp.tile(self.param(name, init, (1, count, d)).astype(x.dtype), (b, 1, 1))
      for name, (count, init) in prefix.items()
      if count
    ]
    x = jnp.concatenate([*tokens, x], axis=1) if tokens else x
    return Encoder(
      self.config,
      tuple(grid),
      deterministic=not train,
      intermediates=intermediates,
      first_only=first_only,
      name="Transformer",
    )(x)

  def pool(self, x, weights):
    """[b n d] -> [b d], and MAPHead's weights f32[b a n] if `weights`."""
    kind = self.config.classifier
    if kind == "token":
      return x[:, 0], None
    if kind == "map":
      return MAPHead(self.config, name="MAPHead_0")(x, weights)
    mean = x[:, self.config.num_prefix :].mean(axis=1, dtype=jnp.float32)
    if kind == "token+gap":
      mean = jnp.concatenate([x[:, 0].astype(jnp.float32), mean], axis=1)
    return mean, None
