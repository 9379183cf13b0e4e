"""The profiler window of a run."""

import logging

import jax

from vit_jax.errors import UserError

log = logging.getLogger(__name__)


def check_profile(config, total_steps):
  """Raises a UserError for a profiler window after the run's last step."""
  if config.profile_step > total_steps:
    raise UserError(
      f"profile_step {config.profile_step} is past the last step, "
      f"{total_steps}; choose one up to that, or 0 for no profile"
    )


class Profiler:
  """Traces the window; a run that resumes in it traces the rest."""

  def __init__(self, config, workdir):
    self._first = config.profile_step
    self._end = self._first + config.profile_steps if self._first else 0
    self._folder = workdir / "profile"
    self._started = None

  def before(self, step, state):
    """Starts or ends the trace before a step runs."""
    if self._first <= step < self._end and self._started is None:
      jax.block_until_ready(state)
      options = jax.profiler.ProfileOptions()
      # Python's tracer ends threads that start meanwhile, such as a save's.
      options.python_tracer_level = 0
      jax.profiler.start_trace(str(self._folder), profiler_options=options)
      self._started = step
    elif step >= self._end:
      self.close(state, step)

  def close(self, state, step):
    """Ends the trace, if there is one, before `step`."""
    if self._started is None:
      return
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    count, workdir = step - self._started, self._folder.parent
    log.info(f"profile of {count} steps from step {self._started} in {workdir}")
    self._started, self._end = None, 0
