"""Process-level behaviour: output streams, exit codes, one-line errors."""

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

  0: done, or stopped by a signal after saving (see --stopped_exit_code).
  1: the run cannot continue. 2: invalid input. 134: JAX aborted because
  another process of the run failed. 141: the reader of the output has exited,
  as in `| head`; shells use that code, too.
  """
  for stream in (sys.stdout, sys.stderr):
    # Escape characters that the terminal's encoding lacks.
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
      stream.reconfigure(errors="backslashreplace")
  try:
    try:
      return _run_or_report(parser, argv)
    finally:
      sys.stdout.flush()  # at exit, an error could not be caught
  except BrokenPipeError:
    if not _is_unread(sys.stdout) and not _is_unread(sys.stderr):
      raise  # from another pipe
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return 141


def use_cpu() -> None:
  """Restricts JAX to the CPU, which avoids libtpu's warnings.

  For commands that do not compute on devices. Their subprocesses initialise
  their own backends.
  """
  import jax

  jax.config.update("jax_platforms", "cpu")


def _is_unread(stream):
  """Returns whether a stream is a pipe whose reader has exited."""
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
  """Logs this package's messages to stderr, and few of other packages."""
  # TensorFlow only reads and decodes images here.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  # It imports Keras 3 otherwise, with scikit-learn and Matplotlib, for nothing.
  os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
  logging.basicConfig(format="%(message)s", stream=sys.stderr)
  # Orbax logs each failure several times, with tracebacks, and also raises it.
  for name in ("absl", "asyncio", "concurrent.futures"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  logging.getLogger("vit_jax").setLevel(logging.INFO)
  sys.unraisablehook = _print_unless_stray
  # From coroutines that a failed (and reported) save never awaited.
  warnings.filterwarnings(
    "ignore", "coroutine .* was never awaited", RuntimeWarning
  )


def _print_unless_stray(unraisable):
  """Prints uncaught exceptions, except those of TensorStore's threads.

  These threads call an event loop that a failed (and reported) save has closed.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


# Users may set these variables to debug their own JAX code. Results here do not
# depend on them.
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
      f"{words.splitlines()[0]}; install its JAX plugin, or unset "
      "JAX_PLATFORMS"
    ) from e


def _fail(args, text, code):
  """Reports an error; returns the exit code."""
  if text:
    print(text, file=sys.stderr)
  if args and args.connected:
    # At exit JAX waits for the other processes and aborts if they do not exit,
    # so a timer preserves the exit code. If another process caused the error,
    # JAX aborts first.
    distributed.exit_after(0 if code == 130 else args.lost_timeout + 10, code)
  return code
