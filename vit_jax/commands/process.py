"""A command as a process: its streams, its exit code, errors in one line."""

import io
import logging
import os
import select
import sys
import warnings

from vit_jax.commands import distributed, flags
from vit_jax.errors import EXTRAS, RunStopped, UserError, needs_extra


def run(parser: flags.Parser, argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code.

  0: done (also, unless --stopped_exit_code is given: stopped by a signal, and
  saved). 1: the run cannot continue.
  2: something that was given cannot be used. 134: JAX has aborted, because
  another process of the run is dead or has failed. 141: the output's reader is
  gone, as after `| head`; shells give that code, too.
  """
  for stream in (sys.stdout, sys.stderr):
    # A name that the terminal's encoding lacks is escaped, not an error.
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
      stream.reconfigure(errors="backslashreplace")
  try:
    try:
      return _run_or_report(parser, argv)
    finally:
      sys.stdout.flush()  # the interpreter would do it too late to catch
  except BrokenPipeError:
    if not _is_unread(sys.stdout) and not _is_unread(sys.stderr):
      raise  # another pipe of the program
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return 141


def use_cpu() -> None:
  """Keeps JAX from looking for accelerators, about which libtpu would warn.

  For commands that compute nothing on a device; the processes that they start
  have backends of their own.
  """
  import jax

  jax.config.update("jax_platforms", "cpu")


def _is_unread(stream):
  """Returns whether a stream is a pipe whose reader is gone."""
  poll = select.poll()
  poll.register(stream.fileno(), 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def _run_or_report(parser, argv):
  """Runs one command; returns the exit code, see `run`."""
  _quiet_libraries()
  args = None
  try:
    args = flags.parse(parser, argv)
    args.connected = False  # to other processes of a run
    return _run(args) or 0
  except UserError as e:
    return _fail(args, f"error: {e}", 2)
  except RunStopped as e:
    return _fail(args, f"stopped: {e}", 1)
  except KeyboardInterrupt:
    return _fail(args, "", 130)
  except Exception:
    _fail(args, "", 1)
    raise


def _quiet_libraries():
  """Logs this package's messages to stderr, and few of other packages'."""
  # TensorFlow only reads and decodes images here.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  # It imports Keras 3 otherwise, with scikit-learn and Matplotlib, for nothing.
  os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
  logging.basicConfig(format="%(message)s", stream=sys.stderr)
  # Orbax logs each failure several times, with traces; what matters arrives as
  # an exception.
  for name in ("absl", "asyncio", "concurrent.futures"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  logging.getLogger("vit_jax").setLevel(logging.INFO)
  sys.unraisablehook = _print_unless_stray
  # Of coroutines that a failed save, which is reported, has not come to.
  warnings.filterwarnings(
    "ignore", "coroutine .* was never awaited", RuntimeWarning
  )


def _print_unless_stray(unraisable):
  """Prints exceptions that nothing catches, but TensorStore's threads'.

  They call back into an event loop that the failure of a save, which is
  reported, has closed.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


# The variables are for debugging users' own JAX code: no number here depends on
# them.
_PROMOTION = {"rank": "allow", "dtype": "standard"}


def _run(args):
  """Runs a command; a missing library or device becomes a UserError."""
  for name, value in _PROMOTION.items():
    if f"JAX_NUMPY_{name.upper()}_PROMOTION" in os.environ:
      import jax

      jax.config.update(f"jax_numpy_{name}_promotion", value)
  try:
    return args.run(args)
  except (UserError, RunStopped):
    raise
  except ImportError as e:
    # epath has a message of its own.
    library = "gcsfs" if "gcsfs" in str(e) else (e.name or "").partition(".")[0]
    if library not in EXTRAS:
      raise
    extra = getattr(sys.modules[args.run.__module__], "EXTRA", None)
    raise needs_extra(args.parser.prog, library, extra) from e
  except Exception:
    if "jax" in sys.modules and not args.connected:
      _check_devices()
    raise


def _check_devices():
  """Raises a UserError if JAX has no device."""
  import jax

  try:
    jax.devices()
  except Exception as e:
    words = str(e).partition(" (set JAX_PLATFORMS")[0].strip() or repr(e)
    given = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    raise UserError(
      f"JAX has no device with JAX_PLATFORMS={given or ''!r}: "
      f"{words.splitlines()[0]}; install what that names, or unset it"
    ) from e


def _fail(args, text, code):
  """Reports an error; returns the exit code."""
  if text:
    print(text, file=sys.stderr)
  if args and args.connected:
    # At the end JAX waits for all others and aborts when they do not end as
    # well, so the exit code is kept by a timer. The error may come of the loss
    # of another process: JAX then aborts first.
    distributed.exit_after(0 if code == 130 else args.lost_timeout + 10, code)
  return code
