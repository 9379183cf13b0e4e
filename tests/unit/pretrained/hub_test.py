"""Models of the Hugging Face hub, from and to a server made here."""

import json
import time

import fake_hub
import huggingface_hub.constants
import huggingface_hub.hf_api
import numpy as np
import pytest
import torch_formats
from random_models import random_weights

import vit_jax
from vit_jax import pretrained
from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.pretrained import fetch, hub


@pytest.fixture
def server(tmp_path, monkeypatch):
  with fake_hub.serve() as made:
    constants = huggingface_hub.constants
    url = f"{made.base}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", made.base)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", made.base)
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield made


def _read_folder(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def tiny(tmp_path):
  """The files of a tiny model in Hugging Face's format, and its weights."""
  arrays = torch_formats.huggingface(torch_formats.random_weights())
  config = torch_formats.huggingface_config()
  folder = torch_formats.save(tmp_path / "tiny", arrays, config)
  return _read_folder(folder), pretrained.read(str(folder))


def test_names():
  assert hub.parse("google/vit-base") == ("google/vit-base", None)
  assert hub.parse("hf:a/b.c@refs/pr/1") == ("a/b.c", "refs/pr/1")
  assert hub.parse("timm:vit.in1k@v2") == ("timm/vit.in1k", "v2")
  for text in (
    "a",
    "a/b/c",
    "./a",
    "../a",
    "/a",
    "a/b.npz",
    "hf:a",
    "gs://a/b",
  ):
    assert hub.parse(text) is None


@pytest.mark.parametrize(
  "source", ["google/vit", "hf:google/vit", "hf:google/vit@old", "timm:vit"]
)
def test_load_then_again_without_a_server(server, tiny, source):
  files, weights = tiny
  # What is not read is not fetched.
  files |= {"pytorch_model.bin": b"x", "flax_model.msgpack": b"x"}
  server.repos["google/vit"] = {"main": files, "old": files}
  server.repos["timm/vit"] = {"main": files}
  torch_formats.assert_identical(pretrained.read(source), weights)
  assert not any("pytorch_model" in path for path in server.requests)
  server.shutdown()
  server.server_close()
  torch_formats.assert_identical(pretrained.read(source), weights)


def test_another_revision_is_another_model(server, tiny):
  files, _ = tiny
  changed = json.loads(files["config.json"]) | {"layer_norm_eps": 0.1}
  old = files | {"config.json": json.dumps(changed).encode()}
  server.repos["a/b"] = {"main": files, "v1": old}
  assert vit_jax.load("hf:a/b@v1").config.layer_norm_epsilon == 0.1
  assert vit_jax.load("a/b").config.layer_norm_epsilon == 1e-12


@pytest.mark.parametrize(
  ("source", "line"),
  [
    ("hf:no/body", "it is not there, or private; check the name, or log in"),
    ("timm:nothing", "timm/nothing: it is not there"),
    ("no/body", "no checkpoint at no/body: .* from the Hugging Face hub: "),
    ("hf:a/b@v9", "no such revision"),
    ("hf:a/gated", "is gated; accept its terms at http"),
  ],
)
def test_what_cannot_be_downloaded(server, tiny, source, line):
  server.repos["a/b"] = {"main": tiny[0]}
  server.gated.add("a/gated")
  with pytest.raises(UserError, match=line) as error:
    pretrained.read(source)
  assert "\n" not in str(error.value)


def test_an_interrupted_download_is_never_taken_for_whole(
  server, tiny, monkeypatch
):
  files, weights = tiny
  monkeypatch.setattr(time, "sleep", lambda _: None)  # between retries
  server.repos["a/b"] = {"main": files}
  server.cut = 2000  # config.json is complete
  with pytest.raises(UserError, match=r"cannot download .*a/b"):
    fetch.locate("a/b")
  repos, server.repos = server.repos, {}  # and then the hub is away
  with pytest.raises(UserError):
    pretrained.read("a/b")
  server.repos, server.cut = repos, None
  torch_formats.assert_identical(pretrained.read("a/b"), weights)


@pytest.mark.parametrize(
  ("to", "library"), [("hf", "transformers"), ("timm",) * 2]
)
def test_push_then_load(server, tmp_path, capsys, to, library):
  source = tmp_path / "weights"
  weights = random_weights("ViT-w32d2m64h2_8")
  pretrained.write(weights, str(source), to)
  args = ["convert", str(source), "hf:me/mine", f"--to={to}", "--push"]
  assert main(args) == 0, capsys.readouterr().err
  assert f"{server.base}/me/mine" in capsys.readouterr().out
  assert server.private["me/mine"] in (True, "private")
  pushed = server.repos["me/mine"]["main"]
  assert f"library_name: {library}" in pushed["README.md"].decode()
  assert pushed.keys() == _read_folder(source).keys() | {"README.md"}
  found = pretrained.read("me/mine").params
  for path, x in pretrained.read(str(source)).params.items():
    np.testing.assert_array_equal(found[path].read(), x.read())
  # One's own card stays.
  pushed["README.md"] = b"mine"
  assert main(args) == 0
  assert pushed["README.md"] == b"mine"


def test_push_without_rights(server, tmp_path, capsys, monkeypatch):
  source = tmp_path / "weights"
  pretrained.write(random_weights("ViT-w32d2m64h2_8"), str(source), "hf")
  monkeypatch.setenv("HF_TOKEN", "hf_bad")
  assert main(["convert", str(source), "hf:me/mine", "--push"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "HTTP 401; log in with `hf auth login`" in line
  assert main(["convert", str(source), "mine", "--push"]) == 2
  assert "hf:OWNER/NAME" in capsys.readouterr().err
  assert not server.repos
