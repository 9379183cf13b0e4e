"""What a user sees of a mistake."""

import contextlib

import pytest

from vit_jax.errors import UserError


@contextlib.contextmanager
def named(*words):
  """Expects a UserError of one line, in which these words are."""
  with pytest.raises(UserError) as error:
    yield
  message = str(error.value)
  assert "\n" not in message
  for word in words:
    assert word in message
