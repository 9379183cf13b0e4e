"""What preflight says of locks, folders, regions, data and disks."""

import http.server
import json
import subprocess
import sys
import threading
from collections import namedtuple

import pytest

from vit_jax import config as configuration
from vit_jax.errors import UserError
from vit_jax.tools import preflight
from vit_jax.tools.preflight import FAILED, OK, SKIPPED, WARNING, Found

_HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_no_lock(tmp_path):
  assert preflight.check_accelerator(str(tmp_path / "no")).state == OK


def test_who_holds_the_lock(tmp_path):
  lock = tmp_path / "lock"
  with subprocess.Popen(
    [sys.executable, "-c", _HOLD, lock],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as holder:
    assert holder.stdout is not None
    holder.stdout.readline()
    state, text = preflight.check_accelerator(str(lock))
    holder.communicate()
  assert state == FAILED
  assert f"in use by process {holder.pid} ({sys.executable} -c" in text
  assert f"kill {holder.pid}" in text
  # It has ended, and left the file.
  state, text = preflight.check_accelerator(str(lock))
  assert state == WARNING
  assert f"rm {lock}" in text


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
  config = configuration.load("configs/common.py")
  assert preflight.check_folder(config, str(tmp_path / "a/b"), 1).state == OK
  several = preflight.check_folder(config, str(tmp_path / "a/b"), 2)
  assert several.state == WARNING
  assert "gs://" in several.text
  assert not list(tmp_path.iterdir())
  found = preflight.check_folder(config, "/proc/run", 1)
  assert found.state == FAILED
  assert "/proc cannot be written" in found.text
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="is a file"):
    preflight.check_folder(config, str(tmp_path / "file"), 1)


@pytest.fixture
def google(monkeypatch):
  """Google's metadata and storage servers: {bucket: where it is}."""
  buckets = {}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      if self.path == "/computeMetadata/v1/instance/zone":
        assert self.headers["Metadata-Flavor"] == "Google"
        text = "projects/1/zones/europe-west4-b"
      elif self.path.endswith("/token"):
        text = json.dumps({"access_token": "secret"})
      elif (name := self.path.rpartition("/")[2]) in buckets:
        assert self.headers["Authorization"] == "Bearer secret"
        text = json.dumps(buckets[name])
      else:
        self.send_error(403)
        return
      self.send_response(200)
      self.end_headers()
      self.wfile.write(text.encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
    serve = threading.Thread(target=server.serve_forever, args=(0.02,))
    serve.start()
    address = f"localhost:{server.server_port}"
    monkeypatch.setenv("GCE_METADATA_HOST", address)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{address}")
    monkeypatch.setenv("no_proxy", "localhost")
    yield buckets
    server.shutdown()
    serve.join()


@pytest.mark.parametrize(
  ("where", "state"),
  [
    ({"location": "EUROPE-WEST4", "locationType": "region"}, OK),
    ({"location": "EU", "locationType": "multi-region"}, OK),
    ({"location": "US-CENTRAL2", "locationType": "region"}, WARNING),
    ({"location": "US", "locationType": "multi-region"}, WARNING),
    (
      {
        "location": "EU",
        "locationType": "dual-region",
        "customPlacementConfig": {
          "dataLocations": ["EUROPE-WEST1", "EUROPE-WEST4"]
        },
      },
      OK,
    ),
  ],
)
def test_regions(google, where, state):
  google["mine"] = where
  found = preflight.check_region(["gs://mine/run", "gs://mine/data"])
  assert found.state == state
  assert "this machine in europe-west4-b" in found.text


def test_regions_that_cannot_be_known(google, monkeypatch):
  found = preflight.check_region(["gs://secret/run"])
  assert found.state == WARNING
  assert "403" in found.text
  assert preflight.check_region(["/local", None]).state == SKIPPED
  monkeypatch.setenv("GCE_METADATA_HOST", "localhost:1")
  assert preflight.check_region(["gs://mine/run"]).state == WARNING


@pytest.mark.parametrize(
  ("gib", "state"), [(100, OK), (5, WARNING), (0.5, FAILED)]
)
def test_disks(monkeypatch, gib, state):
  usage = namedtuple("Usage", "free")(gib * 2**30)
  monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
  assert preflight.check_disk("gs://b/run").state == state


def test_the_worst_of_all_hosts_is_shown_with_its_hosts():
  good, bad = Found(OK, "fine"), Found(FAILED, "no such set")
  merged = preflight.merge([("a", {"data": good}), ("b", {"data": bad})])
  assert merged == {"data": Found(FAILED, "b: no such set")}
  # JSON has no tuples' names; that is how others' findings arrive.
  merged = preflight.merge([("a", {"data": good}), ("b", {"data": [*good]})])
  assert merged == {"data": good}


def test_hosts_with_fewer_chips():
  facts = [{"host": name, "chips": n} for name, n in (("a", 4), ("b", 3))]
  found = preflight.check_hosts(facts, 2)
  assert found.state == FAILED
  assert "a 4, b 3" in found.text


def test_a_plan_that_does_not_fit(monkeypatch):
  plan = {"fits": False, "fallback": {"model.remat": "full"}}
  done = subprocess.CompletedProcess([], 0, json.dumps(plan), "")
  monkeypatch.setattr(preflight.subprocess, "run", lambda *_, **__: done)
  found, _ = preflight.ask_plan("c.py", {"fsdp": "2"}, "v5e:4x4")
  assert found == plan
  found = preflight.check_memory(plan, "v5e:4x4")
  assert found.state == FAILED
  assert "--config.model.remat=full" in found.text
  nothing, why = preflight.ask_plan("c.py", None, None)
  assert nothing is None
  assert why.state == SKIPPED


def test_the_slowest_host_sets_the_pace_of_the_input():
  hosts = [{"images_per_second": x} for x in (1000.0, 900.0)]
  plan = {"fits": True, "images_per_second_per_chip": 100, "chips": 16}
  found = preflight.check_input(hosts, plan)
  assert found.state == OK
  assert found.text.startswith(
    "1,800 images/s from 2 hosts; the step takes 1,6"
  )
  found = preflight.check_input(hosts, plan | {"chips": 20})
  assert found.state == WARNING
  assert "chips will wait" in found.text
  for nothing in (None, {"fits": False}):
    assert preflight.check_input(hosts, nothing).state == OK
  unknown = [*hosts, {"images_per_second": None}]
  assert preflight.check_input(unknown, plan).state == SKIPPED


def test_without_data_there_is_no_input():
  config = configuration.load("configs/common.py", {"train.dataset": "no"})
  assert preflight.measure_input(config) is None
