"""Downloads from and uploads to the Hugging Face hub.

huggingface_hub manages the cache ($HF_HOME), the token (`hf auth login`,
$HF_TOKEN) and the address ($HF_ENDPOINT).
"""

import pathlib
import re
import sys
from typing import NamedTuple

from vit_jax.errors import UserError, needs_extra, one_line
from vit_jax.pretrained.weights import Weights

PREFIXES = ("hf:", "timm:")
FORMATS = ("hf", "timm")  # for uploads
_REVISION = r"(?:@(?P<revision>[\w./-]+))?"
_NAME = r"[A-Za-z0-9][\w.-]*"
# JSON files first, because existing weights imply a complete download.
_PATTERNS = (
  ["config.json", "preprocessor_config.json", "model.safetensors.index.json"],
  ["model.safetensors", "model-*.safetensors"],
)


class Repo(NamedTuple):
  """A repository of models, and one of its branches, tags or commits."""

  name: str
  revision: str | None = None


def parse(text: str) -> Repo | None:
  """Returns the repository of [hf:]OWNER/NAME[@REVISION] or timm:NAME[...]."""
  match = re.fullmatch(rf"(?:hf:)?({_NAME}/{_NAME}){_REVISION}", text)
  if match and not match[1].endswith((".npz", ".safetensors")):
    return Repo(match[1], match["revision"])
  match = re.fullmatch(rf"timm:({_NAME}){_REVISION}", text)
  return Repo(f"timm/{match[1]}", match["revision"]) if match else None


def download(repo: Repo) -> str:
  """Returns the cache folder of the repository's weights, after downloading.

  Raises:
    UserError: no such repository or revision, no read permission, no network, a
      full disk, or huggingface_hub is not installed.
  """
  hf = _import()
  revision, folder = repo.revision, ""
  try:
    for patterns in _PATTERNS:
      folder = hf.snapshot_download(
        repo.name, revision=revision, allow_patterns=patterns
      )
      revision = pathlib.Path(folder).name  # the commit; the branch may move
  except Exception as e:
    raise _explain("download", repo.name, e) from e
  return folder


def upload(folder: pathlib.Path, repo: Repo, to: str, weights: Weights) -> str:
  """Uploads a folder's files as one commit; returns the repository's address.

  A new repository is private. An existing README.md is kept; otherwise a model
  card without a licence is added.

  Raises:
    UserError: no token, no write permission, or no network.
  """
  hf = _import()
  try:
    api = hf.HfApi()
    url = api.create_repo(repo.name, private=True, exist_ok=True)
    if not api.file_exists(repo.name, "README.md"):
      card = _make_card(repo.name, to, weights)
      (folder / "README.md").write_text(card, encoding="utf-8")
    api.upload_folder(
      repo_id=repo.name,
      folder_path=folder,
      revision=repo.revision,
      commit_message=f"vit-jax convert --to={to} --push",
    )
  except Exception as e:
    raise _explain("upload to", repo.name, e) from e
  return str(url)


def _make_card(name, to, weights) -> str:
  """Returns a README.md without a licence, which the author has to choose.

  The hub adds the code for `library_name`.
  """
  height, width = weights.image_size
  is_vit = weights.model["variant"].rpartition("+")[2].startswith("ViT-")
  return f"""---
library_name: {"transformers" if to == "hf" else "timm"}
tags:
- image-classification
- {"vision-transformer" if is_vit else "efficientnet"}
- vit_jax
# license: add one here
---

# {name.partition("/")[2]}

{weights.model["variant"]} for images of {height}x{width} pixels and
{weights.num_classes} classes, trained or converted with vit_jax.

```python
import vit_jax
model = vit_jax.load("{name}")  # takes f32[b h w 3] in [-1, 1]
```
"""


def _import():
  try:
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars
  except ImportError as e:
    raise needs_extra("the Hugging Face hub", "huggingface_hub") from e
  if not sys.stderr.isatty():
    disable_progress_bars()
  return huggingface_hub


def _explain(what: str, name: str, error: Exception) -> UserError:
  """Returns a one-line error for one of huggingface_hub, httpx or the disk."""
  from huggingface_hub import constants, errors

  address = f"{constants.ENDPOINT}/{name}"
  log_in = "log in with `hf auth login`, or set HF_TOKEN"
  response = getattr(error, "response", None)
  code = getattr(response, "status_code", None)
  if isinstance(error, errors.GatedRepoError):
    reason = f"it is gated; accept its terms at {address}, then {log_in}"
  elif isinstance(error, errors.RevisionNotFoundError):
    reason = "it has no such revision; check what follows the @"
  elif what == "download" and code in (401, 403, 404):
    reason = f"it is not there, or private; check the name, or {log_in}"
  elif code in (401, 403, 404):
    reason = f"HTTP {code}; {log_in}, with a token that may write there"
  elif code is not None:
    reason = f"HTTP {code}; run again later"
  elif isinstance(error, errors.LocalEntryNotFoundError):
    reason = "no answer, and it is not in the cache; check the network"
  elif isinstance(error, OSError) and error.errno and error.filename:
    reason = f"{error.filename}: {error.strerror}; make room, or set HF_HOME"
  else:
    reason = f"{one_line(error)}; check the network and run again"
  return UserError(f"cannot {what} {address}: {reason}")
