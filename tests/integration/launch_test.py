"""launch/: every command, against a cloud that is a folder; the manifests."""

import contextlib
import importlib.util
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import compiled
import fake_gcloud
import pytest
import yaml
from tiny_runs import Process, find_port, saved_steps

REPO = Path(__file__).parents[2]
TPU = REPO / "launch" / "tpu.py"
_SPEC = importlib.util.spec_from_file_location("tpu", TPU)
tpu = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tpu)
_FORKS = "VIT_JAX_TESTS_FORKS"  # the address of forks.py's server

# A worker's tools. `uv` makes an environment whose vit-jax does as the test
# says; its python is this one and imports what was sent.
_HOSTNAME = '#!/bin/sh\necho "$WORKER"\n'
_UV = f"""#!/bin/sh
echo "uv $*" >> "$HOME/installed"
test "$1" = venv || exit 0
mkdir -p venv/bin
cat > venv/bin/python <<'END'
#!/bin/sh
test -f "$HOME/old" && {{ echo python 2.7; exit; }}
PYTHONPATH="$HOME/vit-jax/code" exec {sys.executable} "$@"
END
cat > venv/bin/vit-jax <<'END'
#!/bin/sh
if test "$1" = preflight; then
  printf '%s\\0' "$@" > "$HOME/preflight"
  echo "data failed: no such"
  exit "$(cat "$HOME/preflight_code" 2>/dev/null || echo 0)"
fi
printf '%s\\0' "$@" > "$HOME/started"
starts=$(cat "$FAKE_CLOUD/$WORKER" 2>/dev/null || echo 0)
starts=$((starts + 1))
echo "$starts" > "$FAKE_CLOUD/$WORKER"
. "$FAKE_CLOUD/run"
END
chmod +x venv/bin/*
"""


def _run(command, *, run=subprocess.run, **kwargs):
  if command[0] != "gcloud":
    return run(command, **kwargs)
  if not shutil.which("gcloud", path=os.environ["PATH"]):
    raise FileNotFoundError
  return fake_gcloud.call(command[1:])


class Cloud:
  """A cloud and a laptop that uses it."""

  def __init__(self, folder):
    self.folder = folder / "cloud"
    for name in ("machine", "errors", "workers"):
      (self.folder / name).mkdir(parents=True, exist_ok=True)
    (self.folder / "machine" / "hostname").write_text(_HOSTNAME)
    (self.folder / "machine" / "uv").write_text(_UV)
    gcloud = folder / "bin" / "gcloud"
    gcloud.parent.mkdir(exist_ok=True)
    fake = REPO / "tests" / "fake_gcloud.py"
    gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {fake} "$@"\n')
    gcloud.chmod(0o755)
    self.environment = {
      "PATH": f"{gcloud.parent}:/usr/bin:/bin",
      "HOME": str(folder),
      "FAKE_CLOUD": str(self.folder),
      "VIT_JAX_TPU": "pod",
      "VIT_JAX_ZONE": "us-east5-b",
      "VIT_JAX_TYPE": "v6e-8",
      "VIT_JAX_POLL": "0.05",
    }

  def runs(self, script):
    """Says what vit-jax does on a worker: $WORKER, for the $starts-th time."""
    (self.folder / "run").write_text(script)

  def call(self, *words, env=None):
    """Runs launch/tpu.py in this process; gcloud is a function."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
      for name, text in (self.environment | (env or {})).items():
        patch.setenv(name, text)
      patch.setattr(tpu.subprocess, "run", _run)
      patch.setattr(tpu, "POLL", 0.05)
      patch.setattr(sys, "stdout", out)
      patch.setattr(sys, "stderr", err)
      code = tpu.main(list(words))
    return subprocess.CompletedProcess(
      words, code, out.getvalue(), err.getvalue()
    )

  def start(self, *words):
    """Starts launch/tpu.py; what it says is to be read."""
    return subprocess.Popen(
      [sys.executable, "-S", "-E", TPU, *words],
      env=self.environment,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def do(self, *words):
    """Runs launch/tpu.py, which ends well; returns what it says."""
    done = self.call(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  def fails(self, *words, **kwargs):
    """Runs launch/tpu.py, which fails; returns its one line on stderr."""
    done = self.call(*words, **kwargs)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line

  def calls(self):
    """Returns the gcloud commands so far, without what all have."""
    lines = (self.folder / "calls").read_text().splitlines()
    return [json.loads(line)[2:] for line in lines]

  def worker(self, name):
    return self.folder / "workers" / name

  def read_words(self, worker, file):
    """Returns the arguments that a worker's vit-jax was called with."""
    end = time.monotonic() + 10
    path = self.worker(worker) / file
    while not path.exists() or not path.read_bytes().endswith(b"\0"):
      assert time.monotonic() < end
      time.sleep(0.01)
    return path.read_text().split("\0")[:-1]


