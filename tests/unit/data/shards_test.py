"""Records of many files: on a disk, in a bucket, and how many may be open."""

import json
import os
import resource
import threading
from collections import Counter
from typing import NamedTuple

import forks
import numpy as np
import pytest
import tensorflow as tf
from array_record.python import array_record_module
from tiny_runs import REPO

from vit_jax.data import shards
from vit_jax.data.builders import digits
from vit_jax.errors import UserError


class Part(NamedTuple):
  """Of a file, as TFDS says it."""

  filename: str
  skip: int
  take: int


def _write(path, count):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for i in range(count):
    writer.write(f"{path.name} {i}".encode())
  writer.close()


@pytest.mark.parametrize("list_cost", [0, 10, shards._LIST_COST])
def test_records_of_parts_of_files(tmp_path, monkeypatch, list_cost):
  monkeypatch.setattr(shards, "_LIST_COST", list_cost)
  for name, count in (("a", 5), ("b", 1), ("c", 40)):
    _write(tmp_path / name, count)
  parts = [("a", 2, 3), ("b", 0, 1), ("c", 10, 20)]
  found = shards.Shards(
    "x", [Part(f"{tmp_path}/{f}", i, n) for f, i, n in parts]
  )
  expected = [f"{f} {i + k}".encode() for f, i, n in parts for k in range(n)]
  assert found.read(np.arange(24)) == expected
  some = np.random.RandomState(0).randint(0, 24, 100)
  assert found.read(some) == [expected[i] for i in some]
  assert found.read([23]) == [b"c 29"]


# --- a bucket ---


class Bucket:
  """Stands in for the files of a bucket; remembers what it is asked."""

  def __init__(self, monkeypatch, names):
    self.asked, self.opened, self.listed = [], Counter(), []
    self.all_open = threading.Barrier(1)

    def list_folder(folder):
      self.listed.append(folder)
      return names

    def open_reader(file, **kwargs):
      self.all_open.wait(10)
      self.opened[file] += 1
      return Reader(file)

    class Reader:
      def __init__(self, file):
        self._file = file

      def num_records(self):
        return 100

      def read(reader, first, end):
        self.asked.append((reader._file[-1], first, end))
        return [f"{reader._file[-1]} {i}".encode() for i in range(first, end)]

    monkeypatch.setattr(tf.io.gfile, "listdir", list_folder)
    monkeypatch.setattr(
      shards.array_record_module, "ArrayRecordReader", open_reader
    )


def _make_parts(names, take=10):
  return [Part(f"gs://bucket/set/{name}", 0, take) for name in names]


def test_a_bucket_is_asked_once_for_neighbours(monkeypatch):
  bucket = Bucket(monkeypatch, ["a", "b"])
  found = shards.Shards("x", _make_parts("ab"))
  records = found.read([4, 5, 6, 1, 8, 9, 10, 11, 7, 6])
  assert records[:3] == [b"a 4", b"a 5", b"a 6"]
  assert records[-3:] == [b"b 1", b"a 7", b"a 6"]
  assert sorted(bucket.asked) == [
    *(("a", 1, 2), ("a", 4, 7), ("a", 6, 7), ("a", 7, 8), ("a", 8, 10)),
    ("b", 0, 2),
  ]
  assert set(bucket.opened.values()) == {1}


def test_files_of_a_bucket_are_opened_at_the_same_time(monkeypatch):
  """Each waits for an answer; 2,048, one after the other, take minutes."""
  bucket = Bucket(monkeypatch, "abcdef")
  bucket.all_open = threading.Barrier(6)
  found = shards.Shards("x", _make_parts("abcdef"))
  assert len(found.read(np.arange(0, 60, 10))) == 6


