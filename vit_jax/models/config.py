"""The hyper-parameters of a model, each declared once.

`make` reads them from a variant's name and the subtree `config.model`; the
modules get the whole `ViTConfig`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from vit_jax.errors import UserError, check_choice
from vit_jax.models import variants


def _option(default, *choices, rate=False, resnet=False):
  """Declares a key of `config.model`.

  Args:
    default: its value if it is not given.
    *choices: its other values, if they can be listed.
    rate: whether it is a probability below 1.
    resnet: whether it means something for a ResNet too.
  """
  choices = (default, *choices) if choices else ()
  metadata = {"choices": choices, "rate": rate, "resnet": resnet}
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
  """Everything that decides a model, but for the size of its images.

  Attributes:
    num_classes: k, the width of the head; 0 for none.
    hidden_size, num_layers, mlp_dim, num_heads: of the encoder; 0 for a ResNet.
    patch_size: of the patches that the encoder sees, see `variants.Variant`.
    units: of each stage of a hybrid's or a ResNet's; None for a plain ViT.
    width: of a ResNet, times 64.
    classifier: "token" (a class token), "gap" (mean of the patch tokens) or
      "map" (attention pooling).
    representation_size: width of the tanh layer before the head; 0 for none,
      -1 for the hidden size.
    pos_embedding: "learned" (1-D), "2d" (learned, a half for each axis),
      "sincos2d" (fixed), "relative" (in the attention) or "none".
    pos_embedding_at: "input", "every_layer" or "every_layer_shared".
    activation: "gelu_tanh" (the paper) or "gelu_erf" (PyTorch).
    layer_norm_epsilon: added to variances.
    dropout_rate: after every dense layer but query, key and value, and after
      the position embedding (the paper, Appendix B.1).
    attention_dropout_rate: of the attention weights.
    stochastic_depth_rate: of the last block; earlier ones linearly less.
    head_bias_init: the head's initial bias.
    dtype: of the matrix products, "float32" or "bfloat16".
    scan: trace one block and loop over stacked parameters.
    remat: what a block keeps for the backward pass: "none" (all of it), "dots"
      (the results of its weight products) or "full" (nothing but its input).
  """

  num_classes: int
  hidden_size: int = 0
  num_layers: int = 0
  mlp_dim: int = 0
  num_heads: int = 0
  patch_size: int = 0
  units: tuple[int, ...] | None = None
  width: int = 0
  classifier: str = _option("token", "gap", "map")
  representation_size: int = _option(0)
  pos_embedding: str = _option("learned", "2d", "sincos2d", "relative", "none")
  pos_embedding_at: str = _option("input", "every_layer", "every_layer_shared")
  activation: str = _option("gelu_tanh", "gelu_erf")
  layer_norm_epsilon: float = _option(1e-6)
  dropout_rate: float = _option(0.0, rate=True)
  attention_dropout_rate: float = _option(0.0, rate=True)
  stochastic_depth_rate: float = _option(0.0, rate=True)
  head_bias_init: float = _option(0.0, resnet=True)
  dtype: str = _option("bfloat16", "float32", resnet=True)
  scan: bool = _option(False)
  remat: str = _option("none", "dots", "full", resnet=True)

  @property
  def use_tpu_layout(self) -> bool:
    """Whether to compute in the way that suits TPUs best: in bfloat16.

    Tokens are padded, attention is a kernel, LayerNorm's scale and bias become
    part of the next product. Float32 is as the paper has it, and what the
    former is tested against.
    """
    return jnp.dtype(self.dtype) == jnp.bfloat16

  @property
  def representation_width(self) -> int:
    """The width of the tanh layer, 0 for none."""
    given = self.representation_size
    return self.hidden_size if given == -1 else given


_OPTIONS = {f.name: f for f in dataclasses.fields(ViTConfig) if f.metadata}
# What a model is made with if nothing else is given.
DEFAULTS: dict[str, Any] = {name: f.default for name, f in _OPTIONS.items()}


def make(variant: str, num_classes: int, options: dict[str, Any]) -> ViTConfig:
  """Returns the hyper-parameters of a variant with some options.

  Raises:
    UserError: an unknown variant, or a value that an option cannot have.
  """
  sizes = variants.parse(variant)
  encoder = sizes.encoder._asdict() if sizes.encoder else {}
  config = ViTConfig(
    num_classes=num_classes,
    patch_size=sizes.patch_size,
    units=sizes.units,
    width=sizes.width,
    **encoder,
    **options,
  )
  for name, option in _OPTIONS.items():
    value = getattr(config, name)
    if option.metadata["choices"]:
      check_choice(f"config.model.{name}", value, option.metadata["choices"])
    if option.metadata["rate"] and not 0 <= value < 1:
      raise UserError(f"model.{name} is {value}; it must be in [0, 1)")
  if config.representation_size < -1:
    raise UserError(
      f"model.representation_size is {config.representation_size}; it must be "
      "a width, 0 for no layer or -1 for the hidden size"
    )
  if config.layer_norm_epsilon <= 0:
    raise UserError(
      f"model.layer_norm_epsilon is {config.layer_norm_epsilon}, not positive"
    )
  if encoder:
    _check_positions(variant, config)
  else:
    _check_resnet(variant, config)
  return config


def _check_positions(variant, config):
  kind = config.pos_embedding
  if kind in ("none", "relative") and config.pos_embedding_at != "input":
    raise UserError(
      f"model.pos_embedding {kind!r} is not added anywhere; leave "
      "model.pos_embedding_at at 'input'"
    )
  parts = {"2d": 2, "sincos2d": 4}.get(kind, 1)
  if config.hidden_size % parts:
    raise UserError(
      f"model.pos_embedding {kind!r} needs a hidden size divisible by {parts}; "
      f"{variant} has {config.hidden_size}"
    )


def _check_resnet(variant, config):
  for name, option in _OPTIONS.items():
    value = getattr(config, name)
    if not option.metadata["resnet"] and value != option.default:
      raise UserError(
        f"model.{name} is {value!r}, which means nothing for the ResNet "
        f"{variant}; leave it at {option.default!r}"
      )
  if config.remat == "dots":
    raise UserError(
      f"model.remat 'dots' keeps nothing of {variant}, which is all "
      "convolutions; use 'full' or 'none'"
    )
