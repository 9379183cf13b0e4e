"""The Vision Transformer with a head that predicts corrupted patches."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError, check_choice
from vit_jax.models import masking, variants, vit
from vit_jax.models.config import make as make_config
from vit_jax.models.model import Model, as_model, check_image_size


class MaskedPatchPredictor(vit.VisionTransformer):
  """A Vision Transformer that predicts corrupted patches.

  It has no pooling, no tanh layer and no classes; its other parameters are
  named as in `VisionTransformer`, so that a classifier can start from them.
  """

  num_outputs: int = 0

  @nn.compact
  def __call__(self, images, corruption, *, train=False, intermediates=False):
    """Predicts the corrupted patches.

    Args:
      images: [b h w 3] in [-1, 1].
      corruption: a `masking.Corruption` of b images.
      train: whether to apply dropout.
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
    # Zeros, as in a classifier's head, so that all first guesses are the same.
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


def create_masked(*, target: str, variant: str, image_size, **options) -> Model:
  """Returns the model that predicts masked patches, see `masking`.

  Its `apply` takes a `masking.Corruption` after the images, and returns the
  predictions f32[b m o] for the m corrupted patches. Its parameters are those
  of the ViT, "mask_token" and "mpp_head"; of the classifier it has at most the
  class token.

  Args:
    target: what is predicted, one of `masking.TARGETS`.
    variant: a ViT's, such as "ViT-B_16".
    image_size: as in `create`; at least two patches.
    **options: as in `create`, except those of classifiers.

  Raises:
    UserError: as `create`; a variant without patches of pixels, a patch size
      that the target's cells do not divide, an option without effect.
  """
  check_choice("config.masked_target", target, masking.TARGETS)
  sizes = variants.parse(variant)
  _check_masked(target, variant, sizes, options)
  config = make_config(variant, 0, options)
  height_width = check_image_size(image_size, sizes)
  grid = tuple(side // sizes.patch_size for side in height_width)
  num_patches = grid[0] * grid[1]
  if num_patches < 2:
    raise UserError(
      f"image_size {image_size} is one patch of {variant}; to predict a patch "
      "from others there must be two at least"
    )
  keys = jax.random.split(jax.random.key(0), 1)
  corruption = masking.draw_corruption(keys, num_patches)
  make = functools.partial(
    MaskedPatchPredictor,
    num_outputs=masking.count_outputs(target, sizes.patch_size),
  )
  return as_model(make, config, height_width, grid, corruption)


def _check_masked(target, variant, sizes, options):
  """Raises a UserError for what `create_masked` cannot take."""
  if sizes.encoder is None or sizes.units is not None:
    raise UserError(
      f"masked patches are patches of pixels, which {variant} does not have; "
      "choose a plain ViT such as ViT-B_16"
    )
  cells, patch = masking.TARGETS[target], sizes.patch_size
  if cells and patch % cells:
    raise UserError(
      f"masked_target {target!r} has {cells}x{cells} cells a patch, but "
      f"the patch size {patch} of {variant} is not divisible by {cells}; "
      "choose one that is, or 'mean_colour'"
    )
  for name in ("representation_size", "head_bias_init"):
    if options.get(name):
      raise UserError(
        f"model.{name} is {options[name]!r}, which has no effect on masked "
        "patches, because they have no classifier; leave it at 0"
      )
