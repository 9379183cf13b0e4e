"""Checks in advance for problems that would fail or stall a run.

Every process of the run looks at its own machine, without touching its TPU.
Then a roll is called, where each hears what all have found; so all end alike.
"""

import fcntl
import glob
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_jax import checkpoint
from vit_jax.errors import RunStopped, UserError
from vit_jax.tools.bench.input import time_batches
from vit_jax.training import hosts, run_folder
from vit_jax.training.inputs import open_inputs, read_rows

log = logging.getLogger(__name__)

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
LOCK = "/tmp/libtpu_lockfile"
_CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
_GIB = 2**30
_ROWS = 256  # of a batch, that the input is measured with
_LITTLE_SPACE, _NO_SPACE = 10 * _GIB, _GIB


class Found(NamedTuple):
  """What a check has found.

  Attributes:
    state: OK, WARNING, FAILED or SKIPPED.
    text: one line: what it is and, unless it is well, what to do.
  """

  state: str
  text: str


def examine(config, workdir: str, count: int) -> dict:
  """Returns what this process knows of its machine, for `hosts.call_roll`.

  Args:
    config: of the run.
    workdir: of the run.
    count: how many processes there are.
  """
  found = check_machine(config, workdir, count)
  readable = found["data"].state == OK
  return {
    "versions": hosts.read_versions(),
    "chips": len(find_chips()),
    "images_per_second": measure_input(config) if readable else None,
    "found": found,
  }


def compare(everyone: list[dict], expected: int | None) -> dict[str, Found]:
  """Returns {check: what was found} on all machines.

  Args:
    everyone: what `examine` returned there.
    expected: how many processes there should be; None: as many as there are.
  """
  return {
    "hosts": check_hosts(everyone, expected),
    "versions": check_versions(everyone),
    **merge([(facts["host"], facts["found"]) for facts in everyone]),
  }


def check_plan(
  everyone: list[dict],
  spec: str,
  overrides: dict[str, str] | None,
  topology: str | None,
) -> dict[str, Found]:
  """Compares the run's plan with its memory and its input.

  Args:
    everyone: what `examine` returned on all machines.
    spec, overrides: of the run's configuration, as typed by the user.
    topology: as for `plan`, "v5e:4x4"; None: its memory is not planned.
  """
  plan, why_not = ask_plan(spec, overrides, topology)
  return {
    "memory": check_memory(plan, topology) if plan else why_not,
    "input": check_input(everyone, plan),
  }


def raise_if_failed(found: dict[str, Found]) -> None:
  """Raises RunStopped if hosts are missing, a UserError if a check failed."""
  failed = [name for name, check in found.items() if check.state == FAILED]
  if found["hosts"].state == FAILED:
    raise RunStopped(found["hosts"].text)
  if failed:
    raise UserError(f"not ready: {', '.join(failed)}")


def check_machine(config, workdir: str, count: int) -> dict[str, Found]:
  """Runs the checks of one machine; one that breaks has failed."""
  checks: dict[str, Callable[[], Found]] = {
    "accelerator": check_accelerator,
    "workdir": lambda: check_folder(config, workdir, count),
    "region": lambda: check_region([workdir, config.data_dir]),
    "data": lambda: check_data(config),
    "disk": lambda: check_disk(workdir),
  }
  found = {}
  for name, check in checks.items():
    try:
      found[name] = check()
    except UserError as e:
      found[name] = Found(FAILED, str(e))
    except Exception as e:  # whatever a storage layer raises
      found[name] = Found(FAILED, checkpoint.first_line(e))
  return found


def merge(by_host: list[tuple[str, dict]]) -> dict[str, Found]:
  """Returns one finding for each check: the worst, with its hosts."""
  order = (OK, SKIPPED, WARNING, FAILED)
  merged = {}
  for name in by_host[0][1]:
    each = [(host, Found(*found[name])) for host, found in by_host]
    worst = max((found.state for _, found in each), key=order.index)
    texts: dict[str, list[str]] = {}
    for host, found in each:
      if found.state == worst:
        texts.setdefault(found.text, []).append(host)
    lines = [f"{', '.join(at)}: {text}" for text, at in texts.items()]
    if [*texts.values()] == [[host for host, _ in each]]:  # said by all
      lines = [*texts]
    merged[name] = Found(worst, "; ".join(lines))
  return merged


# --- all hosts ---


def check_hosts(everyone: list[dict], expected: int | None) -> Found:
  """Checks that there are as many as expected, all with as many chips."""
  names = [facts["host"] for facts in everyone]
  text = f"saw {len(everyone)} of {expected or len(everyone)} hosts"
  if expected and expected != len(everyone):
    return Found(
      FAILED,
      f"{text}: {', '.join(names)}; start the same command on all, with "
      "--distributed on a pod or under Slurm",
    )
  chips = [facts["chips"] for facts in everyone]
  if len(set(chips)) > 1:
    each = ", ".join(f"{n} {c}" for n, c in zip(names, chips, strict=True))
    return Found(FAILED, f"{text}, with unequal numbers of TPU chips: {each}")
  return Found(OK, f"{text}, {chips[0]} TPU chips each")


