#!/usr/bin/env python3
"""A run on Cloud TPU VMs, from a laptop: one command for each thing to do.

  launch/tpu.py create   request a slice (or --slices of them), wait for it
  launch/tpu.py setup    the same commit and versions on every worker
  launch/tpu.py run      start a vit-jax command on every worker
  launch/tpu.py logs     follow worker 0
  launch/tpu.py status   the request, the machines, every worker's process
  launch/tpu.py watch    all of it: and again after each preemption
  launch/tpu.py stop     let the run save and end
  launch/tpu.py delete   give everything back

It needs Python and Google's `gcloud`, nothing else. --dry-run prints the
commands instead of running them. README.md beside this file shows a whole run.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# What vit-jax says when it was told to stop, and saved: sysexits' "try again".
STOPPED = 75
# What it says when it ended because another of its processes was lost.
LOST_PROCESS = 69
# https://docs.cloud.google.com/tpu/docs/runtimes; first match wins.
RUNTIMES = (
  (r"v6e-", "v2-alpha-tpuv6e"),
  (r"v5p-", "v2-alpha-tpuv5"),
  (r"v5litepod-", "v2-alpha-tpuv5-lite"),
  (r"v[234]-", "tpu-ubuntu2204-base"),
)
PYTHON = "3.12"
POLL = float(os.environ.get("VIT_JAX_POLL", "20"))  # seconds
WAITS = (0, 60, 300, 900)  # seconds before the n-th start that got no further
PATIENCE = 30  # polls without an answer
# How a run may end, for `watch`; anything else is a failure.
COMPLETE, TOLD, LOST = "complete", "told to stop", "preempted"
DRY = False
# vit-jax commands whose processes meet.
TOGETHER = ("train", "evaluate", "linear", "preflight")
WAITING = {"CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"}
GONE = {"SUSPENDING", "SUSPENDED", "FAILED", "DELETING"}
NODE_GONE = {"PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING"}

# What gcloud says, and what to do about it; first match wins. No second try
# mends these.
ADVICE = (
  (
    r"active account|gcloud auth login|[Rr]eauthentication|invalid_grant",
    "you are not logged in; run: gcloud auth login",
  ),
  (
    r"required property \[project\]",
    "no project; give --project or set VIT_JAX_PROJECT",
  ),
  (
    r"[Qq]uota",
    "the quota is used up or zero; suspended requests count too (gcloud "
    "compute tpus queued-resources list), else ask for more: "
    "https://console.cloud.google.com/iam-admin/quotas",
  ),
  (
    r"ALREADY_EXISTS|already exists",
    "the name is taken; see `status`, then `delete` it or take another --name",
  ),
  (
    r"SERVICE_DISABLED|has not been used in project",
    "the API is off; run: gcloud services enable tpu.googleapis.com",
  ),
  (
    r"[Pp]ermission .*locations/|[Ll]ocation .*(not found|is not)|"
    r"[Ii]nvalid.* zone|[Uu]nknown zone",
    "no such zone for TPUs, or not for this project; list them: gcloud "
    "compute tpus locations list",
  ),
  (
    r"PERMISSION_DENIED|does not have permission",
    "this account may not; ask the project's owner for the role TPU Admin",
  ),
  (
    r"[Aa]ccelerator.*(not|invalid)|[Ii]nvalid.*[Aa]ccelerator",
    "the zone has no such --type; list them: gcloud compute tpus "
    "accelerator-types list --zone=ZONE",
  ),
  (
    r"NOT_FOUND|not found",
    "there is nothing of that name in this zone and project; `create` it",
  ),
)


class Problem(Exception):
  """What went wrong and what to do, in one line."""


class NotThere(Problem):
  """The request does not exist."""


class Failed(Problem):
  """Something failed that may go well the next time.

  Attributes:
    output: what it had printed on stdout.
  """

  def __init__(self, message, output=""):
    super().__init__(message)
    self.output = output


def main(argv=None) -> int:
  """Runs one command; returns the exit code."""
  args, command = parse(sys.argv[1:] if argv is None else argv)
  global DRY
  DRY = args.dry_run
  try:
    if args.needs_command != bool(command):
      raise Problem(
        f"{args.action} takes the vit-jax command after --: "
        "... -- train --config=... --workdir=gs://..."
        if args.needs_command
        else f"{args.action} takes no command; what is {command[0]!r}?"
      )
    if not args.name or not args.zone:
      raise Problem(
        "give --name and --zone, or set VIT_JAX_TPU and VIT_JAX_ZONE"
      )
    args.do(Tpu(args), command)
  except Problem as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("what was requested or started goes on without", file=sys.stderr)
    return 130
  return 0


def parse(argv):
  """Returns the flags and the command after `--`."""
  command = []
  if "--" in argv:
    command = argv[argv.index("--") + 1 :]
    argv = argv[: argv.index("--")]
  parser = argparse.ArgumentParser(
    prog="launch/tpu.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  everywhere = argparse.ArgumentParser(add_help=False)
  for name, variable in (
    ("name", "VIT_JAX_TPU"),
    ("zone", "VIT_JAX_ZONE"),
    ("project", "VIT_JAX_PROJECT"),
  ):
    everywhere.add_argument(
      f"--{name}", default=os.environ.get(variable), help=f"or ${variable}"
    )
  everywhere.add_argument("--dry-run", action="store_true", help="only print")
  create = argparse.ArgumentParser(add_help=False)
  create.add_argument(
    "--type",
    default=os.environ.get("VIT_JAX_TYPE"),
    help="v5litepod-16, v6e-64, ... or $VIT_JAX_TYPE",
  )
  create.add_argument("--runtime-version", help="default: by the type")
  create.add_argument("--slices", type=int, default=1, help="default: 1")
  create.add_argument(
    "--spot", action="store_true", help="cheaper, taken away at any time"
  )
  commit = argparse.ArgumentParser(add_help=False)
  commit.add_argument("--commit", default="HEAD", help="default: HEAD")
  checked = argparse.ArgumentParser(add_help=False)
  checked.add_argument("--no-preflight", action="store_true")
  actions = parser.add_subparsers(required=True, dest="action")
  for do, flags, needs_command in (
    (do_create, [create], False),
    (do_setup, [commit], False),
    (do_run, [checked], True),
    (do_logs, [], False),
    (do_status, [], False),
    (do_watch, [create, commit, checked], True),
    (do_stop, [], False),
    (do_delete, [], False),
  ):
    name = do.__name__.removeprefix("do_")
    action = actions.add_parser(
      name,
      parents=[everywhere, *flags],
      help=do.__doc__,
      allow_abbrev=False,
    )
    action.set_defaults(do=do, needs_command=needs_command)
  return parser.parse_args(argv), command


# --- gcloud ---


class Tpu:
  """A queued resource, by name, and what gcloud does with it."""

  def __init__(self, args):
    self.args = args
    self.name = args.name
    self.dry = args.dry_run
    self.workers = 0  # as many as were last seen; 0: not looked yet

  def gcloud(self, *words, show=False) -> str:
    """Runs a gcloud command on this zone and project; returns its stdout.

    Args:
      words: of the command, after `gcloud compute tpus`.
      show: let the user see its output as it comes, and return "".
    """
    command = ["gcloud", "compute", "tpus", *words, f"--zone={self.args.zone}"]
    if self.args.project:
      command.append(f"--project={self.args.project}")
    command.append("--quiet")  # ask nothing
    if self.dry:
      print(shlex.join(command))
      return ""
    try:
      done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.PIPE,
        text=True,
        check=False,
      )
    except FileNotFoundError:
      raise Problem(
        "there is no gcloud; install it: https://cloud.google.com/sdk/docs/"
        "install"
      ) from None
    if done.returncode:
      raise explain(words, done)
    return done.stdout or ""

  def describe(self) -> tuple[str, str]:
    """Returns the state of the request, and why it failed if it did."""
    text = self.gcloud(
      "queued-resources", "describe", self.name, "--format=json"
    )
    if self.dry:
      return "ACTIVE", ""
    state = json.loads(text).get("state", {})
    why = state.get("failedData", {}).get("error", {}).get("message", "")
    return state.get("state", "UNKNOWN"), why

  def list_nodes(self) -> list[tuple[str, str, int]]:
    """Returns [(node, state, workers)] of the slices."""
    text = self.gcloud("tpu-vm", "list", "--format=json")
    found = []
    for node in json.loads(text or "[]"):
      name, owner = (
        node.get(key, "").rpartition("/")[2]
        for key in ("name", "queuedResource")
      )
      if owner == self.name:
        workers = len(node.get("networkEndpoints", []))
        found.append((name, node.get("state", "UNKNOWN"), workers))
    self.workers = sum(workers for _, _, workers in found)
    return sorted(found)

  def ssh(self, script: str, *, everywhere=True, show=False) -> str:
    """Runs a shell script on every worker, or on worker 0 of slice 0."""
    which = "all" if everywhere else "0"
    return self.gcloud(
      "queued-resources",
      "ssh",
      self.name,
      f"--node={which}",
      f"--worker={which}",
      f"--command={script}",
      show=show,
    )

  def ask(self, script: str, show=False) -> dict[str, dict[str, str]]:
    """Runs a script on every worker; returns {worker: {key: value}}.

    The script calls `say KEY VALUE`, and `say finished yes` at its end. Lines
    of several workers come mixed, so each begins with its worker's name.

    Args:
      script: for sh.
      show: print what else it prints.

    Raises:
      Failed: some workers did not answer; says how many did.
    """
    problem = None
    try:
      text = self.ssh(SAY + script)
    except Failed as e:
      problem, text = e, e.output
    if self.dry:
      return {}
    answers: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
      match = re.fullmatch(r"@ (\S+) (\S+) (.*)", line)
      if match:
        answers.setdefault(match[1], {})[match[2]] = match[3]
      elif show:
        say(line)
    expected = self.workers or sum(n for _, _, n in self.list_nodes())
    done = sorted(
      worker for worker, said in answers.items() if "finished" in said
    )
    if problem or len(done) < expected:
      raise Failed(
        f"saw {len(done)} of {expected} workers ({', '.join(done)}): "
        f"{problem or 'the others said nothing'}"
      )
    return answers


SAY = 'say() { printf \'@ %s %s %s\\n\' "$(hostname)" "$1" "$2"; }\n'


def explain(words, done) -> Problem:
  """Returns what a failed gcloud command means."""
  text = (done.stderr or "").strip()
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  said = next((line for line in lines if line.startswith("ERROR")), None)
  said = (said or (lines[-1] if lines else f"exit code {done.returncode}"))[
    :300
  ]
  failed = re.findall(r"worker (\d+) failed with .*?(\d+)\.", text)
  if failed:  # what a command on a worker says is no error of gcloud's
    each = ", ".join(f"{worker} (exit code {code})" for worker, code in failed)
    return Failed(f"it failed on worker {each}: {said}", done.stdout or "")
  message = f"gcloud {words[0]} {words[1]}: {said}"
  advice = next((a for pattern, a in ADVICE if re.search(pattern, text)), None)
  if advice is None:
    return Failed(message, done.stdout or "")
  if words[1] == "describe" and re.search(r"NOT_FOUND|not found", said):
    return NotThere(f"{message} -- {advice}")
  return Problem(f"{message} -- {advice}")


# --- the commands ---


def do_create(tpu, command=()):
  """request TPUs, and wait until they are there"""
  args = tpu.args
  if not args.type:
    raise Problem("give --type=v5litepod-16 or the like, or set VIT_JAX_TYPE")
  runtime = args.runtime_version or next(
    (name for pattern, name in RUNTIMES if re.match(pattern, args.type)), None
  )
  if not runtime:
    raise Problem(
      f"--type={args.type} has no runtime known here; give --runtime-version"
    )
  nodes = [f"--node-id={tpu.name}"]
  if args.slices > 1:
    nodes = [f"--node-count={args.slices}", f"--node-prefix={tpu.name}"]
  tpu.workers = 0
  tpu.gcloud(
    "queued-resources",
    "create",
    tpu.name,
    f"--accelerator-type={args.type}",
    f"--runtime-version={runtime}",
    *nodes,
    *(["--spot"] if args.spot else []),
    "--async",
  )
  say(f"requested {args.slices} x {args.type} as {tpu.name}")
  wait_until_active(tpu)


def wait_until_active(tpu):
  """Waits for the request.

  Raises:
    Problem: it will not become active, and not at a second try either.
    Failed: it will not become active.
  """
  last = None
  while True:
    state, why = tpu.describe()
    if state != last:
      last = state
      say(f"{tpu.name}: {state}")
    if state == "ACTIVE":
      return
    if state not in WAITING:
      advice = next((a for pattern, a in ADVICE if re.search(pattern, why)), "")
      raise (Problem if advice else Failed)(
        f"{tpu.name} is {state}{': ' if why else ''}{why}; "
        + (advice or "`delete` and `create` it again, or let `watch` do it")
      )
    time.sleep(POLL)


def do_setup(tpu, command=()):
  """install the same commit and versions on every worker"""
  wait_until_active(tpu)
  check_idle(tpu)  # its code is about to be replaced
  commit = git("rev-parse", "--verify", f"{tpu.args.commit}^{{commit}}")
  changed = git("diff", "HEAD", "--name-only").split()
  if changed and tpu.args.commit == "HEAD":
    say(f"not committed, so not sent: {', '.join(changed[:5])}")
  archive = Path(tempfile.gettempdir()) / f"vit_jax-{commit[:12]}.tar.gz"
  words = ("archive", "--format=tar.gz", f"--output={archive}", commit)
  if tpu.dry:
    print(shlex.join(["git", "-C", str(REPO), *words]))
  else:
    git(*words)
  tpu.gcloud(
    "queued-resources",
    "scp",
    str(archive),
    f"{tpu.name}:vit_jax.tar.gz",
    "--node=all",
    "--worker=all",
  )
  if not tpu.dry:
    archive.unlink()
  say(f"sent commit {commit[:12]}; installing takes minutes")
  answers = tpu.ask(SETUP % {"commit": commit, "python": PYTHON})
  compare(answers)


SETUP = """set -e
mkdir -p vit-jax/logs
rm -rf vit-jax/code
mkdir vit-jax/code
tar -xzf vit_jax.tar.gz -C vit-jax/code
cd vit-jax
PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet --user uv >&2
test -x venv/bin/python || uv venv --quiet --python %(python)s venv >&2
uv pip install --quiet --python venv/bin/python \\
  --constraint code/constraints.txt --editable './code[tpu,train]' >&2
