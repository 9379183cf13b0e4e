"""Data loading with TensorFlow: from a data set's name to NumPy batches.

Names are imported on first use, so that `vit_jax.data.preprocess` and others
that need no TensorFlow do not load it.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
  from vit_jax.data.benchmarks import MINI as MINI
  from vit_jax.data.benchmarks import VTAB as VTAB
  from vit_jax.data.benchmarks import Task as Task
  from vit_jax.data.benchmarks import find_task as find_task
  from vit_jax.data.benchmarks import list_tasks as list_tasks
  from vit_jax.data.catalog import BY_PATH as BY_PATH
  from vit_jax.data.catalog import PSEUDO as PSEUDO
  from vit_jax.data.catalog import get_source as get_source
  from vit_jax.data.catalog import parse_mixture as parse_mixture
  from vit_jax.data.order import Shuffle as Shuffle
  from vit_jax.data.pipeline import eval_batches as eval_batches
  from vit_jax.data.pipeline import train_batches as train_batches
  from vit_jax.data.preparation import find_needs as find_needs
  from vit_jax.data.preparation import list_splits as list_splits
  from vit_jax.data.preparation import prepare as prepare
  from vit_jax.data.reading import choose_shuffle as choose_shuffle
  from vit_jax.data.relabelled import check_mixture as check_mixture
  from vit_jax.data.source import Source as Source
  from vit_jax.data.source import count_shared as count_shared
