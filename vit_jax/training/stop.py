"""Stop signals, on which all processes of a run save its state and end."""

import itertools
import logging
import os
import signal
import time

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

# Shared by all signals, because numbers for JAX's service must increase.
_polls = itertools.count(1)


class Stopping(Exception):
  """The run received a stop signal."""


class StopSignal:
  """SIGTERM, SIGHUP or Ctrl-C ask a run to save its state and stop.

  Further signals are ignored, because senders may repeat them, but Ctrl-C again
  after a second or more quits at once. With several processes JAX's preemption
  service takes SIGTERM and makes all of them agree on the step to stop at. The
  other signals are forwarded to it.
  """

  def __enter__(self):
    self._since, self._stops = None, False
    self._alone = jax.process_count() == 1
    signals = [signal.SIGINT] + [signal.SIGTERM] * self._alone
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
      signals.append(signal.SIGHUP)
    self._previous = {s: signal.signal(s, self._handle) for s in signals}
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    # A signal after the last check is passed to an enclosing StopSignal.
    outer = getattr(self._previous[signal.SIGINT], "__self__", None)
    if isinstance(outer, StopSignal) and outer._since is None:
      outer._since = self._since

  def _handle(self, number, _):
    now = time.monotonic()
    if self._since is None:
      self._since = now
      log.info("saving, then stopping; Ctrl-C again quits at once")
      if not self._alone:
        os.kill(os.getpid(), signal.SIGTERM)
    elif number == signal.SIGINT and now - self._since > 1:
      raise KeyboardInterrupt

  def check(self) -> None:
    """Raises Stopping, on all processes, if the run is to stop now.

    All processes must call it equally often.
    """
    if self._alone:
      self._stops = self._since is not None
    else:
      number = next(_polls)
      self._stops |= multihost_utils.reached_preemption_sync_point(number)
    if self._stops:
      raise Stopping
