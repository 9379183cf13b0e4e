"""launch/: each file, as far as its own tools check it without a cloud."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import compiled
import pytest
import yaml
from tiny_runs import Process, saved_steps

REPO = Path(__file__).parents[2]
LAUNCH = REPO / "launch"


def test_shell_scripts_are_sound():
  shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
  if not shellcheck:
    pytest.skip("shellcheck is not installed: pip install -e '.[dev]'")
  subprocess.run(
    [shellcheck, LAUNCH / "tpu.sh", LAUNCH / "slurm.sbatch"], check=True
  )


# --- SkyPilot, Kubernetes ---


def read(name):
  return yaml.safe_load((LAUNCH / name).read_text())


def test_skypilot_restarts_what_may_go_on():
  task = read("sky.yaml")
  assert task["resources"]["use_spot"]
  recovery = task["resources"]["job_recovery"]
  assert recovery["recover_on_exit_codes"] == [75, 134]
  assert "train --distributed --stopped_exit_code=75" in task["run"]


def test_the_jobset_restarts_all_but_mistakes():
  spec = read("jobset.yaml")["spec"]
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  (slices,) = spec["replicatedJobs"]
  job = slices["template"]["spec"]
  assert job["completions"] == job["parallelism"]
  (mistake,) = job["podFailurePolicy"]["rules"]
  assert mistake["action"] == "FailJob"
  assert mistake["onExitCodes"]["values"] == [2]
  # 4x4 chips, on hosts that have as many as they ask for.
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  chips = container["resources"]["limits"]["google.com/tpu"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  rows, columns = map(int, topology.split("x"))
  assert rows * columns == chips * job["completions"]


def test_the_manifest_is_a_jobset_of_kubernetes_jobs():
  validator = pytest.importorskip(
    "kubernetes_validate", reason="pip install -e '.[dev]'"
  )
  jobset = read("jobset.yaml")
  # The resource definition of JobSet v1alpha2 is not in a package. It has:
  # https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert jobset["spec"].keys() == {"failurePolicy", "replicatedJobs"}
  failure = jobset["spec"]["failurePolicy"]
  assert failure.keys() == {"maxRestarts", "rules"}
  assert failure["rules"][0].keys() == {"name", "action", "onJobFailureReasons"}
  (slices,) = jobset["spec"]["replicatedJobs"]
  assert slices.keys() == {"name", "replicas", "template"}
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}}
  job |= slices["template"]
  validator.validate(job, "1.32", strict=True)
  job["spec"]["completion"] = 4
  with pytest.raises(validator.ValidationError):
    validator.validate(job, "1.32", strict=True)


# --- gcloud ---

# A cloud of two workers, whose homes are folders; ssh is bash there.
_GCLOUD = """
echo "$@" >> calls
case "$*" in
*" describe "*)
  test -f asked && echo ACTIVE || echo PROVISIONING
  touch asked ;;