def check_versions(everyone: list[dict]) -> Found:
  """Checks that all have the same versions."""
  different = hosts.compare_versions(everyone)
  if different:
    return Found(FAILED, different)
  versions = everyone[0]["versions"]
  return Found(
    OK, ", ".join(f"{n} {version}" for n, version in versions.items())
  )


# --- the accelerator ---


def find_chips() -> list[str]:
  """Returns the device files of this machine's TPU chips."""
  return sorted(name for pattern in _CHIPS for name in glob.glob(pattern))


def check_accelerator(lock: str = LOCK) -> Found:
  """Checks that no process has the TPU, and none has left its lock.

  libtpu locks a file for as long as a process uses the chips.
  """
  chips = find_chips()
  holders = find_holders([lock, *chips])
  if holders:
    each = ", ".join(f"{pid} ({command})" for pid, command in holders.items())
    return Found(
      FAILED,
      f"in use by process {each}; stop it (launch/tpu.py stop, or kill "
      f"{' '.join(map(str, holders))}) and wait until it is gone",
    )
  path = Path(lock)
  if not path.exists():
    return Found(OK, f"{len(chips)} TPU chips" if chips else "no TPU here")
  try:
    with path.open("r+") as file:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return Found(
      FAILED, f"{lock} is locked by a process that cannot be seen; reboot"
    )
  except PermissionError:
    return Found(
      FAILED,
      f"{lock} was left by a process of {_owner(path)} that has ended, and "
      f"is in the way of other users; remove it: sudo rm {lock}",
    )
  return Found(
    WARNING,
    f"{lock} was left by a process that has ended; if the TPU is said to be "
    f"in use, remove it: rm {lock}",
  )


def find_holders(paths: list[str]) -> dict[int, str]:
  """Returns {process: command line} of those that lock or open the files."""
  pids = set()
  known = {Path(path).stat().st_ino for path in paths if Path(path).exists()}
  locks = Path("/proc/locks")  # of all users, unlike the open files
  if locks.exists():
    # 1: POSIX  ADVISORY  WRITE 1234 08:01:131090 0 EOF
    for line in locks.read_text().splitlines():
      match = re.search(r" (\d+) \w+:\w+:(\d+) ", line)
      if match and int(match[2]) in known:
        pids.add(int(match[1]))
  for link in glob.glob("/proc/[0-9]*/fd/*"):
    try:
      if os.readlink(link) in paths:
        pids.add(int(link.split("/")[2]))
    except OSError:
      pass  # it has ended, or is another user's
  return {pid: _read_command(pid) for pid in sorted(pids - {os.getpid()})}


def _read_command(pid):
  try:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
  except OSError:
    return "ended"
  return b" ".join(words).decode(errors="replace").strip()[:80]


def _owner(path):
  try:
    return path.owner()
  except KeyError:
    return f"user {path.stat().st_uid}"


# --- storage ---


def check_folder(config, workdir: str, count: int) -> Found:
  """Checks that the run folder can be written, and is no other run's."""
  folder = checkpoint.absolute(workdir)
  resuming = run_folder.check(config, folder)
  here = next(f for f in (folder, *folder.parents) if f.exists())
  if "://" in str(folder):
    here = folder  # a bucket has no folders that would have to be there
  probe = here / f".preflight-{socket.gethostname()}-{os.getpid()}"
  try:
    probe.write_text("may be deleted")
    probe.unlink()
  except Exception as e:
    return Found(
      FAILED,
      f"{here} cannot be written: {checkpoint.first_line(e)}; "
      + (
        "give the machine's service account the role Storage Object Admin on "
        "the bucket, and the VM the scope cloud-platform"
        if "://" in str(here)
        else "choose another --workdir"
      ),
    )
  text = f"{folder}, {'goes on with its run' if resuming else 'a new run'}"
  if count > 1 and "://" not in str(folder):
    return Found(
      WARNING,
      f"{text}: a local path; all hosts must see the same folder there (NFS), "
      "else take a bucket, gs://...",
    )
  return Found(OK, text)


def check_region(addresses: list[str | None]) -> Found:
  """Compares where the buckets are with where the machine is."""
  buckets = {a.split("/")[2] for a in addresses if a and a.startswith("gs://")}
  if not buckets:
    return Found(SKIPPED, "no bucket")
  try:
    zone = _ask_metadata("instance/zone").rpartition("/")[2]
  except OSError:
    return Found(
      WARNING,
      "this machine does not say where it is (no metadata server); compare "
      f"with the location of {', '.join(sorted(buckets))} yourself",
    )
  each = [_compare_region(bucket, zone) for bucket in sorted(buckets)]
  states = [found.state for found in each]
  text = "; ".join(found.text for found in each)
  return Found(WARNING if WARNING in states else OK, text)


