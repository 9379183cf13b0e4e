"""A function in the operations that jax2onnx 0.13 translates rightly.

Given a function, jax2onnx replaces functions of Flax and jax.numpy by its own
while it traces: that of `nn.max_pool` then takes no positional argument, and
indexing fails beside symbolic sizes. So it gets what is traced already, and of
that `pad` and `reduce_window_max` said otherwise: it computes the shape of the
one as integers, which a symbolic batch is not, and makes of the other a pooling
along all four axes, which ONNX Runtime refuses.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core


def make_plain(function: Callable, *specs: Any) -> Callable:
  """Returns a function that evaluates what `function` is traced to.

  Args:
    function: of arrays; returns a pytree.
    *specs: the arrays' shapes, possibly symbolic.

  Returns:
    A function of the same arrays that returns the pytree's leaves in a tuple.
  """
  traced = jax.make_jaxpr(function)(*specs)
  return lambda *arrays: tuple(_evaluate(traced, arrays))


def _evaluate(closed, arrays):
  jaxpr = closed.jaxpr
  values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  values |= dict(zip(jaxpr.invars, arrays, strict=True))

  def read(x):
    return x.val if isinstance(x, core.Literal) else values[x]

  for equation in jaxpr.eqns:
    given = [read(x) for x in equation.invars]
    name, params = equation.primitive.name, equation.params
    # A function that is called: a jitted one, or one with its own derivative.
    called = params.get("jaxpr") or params.get("call_jaxpr")
    if called is not None:
      results = _evaluate(called, given)
    elif name in _INSTEAD:
      results = [_INSTEAD[name](*given, **params)]
    else:
      results = equation.primitive.bind(*given, **params)
      if not equation.primitive.multiple_results:
        results = [results]
    values.update(zip(equation.outvars, results, strict=True))
  return [read(x) for x in jaxpr.outvars]


def _pad(x, value, padding_config):
  """Pads by concatenation."""
  for axis, (low, high, inner) in enumerate(padding_config):
    assert min(low, high) >= inner == 0, padding_config

    def border(width, axis=axis, x=x):
      shape = (*x.shape[:axis], width, *x.shape[axis + 1 :])
      return [jax.lax.broadcast(value, shape)] if width else []

    pieces = [*border(low), x, *border(high)]
    x = jax.lax.concatenate(pieces, axis) if len(pieces) > 1 else x
  return x


def _pool(x, window_dimensions, window_strides, padding, **others):
  """Takes the maximum in windows of [b h w c], along h, then along w."""
  assert window_dimensions[0] == window_dimensions[3] == 1, window_dimensions
  for axis in (1, 2):
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(math.prod(before), x.shape[axis], math.prod(after))
    x = jax.lax.reduce_window(
      x,
      -np.inf,
      jax.lax.max,
      (1, window_dimensions[axis], 1),
      (1, window_strides[axis], 1),
      ((0, 0), padding[axis], (0, 0)),
    )
    x = x.reshape(*before, x.shape[1], *after)
  return x


_INSTEAD = {"pad": _pad, "reduce_window_max": _pool}
