"""Sources of weights: paths, names, and downloads from a server made here."""

import errno
import hashlib
import http.server
import logging
import pathlib
import random
import re
import shutil
import socket
import struct
import threading
import time

import crashes
import pytest

from vit_jax.errors import UserError
from vit_jax.pretrained import fetch
from vit_jax.pretrained.names import PUBLISHED

_BODY = random.Random(0).randbytes(300_000)
_SHA256 = hashlib.sha256(_BODY).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
  """Serves `server.files`, as well or as badly as the server is told to."""

  def do_GET(self):
    server = self.server
    asked = self.headers.get("Range")
    server.requests.append((self.path, asked))
    time.sleep(server.delay)
    body = server.files.get(self.path)
    if body is None:
      self.send_error(server.missing)
      return
    start = 0
    if server.ranges and asked and self.headers["If-Range"] == server.etag:
      start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
    if start >= len(body):
      self.send_response(416)
      self.send_header("Content-Range", f"bytes */{len(body)}")
      self.end_headers()
      return
    self.send_response(206 if start else 200)
    if start:
      span = f"bytes {start}-{len(body) - 1}/{len(body)}"
      self.send_header("Content-Range", span)
    if server.etag:
      self.send_header("ETag", server.etag)
    if server.lengths:
      self.send_header("Content-Length", str(len(body) - start))
    self.end_headers()
    end = start + server.cut if server.cut else None
    self.wfile.write(body[start:end])
    if server.reset:
      # Closed like this, the connection is reset.
      linger = struct.pack("ii", 1, 0)
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
      self.connection.close()

  def log_message(self, *args):
    pass


class _Server(http.server.ThreadingHTTPServer):
  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.files = {"/models/a.npz": _BODY}
    self.etag = '"first"'
    self.ranges = True
    self.lengths = True
    self.reset = False
    self.cut = None  # bytes after which the connection ends
    self.missing = 404
    self.delay = 0.0  # seconds before an answer
    self.requests = []  # (path, Range header)
    self.base = f"http://127.0.0.1:{self.server_port}"
    self.address = f"{self.base}/models/a.npz"


@pytest.fixture
def server():
  with _Server() as made:
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  folder = tmp_path / "cache"
  monkeypatch.setenv("VIT_JAX_CACHE", str(folder))
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  return folder


def _read(source, **kwargs):
  return pathlib.Path(fetch.locate(source, **kwargs).path).read_bytes()


def _list(cache):
  """Returns the names of the files in the cache, locks left out."""
  names = (path.name for path in cache.rglob("*") if path.is_file())
  return sorted(name for name in names if not name.endswith(".lock"))


def _interrupt(server, after=100_000):
  """Has the next download end after so many bytes."""
  server.cut = after
  with pytest.raises(UserError, match=f"after {after} of 300000 bytes; run"):
    fetch.locate(server.address)
  server.cut = None
  server.requests.clear()


def test_local_paths_are_returned_as_they_are(tmp_path):
  file = tmp_path / "x.npz"
  file.write_bytes(b"x")
  assert fetch.locate(str(file)) == (str(file), None)
  assert fetch.locate(file) == (str(file), None)
  assert fetch.locate(tmp_path) == (str(tmp_path), None)
  assert fetch.locate(f"{file}:img") == (str(file), "img")
  odd = tmp_path / "run:2"
  odd.mkdir()
  assert fetch.locate(str(odd)) == (str(odd), None)


def test_local_file_with_a_digest_is_checked_and_kept(tmp_path):
  file = tmp_path / "x.npz"
  file.write_bytes(_BODY)
  assert fetch.locate(f"{file}:img#sha256={_SHA256}") == (str(file), "img")
  with pytest.raises(UserError, match=f"SHA-256 {_SHA256}, not {'0' * 64}"):
    fetch.locate(f"{file}#sha256={'0' * 64}")
  assert file.exists()
  with pytest.raises(UserError, match="64 hexadecimal digits"):
    fetch.locate(f"{file}#sha256=123")


def test_gs_folder_is_left_to_epath():
  for folder in ("gs://bucket/run", "gs://bucket/run/checkpoints/100/"):
    assert fetch.locate(folder) == (folder, None)


@pytest.mark.parametrize(
  ("source", "line"),
  [
    ("ViT-B16-imagenet21k", "did you mean 'ViT-B_16-imagenet21k'"),
    ("no/such/file.npz:img", "at no/such/file.npz: it is neither a file"),
    ("s3://bucket/x.npz", "begins with https:// or gs://"),
    ("https://host.invalid/model", "not a file .npz or .safetensors"),
    ("gs://b/run#sha256=" + 64 * "0", "not a file .npz or .safetensors"),
  ],
)
def test_what_cannot_be_a_source(source, line):
  with pytest.raises(UserError, match=line) as error:
    fetch.locate(source)
  assert "\n" not in str(error.value)


