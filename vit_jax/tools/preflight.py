"""The `preflight` command: checks for problems that would fail or stall a run.

Every process of the run checks its own host and receives the results of all, so
that all exit with the same status.
"""

import glob
import json
import os
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np

from vit_jax import checkpoint, distributed
from vit_jax.errors import UserError, one_line
from vit_jax.tools.bench.input import time_batches
from vit_jax.training import run_folder
from vit_jax.training.inputs import choose_shuffle, open_inputs, read_rows

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
_ORDER = (OK, SKIPPED, WARNING, FAILED)
_CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # devices of TPUs
_SAME = ("versions", "accelerator")  # must be the same on all hosts
_ROWS = 256  # of a batch, for measuring the input


class Found(NamedTuple):
  """The result of a check.

  Attributes:
    state: OK, WARNING, FAILED or SKIPPED.
    text: one line with the result and, unless it is OK, advice.
    rate: for the data, images per second that this host prepares.
  """

  state: str
  text: str
  rate: float = 0


def check(
  config,
  workdir: str,
  spec: str,
  overrides: dict[str, str] | None,
  topology: str | None,
) -> dict[str, Found]:
  """Returns {check: its result} over all hosts; every process must call it.

  Args:
    config, workdir: of the run.
    spec, overrides: of its configuration, as typed by the user.
    topology: as for `plan`, "v5e:4x4"; None skips the plan.
  """
  versions = [f"{n} {v}" for n, v in distributed.read_versions().items()]
  checks = {
    "versions": lambda: Found(OK, ", ".join(versions)),
    "accelerator": check_accelerator,
    "workdir": lambda: check_folder(config, workdir),
    "data": lambda: check_data(config),
  }
  mine = {name: _try(look) for name, look in checks.items()}
  everyone = distributed.gather([socket.gethostname(), mine])
  found = merge(everyone)
  if jax.process_index() == 0:
    rates = [checks["data"][2] for _, checks in everyone]
    plan, found["memory"] = check_plan(spec, overrides, topology)
    found["input"] = check_input(rates, plan)
  found = distributed.gather(found)[0]  # the others wait for the plan
  return {name: Found(*each) for name, each in found.items()}


def _try(look) -> Found:
  """Returns the result of a check; an exception is a failure."""
  try:
    return look()
  except Exception as e:  # storage layers and drivers raise any type
    text = str(e) if isinstance(e, UserError) else one_line(e)
    return Found(FAILED, text)


def merge(by_host: list) -> dict[str, Found]:
  """Returns the worst result of each check, with its hosts.

  Args:
    by_host: [host, {check: its result}] of all hosts.
  """
  merged = {}
  for name in by_host[0][1]:
    each = [(host, Found(*found[name])) for host, found in by_host]
    worst = max((found.state for _, found in each), key=_ORDER.index)
    texts: dict[str, list[str]] = {}
    for host, found in each:
      if found.state == worst:
        texts.setdefault(found.text, []).append(host)
    if len(texts) > 1 and name in _SAME:
      worst = FAILED
    lines = [f"{', '.join(at)}: {text}" for text, at in texts.items()]
    if [*texts.values()] == [[host for host, _ in each]]:  # the same on all
      lines = [*texts]
    merged[name] = Found(worst, "; ".join(lines))
  return merged


def check_accelerator() -> Found:
  """Checks that JAX can use this host's chips and no other process does."""
  devices = jax.local_devices()
  chips = sum(len(glob.glob(pattern)) for pattern in _CHIPS)
  asked = os.environ.get("JAX_PLATFORMS")
  if devices[0].platform == "cpu" and chips and not asked:
    text = f"JAX has none of {chips} TPUs; another process may hold them. Try"
    return Found(FAILED, f"{text} JAX_PLATFORMS=tpu, which prints more")
  return Found(OK, f"{len(devices)} x {devices[0].device_kind}")


def check_folder(config, workdir: str) -> Found:
  """Checks that the run folder is writable and has no other run."""
  folder = checkpoint.absolute(workdir)
  resuming = run_folder.check(config, folder)
  is_bucket = "://" in str(folder)  # in which folders need not exist
  tree = (folder, *folder.parents)
  here = next(f for f in tree if is_bucket or f.exists())
  probe = here / f".preflight-{socket.gethostname()}-{os.getpid()}"
  try:
    probe.write_text("may be deleted")
    probe.unlink()
  except Exception as e:
    why = one_line(e)
    advice = "choose another --workdir, or change its permissions"
    return Found(FAILED, f"{here} cannot be written: {why}; {advice}")
  text = f"{folder}, {'resumes its run' if resuming else 'a new run'}"
  if jax.process_count() == 1 or is_bucket:
    return Found(OK, text)
  return Found(WARNING, f"{text}: must be the same folder on all hosts (NFS)")


def check_data(config) -> Found:
  """Reads both ends of the run's data sets, and measures the input rate."""
  inputs = open_inputs(config)
  opened = [source for source, _ in inputs.train]
  opened += [source for sources in inputs.evals.values() for source in sources]
  for source in opened:
    source.read(np.array([0, source.num_examples - 1]))
  rows = np.arange(min(_ROWS, config.batch_size))
  shuffle = choose_shuffle(config, inputs, None)
  batches = read_rows(config, inputs, shuffle, rows, 0, 2**40)
  rate = time_batches(batches, len(rows))
  counts = ", ".join(f"{source.num_examples:,}" for source in opened)
  return Found(OK, f"{config.train.dataset}: {counts} examples", rate)


def check_plan(
  spec: str, overrides: dict[str, str] | None, topology: str | None
) -> tuple[dict | None, Found]:
  """Returns `plan`'s estimate, None without one, and whether the step fits.

  It runs in a subprocess, because the TPU compiler is set up before JAX starts.
  """
  if topology is None:
    return None, Found(SKIPPED, "give --topology=v5e:4x4 (yours) to plan it")
  flags = [f"--config.{key}={x}" for key, x in (overrides or {}).items()]
  command = [sys.executable, "-m", "vit_jax", "plan", f"--config={spec}"]
  done = subprocess.run(
    [*command, f"--topology={topology}", "--json", *flags],
    env={**os.environ, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    why = done.stderr.strip().rpartition("\n")[2]
    return None, Found(WARNING, f"cannot be planned: {why}")
  plan = json.loads(done.stdout.splitlines()[-1])
  if plan["fits"]:
    text = f"{plan['hbm_gib']:.2f} GiB a chip of {topology}, planned"
    return plan, Found(OK, text)
  change = (plan.get("fallback") or {}).items()
  advice = " ".join(f"--config.{key}={x}" for key, x in change)
  text = f"does not fit on {topology}; use {advice or 'more chips'}"
  return None, Found(FAILED, text)


def check_input(rates: list[float], plan: dict | None) -> Found:
  """Compares the input rate of all hosts with the rate of the planned step.

  Args:
    rates: images per second that each host prepares; 0 without data.
    plan: `plan`'s estimate of a step that fits, or None.
  """
  if not all(rates):
    return Found(SKIPPED, "not measured without data")
  # All hosts feed the same number of rows, so the slowest sets the pace.
  total = min(rates) * len(rates)
  text = f"{total:,.0f} images/s from {len(rates)} hosts"
  if plan is None:
    return Found(OK, text)
  needed = plan["images_per_second_per_chip"] * plan["chips"]
  text += f"; the step takes {needed:,.0f}, planned"
  if total >= needed:
    return Found(OK, text)
  text += ", so chips will wait for input; use hosts with more cores"
  return Found(WARNING, text)
