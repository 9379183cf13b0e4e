"""Data: from a data set's name to NumPy batches. TensorFlow stays in here."""

import contextlib

import tensorflow as tf

from vit_jax.data.pipeline import eval_batches, train_batches
from vit_jax.data.prepare import Needs, find_needs, prepare
from vit_jax.data.source import (
  FOLDER,
  OBJECTNET,
  Source,
  check_mixture,
  count_shared,
  get_source,
  list_splits,
  parse_mixture,
)
from vit_jax.data.tasks import MINI, VTAB, Task, find_task, list_tasks

__all__ = [
  "FOLDER",
  "MINI",
  "OBJECTNET",
  "VTAB",
  "Needs",
  "Source",
  "Task",
  "check_mixture",
  "count_shared",
  "eval_batches",
  "find_needs",
  "find_task",
  "get_source",
  "list_splits",
  "list_tasks",
  "parse_mixture",
  "prepare",
  "train_batches",
]

# The accelerators are JAX's. TensorFlow refuses once it has started, which
# happens where the caller has already given it its devices.
for _kind in ("GPU", "TPU"):
  with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], _kind)
