"""Vision Transformers in JAX: pre-training, fine-tuning and inference.

`vit_jax.load(source)` returns a model with published weights or your own, see
`vit_jax.pretrained.load`. Import everything else from its module.
"""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
  from vit_jax.pretrained import load as load


def __getattr__(name):
  # Imported lazily, so that `import vit_jax` does not import JAX.
  if name == "load":
    from vit_jax.pretrained import load

    return load
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