def test_a_folder_is_listed_once(monkeypatch, tmp_path):
  monkeypatch.setattr(tf.io.gfile, "exists", None)
  bucket = Bucket(monkeypatch, "abc")
  shards.Shards("x", _make_parts("abc"))
  assert bucket.listed == ["gs://bucket/set"]
  with pytest.raises(UserError, match=r"2 of its files are missing, .*set/d;"):
    shards.Shards("x", _make_parts("abcde"))
  # On a disk, a link to nothing is no file.
  (tmp_path / "a").symlink_to(tmp_path / "none")
  with pytest.raises(UserError, match=r"1 of its files are missing, .*/a;"):
    shards.Shards("x", [Part(f"{tmp_path}/a", 0, 1)])


# --- limits ---


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
  """The digits' 1,000 training images in 2,048 files, each all of them."""
  root = tmp_path_factory.mktemp("many")
  builder = digits.Digits(data_dir=root, file_format="array_record")
  builder.download_and_prepare()
  (file,) = builder.data_path.glob("*train*")
  for i in range(2048):
    os.link(file, str(file).replace("00000-of-00001", f"{i:05d}-of-02048"))
  info = builder.data_path / "dataset_info.json"
  content = json.loads(info.read_text())
  for split in content["splits"]:
    if split["name"] == "train":
      split["shardLengths"] = ["1000"] * 2048
  info.write_text(json.dumps(content))
  return root


def _run_limited(limits, code, *args):
  """Runs a program that may open as many files: soft and hard limit."""
  limit = (
    f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits})"
  )
  return forks.run(["-c", f"{limit}\n{code}", *args], cwd=REPO)


_READ = """
import sys
import numpy as np
from vit_jax import data
source = data.get_source("digits", "train", sys.argv[1])
print(len(source.read(1000 * np.arange(2048))))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
_SHOW = """
import sys
from vit_jax.__main__ import main
sys.exit(main(["data", "show", "digits", f"--data_dir={sys.argv[1]}"]))
"""


@pytest.mark.ci
@pytest.mark.usefixtures("fork_server")
def test_2048_files_where_1024_may_be_open(many_shards):
  hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
  done = _run_limited((1024, hard), _READ, many_shards)
  assert done.stdout.split() == ["2048", str(1024 + 2048)], done.stderr
  done = _run_limited((1024, 1024), _SHOW, many_shards)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert "'digits' has 2,048 files, all of them open at once; this" in line
  assert (
    "may open 1,024, its hard limit: raise it, as root with `ulimit" in line
  )


def test_files_of_all_data_sets_are_open(monkeypatch, tmp_path):
  monkeypatch.setattr(resource, "getrlimit", lambda _: (300, 300))
  monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
  _write(tmp_path / "a", 1)
  parts = [Part(f"{tmp_path}/a", 0, 1)] * 100
  before = sum(x.num_open for x in shards._alive)
  first = shards.Shards("first", parts)
  with pytest.raises(
    UserError, match=rf"'second' has 100 .* it {before + 100},"
  ):
    shards.Shards("second", parts)
  del first
  shards.Shards("third", parts)


_INDEX = """
import re, sys
import numpy as np
from types import SimpleNamespace as Part
from vit_jax.data import shards

def count_bytes():
  with open("/proc/self/status") as f:  # without what is mapped from files
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", f.read())[1])

found = shards.Shards("x", [
  Part(filename=file, skip=0, take=100_000) for file in sys.argv[1:]
])
found.read(np.arange(20) * 100_000)  # 20 files: what all threads need
before = count_bytes()
found.read(np.arange(20, 80) * 100_000)
print((count_bytes() - before) / 6e6)
"""


@pytest.mark.ci
@pytest.mark.usefixtures("fork_server")
def test_memory_of_an_index(tmp_path):
  """8 bytes a record, and what was needed to read it that is not given back."""
  _write(tmp_path / "0", 100_000)
  files = [tmp_path / str(i) for i in range(80)]
  for file in files[1:]:
    os.link(files[0], file)
  done = forks.run(["-c", _INDEX, *files], cwd=REPO)
  assert 7 < float(done.stdout) < 16, done.stderr
