"""The hyper-parameters of a model, each declared once.

`make` reads them from a variant's name and the subtree `config.model`; the
modules get the whole `ViTConfig`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from vit_jax.errors import UserError, check_choice
from vit_jax.models import variants


def _option(default, *choices, rate=False, also=()) -> Any:
  """Declares a key of `config.model`: its default and its other choices.

  A `rate` is the probability, below 1, of a random operation in training.
  `also` lists the kinds of convolutional networks that use the option, see
  `Variant.kind`.
  """
  choices = (default, *choices) if choices else ()
  metadata = {"choices": choices, "rate": rate, "also": also}
  return dataclasses.field(default=default, metadata=metadata)


_EFFICIENTNET = ("EfficientNet",)
_CONVOLUTIONAL = ("ResNet", "EfficientNet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
  """All hyper-parameters of a model except the size of its images.

  Sizes come from the variant's name, 0 for missing parts; the options are the
  keys of `config.model`, which configs/common.py explains.
  """

  num_classes: int  # k, the width of the head; 0 for none
  hidden_size: int = 0
  num_layers: int = 0
  mlp_dim: int = 0
  num_heads: int = 0
  patch_size: int = 0  # of the encoder's patches
  units: tuple[int, ...] | None = None  # of a ResNet's stages, see `Variant`
  width: int = 0  # of a ResNet, times 64
  scaling: variants.Scaling | None = None  # of an EfficientNet
  classifier: str = _option("token", "gap", "map", "token+gap")
  class_token: bool = _option(False)  # also where the classifier ignores it
  distillation_token: bool = _option(False)
  registers: int = _option(0)
  map_heads: int = _option(0)
  final_norm: str = _option("tokens", "pooled", "none")
  projection_size: int = _option(0)
  representation_size: int = _option(0)
  patch_bias: bool = _option(True)
  pre_norm: bool = _option(False)
  pos_embedding: str = _option("learned", "2d", "sincos2d", "relative", "none")
  pos_embedding_at: str = _option("input", "every_layer", "every_layer_shared")
  prefix_positions: str = _option("tokens", "all", "none")
  rope: str = _option("none", "dinov3")
  rope_base: float = _option(100.0)
  qkv_bias: str = _option("all", "none", "qv")
  qk_norm: bool = _option(False)
  mlp: str = _option("plain", "gated")
  activation: str = _option("gelu_tanh", "gelu_erf", "gelu_quick", "silu")
  layer_scale_init: float = _option(0.0)
  layer_norm_epsilon: float = _option(1e-6)
  dropout_rate: float = _option(0.0, rate=True, also=_EFFICIENTNET)
  attention_dropout_rate: float = _option(0.0, rate=True)
  stochastic_depth_rate: float = _option(0.0, rate=True, also=_EFFICIENTNET)
  head_bias_init: float = _option(0.0, also=_CONVOLUTIONAL)
  dtype: str = _option("bfloat16", "float32", also=_CONVOLUTIONAL)
  scan: bool = _option(False)
  remat: str = _option("none", "dots", "full", also=_CONVOLUTIONAL)

  @property
  def use_tpu_layout(self) -> bool:
    """Whether to use the layout that suits TPUs, as in bfloat16.

    Tokens are padded, attention is fused, LayerNorm's scale and bias are folded
    into the next matmul. Float32 follows the paper and is the reference.
    """
    return jnp.dtype(self.dtype) == jnp.bfloat16

  @property
  def has_class_token(self) -> bool:
    """Whether the first token is a class token."""
    return self.class_token or self.classifier.startswith("token")

  @property
  def num_prefix(self) -> int:
    """The number of tokens before those of the patches."""
    return self.has_class_token + self.distillation_token + self.registers

  @property
  def num_prefix_positions(self) -> int:
    """The number of prefix tokens with learned position embeddings."""
    rows = {"all": self.num_prefix, "none": 0}
    return rows.get(self.prefix_positions, self.num_prefix - self.registers)

  @property
  def representation_width(self) -> int:
    """The width of the tanh layer, 0 for none."""
    given = self.representation_size
    return self.hidden_size if given == -1 else given


_OPTIONS = {f.name: f for f in dataclasses.fields(ViTConfig) if f.metadata}
# The probabilities of random operations, which change no output of inference.
RATES = tuple(name for name, f in _OPTIONS.items() if f.metadata["rate"])
# Options for other architectures than the paper's.
SWITCHES = (
  *("class_token", "distillation_token", "registers", "map_heads"),
  *("final_norm", "projection_size", "patch_bias", "pre_norm"),
  *("prefix_positions", "rope", "rope_base", "qkv_bias", "qk_norm"),
  *("mlp", "layer_scale_init"),
)
# The defaults of all options.
DEFAULTS: dict[str, Any] = {name: f.default for name, f in _OPTIONS.items()}


def make(variant: str, num_classes: int, options: dict[str, Any]) -> ViTConfig:
  """Returns the hyper-parameters of a variant with some options.

  Raises:
    UserError: an unknown variant, or an invalid option.
  """
  parsed = variants.parse(variant)
  sizes = parsed._asdict()
  encoder, _ = sizes.pop("encoder"), sizes.pop("stride")
  sizes |= encoder._asdict() if encoder else {}
  config = ViTConfig(num_classes=num_classes, **sizes, **options)
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
  for name in ("layer_norm_epsilon", "rope_base"):
    if getattr(config, name) <= 0:
      raise UserError(f"model.{name} is {getattr(config, name)}, not positive")
  if encoder:
    _check_positions(variant, config)
    _check_tokens(config)
  else:
    _check_convolutional(variant, parsed.kind, config)
  return config


def _check_convolutional(variant, kind, config):
  """Raises a UserError for an option that has no effect without an encoder."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    known = not field.metadata or kind in field.metadata["also"]
    if not known and value != field.default:
      raise UserError(
        f"model.{field.name} is {value!r}, which has no effect on the "
        f"convolutions of {variant}; leave it at {field.default!r}"
      )
  if config.remat == "dots":
    raise UserError(
      f"model.remat 'dots' saves nothing of {variant}, which is all "
      "convolutions; use 'full' or 'none'"
    )


def _check_tokens(config):
  for name in ("registers", "map_heads", "projection_size", "layer_scale_init"):
    if getattr(config, name) < 0:
      raise UserError(f"model.{name} is {getattr(config, name)}, below 0")
  if config.distillation_token and config.classifier != "token":
    raise UserError(
      "model.distillation_token has a head beside the class token's; it needs "
      f"model.classifier 'token', not {config.classifier!r}"
    )
  heads = config.map_heads or config.num_heads
  if config.classifier == "map" and config.hidden_size % heads:
    raise UserError(
      f"model.map_heads {heads} does not divide the hidden size "
      f"{config.hidden_size}"
    )


def _check_positions(variant, config):
  kind = config.pos_embedding
  if kind in ("none", "relative") and config.pos_embedding_at != "input":
    raise UserError(
      f"model.pos_embedding {kind!r} is not added anywhere; leave "
      "model.pos_embedding_at at 'input'"
    )
  head_dim = config.hidden_size // config.num_heads
  if config.rope != "none" and head_dim % 4:
    raise UserError(
      f"model.rope {config.rope!r} needs a head width divisible by 4; that of "
      f"{variant} is {head_dim}"
    )
  parts = {"2d": 2, "sincos2d": 4}.get(kind, 1)
  if config.hidden_size % parts:
    raise UserError(
      f"model.pos_embedding {kind!r} needs a hidden size divisible by {parts}; "
      f"{variant} has {config.hidden_size}"
    )