say commit %(commit)s
say versions "$(venv/bin/python -c '
from vit_jax.training.hosts import read_versions
print(*(f"{name} {x}" for name, x in read_versions().items()), sep=", ")')"
say finished yes
"""


def compare(answers):
  """Prints every worker's versions.

  Raises:
    Problem: they are not the same.
  """
  by_versions: dict[str, list[str]] = {}
  for worker, said in sorted(answers.items()):
    say(f"{worker}: {said['versions']}")
    by_versions.setdefault(said["versions"], []).append(worker)
  if len(by_versions) > 1:
    few = min(by_versions.values(), key=len)
    raise Problem(
      f"the versions differ: {', '.join(few)} has others; remove vit-jax/venv "
      "there and run `setup` again"
    )


def do_run(tpu, command):
  """start a vit-jax command on every worker, in the background"""
  command = complete(command)
  check_idle(tpu)
  if not tpu.args.no_preflight and command[0] == "train":
    run_preflight(tpu, command)
  answers = tpu.ask(make_start(command))
  say(f"started on {len(answers)} workers: vit-jax {shlex.join(command)}")
  say(f"its log on each of them: vit-jax/logs/{name_run(command)}.log")


def check_idle(tpu):
  """Raises a Problem if a command runs on a worker."""
  said = tpu.ask(LOOK)
  busy = [worker for worker in said if said[worker]["state"] == "running"]
  if busy:
    raise Problem(
      f"a command runs already on {', '.join(sorted(busy))}; see `status`, "
      "`stop` it first"
    )


def complete(command):
  """Adds what every worker of a pod needs to be told."""
  command = list(command)
  if command[0] in TOGETHER and "--distributed" not in command:
    command.insert(1, "--distributed")
  if command[0] == "train":
    command.insert(1, f"--stopped_exit_code={STOPPED}")
  return command


def run_preflight(tpu, command):
  """Runs `vit-jax preflight` on every worker, before it costs anything.

  Raises:
    Problem: it found something, which has been printed.
  """
  hosts = tpu.workers or sum(workers for _, _, workers in tpu.list_nodes())
  flags = [flag for flag in command[1:] if not flag.startswith("--stopped")]
  words = ["../venv/bin/vit-jax", "preflight", f"--hosts={hosts}", *flags]
  say("preflight")
  answers = tpu.ask(
    f"cd vit-jax/code || exit 1\n{shlex.join(words)} 2>&1\n"
    "say code $?\nsay finished yes\n",
    show=True,
  )
  codes = {said["code"] for said in answers.values()}
  if codes <= {"0"}:
    return
  # As everywhere in vit-jax, 2 is for the user to mend.
  raise (Problem if "2" in codes else Failed)(
    "the preflight failed, see above; mend that, or start with --no-preflight"
  )


def name_run(command) -> str:
  """Returns the name of a run's files on the workers."""
  flags = [*command]
  for i, flag in enumerate(flags):
    key, equals, value = flag.partition("=")
    if key == "--workdir":
      value = value if equals else "".join(flags[i + 1 : i + 2])
      name = re.sub(r"[^\w.-]+", "-", value.split("://")[-1]).strip("-.")
      return name or command[0]
  return command[0]


def make_start(command) -> str:
  """Returns the script that starts a command and outlives the connection."""
  name = name_run(command)
  words = shlex.join(["../venv/bin/vit-jax", *command])
  # The inner shell stays to write down how it ended.
  inner = shlex.quote(
    f"{words} & echo $! > ../logs/pid; wait $!; echo $? > ../logs/exit_code"
  )
  return f"""cd vit-jax/code || exit 1
rm -f ../logs/exit_code ../logs/told_to_stop ../logs/pid
echo {name} > ../logs/name
nohup setsid sh -c {inner} \\
  >> ../logs/{name}.log 2>&1 </dev/null &
say finished yes
"""


def do_logs(tpu, command=()):
  """follow the log of worker 0 until Ctrl-C"""
  script = 'cd vit-jax/logs && exec tail -n 50 -F "$(cat name).log"'
  tpu.ssh(script, everywhere=False, show=True)


LOOK = """mkdir -p vit-jax/logs && cd vit-jax/logs || exit 1
name=$(cat name 2>/dev/null)
if kill -0 "$(cat pid 2>/dev/null)" 2>/dev/null; then say state running
elif test -f exit_code; then say state "$(cat exit_code)"
elif test -f pid; then say state killed
else say state none
fi
test -f told_to_stop && say told_to_stop yes
say step "$(grep -o '^step [0-9]*' "$name.log" 2>/dev/null | tail -n 1)"
say last "$(tail -n 1 "$name.log" 2>/dev/null | cut -c 1-300)"
say finished yes
"""


def do_status(tpu, command=()):
  """show the request, its machines, and every worker's process"""
  state, why = tpu.describe()
  say(f"{tpu.name}: {state} {why}".rstrip())
  for name, node_state, workers in tpu.list_nodes():
    say(f"  {name}: {node_state}, {workers} workers")
  if state != "ACTIVE":
    return
  for worker, said in sorted(tpu.ask(LOOK).items()):
    say(f"  {worker}: {name_state(said)}  {said.get('last', '')}")


def name_state(said) -> str:
  """Returns a worker's state in words."""
  state = said.get("state", "none")
  words = {
    "none": "nothing was started",
    "running": "running",
    "killed": "killed, or restarted",
    "0": "complete",
    "1": "cannot go on (exit code 1)",
    "2": "wrong input (exit code 2)",
    str(STOPPED): "stopped, and saved",
    str(LOST_PROCESS): "ended, because another process was lost",
  }
  return words.get(state, f"ended with exit code {state}")


def do_stop(tpu, command=()):
  """tell the run to save and end, and wait for it"""
  answers = tpu.ask(
    """cd vit-jax/logs || exit 1
touch told_to_stop
pid=$(cat pid 2>/dev/null)
kill -TERM "$pid" 2>/dev/null || say idle yes
i=0
while kill -0 "$pid" 2>/dev/null && test $i -lt 300; do
  sleep 1
  i=$((i+1))
done
kill -0 "$pid" 2>/dev/null && say slow yes
say finished yes
"""
  )
  if tpu.dry:
    return
  slow = sorted(worker for worker, said in answers.items() if "slow" in said)
  if slow:
    raise Problem(
      f"still saving after 300 s: {', '.join(slow)}; see `logs`, or `delete`"
    )
  idle = sum("idle" in said for said in answers.values())
  if idle and idle == len(answers):
    say("nothing was running")
  else:
    say("stopped; `run` the same command to go on")


def do_delete(tpu, command=()):
  """delete the TPUs and their disks; what is in buckets stays"""
  tpu.gcloud("queued-resources", "delete", tpu.name, "--force")
  say(f"{tpu.name} is deleted")


# --- watch ---


def do_watch(tpu, command):
  """create, set up, run; again after each preemption, until it is complete"""
  if tpu.dry:  # what the first round runs
    do_create(tpu)
    do_setup(tpu)
    do_run(tpu, command)
    return
  failures, losses, best = 0, 0, -1
  while True:
    outcome, step = watch_once(tpu, command)
    if outcome == COMPLETE:
      say("the run is complete; `delete` gives the TPUs back")
      return
    if outcome == TOLD:
      say("the run was told to stop; `watch` again to go on")
      return
    # Whoever gets further is not stuck, however often it is interrupted; and
    # machines that are taken away say nothing about the run.
    if step > best:
      failures, losses, best = 0, 0, step
    failures += outcome != LOST
    losses += outcome == LOST
    if failures >= len(WAITS):
      raise Problem(
        f"{failures} starts in a row got no further than step {max(best, 0)}; "
        f"the last: {outcome}; see `logs`"
      )
    wait = POLL / 20 * WAITS[min(max(failures, losses - 1), len(WAITS) - 1)]
    say(f"{outcome}, at step {max(best, 0)}; again in {wait:.0f} s")
    time.sleep(wait)


def watch_once(tpu, command):
  """Has the run going and follows it; returns (how it ended, its last step).

  Raises:
    Problem: it would end the same way again.
  """
  try:
    bring_up(tpu, command)
  except Failed as e:
    say(str(e))
    return (LOST if is_lost(tpu) else str(e)), -1
  return follow(tpu)


def bring_up(tpu, command):
  """Has the TPUs and the run on them, whatever there is now."""
  try:
    state, _ = tpu.describe()
    if is_lost(tpu):
      say(f"{tpu.name} is lost ({state}); what is left of it goes")
      do_delete(tpu)  # it would count against the quota
      raise NotThere
    if state == "ACTIVE" and is_going(tpu):
      say("it runs already")
      return
  except NotThere:
    do_create(tpu)
  do_setup(tpu)
  do_run(tpu, command)


def is_lost(tpu) -> bool:
  """Returns whether the TPUs were taken away."""
  try:
    state, _ = tpu.describe()
    nodes = {node_state for _, node_state, _ in tpu.list_nodes()}
  except NotThere:
    return True
  except Failed:
    return False  # no answer is no news
  return state in GONE or bool(nodes & NODE_GONE)


def is_going(tpu) -> bool:
  """Returns whether a command runs; where one ends, all do."""
  try:
    answers = tpu.ask(LOOK)
  except Failed:
    return False
  return any(said["state"] == "running" for said in answers.values())


def follow(tpu):
  """Looks at the run until it ends or is lost; returns as `watch_once`."""
  step, silent = -1, 0
  while True:
    time.sleep(POLL)
    try:
      answers = tpu.ask(LOOK)
      silent = 0
    except Failed as e:
      # A connection fails now and then; a machine that is gone stays so.
      silent += 1
      if is_lost(tpu):
        return LOST, step
      if silent == PATIENCE:
        raise Problem(f"no answer {PATIENCE} times in a row: {e}") from e
      continue
    steps = [said["step"].rpartition(" ")[2] for said in answers.values()]
    step = max(step, *(int(text or -1) for text in steps))
    outcome = judge(answers)
    if outcome:
      return outcome, step


def judge(answers) -> str | None:
  """Returns how a run has ended, None while it goes on.

  Raises:
    Problem: wrong input, which no restart mends.
  """
  states = {worker: said["state"] for worker, said in answers.items()}
  found = set(states.values())
  if "running" in found:
    return None  # the others will end too: vit-jax sees to that
  wrong = [worker for worker, state in states.items() if state == "2"]
  if wrong:
    raise Problem(f"wrong input on {wrong[0]}: {answers[wrong[0]]['last']}")
  if found == {"0"}:
    return COMPLETE
  if any("told_to_stop" in said for said in answers.values()):
    return TOLD
  return "; ".join(sorted({name_state(said) for said in answers.values()}))


# --- helpers ---


def git(*words) -> str:
  """Runs git in this repository; returns what it says."""
  done = subprocess.run(
    ["git", "-C", str(REPO), *words],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise Problem(f"git {words[0]}: {done.stderr.strip().splitlines()[-1]}")
  return done.stdout.strip()


def say(text):
  if not DRY:  # then only commands are printed
    print(text, flush=True)


if __name__ == "__main__":
  sys.exit(main())
