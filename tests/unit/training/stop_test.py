"""Stop signals, one within the other."""

import signal

import pytest

from vit_jax.training.stop import Stopping, StopSignal


def test_a_signal_after_the_last_check_stops_what_is_around():
  with StopSignal() as outer:
    with StopSignal() as inner:
      inner.check()
      signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopping):
      outer.check()
    with StopSignal() as another:
      another.check()


def test_no_signal_stops_nothing():
  with StopSignal() as outer:
    with StopSignal() as inner:
      inner.check()
    outer.check()
