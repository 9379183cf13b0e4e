"""Models by name, as pure functions.

`create(...)` checks its arguments and returns a `Model`, whose `init` and
`apply` use plain nested dictionaries of arrays; Flax stays in this package.
"""

from typing import Any

from vit_jax.models import efficientnet, resnet, variants, vit
from vit_jax.models import layers as layers
from vit_jax.models.config import DEFAULTS as DEFAULTS
from vit_jax.models.config import RATES as RATES
from vit_jax.models.config import SWITCHES as SWITCHES
from vit_jax.models.config import make as make_config
from vit_jax.models.model import FEATURES as FEATURES
from vit_jax.models.model import Model as Model
from vit_jax.models.model import as_model, check_image_size
from vit_jax.models.model import make_features as make_features
from vit_jax.models.model import representation as representation
from vit_jax.models.model import stack_blocks as stack_blocks
from vit_jax.models.mpp import create_masked as create_masked
from vit_jax.models.variants import ENCODERS as ENCODERS
from vit_jax.state import is_statistic as is_statistic

_MODULES = {"ResNet": resnet.BiT, "EfficientNet": efficientnet.EfficientNet}


def create(
  *, variant: str, num_classes: int, image_size, **options: Any
) -> Model:
  """Returns the model of a variant name such as "ViT-B_16".

  Args:
    variant: "ViT-B_16", "R50+ViT-B_16", "R50x1" or "EfficientNet-B0", see
      `models/variants.py`. A ResNet takes only `head_bias_init`, `dtype` and
      `remat` of the options, an EfficientNet also `dropout_rate` and
      `stochastic_depth_rate`.
    num_classes: k, the width of the head; 0 for none.
    image_size: pixels, an integer or (h, w); divisible by the patch.
    **options: keys of `config.model`, see configs/common.py.

  Raises:
    UserError: a value that is not one of the choices, or an image size that
      the patch size does not divide.
  """
  config = make_config(variant, num_classes, options)
  sizes = variants.parse(variant)
  make = _MODULES.get(sizes.kind, vit.VisionTransformer)
  height_width = check_image_size(image_size, sizes)
  grid = tuple(-(-side // sizes.stride) for side in height_width)
  return as_model(make, config, height_width, grid)
