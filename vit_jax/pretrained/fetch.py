"""Location and download of weights: local paths, addresses, names.

pooch downloads files on the web into $VIT_JAX_CACHE or ~/.cache/vit_jax,
huggingface_hub models into its own cache (`hub`). Cached files need no network.
A file is renamed into place once it is complete and matches its digest, if any.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import re
import sys
import urllib.parse
from typing import Any, NamedTuple

from vit_jax.errors import UserError, needs_extra, one_line, suggest
from vit_jax.pretrained import embedded, hub
from vit_jax.pretrained.names import PUBLISHED

log = logging.getLogger(__name__)

# Public objects need no credentials.
_STORAGE = "https://storage.googleapis.com"
_SUFFIXES = (".npz", ".safetensors")
_TIMEOUT = 60  # seconds without a byte


class Source(NamedTuple):
  """The location of weights that can be read.

  Attributes:
    path: a local file or folder, or a gs:// folder for epath. It is a string,
      because pathlib.Path would drop a slash of gs://.
    part: the sub-model named after an npz file, "img" of "file.npz:img".
  """

  path: str
  part: str | None = None


def locate(source: str | os.PathLike[str]) -> Source:
  """Returns the location of `source`, downloaded if necessary.

  Args:
    source: one of
      - a local file or folder, or the prefix of a TensorFlow checkpoint;
      - the https:// or http:// address of an .npz or .safetensors file; the
        config.json beside a .safetensors file is fetched as well, if it exists;
      - the gs:// address of such a file, which must be public, or of a folder;
      - a name in `names.PUBLISHED`, or in `embedded.MODELS` (in the package);
      - a model of the Hugging Face hub: [hf:]OWNER/NAME[@REVISION], or
        timm:NAME[@REVISION] for those of timm.
      A file may be followed by ":PART" (npz only) and then by "#sha256=HEX".

  Raises:
    UserError: it does not exist, cannot be downloaded or stored, or does not
      match its digest.
  """
  source = os.fspath(source)
  if os.path.exists(source) or os.path.exists(f"{source}.index"):
    return Source(source)
  address, part, digest = _split(source)
  known = PUBLISHED | embedded.MODELS
  address = os.fspath(known.get(address, address))
  if os.path.exists(address):
    _check_digest(address, digest)
    return Source(address, part)
  if address.startswith(("https://", "http://", "gs://")):
    if address.partition("?")[0].endswith(_SUFFIXES):
      return Source(str(_fetch(address, digest)), part)
    if address.startswith("gs://") and not digest:
      return Source(address)
    raise UserError(
      f"{_shown(address)} is not an .npz or .safetensors file; give the address"
      " of the file itself"
    )
  missing = f"no checkpoint at {_shown(address)}: no such file, published name "
  missing += f"or web address{suggest(address, known)}"
  repo = hub.parse(address)
  if not repo:
    raise UserError(missing)
  try:
    return Source(hub.download(repo))
  except UserError as e:
    if address.startswith(hub.PREFIXES):
      raise
    raise UserError(f"{missing}; from the Hugging Face hub: {e}") from e


def _split(source: str) -> tuple[str, str | None, str | None]:
  """Returns (address, part, digest) of "ADDRESS:PART#sha256=DIGEST"."""
  part = digest = None
  if "#sha256=" in source:
    source, _, digest = source.rpartition("#sha256=")
    digest = digest.lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
      raise UserError(
        f"#sha256={digest} is not a SHA-256; give its 64 hexadecimal digits,"
        " and a part before it: FILE.npz:PART#sha256=DIGITS"
      )
  file, colon, name = source.rpartition(":")
  if colon and file.endswith(".npz"):
    source, part = file, name or None
  return source, part, digest


def _fetch(address: str, digest: str | None) -> pathlib.Path:
  """Returns the file in the cache, downloaded if necessary."""
  url = _make_url(address)
  path = _cached_path(url)
  if path.exists():
    _check_digest(path, digest)
    return path
  if path.suffix == ".safetensors":
    # First, because existing weights imply that the download is complete.
    split = urllib.parse.urlsplit(url)
    folder = split.path.rpartition("/")[0]
    config = split._replace(path=f"{folder}/config.json").geturl()
    if not path.with_name("config.json").exists():
      with contextlib.suppress(_NotThere):
        _download(config, path.with_name("config.json"), None)
  _download(url, path, digest)
  return path


class _NotThere(UserError):
  """The server has no such file, or it is not public."""


def _download(url: str, path: pathlib.Path, digest: str | None):
  try:
    import pooch
    import requests
  except ImportError as e:
    raise needs_extra(f"downloading {_shown(url)}", "pooch") from e
  pooch.get_logger().setLevel("WARNING")  # INFO includes the query
  log.info("downloading %s", _shown(url))
  downloader: Any = pooch.HTTPDownloader(
    progressbar=sys.stderr.isatty(),
    chunk_size=2**20,
    timeout=_TIMEOUT,
    headers={"Accept-Encoding": "identity"},
  )
  try:
    pooch.retrieve(
      url, digest, fname=path.name, path=path.parent, downloader=downloader
    )
  except requests.HTTPError as e:
    code = getattr(e.response, "status_code", 0)
    reason = f"cannot download {_shown(url)}: HTTP {code}"
    if code in (401, 403, 404, 410):
      raise _NotThere(f"{reason}; it is not there, or not public") from e
    raise UserError(f"{reason}; run again later") from e
  except requests.RequestException as e:
    why = one_line(Exception(re.sub(r"\?\S+", "", str(e))))  # no query
    raise UserError(
      f"cannot download {_shown(url)}: {why}; check the network and run again"
    ) from e
  except OSError as e:
    raise UserError(
      f"cannot store {path}: {e.strerror or e}; make room, or choose another "
      "folder with VIT_JAX_CACHE"
    ) from e
  except ValueError as e:  # the digest
    raise UserError(
      f"{_shown(url)} does not have the SHA-256 {digest}: corrupt, or another "
      "version; nothing is kept: run again, or correct the digest"
    ) from e


def _make_url(address: str) -> str:
  """Returns the https:// form of gs://, and the rest percent-encoded."""
  if address.startswith("gs://"):
    return f"{_STORAGE}/{urllib.parse.quote(address.removeprefix('gs://'))}"
  return urllib.parse.quote(address, safe="%:/?&=+,;@~!$'()*[]")


def _shown(url: str) -> str:
  """Returns the address without its query, which may hold a signature."""
  return url.partition("?")[0]


def _cached_path(url: str) -> pathlib.Path:
  """Returns the cache path of `url`; files of one folder stay together."""
  root = os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax"
  split = urllib.parse.urlsplit(url)
  folder, _, name = split.path.rpartition("/")
  # The hash makes the name unique; the words are human-readable.
  key = split._replace(path=folder).geturl()
  words = re.sub(r"[^\w.-]+", "_", urllib.parse.unquote(split.netloc + folder))
  folder = f"{words[-80:]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
  name = re.sub(r"[/\x00-\x1f]", "_", urllib.parse.unquote(name))
  return pathlib.Path(root).expanduser() / folder / name


def _check_digest(path: str | pathlib.Path, digest: str | None):
  """Raises a UserError if a digest is given and the file does not match."""
  if digest is None:
    return
  with open(path, "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != digest:
    raise UserError(
      f"{path} has SHA-256 {found}, not {digest}: corrupt, or another version; "
      "delete it, or correct the digest"
    )