def test_download_then_cache_without_a_server(server, cache, caplog):
  caplog.set_level(logging.INFO)
  assert _read(server.address) == _BODY
  assert _list(cache) == ["a.npz"]
  assert "0.3 MB of 0.3 MB" in caplog.text
  server.shutdown()
  server.server_close()
  assert _read(server.address) == _BODY
  assert _read(f"{server.address}#sha256={_SHA256}") == _BODY
  assert len(server.requests) == 1


def test_cache_dir_and_default(server, tmp_path, monkeypatch):
  assert _read(server.address, cache_dir=tmp_path / "other") == _BODY
  assert _list(tmp_path / "other") == ["a.npz"]
  monkeypatch.delenv("VIT_JAX_CACHE")
  monkeypatch.setenv("HOME", str(tmp_path))
  found = pathlib.Path(fetch.locate(server.address).path)
  assert (tmp_path / ".cache" / "vit_jax") in found.parents


def test_files_of_one_name_stay_apart(server):
  server.files |= {"/other/a.npz": b"other", "/models/a.npz?v=2": b"second"}
  assert _read(f"{server.base}/other/a.npz") == b"other"
  assert _read(f"{server.base}/models/a.npz?v=2") == b"second"
  assert _read(server.address) == _BODY


def test_sub_model_is_split_off(server):
  source = fetch.locate(f"{server.address}:img#sha256={_SHA256}")
  assert source.part == "img"
  assert server.requests == [("/models/a.npz", None)]


def test_interrupted_download_goes_on(server, cache):
  _interrupt(server)
  assert _list(cache) == ["a.npz.part", "a.npz.version"]
  server.cut = 50_000  # and is interrupted again
  with pytest.raises(UserError, match="after 150000 of 300000 bytes"):
    fetch.locate(server.address)
  server.cut = None
  assert _read(f"{server.address}#sha256={_SHA256}") == _BODY
  assert [asked for _, asked in server.requests] == [
    "bytes=100000-",
    "bytes=150000-",
  ]
  assert _list(cache) == ["a.npz"]


def test_download_that_is_killed_at_any_moment(server, cache, tmp_path):
  source = f"{server.address}#sha256={_SHA256}"
  cache.mkdir()
  with crashes.watch(cache, tmp_path / "copies") as moments:
    fetch.locate(source)
  asked = set()
  for moment in moments:
    shutil.rmtree(cache)
    shutil.copytree(moment.folder, cache)
    server.requests.clear()
    if "a.npz" in _list(cache):
      [file] = cache.rglob("a.npz")
      assert file.read_bytes() == _BODY, moment.next
    assert _read(source) == _BODY, moment.next
    assert "a.npz.part" not in _list(cache)
    asked |= {span for _, span in server.requests}
  # Some resumed; one from the middle.
  assert None in asked
  assert any(span for span in asked)


def test_reset_connection_goes_on(server):
  server.cut, server.reset = 100_000, True
  with pytest.raises(UserError, match=r"run again"):
    fetch.locate(server.address)
  server.cut, server.reset = None, False
  assert _read(server.address) == _BODY


def test_server_that_tells_no_length(server):
  server.lengths = False
  assert _read(server.address) == _BODY


def test_server_without_ranges_sends_all_again(server):
  _interrupt(server)
  server.ranges = False
  assert _read(server.address) == _BODY
  assert server.requests == [("/models/a.npz", "bytes=100000-")]


def test_changed_file_starts_anew(server):
  _interrupt(server)
  server.etag = '"second"'
  server.files["/models/a.npz"] = _BODY[::-1]
  assert _read(server.address) == _BODY[::-1]
  assert len(server.requests) == 1


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_tag_starts_anew(server, etag):
  server.etag = etag
  _interrupt(server)
  assert _read(server.address) == _BODY
  assert server.requests == [("/models/a.npz", None)]


def test_part_that_is_complete_is_taken(server, cache):
  _interrupt(server)
  (part,) = cache.rglob("*.part")
  part.write_bytes(_BODY)
  assert _read(server.address) == _BODY
  assert server.requests == [("/models/a.npz", "bytes=300000-")]


def test_part_that_is_too_long_is_dropped(server, cache):
  _interrupt(server)
  (part,) = cache.rglob("*.part")
  part.write_bytes(_BODY + b"more")
  assert _read(server.address) == _BODY
  asked = [asked for _, asked in server.requests]
  assert asked == ["bytes=300004-", None]


def test_wrong_digest_names_both_and_the_next_try_starts_anew(server, cache):
  wrong = "0" * 64
  line = f"SHA-256 {_SHA256}, not {wrong}.*run again"
  with pytest.raises(UserError, match=line):
    fetch.locate(f"{server.address}#sha256={wrong}")
  assert "a.npz" not in _list(cache)
  assert "a.npz.part" not in _list(cache)
  assert _read(f"{server.address}#sha256={_SHA256.upper()}") == _BODY
  assert [asked for _, asked in server.requests] == [None, None]
  # The same for a file that is in the cache already.
  with pytest.raises(UserError, match=line):
    fetch.locate(f"{server.address}#sha256={wrong}")
  assert _list(cache) == []


