"""The table of model sizes."""

import re
from typing import NamedTuple

from vit_jax.errors import UserError, suggest


class Variant(NamedTuple):
  """The sizes that a name stands for; the patch is the name's second half."""

  hidden_size: int
  num_layers: int
  mlp_dim: int
  num_heads: int


# N ("nano") is ours, for the quickstart and for tests. Ti and S are DeiT's
# (arXiv 2012.12877), B, L and H the paper's Table 1, g and G those of "Scaling
# Vision Transformers" (arXiv 2106.04560, Table 2).
VARIANTS = {
  "N": Variant(128, 4, 512, 4),
  "Ti": Variant(192, 12, 768, 3),
  "S": Variant(384, 12, 1536, 6),
  "B": Variant(768, 12, 3072, 12),
  "L": Variant(1024, 24, 4096, 16),
  "H": Variant(1280, 32, 5120, 16),
  "g": Variant(1408, 40, 6144, 16),
  "G": Variant(1664, 48, 8192, 16),
}


def parse(name: str) -> tuple[Variant, int]:
  """Returns the sizes and the patch size of a name such as "ViT-B_16".

  Raises:
    UserError: the name is not `ViT-SIZE_PATCH` with a SIZE of the table.
  """
  match = re.fullmatch(r"ViT-([A-Za-z]+)[_/](\d+)", name)
  if match and match[1] in VARIANTS and int(match[2]) > 0:
    return VARIANTS[match[1]], int(match[2])
  known = [f"ViT-{size}_16" for size in VARIANTS]
  raise UserError(
    f"unknown model variant {name!r}; it is ViT-SIZE_PATCH with SIZE one of "
    f"{', '.join(VARIANTS)} and any patch size{suggest(name, known)}"
  )
