"""Data: from a data set's name to NumPy batches. TensorFlow stays in here."""

import contextlib

import tensorflow as tf

from vit_jax.data.pipeline import eval_batches, train_batches
from vit_jax.data.prepare import prepare
from vit_jax.data.source import (
  Source,
  get_source,
  list_splits,
  parse_mixture,
)

__all__ = [
  "Source",
  "eval_batches",
  "get_source",
  "list_splits",
  "parse_mixture",
  "prepare",
  "train_batches",
]

# The accelerators are JAX's. TensorFlow refuses once it has started, which
# happens where the caller has already given it its devices.
for _kind in ("GPU", "TPU"):
  with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], _kind)
