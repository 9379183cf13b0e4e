"""The Vision Transformer of arXiv 2010.11929, as Flax Linen modules.

Parameter names are those of the published files. Parameters are float32;
matrix products run in `dtype`; LayerNorm statistics and softmax are float32,
because bfloat16's eight bits lose small attention weights and variances.
Everything after the pooling is float32: it is one vector an image.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.models import attention, posemb
from vit_jax.models.resnet import hybrid_stem

# The published npz files were trained with the tanh approximation; PyTorch's
# default, and so what Hugging Face's and timm's weights expect, is erf.
ACTIVATIONS = {
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "gelu_erf": lambda x: nn.gelu(x, approximate=False),
}

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


class Dropout(nn.Module):
  """Dropout (arXiv 1207.0580).

  The barrier keeps XLA from drawing the mask anew in each product that reads
  it, forward and backward: that would take as long as these (RESULTS.md).
  """

  rate: float
  deterministic: bool

  @nn.compact
  def __call__(self, x):
    """[...] -> [...]"""
    if self.deterministic or not self.rate:
      return x
    keep = 1 - self.rate
    kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
    return jnp.where(jax.lax.optimization_barrier(kept), x / keep, 0)


def is_fast(dtype) -> bool:
  """Returns whether to compute in the way that suits TPUs best.

  That is in bfloat16: tokens are padded, attention is a kernel, LayerNorm's
  scale and bias become part of the next product. Float32 is as the paper has
  it, and what the former is tested against.
  """
  return dtype == jnp.bfloat16


def count_rows(n: int, dtype) -> int:
  """Returns the rows of `pad_tokens`: 200 for 197 tokens."""
  return n + -n % attention.ROWS if is_fast(dtype) else n


def pad_tokens(x):
  """Appends zeros to [b n d], so that n fills the rows of TPU registers.

  Then [b n d] and [b*n d] lie in memory alike, and XLA needs no copies between
  what is about images and what is about tokens alone.
  """
  n = x.shape[1]
  return jnp.pad(x, ((0, 0), (0, count_rows(n, x.dtype) - n), (0, 0)))


def gather(kernel):
  """Has each device get all of a kernel that is split by fsdp.

  Left to itself, XLA's partitioner makes a loop of a product with a split
  kernel, of small products with a piece each.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
    return kernel
  return jax.lax.with_sharding_constraint(kernel, P())


