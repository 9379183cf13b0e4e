"""Data: from a data set's name to NumPy batches. TensorFlow stays in here.

The names are imported when they are asked for: `preprocess` and what else needs
no TensorFlow does not load it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from vit_jax.data.benchmarks import MINI as MINI
  from vit_jax.data.benchmarks import VTAB as VTAB
  from vit_jax.data.benchmarks import Task as Task
  from vit_jax.data.benchmarks import find_task as find_task
  from vit_jax.data.benchmarks import list_tasks as list_tasks
  from vit_jax.data.pipeline import eval_batches as eval_batches
  from vit_jax.data.pipeline import train_batches as train_batches
  from vit_jax.data.preparation import Needs as Needs
  from vit_jax.data.preparation import find_needs as find_needs
  from vit_jax.data.preparation import prepare as prepare
  from vit_jax.data.source import FOLDER as FOLDER
  from vit_jax.data.source import OBJECTNET as OBJECTNET
  from vit_jax.data.source import Source as Source
  from vit_jax.data.source import check_mixture as check_mixture
  from vit_jax.data.source import count_shared as count_shared
  from vit_jax.data.source import get_source as get_source
  from vit_jax.data.source import list_splits as list_splits
  from vit_jax.data.source import parse_mixture as parse_mixture

_NAMES = {
  "benchmarks": "MINI VTAB Task find_task list_tasks",
  "pipeline": "eval_batches train_batches",
  "preparation": "Needs find_needs prepare",
  "source": (
    "FOLDER OBJECTNET Source check_mixture count_shared get_source list_splits "
    "parse_mixture"
  ),
}
_MODULE_OF = {n: module for module, ns in _NAMES.items() for n in ns.split()}


def __getattr__(name):
  if name not in _MODULE_OF:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
  return getattr(module, name)