@pytest.mark.parametrize(
  ("status", "line"),
  [
    (404, "HTTP 404 Not Found; check the address"),
    (403, "HTTP 403 Forbidden; it is not public"),
    (503, "HTTP 503 Service Unavailable; run again later"),
  ],
)
def test_status_is_told(server, cache, status, line):
  server.missing = status
  with pytest.raises(UserError, match=line) as error:
    fetch.locate(f"{server.base}/b.npz?signature=secret")
  assert "\n" not in str(error.value)
  assert "secret" not in str(error.value)
  assert _list(cache) == []


def test_error_in_between_keeps_the_part(server):
  _interrupt(server)
  server.files.clear()
  server.missing = 500
  with pytest.raises(UserError, match="HTTP 500"):
    fetch.locate(server.address)
  server.files["/models/a.npz"] = _BODY
  assert _read(server.address) == _BODY
  assert [asked for _, asked in server.requests] == ["bytes=100000-"] * 2


def test_no_server_no_answer_and_no_certificate(server, monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as silent:
    address = f"http://127.0.0.1:{silent.getsockname()[1]}/a.npz"
    monkeypatch.setattr(fetch, "_TIMEOUT", 0.2)
    with pytest.raises(UserError, match=r"no answer within 0\.2 s; check the"):
      fetch.locate(address)
  with pytest.raises(UserError, match=r"refused; check the network and run"):
    fetch.locate(address)
  with pytest.raises(UserError, match=r"SSL.*; check the network"):
    fetch.locate(server.address.replace("http:", "https:"))


def test_full_disk_is_told_and_the_part_stays(server, cache, monkeypatch):
  def fail(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(fetch.os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device; make room"):
      fetch.locate(server.address)
  assert _list(cache) == ["a.npz.part", "a.npz.version"]
  assert _read(server.address) == _BODY


def test_cache_that_cannot_be_made(server, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"cannot store .*VIT_JAX_CACHE"):
    fetch.locate(server.address, cache_dir=tmp_path / "file")


def test_two_at_once_download_once(server):
  server.delay = 0.2
  found = []
  threads = [
    threading.Thread(target=lambda: found.append(_read(server.address)))
    for _ in range(3)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == [_BODY] * 3
  assert len(server.requests) == 1


def test_gs_files_and_published_names_are_read_over_https(server, monkeypatch):
  assert fetch._make_url("gs://vit_models/imagenet21k/R50+ViT-B_16.npz") == (
    "https://storage.googleapis.com/vit_models/imagenet21k/R50%2BViT-B_16.npz"
  )
  monkeypatch.setattr(fetch, "_STORAGE", server.base)
  path = "/vit_models/imagenet21k/R50%2BViT-B_16.npz"
  server.files[path] = _BODY
  assert _read("gs://vit_models/imagenet21k/R50+ViT-B_16.npz") == _BODY
  found = fetch.locate("R50+ViT-B_16-imagenet21k")
  assert pathlib.Path(found.path).name == "R50+ViT-B_16.npz"
  assert len(server.requests) == 1


def test_config_comes_with_safetensors(server, cache):
  server.files |= {
    "/hf/model.safetensors": _BODY,
    "/hf/config.json": b"{}",
    "/timm/model.safetensors": _BODY,
  }
  found = pathlib.Path(fetch.locate(f"{server.base}/hf/model.safetensors").path)
  assert found.with_name("config.json").read_bytes() == b"{}"
  assert _read(f"{server.base}/timm/model.safetensors") == _BODY
  server.requests.clear()
  assert _read(f"{server.base}/timm/model.safetensors") == _BODY
  assert server.requests == []


@pytest.mark.parametrize(
  ("name", "address"),
  [
    ("ViT-H_14-imagenet21k", "gs://vit_models/imagenet21k/ViT-H_14.npz"),
    (
      "ViT-L_16-224-imagenet21k+imagenet2012",
      "gs://vit_models/imagenet21k+imagenet2012/ViT-L_16-224.npz",
    ),
    ("ViT-B_32-sam", "gs://vit_models/sam/ViT-B_32.npz"),
    ("BiT-M-R152x4", "gs://bit_models/BiT-M-R152x4.npz"),
    ("i1k-s16-90ep", "gs://big_vision/vit_s16_i1k_90ep.npz"),
    (
      "R50+ViT-L_32-augreg",
      "gs://vit_models/augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1"
      "-do_0.1-sd_0.1.npz",
    ),
    (
      "ViT-B_16-augreg-imagenet2012-384",
      "gs://vit_models/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1"
      "-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.npz",
    ),
    (
      "R26+ViT-S_32-augreg-imagenet2012-224",
      "gs://vit_models/augreg/R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03"
      "-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.03-res_224.npz",
    ),
  ],
)
def test_published_addresses(name, address):
  assert PUBLISHED[name].address == address


def test_published_names_cannot_be_mistaken():
  for name, published in PUBLISHED.items():
    assert "://" not in name
    assert ":" not in name
    assert published.address.startswith("gs://")
    assert published.address.endswith(".npz")