*" scp "*) for w in 0 1; do mkdir -p w$w; cp "$5" w$w/vit_jax.tar.gz; done ;;
*" ssh "*)
  for word in "$@"; do
    case $word in --command=*) command=${word#--command=} ;; esac
  done
  for w in 0 1; do (cd w$w && bash -c "$command") || exit; done ;;
esac
"""
_VIT_JAX = """
printf '%s\\0' "$@" > ../words
echo start >> ../starts
test "$(wc -l < ../starts)" -lt 3 && exit 134
trap 'exit 75' TERM
sleep 60 & wait
"""


def write_script(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)


def wait_for(condition):
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.1)


@pytest.mark.ci
def test_gcloud_script_from_create_to_delete(tmp_path):
  write_script(tmp_path / "bin" / "gcloud", f"cd {tmp_path} || exit{_GCLOUD}")
  environment = {
    "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
    **{"NAME": "b16", "ZONE": "us-east5-b", "TYPE": "v6e-8", "POLL": "0"},
    "RUNTIME": "v2-alpha-tpuv6e",
  }

  def tpu(*words):
    command = ["bash", LAUNCH / "tpu.sh", *words]
    done = subprocess.run(
      command, cwd=REPO, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  assert "b16 is PROVISIONING" in tpu("create", "--spot")
  call = (tmp_path / "calls").read_text().splitlines()[0]
  assert call == (
    "compute tpus queued-resources create b16 --node-id=b16 --async "
    "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e --spot "
    "--zone=us-east5-b --quiet"
  )
  # Its packages come from elsewhere; its files are those of the commit.
  write_script(tmp_path / "bin" / "python3", 'echo "$@" >> installed')
  tpu("setup")
  homes = [tmp_path / "w0", tmp_path / "w1"]
  for home in homes:
    assert (home / "code" / "constraints.txt").exists()
    assert "--editable code[tpu,train,gcs]" in (home / "installed").read_text()
    write_script(home / "venv" / "bin" / "vit-jax", _VIT_JAX)
  odd = ['--config.a=it\'s "$HOME" `id` \\ *', "--config.b=two\nlines", ""]
  tpu("run", "train", "--workdir=gs://b/my run", *odd)
  starts = [home / "starts" for home in homes]
  # Twice another process was lost.
  wait_for(lambda: all(f.exists() and len(f.read_text()) == 18 for f in starts))
  for home in homes:
    words = (home / "words").read_text().split("\0")[:-1]
    flags = ["train", "--distributed", "--stopped_exit_code=75"]
    assert words == [*flags, "--workdir=gs://b/my run", *odd]
  time.sleep(0.5)  # for the trap
  tpu("stop")
  logs = [home / "logs" / "run.log" for home in homes]
  wait_for(lambda: all("exit code 75" in log.read_text() for log in logs))
  tpu("delete")


# --- Slurm ---

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


@pytest.fixture
def cluster(tmp_path):
  """The environment of a job: srun, scontrol and a folder to start in."""
  write_script(tmp_path / "bin" / "scontrol", 'echo "$@" >> scontrol')
  (tmp_path / ".venv" / "bin").mkdir(parents=True)
  (tmp_path / ".venv" / "bin" / "activate").touch()
  path = f"{tmp_path}/bin:/usr/bin:/bin"
  return {"PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
  ("code", "restarts", "requeued"),
  [(75, 99, True), (134, 0, True), (134, 99, False), (2, 0, False)],
)
def test_slurm_requeues_by_the_exit_code(
  code, restarts, requeued, cluster, tmp_path
):
  write_script(tmp_path / "bin" / "srun", f"exit {code}")
  cluster["SLURM_RESTART_COUNT"] = str(restarts)
  batch = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=cluster)
  assert batch.returncode == code
  assert (tmp_path / "scontrol").exists() == requeued


@pytest.mark.nightly
def test_slurm_trains_and_is_requeued_when_time_is_up(runs, cluster, tmp_path):
  write_script(tmp_path / "bin" / "srun", _SRUN)
  fork = f"{sys.executable} {REPO / 'tests' / 'forks.py'}"
  write_script(tmp_path / "bin" / "vit-jax", f'exec {fork} -m vit_jax "$@"')
  forks = "VIT_JAX_TESTS_FORKS"
  cluster |= {
    **{"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"},
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
    "--xla_backend_optimization_level=0",
    "SLURM_JOB_ID": str(find_job()),
    **{name: os.environ[name] for name in (*compiled.ENVIRONMENT, forks)},
  }
  args = runs.train_args(tmp_path / "run")[1:]

  def start():
    return Process(["bash", str(LAUNCH / "slurm.sbatch"), *args], cluster)

  batch = start()
  assert batch.wait_until(lambda: 4 in batch.steps()), batch.stderr()
  for i in range(2):  # --signal=TERM@300 tells all tasks, not the script
    os.kill(int((tmp_path / f"task{i}").read_text()), signal.SIGTERM)
  assert batch.wait() == 75
  assert 4 <= saved_steps(tmp_path / "run")[-1] < 14
  assert (tmp_path / "scontrol").read_text().startswith("requeue ")
  batch = start()
  assert batch.wait() == 0, batch.stderr()
  assert "waiting up to 300 s for all 2 processes" in batch.stderr()
  assert "the run is complete" in batch.stderr()


def find_job():
  """Returns a job number whose port, by JAX's rule, is free now."""
  for job in range(4096):
    with contextlib.closing(socket.socket()) as s:
      if s.connect_ex(("localhost", 2**16 - 2**12 + job)):
        return job
  raise AssertionError("no port is free")