def spread(x):
  """Keeps [b*n d] where its images are: every device has its own.

  With kernels split by fsdp the partitioner may think it better to gather the
  tokens.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(mesh.axis_names))


def convolve(x, kernel, *args, **kwargs):
  """Returns a convolution with a kernel that `gather` gathers."""
  return jax.lax.conv_general_dilated(x, gather(kernel), *args, **kwargs)


@jax.custom_vjp
def add_bias(x, bias):
  """[r o] + [o]; the bias's gradient is a product with ones, where it may be.

  It sums over all tokens, for which XLA's estimate on v5e is 256,000 cycles for
  B/16's keys alone: as much as for two of their products. A product with ones
  adds in float32 as well and is but a pass through memory.
  """
  return x + bias


def _add_bias_backward(_, gradient):
  if gradient.dtype != jnp.bfloat16:
    # Products of float32 are rounded to bfloat16 on TPUs; sums are not.
    return gradient, gradient.sum(0)
  ones = jnp.ones((attention.ROWS, gradient.shape[0]), gradient.dtype)
  # One row would be enough, but XLA would make a sum of it again.
  sums = jnp.matmul(ones, gradient, preferred_element_type=jnp.float32)
  return gradient, sums[0].astype(gradient.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, None), _add_bias_backward)


class Dense(nn.Module):
  """A dense layer, whose kernel may be stored with the heads apart.

  The product is that of the flattened kernel: its result has the heads side by
  side, as `attention.attend` takes them, which a product with the kernel as it
  is stored would have to be copied for.
  """

  kernel_shape: tuple[int, ...]
  in_axes: int = 1  # leading axes of the kernel that are summed over
  bias_init: Any = nn.initializers.zeros
  sum_by_product: bool = True  # see `add_bias`
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, affine=None):
    """[... i] -> [... o]; `affine` see `LayerNorm`."""
    shape = self.kernel_shape
    flat = (
      math.prod(shape[: self.in_axes]),
      math.prod(shape[self.in_axes :]),
    )
    # Xavier's of the flattened shape, not of one head's.
    init = nn.initializers.xavier_uniform()
    kernel = self.param("kernel", lambda key: init(key, flat).reshape(shape))
    bias = self.param("bias", self.bias_init, shape[self.in_axes :])
    kernel, bias = kernel.reshape(flat), bias.reshape(-1)
    if affine:
      # (x scale + shift) kernel + bias, with as much of it as possible done
      # once, not for each token: then gradients need no sums over tokens.
      scale, shift = affine
      moved = jnp.broadcast_to(shift, (attention.ROWS, flat[0]))
      moved = moved.astype(self.dtype) @ kernel.astype(self.dtype)
      kernel, bias = kernel * scale[:, None], bias + moved[0]
    kernel, bias = (y.astype(self.dtype) for y in (kernel, bias))
    kernel = gather(kernel)
    if len(shape) > 2:
      # Else the kernel's gradient is computed in the layout of what is stored,
      # for which XLA transposes the tokens: 117,000 cycles for each of B/16's.
      kernel = jax.lax.optimization_barrier(kernel)
    y = x.astype(self.dtype).reshape(-1, flat[0]) @ kernel
    add = add_bias if self.sum_by_product else jnp.add
    return add(y, bias).reshape(*x.shape[:-1], flat[1])


class LayerNorm(nn.Module):
  """LayerNorm for the `Dense` layers that follow.

  With bfloat16 the scale and bias are left to them: their gradients are sums
  over all tokens, which cost as much as a product, unless they follow from the
  kernel's gradient, as they do there.
  """

  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[... d] -> [... d], and (scale f32[d], bias f32[d]) if still to do."""
    shape = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    variance = jnp.square(y).mean(-1, keepdims=True) - jnp.square(mean)
    factor = jax.lax.rsqrt(jnp.maximum(variance, 0) + self.epsilon)
    if is_fast(self.dtype):
      return ((y - mean) * factor).astype(self.dtype), (scale, bias)
    return ((y - mean) * (factor * scale) + bias).astype(self.dtype), None


class MlpBlock(nn.Module):
  """Two dense layers with GELU between them."""

  mlp_dim: int
  activation: str = "gelu_tanh"
  dropout_rate: float = 0.0
  deterministic: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, affine=None):
    """[... d] -> [... d]; `affine` see `LayerNorm`."""
    width = x.shape[-1]
    options = {"bias_init": nn.initializers.normal(1e-6), "dtype": self.dtype}
    # XLA sums this bias's gradient where it makes it, beside a product.
    x = Dense((width, self.mlp_dim), sum_by_product=False, **options)(x, affine)
    x = ACTIVATIONS[self.activation](x)
    x = Dropout(self.dropout_rate, self.deterministic)(x)
    x = Dense((self.mlp_dim, width), **options)(x)
    return Dropout(self.dropout_rate, self.deterministic)(x)


