"""Products of parameters, most of which run nightly."""

import itertools

import pytest


def product(*lists, mark=None):
  """Returns all combinations of the lists' values, as pytest parameters.

  A covering set, which has each value at least once, has `mark`: "ci", or none
  for the default tests. All others have "nightly".
  """
  count = max(map(len, lists))
  covering = {tuple(i % len(x) for x in lists) for i in range(count)}
  usual = getattr(pytest.mark, mark) if mark else ()
  return [
    pytest.param(
      *(x[i] for x, i in zip(lists, indices, strict=True)),
      marks=usual if indices in covering else pytest.mark.nightly,
    )
    for indices in itertools.product(*(range(len(x)) for x in lists))
  ]


def nightly(*values):
  """Returns values of one parameter as pytest parameters that run nightly."""
  return [pytest.param(x, marks=pytest.mark.nightly) for x in values]
