"""The Vision Transformer with a head that predicts corrupted patches."""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.models import masking, vit


class MaskedPatchPredictor(vit.VisionTransformer):
  """An encoder as in `VisionTransformer`, another beginning and end.

  It has no pooling, no tanh layer and no classes; its other parameters have
  the same names, so that a classifier can start from them.
  """

  num_outputs: int = 0

  @nn.compact
  def __call__(self, images, corruption, *, train=False, intermediates=False):
    """Predicts the corrupted patches.

    Args:
      images: [b h w 3] in [-1, 1].
      corruption: a `masking.Corruption` of b images.
      train: whether to drop out.
      intermediates: whether to return those of the blocks.

    Returns:
      f32[b m o] for the patches `corruption.corrupted`, intermediates by name.
    """
    x, out = self.embed(images)
    x, encoder_out = self.encode(
      self.corrupt(x, corruption), train, intermediates
    )
    num_patches = corruption.source.shape[1]
    x = x[:, x.shape[1] - num_patches :]  # without the class token
    x = masking.take_patches(x, corruption.corrupted).astype(jnp.float32)
    # Zeros, as in a classifier's head: the first guess is the same for all.
    x = nn.Dense(
      self.num_outputs, kernel_init=nn.initializers.zeros, name="mpp_head"
    )(x)
    return x, out | encoder_out | {"logits": x}

  def corrupt(self, x, corruption):
    """Hides and swaps embeddings [b h' w' d], before positions are added."""
    mask_token = self.param(
      "mask_token", nn.initializers.normal(0.02), (1, 1, x.shape[-1])
    )
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    tokens = masking.take_patches(tokens, corruption.source)
    tokens = jnp.where(
      corruption.masked[..., None], mask_token.astype(x.dtype), tokens
    )
    return tokens.reshape(x.shape)