class MultiHeadDotProductAttention(nn.Module):
  """Multi-head attention with a float32 softmax.

  Query, key and value are three projections: one fused product costs layout
  copies on TPU, and the published files keep them apart.
  """

  num_heads: int
  relative: bool = False  # position embeddings of key minus query
  dropout_rate: float = 0.0  # of the attention weights
  deterministic: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs_q, inputs_kv, valid, weights=False, affine=None):
    """[b q d] attends to [b n d] -> [b q d] and the weights f32[b a q n].

    Args:
      inputs_q: what asks.
      inputs_kv: what is asked; rows from `valid` on are padding.
      valid: how many rows are not.
      weights: whether they are wanted; else None stands in their place.
      affine: of both inputs, see `LayerNorm`.
    """
    width = inputs_q.shape[-1]
    heads = (self.num_heads, width // self.num_heads)

    # In rows, so that the three gradients are added where LayerNorm's begins:
    # a change of shape between them costs XLA one more pass.
    alike, n = inputs_q is inputs_kv, inputs_kv.shape[1]
    rows_q = inputs_q.reshape(-1, width)
    rows_kv = rows_q if alike else inputs_kv.reshape(-1, width)

    def project(name, rows, like):
      y = Dense((width, *heads), dtype=self.dtype, name=name)(rows, affine)
      return y.reshape(like.shape)

    query, key, value = (
      project("query", rows_q, inputs_q),
      project("key", rows_kv, inputs_kv),
      project("value", rows_kv, inputs_kv),
    )
    plainly = weights or self.relative or not is_fast(self.dtype)
    if inputs_q.shape[1] % attention.ROWS:
      plainly = True
    if self.dropout_rate > 0 and not self.deterministic:
      plainly = True
    fused = None
    if not plainly:
      fused = attention.find_fused(n, width, self.num_heads)
    if fused:
      x, found = fused(query, key, value, self.num_heads, valid), None
    else:
      offsets = self.score_offsets(query, n, valid) if self.relative else None
      drop = Dropout(self.dropout_rate, self.deterministic)
      x, found = attention.attend_plainly(
        query, key, value, self.num_heads, valid, offsets, drop
      )
    out = Dense((*heads, width), in_axes=2, dtype=self.dtype, name="out")
    return out(x), found

  def score_offsets(self, query, num_keys, valid):
    """[b q d] -> f32[b a q n]: the query against each offset's embedding.

    One-dimensional relative attention (the paper, Appendix D.4): the offset is
    the distance in the sequence, the class token's place included.
    """
    num_queries, n = query.shape[1], valid
    query = attention.split_heads(query[:, :n], self.num_heads)
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    embedding = self.param(
      "relative_embedding",
      nn.initializers.normal(0.02),
      (2 * n - 1, *query.shape[2:]),
    )
    by_offset = jnp.einsum(
      "bqad,rad->baqr",
      query,
      embedding.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    # Row q holds the offsets -q .. n-1-q of its keys 0 .. n-1.
    row = jnp.arange(query.shape[1])[:, None]
    index = jnp.arange(n)[None, :] - row + n - 1
    offsets = by_offset[:, :, row, index]
    padding = (0, num_queries - len(row)), (0, num_keys - n)
    return jnp.pad(offsets, ((0, 0), (0, 0), *padding))


class PositionEmbs(nn.Module):
  """One vector for each position, learned or computed.

  "learned" (1-D): one for each token, the class token included. "2d": one
  half-vector for each row and each column. "sincos2d": fixed waves. The latter
  two leave the class token, which has no place in the image, without.
  """

  kind: str
  grid: tuple[int, int]

  @nn.compact
  def __call__(self, n, width):
    """Returns f32[1 n width]."""
    init = nn.initializers.normal(0.02)
    if self.kind == "learned":
      return self.param("pos_embedding", init, (1, n, width))
    height_width = self.grid
    if self.kind == "2d":
      tables = [
        self.param(f"pos_embedding_{axis}", init, (length, width // 2))
        for axis, length in zip("yx", height_width, strict=True)
      ]
      tokens = posemb.join_axes(*tables)
    else:
      tokens = posemb.sincos_2d(height_width, width)
    extra = n - tokens.shape[0]
    return jnp.pad(tokens, ((extra, 0), (0, 0)))[None]


class Encoder1DBlock(nn.Module):
  """Pre-LayerNorm transformer block.

  `positions` makes the embeddings that this block adds to its own input; it is
  None where they are added elsewhere or not at all. With `first_only` nobody
  reads what the other tokens would become, so they are keys and values alone.
  """

  num_heads: int
  mlp_dim: int
  num_tokens: int  # what comes behind them is padding
  first_only: bool = False
  positions: Any = None
  relative: bool = False
  activation: str = "gelu_tanh"
  layer_norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth: bool = False
  deterministic: bool = True
  intermediates: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, drop_path_rate, shared_positions):
    """Applies the block.

    Args:
      x: [b*n d]: the tokens of `pad_tokens`, those of all images in a row.
      drop_path_rate: f32[].
      shared_positions: f32[1 num_tokens d], added first, or None.

    Returns:
      [b*n d], or the first token or tokens of each image alone, and the
      intermediates by name (empty if not asked for).
    """
    options = {"deterministic": self.deterministic, "dtype": self.dtype}
    n = self.num_tokens
    b = x.shape[0] // count_rows(n, x.dtype)

    def split(y):
      """[b*n d] -> [b n d]."""
      return y.reshape(b, -1, y.shape[-1])

    def norm(y):
      return LayerNorm(self.layer_norm_epsilon, dtype=self.dtype)(y)

    def branch(y):
      if not self.stochastic_depth or self.deterministic:
        return y
      y = drop_path(split(y), drop_path_rate, self.make_rng("dropout"))
      return y.reshape(x.shape)

    if self.positions:
      shared_positions = self.positions(name="posembed")(n, x.shape[-1])
    if shared_positions is not None:
      x = (split(x) + pad_tokens(shared_positions.astype(x.dtype))).reshape(
        x.shape
      )
    y, affine = norm(x)
    queries = keys = split(y)
    if self.first_only:
      # With as many rows as a register has, where there are registers.
      first = slice(0, count_rows(1, x.dtype))
      queries, x = keys[:, first], split(x)[:, first].reshape(-1, x.shape[-1])
    y, weights = MultiHeadDotProductAttention(
      self.num_heads, self.relative, self.attention_dropout_rate, **options
    )(queries, keys, n, self.intermediates, affine)
    y = y.reshape(x.shape)
    attended = Dropout(self.dropout_rate, self.deterministic)(y)
    x = spread(x + branch(attended))
    mlp = MlpBlock(self.mlp_dim, self.activation, self.dropout_rate, **options)(
      *norm(x)
    )
    x = spread(x + branch(mlp))
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

  With `first_only` just the first token of the result is returned, and the last
  block does the less, but for scanned ones.
  """

  num_layers: int
  num_heads: int
  mlp_dim: int
  grid: tuple[int, int]
  pos_embedding: str = "learned"
  pos_embedding_at: str = "input"
  activation: str = "gelu_tanh"
  layer_norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth_rate: float = 0.0
  deterministic: bool = True
  intermediates: bool = False
  scan: bool = False
  remat: str = "none"
  first_only: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[b n d] -> [b n d] or [b 1 d], intermediates by name."""
    b, n, d = x.shape
    x = pad_tokens(x)
    positions, shared = None, None
    if self.pos_embedding not in ("none", "relative"):
      positions = functools.partial(PositionEmbs, self.pos_embedding, self.grid)
      if self.pos_embedding_at != "every_layer":
        embedding = positions(name="posembed_input")(n, d)
        positions = None
        if self.pos_embedding_at == "input":
          # Its gradient is a sum over images, in float32.
          padding = ((0, 0), (0, x.shape[1] - n), (0, 0))
          x = (x + jnp.pad(embedding, padding)).astype(x.dtype)
        else:
          shared = embedding
    x = Dropout(self.dropout_rate, self.deterministic)(x)
    out = {"embedded": x[:, :n]}
    x = spread(x.reshape(-1, d))
    x, blocks = self.run_blocks(x, n, positions, shared)
    for i, values in enumerate(blocks):
      out.update({f"block{i:02d}/{name}": v for name, v in values.items()})
    if self.first_only:
      x = x.reshape(b, -1, d)[:, 0]
    x = nn.LayerNorm(
      self.layer_norm_epsilon, dtype=self.dtype, name="encoder_norm"
    )(x)
    x = x.reshape(b, -1, d)[:, :n]
    return x, out | {"encoded": x}

  def run_blocks(self, x, num_tokens, positions, shared_positions):
    """Applies every block; returns x and each block's intermediates."""
    rates = jnp.linspace(0, self.stochastic_depth_rate, self.num_layers)
    options = {
      "num_heads": self.num_heads,
      "mlp_dim": self.mlp_dim,
      "num_tokens": num_tokens,
      "positions": positions,
      "relative": self.pos_embedding == "relative",
      "activation": self.activation,
      "layer_norm_epsilon": self.layer_norm_epsilon,
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
        options["first_only"] = self.first_only and i == self.num_layers - 1
        x, values = block(**options, name=f"encoderblock_{i}")(
          x, rates[i], shared_positions
        )
        blocks.append(values)
      return x, blocks
    x, stacked = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
      length=self.num_layers,
    )(**options, name="encoderblock")(x, rates, shared_positions)
    return x, [
      jax.tree.map(lambda v, i=i: v[i], stacked) for i in range(self.num_layers)
    ]


class MAPHead(nn.Module):
  """Multi-head attention pooling (arXiv 2106.04560, Section 3.2)."""

  num_heads: int
  mlp_dim: int
  activation: str = "gelu_tanh"
  layer_norm_epsilon: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, weights=False):
    """[b n d] -> [b d], and the weights f32[b a n] if they are wanted."""
    probe = self.param(
      "probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1])
    )
    probe = jnp.tile(probe.astype(x.dtype), (x.shape[0], 1, 1))
    x, seen = MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype)(
      probe, x, x.shape[1], weights
    )
    y = LayerNorm(self.layer_norm_epsilon, dtype=self.dtype)(x)
    x = x + MlpBlock(self.mlp_dim, self.activation, dtype=self.dtype)(*y)
    if not weights:
      return x[:, 0], None
    assert seen is not None
    return x[:, 0], seen[:, :, 0]


class VisionTransformer(nn.Module):
  """Images to logits; with `units` the hybrid, whose patches are a ResNet's."""

  num_classes: int
  patch_size: int
  hidden_size: int
  num_layers: int
  mlp_dim: int
  num_heads: int
  units: tuple[int, ...] | None = None
  classifier: str = "token"
  representation_size: int = 0
  pos_embedding: str = "learned"
  pos_embedding_at: str = "input"
  activation: str = "gelu_tanh"
  layer_norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth_rate: float = 0.0
  head_bias_init: float = 0.0
  scan: bool = False
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, *, train=False, intermediates=False):
    """[b h w 3] in [-1, 1] -> f32[b k] and the intermediates by name.

    Without classes the representation f32[b d] takes the logits' place.
    """
    x, out = self.embed(images)
    first_only = self.classifier == "token" and not intermediates
    x, encoder_out = self.encode(x, train, intermediates, first_only)
    out |= encoder_out
    x, weights = self.pool(x, intermediates)
    if weights is not None:
      out["pooling_weights"] = weights
    x = out["pooled"] = x.astype(jnp.float32)
    if self.representation_size:
      x = nn.tanh(nn.Dense(self.representation_size, name="pre_logits")(x))
      out["pre_logits"] = x
    if self.num_classes:
      x = out["logits"] = nn.Dense(
        self.num_classes,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(self.head_bias_init),
        name="head",
      )(x)
    return x, out

  def embed(self, images):
    """[b h w 3] -> patch embeddings [b h' w' d], intermediates by name."""
    x, out = images.astype(self.dtype), {}
    if self.units is not None:
      x, out = hybrid_stem(x, self.units, self.dtype)
    x = nn.Conv(
      self.hidden_size,
      (self.patch_size, self.patch_size),
      strides=(self.patch_size, self.patch_size),
      padding="VALID",
      dtype=self.dtype,
      conv_general_dilated=convolve,
      name="embedding",
    )(x)
    return x, out | {"stem": x}

  def encode(self, x, train, intermediates, first_only=False):
    """[b h' w' d] -> the encoder's tokens [b n d], intermediates by name.

    With `first_only` the first token alone, [b 1 d].
    """
    grid = x.shape[1:3]
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    if self.classifier == "token":
      cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
      cls = jnp.tile(cls.astype(x.dtype), (x.shape[0], 1, 1))
      x = jnp.concatenate([cls, x], axis=1)
    return Encoder(
      self.num_layers,
      self.num_heads,
      self.mlp_dim,
      grid,
      self.pos_embedding,
      self.pos_embedding_at,
      self.activation,
      self.layer_norm_epsilon,
      self.dropout_rate,
      self.attention_dropout_rate,
      self.stochastic_depth_rate,
      deterministic=not train,
      intermediates=intermediates,
      scan=self.scan,
      remat=self.remat,
      first_only=first_only,
      dtype=self.dtype,
      name="Transformer",
    )(x)

  def pool(self, x, weights):
    """[b n d] -> [b d], and MAPHead's weights f32[b a n] if they are wanted."""
    if self.classifier == "token":
      return x[:, 0], None
    if self.classifier == "gap":
      return x.mean(axis=1, dtype=jnp.float32), None
    return MAPHead(
      self.num_heads,
      self.mlp_dim,
      self.activation,
      self.layer_norm_epsilon,
      dtype=self.dtype,
      name="MAPHead_0",
    )(x, weights)
