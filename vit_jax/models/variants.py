"""Tables of model sizes, and the names of variants."""

import re
from typing import NamedTuple

from vit_jax.errors import UserError, suggest


class Encoder(NamedTuple):
  """The sizes of a transformer encoder."""

  hidden_size: int
  num_layers: int
  mlp_dim: int
  num_heads: int


class Scaling(NamedTuple):
  """The factors of B0's widths and numbers of blocks."""

  width: float
  depth: float


class Variant(NamedTuple):
  """The sizes of a variant."""

  encoder: Encoder | None  # None for a ResNet or an EfficientNet
  patch_size: int  # pixels; of a hybrid, cells of the ResNet's output; or 0
  units: tuple[int, ...] | None  # of the ResNet's stages; (): its root alone
  width: int  # of the ResNet, times 64
  stride: int  # pixels along a side of a token, or of a cell of the output
  scaling: Scaling | None = None  # of an EfficientNet

  @property
  def kind(self) -> str:
    """Returns "ViT", "hybrid", "ResNet" or "EfficientNet"."""
    if self.encoder:
      return "ViT" if self.units is None else "hybrid"
    return "EfficientNet" if self.scaling else "ResNet"


# N ("nano") is ours, for the quickstart and for tests. Ti and S are DeiT's
# (arXiv 2012.12877), B, L and H the paper's Table 1, g and G those of "Scaling
# Vision Transformers" (arXiv 2106.04560, Table 2).
ENCODERS = {
  "N": Encoder(128, 4, 512, 4),
  "Ti": Encoder(192, 12, 768, 3),
  "S": Encoder(384, 12, 1536, 6),
  "B": Encoder(768, 12, 3072, 12),
  "L": Encoder(1024, 24, 4096, 16),
  "H": Encoder(1280, 32, 5120, 16),
  "g": Encoder(1408, 40, 6144, 16),
  "G": Encoder(1664, 48, 8192, 16),
}

# The paper's baselines (BiT): units of the four stages. RN is ours, for tests.
RESNETS = {
  "RN": (1, 1),
  "R26": (2, 2, 2, 2),
  "R50": (3, 4, 6, 3),
  "R101": (3, 4, 23, 3),
  "R152": (3, 8, 36, 3),
  "R200": (3, 24, 36, 3),
}

# From arXiv 1905.11946, the authors' code (B8) and arXiv 1911.04252 (L2). N is
# ours, for tests.
EFFICIENTNET = "EfficientNet-"  # prefix of their names
EFFICIENTNETS = {
  "N": Scaling(0.25, 0.4),
  "B0": Scaling(1.0, 1.0),
  "B1": Scaling(1.0, 1.1),
  "B2": Scaling(1.1, 1.2),
  "B3": Scaling(1.2, 1.4),
  "B4": Scaling(1.4, 1.8),
  "B5": Scaling(1.6, 2.2),
  "B6": Scaling(1.8, 2.6),
  "B7": Scaling(2.0, 3.1),
  "B8": Scaling(2.2, 3.6),
  "L2": Scaling(4.3, 5.3),
}

# The hybrids: (ResNet, patch in the name) -> its stages, the encoder's patch.
# At 16 pixels a token, stage 4's units have moved to stage 3 (the paper,
# Section 4.1). R+ViT-Ti_16 takes 8x8 patches of the root's output, so its
# tokens are 32 pixels wide, despite its published name.
HYBRIDS = {
  ("R", 16): ((), 8),
  ("RN", 8): ((1, 1), 1),
  ("R26", 32): (RESNETS["R26"], 1),
  ("R50", 16): ((3, 4, 9), 1),
  ("R50", 32): (RESNETS["R50"], 1),
}


def parse(name: str) -> Variant:
  """Returns the sizes of a variant by its name.

  "ViT-B_16": size and patch; "R50+ViT-B_16": a hybrid; "R50x1": a ResNet and
  its width; "EfficientNet-B0". Encoders of other sizes are written out as
  hidden size, depth, MLP and heads: "ViT-w192d12m768h3_16".

  Raises:
    UserError: another name.
  """
  match = re.fullmatch(r"(R[N\d]*)x([1-9]\d*)", name)
  if match and match[1] in RESNETS:
    units = RESNETS[match[1]]
    return Variant(None, 0, units, int(match[2]), 2 ** (len(units) + 1))
  scaling = EFFICIENTNETS.get(name.removeprefix(EFFICIENTNET))
  if scaling and name.startswith(EFFICIENTNET):
    return Variant(None, 0, None, 0, 32, scaling)
  match = re.fullmatch(r"(?:(R\w*)\+)?ViT-(\w+)[_/]([1-9]\d*)", name)
  if match:
    encoder, patch = _parse_encoder(match[2]), int(match[3])
    if encoder and not match[1]:
      return Variant(encoder, patch, None, 0, patch)
    if encoder and (match[1], patch) in HYBRIDS:
      units, cells = HYBRIDS[match[1], patch]
      stride = cells * 2 ** (len(units) + (1 if units else 2))
      return Variant(encoder, cells, units, 1, stride)
  hybrids = ", ".join(f"{resnet}+ViT-SIZE_{p}" for resnet, p in HYBRIDS)
  known = [f"ViT-{size}_16" for size in ENCODERS]
  known += [f"R50+ViT-{size}_16" for size in ENCODERS]
  known += [f"{EFFICIENTNET}{size}" for size in EFFICIENTNETS]
  raise UserError(
    f"unknown model variant {name!r}; it is ViT-SIZE_PATCH with SIZE one of "
    f"{', '.join(ENCODERS)} and any patch size, a hybrid ({hybrids}), "
    f"a ResNet xWIDTH ({', '.join(RESNETS)}, as in R50x1), or "
    f"{EFFICIENTNET}SIZE ({', '.join(EFFICIENTNETS)})"
    f"{suggest(name, known)}"
  )


def _parse_encoder(size):
  """Returns the sizes of "B" or of "w768d12m3072h12", None for neither."""
  if size in ENCODERS:
    return ENCODERS[size]
  match = re.fullmatch(r"w(\d+)d(\d+)m(\d+)h(\d+)", size)
  sizes = Encoder(*map(int, match.groups())) if match else None
  if sizes and min(sizes) > 0 and sizes.hidden_size % sizes.num_heads == 0:
    return sizes
  return None
