"""The training state, and parameters as a flat {path: array} dictionary."""

import re
from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
  """Everything that a run carries from step to step."""

  step: jax.Array  # int32[], the number of updates done
  params: Any  # nested dictionary of float32 arrays, with running statistics
  opt_state: Any  # of the optimizer; its moments mirror `params`
  ema: Any  # the Polyak average of `params`, or None when averaging is off
  rng: jax.Array  # the key that every step folds its number into


# Used for every key, so that no run depends on JAX_DEFAULT_PRNG_IMPL.
KEY_IMPL = "threefry2x32"


def make_key(seed: int) -> jax.Array:
  """Returns the PRNG key of a seed."""
  return jax.random.key(seed, impl=KEY_IMPL)


def path_str(key_path) -> str:
  """Returns a JAX key path as "Transformer/encoder_norm/scale"."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def is_statistic(path: str) -> bool:
  """Returns whether the array at a path of `params` is not a parameter.

  It is then a running statistic of BatchNorm, or a constant that normalises
  pixels. Both have no gradient, and the optimizer does not change them.
  """
  return re.search(r"/(mean|var|std)$", path) is not None


def flatten(tree) -> dict[str, Any]:
  """Returns {"a/b/c": leaf} of any pytree."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_str(path): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
  """Returns the nested dictionary of {"a/b/c": leaf}."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree
