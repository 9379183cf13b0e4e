"""A mock of Google's gcloud: the part of it that launch/tpu.py uses.

The cloud is a folder, $FAKE_CLOUD: `state` is that of the request (no file: no
request), `nodes` lists "NODE STATE" a line, `workers/NAME` are the homes of the
machines, `errors/COMMAND` is what a command fails with, `calls` is what was
called. A remote command is run by a real shell in every worker's home.

`call` is `python fake_gcloud.py ...` without the process.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

CLOUD = pathlib.Path()
HOMES = pathlib.Path()


def call(argv):
  """Returns the subprocess.CompletedProcess of `gcloud ARGV`."""
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      try:
        main(argv)
      except SystemExit as e:
        code = e.code
    out.seek(0)
    err.seek(0)
    return subprocess.CompletedProcess(argv, code, out.read(), err.read())


def main(argv):
  """Does what `gcloud ARGV` would."""
  global CLOUD, HOMES
  CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])
  HOMES = CLOUD / "workers"
  with (CLOUD / "calls").open("a") as file:
    file.write(json.dumps(argv) + "\n")
  assert argv[:2] == ["compute", "tpus"]
  group, command = argv[2:4]
  assert group in ("queued-resources", "tpu-vm")
  flags = dict(
    word[2:].partition("=")[::2] for word in argv[4:] if word.startswith("--")
  )
  names = [word for word in argv[4:] if not word.startswith("--")]
  assert flags["zone"]
  assert "quiet" in flags
  error = CLOUD / "errors" / command
  if error.exists():
    fail(error.read_text())
  name = names[-1].partition(":")[0] if names else None
  return globals()[f"play_{command}"](name, flags, names)


def fail(text):
  sys.stderr.write(f"{text}\n")
  sys.exit(1)


def find(name):
  if not (CLOUD / "state").exists():
    fail(
      "ERROR: (gcloud.compute.tpus.queued-resources) NOT_FOUND: Resource "
      f"'projects/p/locations/z/queuedResources/{name}' was not found"
    )


def play_create(name, flags, _):
  if (CLOUD / "state").exists():
    fail("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS")
  count = int(flags.get("node-count", 1))
  nodes = [flags["node-id"]] if "node-id" in flags else None
  nodes = nodes or [f"{flags['node-prefix']}-{i}" for i in range(count)]
  (CLOUD / "nodes").write_text("".join(f"{node} READY\n" for node in nodes))
  for node in nodes:
    for i in range(2):
      make_worker(f"{node}-w-{i}")
  (CLOUD / "state").write_text("WAITING_FOR_RESOURCES ACTIVE")


def make_worker(worker):
  """Makes a machine: a home with a `hostname`, a `uv` and a `setup` of ours."""
  (HOMES / worker / "bin").mkdir(parents=True)
  for name in ("hostname", "uv"):
    file = HOMES / worker / "bin" / name
    file.write_text((CLOUD / "machine" / name).read_text())
    file.chmod(0o755)


def play_describe(name, *_):
  find(name)
  states = (CLOUD / "state").read_text().split()
  if len(states) > 1:  # one look later it is the next one
    (CLOUD / "state").write_text(" ".join(states[1:]))
  state = {"state": states[0]}
  why = CLOUD / "why"
  if states[0] == "FAILED" and why.exists():
    state["failedData"] = {"error": {"message": why.read_text()}}
  print(json.dumps({"name": f"projects/p/{name}", "state": state}))


def play_list(*_):
  nodes = [{"name": "projects/p/locations/z/nodes/other", "state": "READY"}]
  if (CLOUD / "nodes").exists():
    for line in (CLOUD / "nodes").read_text().splitlines():
      node, state = line.split()
      workers = [h for h in HOMES.glob("*") if h.name.startswith(f"{node}-w-")]
      nodes.append(
        {
          "name": f"projects/p/locations/z/nodes/{node}",
          "state": state,
          "queuedResource": "projects/p/locations/z/queuedResources/pod",
          "networkEndpoints": [{"ipAddress": "10.0.0.1"} for _ in workers],
        }
      )
  print(json.dumps(nodes))


def play_delete(name, flags, _):
  find(name)
  assert "force" in flags
  for file in HOMES.glob("*/vit-jax/logs/pid"):
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(file.read_text()), signal.SIGKILL)
  shutil.rmtree(HOMES, ignore_errors=True)
  for file in ("state", "nodes"):
    (CLOUD / file).unlink(missing_ok=True)


def play_scp(_, flags, names):
  source, target = names
  assert (flags["node"], flags["worker"]) == ("all", "all")
  for home in HOMES.glob("*"):
    shutil.copy(source, home / target.partition(":")[2])


def play_ssh(name, flags, _):
  find(name)
  state = (CLOUD / "state").read_text()
  if state != "ACTIVE":
    fail(f"ERROR: (gcloud.compute.tpus.queued-resources.ssh) it is {state}")
  homes = sorted(HOMES.glob("*"))
  if flags["worker"] == "0":
    homes = homes[:1]
  result = 0
  for i, home in enumerate(homes):
    if (home / "broken").exists():
      code = 255
    else:
      code = subprocess.run(
        ["sh", "-c", flags["command"]],
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=sys.stdout,
        stderr=sys.stderr,
        env={
          "HOME": str(home),
          "PATH": f"{home}/bin:{os.environ['PATH']}",
          "FAKE_CLOUD": str(CLOUD),
          "WORKER": home.name,
        },
        check=False,
      ).returncode
    if code:
      sys.stderr.write(
        f"##### Command execution on worker {i} failed with exit status "
        f"{code}. Continuing.\n"
      )
      result = code
  sys.exit(result)


if __name__ == "__main__":
  main(sys.argv[1:])
