"""The stand-in for Cloud Storage, as the libraries that use it see it."""

import fake_gcs
import numpy as np
import pytest
import tensorstore
from array_record.python import array_record_module
from etils import epath

NUM_RECORDS, SIZE = 4000, 3000
ONE_BY_ONE, CONTIGUOUS = (
  "readahead_buffer_size:0",
  "readahead_buffer_size:16777216",
)


@pytest.fixture(scope="module")
def records():
  rows = np.random.default_rng(0).integers(
    0, 256, (NUM_RECORDS, SIZE), np.uint8
  )
  return [row.tobytes() for row in rows]


@pytest.fixture(scope="module")
def server(tmp_path_factory, records):
  folder = tmp_path_factory.mktemp("gcs")
  (folder / "bucket").mkdir()
  writer = array_record_module.ArrayRecordWriter(
    str(folder / "bucket" / "file.array_record"), "group_size:1,uncompressed"
  )
  for record in records:
    writer.write(record)
  writer.close()
  with fake_gcs.serve(folder) as server, pytest.MonkeyPatch.context() as patch:
    for name, value in server.environment().items():
      patch.setenv(name, value)
    yield server


def open_reader(server, options):
  """Opens the file; what that takes is not counted."""
  reader = array_record_module.ArrayRecordReader(
    "gs://bucket/file.array_record", options, file_reader_buffer_size=32768
  )
  assert reader.num_records() == NUM_RECORDS
  server.reset()
  return reader


def test_records_of_single_indices_are_a_request_each(server, records):
  reader = open_reader(server, ONE_BY_ONE)
  indices = [3999, 17, 2000, 18]
  assert reader.read(indices) == [records[i] for i in indices]
  assert len(server.requests) == len(indices)
  # Open-ended: the client closes them when it has its record.
  assert all(request.endswith("-") for request in server.requests)
  assert server.sent > 2 * len(indices) * SIZE


def test_a_contiguous_range_is_one_request(server, records):
  reader = open_reader(server, CONTIGUOUS)
  assert reader.read(0, NUM_RECORDS) == records
  assert len(server.requests) == 1
  assert server.sent < 1.1 * NUM_RECORDS * SIZE


def test_a_range_in_the_middle_overshoots_by_what_is_on_its_way(
  server, records
):
  reader = open_reader(server, CONTIGUOUS)
  assert reader.read(1000, 1100) == records[1000:1100]
  (request,) = server.requests
  assert request.endswith("-")


@pytest.mark.parametrize("fault", [503, "drop"])
def test_a_fault_is_tried_again(server, records, fault):
  reader = open_reader(server, CONTIGUOUS)
  server.fault = lambda number, request: fault if number == 1 else None
  try:
    assert reader.read(0, NUM_RECORDS) == records
  finally:
    server.fault = lambda number, request: None
  assert len(server.requests) > 1


def test_tensorflow_and_tensorstore_write_and_read_the_same(server):
  path = epath.Path("gs://bucket/run/x.txt")
  store = tensorstore.KvStore.open("gs://bucket/run/").result()
  path.write_text("from TensorFlow")
  assert store["x.txt"] == b"from TensorFlow"
  store["y/z.txt"] = b"from TensorStore"
  assert (path.parent / "y/z.txt").read_text() == "from TensorStore"
  path.rename(path.with_name("renamed"))
  assert {p.name for p in path.parent.iterdir()} == {"renamed", "y"}
  assert store.list().result() == [b"renamed", b"y/z.txt"]
  path.parent.rmtree()
  assert not store.list().result()


@pytest.mark.ci
@pytest.mark.parametrize("fault", [503, "drop"])
def test_both_try_again(server, fault):
  path = epath.Path(f"gs://bucket/{fault}.txt")
  store = tensorstore.KvStore.open("gs://bucket/").result()
  faults = iter([fault, None, fault])
  server.fault = lambda *_: next(faults, None)
  path.write_text("1")
  assert path.read_text() == "1"
  faults = iter([fault, None, fault])
  store[path.name] = b"2"
  assert store[path.name] == b"2"
  server.fault = lambda *_: None