@contextlib.contextmanager
def _closing(cloud):
  """Ends what runs on the workers."""
  cloud.runs("exec sleep 60")
  yield cloud
  for file in cloud.folder.glob("workers/*/vit-jax/logs/pid"):
    with contextlib.suppress(ProcessLookupError, ValueError):
      os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
  with _closing(Cloud(tmp_path)) as cloud:
    yield cloud


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A folder with a pod of two workers, and what their setup printed."""
  folder = tmp_path_factory.mktemp("prepared")
  cloud = Cloud(folder)
  cloud.do("create")
  return folder, cloud.do("setup")


@pytest.fixture
def pod(prepared, tmp_path):
  """A pod of two workers that are set up."""
  # The code was there; vit-jax is a script of the environment beside it.
  shutil.copytree(
    prepared[0],
    tmp_path / "pod",
    ignore=lambda folder, names: names if folder.endswith("/code") else (),
  )
  with _closing(Cloud(tmp_path / "pod")) as pod:
    yield pod


TRAIN = ("--", "train", "--config=c.py", "--workdir=gs://b/my run")


# --- create, setup ---


def test_create_waits_until_the_machines_are_there(cloud):
  out = cloud.do("create", "--spot", "--project=p")
  assert "pod: WAITING_FOR_RESOURCES" in out
  assert out.endswith("pod: ACTIVE\n")
  assert cloud.calls()[0] == [
    "queued-resources",
    "create",
    "pod",
    "--accelerator-type=v6e-8",
    "--runtime-version=v2-alpha-tpuv6e",
    "--node-id=pod",
    "--spot",
    "--async",
    "--zone=us-east5-b",
    "--project=p",
    "--quiet",
  ]


def test_create_several_slices(cloud):
  cloud.do("create", "--slices=2", "--type=v4-16")
  call = cloud.calls()[0]
  assert {"--node-count=2", "--node-prefix=pod"} <= set(call)
  assert "--runtime-version=tpu-ubuntu2204-base" in call
  assert not any(word.startswith(("--node-id", "--spot")) for word in call)
  assert len(list((cloud.folder / "workers").iterdir())) == 4
  assert "pod-1: READY, 2 workers" in cloud.do("status")


def test_setup_brings_the_same_commit_and_constraints_everywhere(prepared):
  folder, out = prepared
  for worker in ("pod-w-0", "pod-w-1"):
    home = folder / "cloud" / "workers" / worker
    code = home / "vit-jax" / "code"
    sent = (code / "constraints.txt").read_text()
    committed = subprocess.run(
      ["git", "-C", REPO, "show", "HEAD:constraints.txt"],
      capture_output=True,
      text=True,
      check=True,
    )
    assert sent == committed.stdout
    assert f"{worker}: python 3" in out
    installed = (home / "installed").read_text().splitlines()
    assert installed[0] == "uv venv --quiet --python 3.12 venv"
    assert "--constraint code/constraints.txt" in installed[1]
    assert installed[1].endswith("--editable ./code[tpu,train]")


@pytest.mark.ci
def test_setup_refuses_different_versions(pod):
  (pod.worker("pod-w-1") / "old").touch()
  line = pod.fails("setup")
  assert "versions differ: pod-w-" in line


@pytest.mark.ci
def test_a_worker_that_does_not_answer(pod):
  (pod.worker("pod-w-1") / "broken").touch()
  for command in (["setup"], ["status"], ["stop"], ["run", *TRAIN]):
    line = pod.fails(*command)
    assert "saw 1 of 2 workers (pod-w-0)" in line
    assert "worker 1 (exit code 255)" in line


# --- run, logs, status, stop ---


def test_arguments_arrive_as_they_were_typed(pod):
  odd = ['--config.a=it\'s "$HOME" `id` \\ *', "--config.b=two\nlines", ""]
  out = pod.do("run", *TRAIN, *odd)
  assert "started on 2 workers" in out
  given = ["--config=c.py", "--workdir=gs://b/my run", *odd]
  for worker in ("pod-w-0", "pod-w-1"):
    words = pod.read_words(worker, "started")
    assert words == [
      "train",
      "--stopped_exit_code=75",
      "--distributed",
      *given,
    ]
    checked = pod.read_words(worker, "preflight")
    assert checked == ["preflight", "--hosts=2", "--distributed", *given]


def test_a_run_from_beginning_to_end(pod):
  pod.runs('echo "step 3/9 loss"; trap "exit 75" TERM; sleep 60 & wait')
  pod.do("run", *TRAIN)
  assert "pod-w-1: running" in wait_for(pod, "step 3/9")
  assert "runs already on pod-w-0, pod-w-1" in pod.fails("run", *TRAIN)
  assert "runs already" in pod.fails("setup")
  logs = pod.worker("pod-w-0") / "vit-jax" / "logs"
  assert (logs / "b-my-run.log").read_text() == "step 3/9 loss\n"
  assert pod.do("stop").startswith("stopped;")
  assert pod.do("status").count("stopped, and saved") == 2
  assert "nothing was running" in pod.do("stop")
  assert "pod is deleted" in pod.do("delete")
  assert pod.calls()[-1][:4] == ["queued-resources", "delete", "pod", "--force"]


def wait_for(pod, text):
  end = time.monotonic() + 20
  while text not in (out := pod.do("status")):
    assert time.monotonic() < end, out
  return out


def test_logs_follow_worker_0(pod):
  pod.runs('echo "hello from $WORKER"')
  pod.do("run", "--no-preflight", *TRAIN)
  process = pod.start("logs")
  try:
    assert process.stdout.readline() == "hello from pod-w-0\n"
  finally:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_preflight_that_fails_starts_nothing(pod):
  (pod.worker("pod-w-1") / "preflight_code").write_text("2")
  done = pod.call("run", *TRAIN)
  assert "data failed: no such" in done.stdout
  assert "the preflight failed" in done.stderr
  assert not list(pod.folder.glob("workers/*/started"))
  assert "started on 2" in pod.do("run", "--no-preflight", *TRAIN)


# --- watch ---


def test_watch_goes_on_after_preemption_until_it_is_complete(cloud):
  cloud.runs(
    'test "$starts" = 2 && { echo "step 9/9"; exit 0; }\n'
    'echo "step 5/9"\n'
    'test "$WORKER" = pod-w-0 && echo SUSPENDED > "$FAKE_CLOUD/state"\n'
    "exec sleep 60\n"
  )
  out = cloud.do("watch", "--spot", *TRAIN)
  assert "pod is lost (SUSPENDED)" in out
  assert out.endswith("complete; `delete` gives the TPUs back\n")
  done = [call[1] for call in cloud.calls()]
  assert [c for c in done if c in ("create", "scp", "delete")] == [
    "create",
    "scp",
    "delete",
    "create",
    "scp",
  ]
  # The same command, which resumes by itself.
  assert "--workdir=gs://b/my run" in cloud.read_words("pod-w-1", "started")


@pytest.mark.ci
def test_watch_sees_a_preempted_machine_of_an_active_request(pod):
  pod.runs(
    'test "$starts" = 2 && exit 0\n'
    'test "$WORKER" = pod-w-0 && touch "$HOME/broken" && '
    'echo pod PREEMPTED > "$FAKE_CLOUD/nodes"\n'
    "exec sleep 60\n"
  )
  out = pod.do("watch", *TRAIN)
  assert "pod is lost (ACTIVE)" in out
  assert "the run is complete" in out


@pytest.mark.ci
def test_watch_gives_up_on_a_run_that_gets_no_further(pod):
  pod.runs('echo "step 5/9"; echo "loss is nan" ; exit 1')
  line = pod.fails("watch", *TRAIN)
  assert "4 starts in a row got no further than step 5" in line
  assert "cannot go on (exit code 1)" in line
  assert (pod.folder / "pod-w-0").read_text() == "4\n"


@pytest.mark.ci
def test_watch_starts_again_what_gets_further(pod):
  pod.runs('test "$starts" = 6 && exit 0\necho "step $starts/9"; exit 1')
  assert "complete" in pod.do("watch", *TRAIN, "--x")
  assert (pod.folder / "pod-w-1").read_text() == "6\n"


@pytest.mark.ci
def test_watch_does_not_repeat_a_mistake(pod):
  pod.runs('echo "error: no such data set"; exit 2')
  line = pod.fails("watch", *TRAIN)
  assert "wrong input on pod-w-" in line
  assert "no such data set" in line
  assert (pod.folder / "pod-w-0").read_text() == "1\n"


@pytest.mark.ci
def test_watch_ends_when_the_run_is_told_to_stop(pod):
  pod.runs('touch "$HOME/vit-jax/logs/told_to_stop"; exit 75')
  assert "told to stop" in pod.do("watch", *TRAIN)


@pytest.mark.ci
def test_watch_stops_at_a_preflight_that_finds_a_mistake(pod):
  (pod.worker("pod-w-0") / "preflight_code").write_text("2")
  assert "preflight failed" in pod.fails("watch", *TRAIN)


@pytest.mark.ci
def test_watch_follows_a_run_that_goes_on_already(pod):
  pod.runs('until test -e "$FAKE_CLOUD/enough"; do sleep 0.05; done')
  pod.do("run", *TRAIN)
  with pod.start("watch", *TRAIN) as watch:
    assert watch.stdout.readline() == "it runs already\n"
    (pod.folder / "enough").touch()
    assert watch.communicate(timeout=60)[0].startswith("the run is complete")


# --- what gcloud says ---


@pytest.mark.parametrize(
  ("error", "advice"),
  [
    (
      "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptible"
      "PerProjectPerRegion' has been exceeded. Limit: 0 in region us-east5.",
      "ask for more",
    ),
    (
      "ERROR: (gcloud) You do not currently have an active account selected.\n"
      "Please run:\n  $ gcloud auth login",
      "run: gcloud auth login",
    ),
    (
      "ERROR: (gcloud) The required property [project] is not currently set.",
      "VIT_JAX_PROJECT",
    ),
    (
      "ERROR: (gcloud) PERMISSION_DENIED: Permission denied on "
      "'locations/us-mars1-a' (or it may not exist).",
      "no such zone",
    ),
    (
      "ERROR: (gcloud) PERMISSION_DENIED: Cloud TPU API has not been used in "
      "project 1 before or it is disabled.",
      "services enable tpu.googleapis.com",
    ),
    (
      "ERROR: (gcloud) INVALID_ARGUMENT: Accelerator type v6e-9 not found.",
      "accelerator-types list",
    ),
  ],
)
def test_what_is_said_about_errors(cloud, error, advice):
  (cloud.folder / "errors" / "create").write_text(error)
  line = cloud.fails("create")
  assert advice in line
  assert error.splitlines()[0] in line


@pytest.mark.ci
def test_watch_does_not_ask_again_for_what_there_is_no_quota_for(cloud):
  (cloud.folder / "errors" / "create").write_text("ERROR: Quota exceeded")
  assert "ask for more" in cloud.fails("watch", *TRAIN)
  assert [call[1] for call in cloud.calls()] == ["describe", "create"]


def test_a_name_that_is_taken(pod):
  assert "the name is taken" in pod.fails("create")


def test_a_request_that_failed(pod):
  (pod.folder / "state").write_text("FAILED")
  (pod.folder / "why").write_text("Quota 'TPUV6E' exhausted.")
  line = pod.fails("setup")
  assert "pod is FAILED: Quota 'TPUV6E' exhausted.; the quota is" in line


def test_nothing_there(cloud):
  for command in (["setup"], ["status"], ["stop"], ["delete"]):
    assert "`create` it" in cloud.fails(*command)


def test_no_gcloud(cloud):
  line = cloud.fails("status", env={"PATH": "/nowhere"})
  assert "https://cloud.google.com/sdk" in line


@pytest.mark.parametrize(
  ("words", "env", "message"),
  [
    (["create"], {"VIT_JAX_TYPE": ""}, "give --type="),
    (["create", "--type=h100-8"], {}, "give --runtime-version"),
    (["status"], {"VIT_JAX_ZONE": ""}, "VIT_JAX_ZONE"),
    (["run"], {}, "after --"),
    (["status", "--", "train"], {}, "status takes no command"),
    (["setup", "--commit=nosuch"], {}, "git rev-parse"),
  ],
)
def test_wrong_arguments(pod, words, env, message):
  assert message in pod.fails(*words, env=env)


# --- dry runs ---


def test_dry_runs_print_commands_and_run_nothing(cloud):
  for command in ("create", "setup", "logs", "status", "stop", "delete"):
    out = cloud.do(command, "--dry-run")
    assert out.startswith(("gcloud compute tpus ", "git -C "))
  cloud.do("watch", "--dry-run", *TRAIN)
  assert not (cloud.folder / "calls").exists()


@pytest.mark.ci
def test_what_a_dry_run_prints_can_be_pasted(cloud):
  out = cloud.do("watch", "--dry-run", "--slices=2", *TRAIN, "--a=it's $1\n2")
  # What is printed is what a shell would run: pasted, it does the same.
  (pasted := cloud.folder.parent / "pasted.sh").write_text(f"set -e\n{out}")
  archive = shlex.split(out[out.index("--output=") :])[0].partition("=")[2]
  subprocess.run(
    ["sh", pasted], env=cloud.environment, capture_output=True, check=True
  )
  Path(archive).unlink()
  assert len(list(cloud.folder.glob("workers/*/vit-jax/code/setup.py"))) == 4
  words = cloud.read_words("pod-1-w-1", "started")
  assert words[-1] == "--a=it's $1\n2"


# --- shell ---


def test_scripts_for_workers_are_sound(cloud):
  shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
  if not shellcheck:
    pytest.skip("shellcheck is not installed: pip install -e '.[dev]'")
  files = [REPO / "launch" / "slurm.sbatch"]
  out = cloud.do("watch", "--dry-run", *TRAIN) + cloud.do("stop", "--dry-run")
  scripts = [
    word.partition("=")[2]
    for word in shlex.split(out)
    if word.startswith("--command=")
  ]
  assert len(scripts) == 6
  for i, script in enumerate(scripts):
    file = cloud.folder / f"{i}.sh"
    file.write_text(f"#!/bin/sh\n{script}")
    files.append(file)
  done = subprocess.run(
    [shellcheck, *files], capture_output=True, text=True, check=False
  )
  assert not done.stdout


# --- Slurm and Kubernetes: two processes, started as the manifest says ---


@pytest.fixture
def machine(fork_server, tmp_path):
  """The environment of a machine whose PATH has a vit-jax."""
  (tmp_path / "bin").mkdir()
  fork = f"{sys.executable} {REPO / 'tests' / 'forks.py'}"
  write_script(tmp_path / "bin" / "vit-jax", f'exec {fork} -m vit_jax "$@"')
  return {
    "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
    "PYTHONPATH": str(REPO),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
    "--xla_backend_optimization_level=0",
    **{name: os.environ[name] for name in (*compiled.ENVIRONMENT, _FORKS)},
  }


@pytest.fixture
def config(runs, tmp_path):
  """A configuration file that says where the data is."""
  shutil.copytree(runs.config.parent, tmp_path / "configs")
  file = tmp_path / "configs" / "with_data.py"
  file.write_text(
    "from tiny_config import get_config as get_tiny_config\n"
    "def get_config():\n"
    "  config = get_tiny_config()\n"
    f"  config.data_dir = {str(runs.data_dir)!r}\n"
    "  return config\n"
  )
  return file


def write_script(path, text):
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)


def read_manifest():
  """Returns the Service and the Job."""
  text = (REPO / "launch" / "kubernetes.yaml").read_text()
  service, job = yaml.safe_load_all(text)
  assert (service["kind"], job["kind"]) == ("Service", "Job")
  return service, job["spec"], job["metadata"]["name"]


def test_the_pods_of_the_manifest_find_each_other():
  service, spec, name = read_manifest()
  pod = spec["template"]["spec"]
  assert service["spec"]["clusterIP"] == "None"
  assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
  assert pod["subdomain"] == service["metadata"]["name"]
  (container,) = pod["containers"]
  environment = {e["name"]: e["value"] for e in container["env"]}
  # An indexed Job names its pods so.
  host = f"{name}-0.{pod['subdomain']}"
  assert environment["COORDINATOR"].partition(":")[0] == host
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"]
  assert environment["PROCESSES"] == str(spec["completions"])
  rules = spec["podFailurePolicy"]["rules"]
  codes = {r["action"]: r["onExitCodes"]["values"] for r in rules[:2]}
  assert codes == {"FailJob": [2], "Ignore": [69, 75]}
  assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for


@pytest.mark.nightly  # as with Slurm
def test_kubernetes_pods_train_stop_and_go_on(config, machine, tmp_path):
  _, spec, _ = read_manifest()
  (container,) = spec["template"]["spec"]["containers"]

  def start():
    port = find_port()
    return [
      Process(
        [*container["command"], *container["args"]],
        {e["name"]: e["value"] for e in container["env"]}
        | machine
        | {
          "CONFIG": str(config),
          "WORKDIR": str(tmp_path / "run"),
          "COORDINATOR": f"localhost:{port}",
          "JOB_COMPLETION_INDEX": str(i),
        },
      )
      for i in range(spec["completions"])
    ]

  pods = start()
  assert pods[0].wait_until(lambda: 4 in pods[0].steps()), pods[0].stderr()
  pods[1].send(signal.SIGTERM)  # as when its machine is drained
  assert [pod.wait() for pod in pods] == [75, 75]
  stopped = saved_steps(tmp_path / "run")[-1]
  assert 4 <= stopped < 14
  pods = start()
  assert [pod.wait() for pod in pods] == [0, 0], pods[0].stderr()
  assert min(pods[0].steps()) == stopped + 1
  assert "the run is complete" in pods[0].stderr()


# `srun`: a process for each task, with Slurm's variables.
_SRUN = """\
for i in 0 1; do
  SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 \\
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  echo $! > task$i
done
wait "$(cat task0)"; first=$?
wait "$(cat task1)" || exit
exit $first
"""


@pytest.mark.ci
def test_slurm_trains_and_is_requeued_when_time_is_up(
  config, machine, tmp_path
):
  write_script(tmp_path / "bin" / "srun", _SRUN)
  write_script(tmp_path / "bin" / "scontrol", 'echo "$@" >> scontrol')
  (tmp_path / ".venv" / "bin").mkdir(parents=True)
  (tmp_path / ".venv" / "bin" / "activate").touch()
  job = find_job()

  def start():
    return Process(
      [
        "bash",
        str(REPO / "launch" / "slurm.sbatch"),
        f"--config={config}",
        f"--workdir={tmp_path}/run",
      ],
      machine | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": str(job)},
    )

  batch = start()
  assert batch.wait_until(lambda: 4 in batch.steps()), batch.stderr()
  for i in range(2):  # --signal=TERM@300 tells all tasks, not the script
    os.kill(int((tmp_path / f"task{i}").read_text()), signal.SIGTERM)
  assert batch.wait() == 75
  assert (tmp_path / "scontrol").read_text() == f"requeue {job}\n"
  batch = start()
  assert batch.wait() == 0, batch.stderr()
  assert "the run is complete" in batch.stderr()
  assert len((tmp_path / "scontrol").read_text().splitlines()) == 1


def find_job():
  """Returns a job number whose port, by JAX's rule, is free now."""
  for job in range(4096):
    with contextlib.closing(socket.socket()) as s:
      if s.connect_ex(("localhost", 2**16 - 2**12 + job)):
        return job
  raise AssertionError("no port is free")