def _compare_region(bucket, zone):
  region = zone.rpartition("-")[0]
  try:
    found = _ask_storage(bucket)
  except OSError as e:
    return Found(
      WARNING, f"the location of {bucket} cannot be read ({e}), not compared"
    )
  location = found["location"].lower()
  places = found.get("customPlacementConfig", {}).get("dataLocations", [])
  near = region == location or region in [p.lower() for p in places]
  if found.get("locationType") == "multi-region":
    continent = "europe" if location == "eu" else location
    near = region.startswith(f"{continent}-")
  if near:
    return Found(OK, f"{bucket} is in {location}, this machine in {zone}")
  return Found(
    WARNING,
    f"{bucket} is in {location}, this machine in {zone}: slow, and traffic "
    f"between regions is charged; take a bucket in {region}",
  )


def _ask_metadata(what):
  host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{host}/computeMetadata/v1/{what}",
    headers={"Metadata-Flavor": "Google"},
  )
  # Never through a proxy, which would answer for its own machine.
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  with opener.open(request, timeout=3) as reply:
    return reply.read().decode()


def _ask_storage(bucket):
  token = json.loads(_ask_metadata("instance/service-accounts/default/token"))
  host = os.environ.get(
    "STORAGE_EMULATOR_HOST", "https://storage.googleapis.com"
  )
  request = urllib.request.Request(
    f"{host}/storage/v1/b/{bucket}",
    headers={"Authorization": f"Bearer {token['access_token']}"},
  )
  with urllib.request.urlopen(request, timeout=10) as reply:
    return json.loads(reply.read())


def check_data(config) -> Found:
  """Opens the run's data sets and reads the ends of each."""
  inputs = open_inputs(config)
  opened = [source for source, _ in inputs.train]
  opened += [source for sources in inputs.evals.values() for source in sources]
  for source in opened:
    source.read(np.array([0, source.num_examples - 1]))
  counts = ", ".join(f"{source.num_examples:,}" for source in opened)
  return Found(OK, f"{config.train.dataset}: {counts} examples")


def check_disk(workdir: str) -> Found:
  """Checks the space for temporary files and for a local run folder."""
  folders = [tempfile.gettempdir()]
  if "://" not in workdir:
    path = Path(workdir).expanduser().absolute()
    folders.append(str(next(f for f in (path, *path.parents) if f.exists())))
  free = {folder: shutil.disk_usage(folder).free for folder in folders}
  folder = min(free, key=lambda name: free[name])
  text = f"{free[folder] / _GIB:.1f} GiB free at {folder}"
  if free[folder] < _NO_SPACE:
    return Found(FAILED, f"{text}; make room")
  if free[folder] < _LITTLE_SPACE:
    return Found(WARNING, f"{text}; is that enough for checkpoints?")
  return Found(OK, text)


# --- the plan ---


def ask_plan(
  spec: str, overrides: dict[str, str] | None, topology: str | None
) -> tuple[dict | None, Found]:
  """Returns what `plan` says, and why it says nothing if it does not.

  It runs in a process of its own, which loads the TPU's compiler; this one
  keeps away from that.
  """
  if topology is None:
    return None, Found(SKIPPED, "give --topology=v5e:4x4 (yours) to plan it")
  flags = [
    f"--config.{key}={value}" for key, value in (overrides or {}).items()
  ]
  command = [sys.executable, "-m", "vit_jax", "plan", f"--config={spec}"]
  done = subprocess.run(
    [*command, f"--topology={topology}", "--json", *flags],
    env={**os.environ, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ["it says nothing"]
    return None, Found(WARNING, f"cannot be planned: {lines[-1]}")
  return json.loads(done.stdout.splitlines()[-1]), Found(OK, "")


def check_memory(plan: dict, topology: str | None) -> Found:
  """Says whether the step fits, from what `plan` says."""
  if plan["fits"]:
    return Found(OK, f"{plan['hbm_gib']:.2f} GiB a chip of {topology}, planned")
  change = plan.get("fallback")
  advice = (
    " ".join(f"--config.{key}={value}" for key, value in change.items())
    if change
    else "take more or larger chips"
  )
  return Found(FAILED, f"does not fit on {topology}; what would: {advice}")


# --- the input ---


def measure_input(config) -> float | None:
  """Returns the images a second that this machine prepares for the run.

  None if it cannot; `check_data` says why.
  """
  rows = np.arange(min(_ROWS, config.batch_size))
  try:
    batches = read_rows(config, open_inputs(config), rows, 0, 2**40)
    return time_batches(batches, len(rows))
  except Exception as e:  # as in `check_machine`
    log.warning("the input cannot be measured: %s", checkpoint.first_line(e))
    return None


def check_input(everyone: list[dict], plan: dict | None) -> Found:
  """Compares what all hosts prepare with what the planned step takes."""
  rates = [facts["images_per_second"] for facts in everyone]
  if not all(rates):
    return Found(SKIPPED, "not measured without data")
  # Each host feeds as many rows, so the slowest sets the pace.
  total = min(rates) * len(rates)
  text = f"{total:,.0f} images/s from {len(rates)} hosts"
  if plan is None or not plan["fits"]:
    return Found(OK, f"{text}; how many the step takes is not planned")
  needed = plan["images_per_second_per_chip"] * plan["chips"]
  text += f"; the step takes {needed:,.0f}, planned"
  if total < needed:
    text += ", so chips will wait: take machines with more cores for them"
    return Found(WARNING, text)
  return Found(OK, text)
