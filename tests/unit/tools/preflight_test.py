"""What preflight says of chips, folders, data and plans."""

import json
import subprocess

import pytest

from vit_jax import config as configuration
from vit_jax.errors import UserError
from vit_jax.tools import preflight
from vit_jax.tools.preflight import FAILED, OK, SKIPPED, WARNING, Found


def test_chips_that_another_process_has(monkeypatch):
  assert preflight.check_accelerator().text == "8 x cpu"
  monkeypatch.setattr(preflight.glob, "glob", lambda _: ["/dev/vfio/0"])
  assert preflight.check_accelerator().state == OK  # JAX_PLATFORMS=cpu
  monkeypatch.delenv("JAX_PLATFORMS")
  assert preflight.check_accelerator().state == FAILED


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
  config = configuration.load("configs/common.py")
  folder = str(tmp_path / "a/b")
  assert preflight.check_folder(config, folder).state == OK
  monkeypatch.setattr(preflight.jax, "process_count", lambda: 2)
  assert preflight.check_folder(config, folder).state == WARNING
  assert not list(tmp_path.iterdir())
  found = preflight.check_folder(config, "/proc/run")
  assert found.state == FAILED
  assert "/proc cannot be written" in found.text
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="is a file"):
    preflight.check_folder(config, str(tmp_path / "file"))


def test_the_worst_of_all_hosts_is_shown_with_its_hosts():
  good, bad = Found(OK, "fine"), Found(FAILED, "no such set")
  merged = preflight.merge([("a", {"data": good}), ("b", {"data": bad})])
  assert merged == {"data": Found(FAILED, "b: no such set")}
  # JSON has no tuples' names; that is how others' findings arrive.
  merged = preflight.merge([("a", {"data": good}), ("b", {"data": [*good]})])
  assert merged == {"data": good}


def test_hosts_have_to_be_alike():
  each = [(h, {"versions": Found(OK, x)}) for h, x in (("a", "4"), ("b", "3"))]
  assert preflight.merge(each) == {"versions": Found(FAILED, "a: 4; b: 3")}


def test_a_plan_that_does_not_fit(monkeypatch):
  plan = {"fits": False, "fallback": {"model.remat": "full"}}
  done = subprocess.CompletedProcess([], 0, json.dumps(plan), "")
  monkeypatch.setattr(preflight.subprocess, "run", lambda *_, **__: done)
  _, found = preflight.check_plan("c.py", {"fsdp": "2"}, "v5e:4x4")
  assert found.state == FAILED
  assert "--config.model.remat=full" in found.text
  nothing, why = preflight.check_plan("c.py", None, None)
  assert nothing is None
  assert why.state == SKIPPED


def test_the_slowest_host_sets_the_pace_of_the_input():
  plan = {"images_per_second_per_chip": 100, "chips": 16}
  found = preflight.check_input([1000, 900], plan)
  assert found.state == OK
  assert found.text.startswith(
    "1,800 images/s from 2 hosts; the step takes 1,6"
  )
  assert preflight.check_input([1000, 900], plan | {"chips": 20})[0] == WARNING
  assert preflight.check_input([1000, 900], None).state == OK
  assert preflight.check_input([1000, 0], plan).state == SKIPPED


def test_a_check_that_breaks_has_failed():
  config = configuration.load("configs/common.py", {"train.dataset": "no"})
  found = preflight._try(lambda: preflight.check_data(config))
  assert found.state == FAILED
  assert found.rate == 0
