"""`data build` by Apache Beam makes what the processes of one machine make."""

import resource
import sys

import pytest
from data_build import KINDS, RUINS, build, make_files, read_all, read_report

from vit_jax.__main__ import main
from vit_jax.errors import RunStopped
from vit_jax.tools.build_data import labelled

_BEAM = "--beam_runner=DirectRunner"
_TWO = "direct_num_workers=2,direct_running_mode=multi_processing"


def _need_beam():
  """Its versions do not go with those of constraints.txt."""
  pytest.importorskip(
    "apache_beam", reason="apache-beam is not installed: run `make test-beam`"
  )


def _read(root, name):
  """Returns the sorted examples of both splits, and the report."""
  splits = [sorted(read_all(root, name, x)) for x in ("train", "test")]
  return splits, read_report(root, name)


@pytest.mark.nightly
def test_two_workers_of_beam_make_the_same_set(tmp_path):
  _need_beam()
  planted = make_files(tmp_path, images=400, tests=40, workers=2)
  build(tmp_path, "tests", "tests", "--workers=1")
  options = ("--against=tests:train", "--holdout=0.2")
  build(tmp_path, "pool", "images", "--workers=2", *options)
  build(tmp_path, "beam", "images", _BEAM, f"--beam_options={_TWO}", *options)
  splits, report = _read(tmp_path, "beam")
  assert (splits, report) == _read(tmp_path, "pool")
  ruined = {n for n, kind in planted.items() if kind in RUINS}
  copies = {n for n, kind in planted.items() if kind in KINDS}
  assert {name for name, _ in report["unreadable"]} == ruined
  assert {name for name, *_ in report["twins"]} <= copies
  assert len(report["twins"]) >= 0.9 * len(copies) > 10
  assert report["train"] + report["test"] == sum(map(len, splits)) > 350
  assert not (tmp_path / "data" / "beam" / "1.0.0" / "work").exists()


@pytest.mark.nightly
def test_a_full_disk_stops_beam(tmp_path):
  _need_beam()
  make_files(tmp_path, images=20, tests=1, workers=1)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
  try:
    with pytest.raises(RunStopped, match="nothing is kept"):
      labelled.build(
        "mine",
        images=str(tmp_path / "images"),
        labels="folders",
        data_dir=str(tmp_path / "data"),
        beam_runner="DirectRunner",
      )
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not [*(tmp_path / "data" / "mine").iterdir()]


@pytest.mark.nightly
def test_mistakes_with_beam(tmp_path, capfd):
  _need_beam()
  make_files(tmp_path, images=2, tests=1, workers=1)

  def run(runner, options=None):
    labelled.build(
      "mine",
      images=str(tmp_path / "images"),
      labels="folders",
      data_dir=str(tmp_path / "data"),
      beam_runner=runner,
      beam_options=options,
    )

  with pytest.raises(RunStopped, match="Unexpected pipeline runner: NoRunner"):
    run("NoRunner")
  with pytest.raises(SystemExit):
    run("DirectRunner", "direct_num_workers=two")
  assert "invalid int value: 'two'" in capfd.readouterr().err
  assert not [*(tmp_path / "data" / "mine").iterdir()]


def test_a_missing_beam_is_named(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  given = [f"--images={tmp_path}", "--labels=folders", _BEAM]
  assert main(["data", "build", "mine", *given]) == 2
  assert "pip install 'vit_jax[beam]'" in capsys.readouterr().err
