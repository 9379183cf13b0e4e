"""Copies of a folder at each moment of a program: none is missing."""

import os
import shutil
import threading

import crashes


def _read(folder):
  return {
    str(path.relative_to(folder)): path.read_text()
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_every_operation_has_its_moment(tmp_path):
  folder = tmp_path / "run"
  with crashes.watch(folder, tmp_path / "copies") as moments:
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.tmp").write_text("whole")
    (folder / "a" / "x.tmp").replace(folder / "a" / "x")
    with (folder / "log").open("a") as log:
      log.write("0123")
      log.flush()
      (folder / "a" / "y").touch()
      log.write("4567")
    os.truncate(folder / "log", 5)
    shutil.rmtree(folder / "a")  # by descriptors of folders
    (tmp_path / "elsewhere").touch()
    (folder / "log").read_text()
  (folder / "later").touch()  # is not watched
  assert [(*moment.next, _read(moment.folder)) for moment in moments] == [
    ("os.mkdir a", {}),
    ("open a/x.tmp", {}),
    ("write a/x.tmp", {"a/x.tmp": "wh"}),
    ("os.rename a/x.tmp a/x", {"a/x.tmp": "whole"}),
    ("open log", {"a/x": "whole"}),
    ("write log", {"a/x": "whole", "log": "01"}),
    ("open a/y", {"a/x": "whole", "log": "0123"}),
    ("write log", {"a/x": "whole", "log": "012345"}),
    ("os.truncate log", {"a/x": "whole", "a/y": "", "log": "01234567"}),
    ("os.remove a/x", {"a/x": "whole", "a/y": "", "log": "01234"}),
    ("os.remove a/y", {"a/y": "", "log": "01234"}),
    ("os.rmdir a", {"log": "01234"}),
    ({"log": "01234"},),
  ]


def test_threads_that_write_are_seen_and_copies_are_whole(tmp_path):
  folder = tmp_path / "run"

  def write(i):
    for step in range(5):
      file = folder / f"{i}-{step}.tmp"
      file.write_text("x" * 100)
      file.rename(file.with_suffix(""))

  folder.mkdir()
  with crashes.watch(folder, tmp_path / "copies") as moments:
    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert len(_read(moments[-1].folder)) == 20
  for moment in moments:
    for name, text in _read(moment.folder).items():
      assert len(text) == 100 or name.endswith(".tmp"), moment
  assert len(moments) >= 10  # operations at the same time share one
