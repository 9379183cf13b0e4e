"""Sources of weights: paths, names, and downloads from a server made here."""

import errno
import hashlib
import os
import pathlib
import socket

import fake_hub
import pytest

from vit_jax.errors import UserError
from vit_jax.pretrained import fetch
from vit_jax.pretrained.names import PUBLISHED

_BODY = bytes(range(256)) * 1000
_SHA256 = hashlib.sha256(_BODY).hexdigest()


@pytest.fixture
def server():
  with fake_hub.serve() as made:
    made.files["/models/a.npz"] = _BODY
    made.address = f"{made.base}/models/a.npz"
    yield made


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  folder = tmp_path / "cache"
  monkeypatch.setenv("VIT_JAX_CACHE", str(folder))
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  return folder


def _read(source):
  return pathlib.Path(fetch.locate(source).path).read_bytes()


def _list(cache):
  """Returns the names of the files in the cache."""
  return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_local_paths_are_returned_as_they_are(tmp_path):
  file = tmp_path / "x.npz"
  file.write_bytes(_BODY)
  assert fetch.locate(file) == (str(file), None)
  assert fetch.locate(tmp_path) == (str(tmp_path), None)
  assert fetch.locate(f"{file}:img") == (str(file), "img")
  odd = tmp_path / "run:2"
  odd.mkdir()
  assert fetch.locate(str(odd)) == (str(odd), None)
  # These are read by epath.
  for folder in ("gs://bucket/run", "gs://bucket/run/checkpoints/100/"):
    assert fetch.locate(folder) == (folder, None)


def test_a_local_file_with_a_digest_is_checked_and_kept(tmp_path):
  file = tmp_path / "x.npz"
  file.write_bytes(_BODY)
  assert fetch.locate(f"{file}:img#sha256={_SHA256}") == (str(file), "img")
  with pytest.raises(UserError, match=f"SHA-256 {_SHA256}, not {'0' * 64}"):
    fetch.locate(f"{file}#sha256={'0' * 64}")
  assert file.exists()
  with pytest.raises(UserError, match="64 hexadecimal digits"):
    fetch.locate(f"{file}#sha256=123")


@pytest.mark.parametrize(
  ("source", "line"),
  [
    ("ViT-B16-imagenet21k", "did you mean 'ViT-B_16-imagenet21k'"),
    ("no/such/file.npz:img", "at no/such/file.npz: no such file"),
    ("s3://bucket/x.npz", "no such file, published name or web address"),
    ("https://host.invalid/model", "not an .npz or .safetensors file"),
    ("gs://b/run#sha256=" + 64 * "0", "not an .npz or .safetensors file"),
  ],
)
def test_what_cannot_be_a_source(source, line):
  with pytest.raises(UserError, match=line) as error:
    fetch.locate(source)
  assert "\n" not in str(error.value)


def test_download_then_cache_without_a_server(server, cache):
  assert _read(server.address) == _BODY
  assert _list(cache) == ["a.npz"]
  server.shutdown()
  server.server_close()
  assert _read(server.address) == _BODY
  assert _read(f"{server.address}#sha256={_SHA256.upper()}") == _BODY
  assert len(server.requests) == 1


def test_files_of_one_name_stay_apart(server):
  server.files |= {"/other/a.npz": b"other", "/models/a.npz?v=2": b"second"}
  assert _read(f"{server.base}/other/a.npz") == b"other"
  assert _read(f"{server.base}/models/a.npz?v=2") == b"second"
  assert _read(server.address) == _BODY


def test_interrupted_download_is_never_taken_for_whole(server, cache):
  server.cut = 100_000
  with pytest.raises(UserError, match=r"100000 bytes read.*run again"):
    fetch.locate(server.address)
  assert _list(cache) == []
  server.cut = None
  assert _read(server.address) == _BODY


def test_wrong_digest_keeps_what_is_there(server, cache):
  wrong = f"{server.address}#sha256={'0' * 64}"
  with pytest.raises(UserError, match=r"not have the SHA-256 000.*run again"):
    fetch.locate(wrong)
  assert _list(cache) == []
  assert _read(f"{server.address}#sha256={_SHA256}") == _BODY
  with pytest.raises(UserError, match="delete it, or correct the digest"):
    fetch.locate(wrong)
  assert _list(cache) == ["a.npz"]


@pytest.mark.parametrize(
  ("status", "line"),
  [
    (404, "HTTP 404; it is not there, or not public"),
    (403, "HTTP 403; it is not there, or not public"),
    (503, "HTTP 503; run again later"),
  ],
)
def test_status_is_told(server, cache, status, line):
  server.missing = status
  with pytest.raises(UserError, match=line) as error:
    fetch.locate(f"{server.base}/b.npz?signature=secret")
  assert "\n" not in str(error.value)
  assert "secret" not in str(error.value)
  assert _list(cache) == []


def test_no_server_no_answer_and_no_certificate(server, monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as silent:
    address = f"http://127.0.0.1:{silent.getsockname()[1]}/a.npz?x=secret"
    monkeypatch.setattr(fetch, "_TIMEOUT", 0.2)
    with pytest.raises(UserError, match=r"timed out.*; check the") as error:
      fetch.locate(address)
    assert "secret" not in str(error.value)
  with pytest.raises(UserError, match=r"refused.*; check the network"):
    fetch.locate(address)
  with pytest.raises(UserError, match=r"SSL.*; check the network"):
    fetch.locate(server.address.replace("http:", "https:"))


def test_what_cannot_be_stored(server, cache, tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("shutil.move", fail)
    with pytest.raises(UserError, match="No space left on device; make room"):
      fetch.locate(server.address)
  assert _list(cache) == []
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("VIT_JAX_CACHE", os.fspath(tmp_path / "file"))
  with pytest.raises(UserError, match=r"cannot store .*VIT_JAX_CACHE"):
    fetch.locate(server.address)


def test_gs_files_and_published_names_are_read_over_https(server, monkeypatch):
  url = "https://storage.googleapis.com/vit_models/sam/R50%2BViT-B_16.npz"
  assert fetch._make_url("gs://vit_models/sam/R50+ViT-B_16.npz") == url
  monkeypatch.setattr(fetch, "_STORAGE", server.base)
  server.files["/vit_models/imagenet21k/R50%2BViT-B_16.npz"] = _BODY
  found = fetch.locate("R50+ViT-B_16-imagenet21k")
  assert pathlib.Path(found.path).name == "R50+ViT-B_16.npz"


def test_config_comes_with_safetensors(server):
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
    ("BiT-M-R152x4", "gs://bit_models/BiT-M-R152x4.npz"),
    ("i1k-s16-90ep", "gs://big_vision/vit_s16_i1k_90ep.npz"),
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
  assert PUBLISHED[name] == address


def test_published_names_cannot_be_mistaken():
  for name, address in PUBLISHED.items():
    assert ":" not in name
    assert address.startswith("gs://")
    assert address.endswith(".npz")
