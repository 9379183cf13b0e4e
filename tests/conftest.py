"""Test set-up: eight fake CPU devices stand in for a pod slice."""

import os
import signal

import compiled
import pytest
from browser import chromium, open_page  # noqa: F401 - fixtures

# Before anything imports jax: the backend reads these once. A setting of the
# same name that is there already wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if os.environ["JAX_PLATFORMS"] == "cpu":
  # Tests compile many tiny programs and run each once or twice: compiling
  # without optimisations saves more than it costs.
  _FLAGS.append("--xla_backend_optimization_level=0")
compiled.use()
_given = os.environ.get("XLA_FLAGS", "").split()
_names = {flag.partition("=")[0] for flag in _given}
os.environ["XLA_FLAGS"] = " ".join(
  _given + [flag for flag in _FLAGS if flag.partition("=")[0] not in _names]
)


compiled.write_whole()  # this imports jax

# A shell's background jobs ignore Ctrl-C, and so would what tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest come first: a worker that meets one of them last
# works on it alone. Of the default suite, those that wait for the reference run
# are far apart.
_LONG = (
  *("documents", "notebooks", "train", "masked", "distributed", "sweep"),
  *("plan", "interop", "export", "models", "labelled", "launch", "data_tasks"),
  *("cli", "attention", "attention_maps", "exchange", "demo", "report"),
)


def pytest_collection_modifyitems(items):
  rank = {f"{name}_test.py": i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: rank.get(item.path.name, len(_LONG)))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
  """The folder of a test run that all its workers share."""
  folder = tmp_path_factory.getbasetemp()
  return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="module")
def sharing():
  """Has the runs of a file's tests share their compiled steps."""
  from tiny_runs import shared_programs

  with shared_programs():
    yield


@pytest.fixture(scope="session")
def fork_server(shared):
  """Lets tests start programs as forks, see forks.py."""
  import forks

  forks.start_server(shared)


@pytest.fixture(scope="session")
def runs(shared, fork_server):
  """Starts commands that share a folder with the digits, see tiny_runs.py."""
  import forks
  from tiny_runs import Runs

  from vit_jax import data

  with forks.locked(shared / "runs.lock"):
    runs = Runs(shared / "runs")
    data.prepare("digits", str(runs.data_dir))
  return runs


@pytest.fixture(scope="session")
def reference(runs, shared):
  """The tiny run, never interrupted, started as a user starts it."""
  import forks
  from tiny_runs import Reference

  workdir, log = runs.folder / "reference", runs.folder / "reference.log"
  with forks.locked(shared / "reference.lock"):
    if not log.exists():
      log.write_text(runs.train_to_end(workdir, anew=True).stderr())
  return Reference(workdir, log.read_text())
