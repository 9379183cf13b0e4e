"""Where weights are: a local path, an address, or a published name.

A file on the web is downloaded once into the cache folder, $VIT_JAX_CACHE or
~/.cache/vit_jax, and read from there the next time, without a network:

  FOLDER/NAME          the file, complete and checked
  FOLDER/NAME.part     what has come so far
  FOLDER/NAME.version  which version of the file that is a part of
  FOLDER/NAME.lock     held by the process that downloads

An interrupted download is gone on with if the server still has that version.
Nothing appears under its own name before it is complete: its length and, where
one is known, its SHA-256 are right.
"""

import contextlib
import fcntl
import hashlib
import http.client
import logging
import os
import pathlib
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

from vit_jax.errors import UserError, suggest
from vit_jax.pretrained import embedded
from vit_jax.pretrained.names import PUBLISHED

log = logging.getLogger(__name__)

# Public objects need no credentials and no library here.
_STORAGE = "https://storage.googleapis.com"
_SUFFIXES = (".npz", ".safetensors")
_TIMEOUT = 60  # seconds without a byte
_CHUNK = 2**20  # bytes
_MB = 10**6


class Source(NamedTuple):
  """Where weights can be read.

  Attributes:
    path: a local file or folder; or a gs:// folder, unchanged, which epath
      reads (as pathlib.Path it would lose a slash, so this is a string).
    part: the sub-model named after an npz file, "img" of "file.npz:img".
  """

  path: str
  part: str | None = None


class _NotThere(UserError):
  """The server has no such file, or not for everybody."""


def locate(
  source: str | os.PathLike[str],
  cache_dir: str | os.PathLike[str] | None = None,
) -> Source:
  """Returns where `source` can be read, after downloading it if need be.

  Args:
    source: one of
      - a local file or folder;
      - https:// or http:// and a file .npz or .safetensors; beside a
        .safetensors its config.json is fetched as well, if there is one;
      - gs:// and such a file, which must be public, or a folder;
      - a name in `names.PUBLISHED`, or in `embedded.MODELS`: in the package.
      A file may be followed by ":PART" (npz only) and then by "#sha256=HEX".
    cache_dir: instead of $VIT_JAX_CACHE or ~/.cache/vit_jax.

  Raises:
    UserError: there is no such thing, it cannot be downloaded or stored, or its
      digest is another one.
  """
  source = os.fspath(source)
  if os.path.exists(source):
    return Source(source)
  address, part, digest = _split(source)
  address = os.fspath(embedded.MODELS.get(address, address))
  if os.path.exists(address):
    _check_digest(pathlib.Path(address), digest)
    return Source(address, part)
  if address in PUBLISHED:
    address, known = PUBLISHED[address]
    digest = digest or known
  _check_address(address)
  is_file = address.partition("?")[0].endswith(_SUFFIXES)
  if is_file:
    return Source(str(_fetch(address, digest, cache_dir)), part)
  if not address.startswith("gs://") or digest:
    raise UserError(
      f"{_shown(address)} is not a file .npz or .safetensors; give the address"
      " of the file itself"
    )
  return Source(address)


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


def _check_address(address: str):
  """Raises UserError unless this is an address that can be read."""
  if address.startswith(("https://", "http://", "gs://")):
    return
  if "://" in address:
    raise UserError(
      f"cannot read {_shown(address)}; give a local path, or an address that"
      " begins with https:// or gs://"
    )
  raise UserError(
    f"no checkpoint at {address}: it is neither a file or folder here nor a "
    f"published name{suggest(address, [*PUBLISHED, *embedded.MODELS])}"
  )


def _fetch(address, digest, cache_dir) -> pathlib.Path:
  """Returns the file in the cache, downloaded if it is not there yet."""
  url = _make_url(address)
  path = _cached_path(url, cache_dir)
  try:
    if path.exists():
      _check_digest(path, digest, remove=True)
      return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
      # First, because the weights' presence says that all is there.
      _fetch_config(url, path)
    with _locked(path):
      if path.exists():  # another process was faster
        _check_digest(path, digest, remove=True)
      else:
        _download(url, path, digest)
  except OSError as error:
    raise UserError(
      f"cannot store {path}: {error.strerror or error}; make room, or choose"
      " another folder with VIT_JAX_CACHE; what has come is kept"
    ) from error
  return path


def _fetch_config(url, path):
  """Downloads the config.json beside a file, if there is one."""
  split = urllib.parse.urlsplit(url)
  folder = split.path.rpartition("/")[0]
  config = path.with_name("config.json")
  with _locked(config), contextlib.suppress(_NotThere):
    if not config.exists():
      url = split._replace(path=f"{folder}/config.json").geturl()
      _download(url, config, None)


def _make_url(address: str) -> str:
  """Returns the https:// form of gs://, and the rest percent-encoded."""
  if address.startswith("gs://"):
    return f"{_STORAGE}/{urllib.parse.quote(address.removeprefix('gs://'))}"
  return urllib.parse.quote(address, safe="%:/?&=+,;@~!$'()*[]")


def _shown(url: str) -> str:
  """Returns the address without its query, which may hold a signature."""
  return url.partition("?")[0]


def _cached_path(url: str, cache_dir) -> pathlib.Path:
  """Returns where `url` is kept: files of one folder stay together."""
  root = cache_dir or os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax"
  split = urllib.parse.urlsplit(url)
  folder, _, name = split.path.rpartition("/")
  # The hash keeps apart what differs; the words are for who looks inside.
  key = split._replace(path=folder).geturl()
  words = re.sub(r"[^\w.-]+", "_", urllib.parse.unquote(split.netloc + folder))
  folder = f"{words[-80:]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
  name = re.sub(r"[/\x00-\x1f]", "_", urllib.parse.unquote(name))
  return pathlib.Path(root).expanduser() / folder / name


@contextlib.contextmanager
def _locked(path: pathlib.Path):
  """Keeps other processes from downloading the same file meanwhile.

  The system releases the lock of a process that dies, so the file may stay.
  """
  with open(f"{path}.lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log.info("waiting for another process to download %s", path.name)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _download(url: str, path: pathlib.Path, digest: str | None):
  """Downloads `url` to `path`, going on with what is there of it."""
  part = pathlib.Path(f"{path}.part")
  version = pathlib.Path(f"{path}.version")
  have = part.stat().st_size if part.exists() and version.exists() else 0
  known = version.read_text() if have else ""
  with contextlib.ExitStack() as stack:
    response = stack.enter_context(_open(url, have, known))
    start, total = _read_span(response)
    if start not in (0, have) and total != have:
      response = stack.enter_context(_open(url))
      start, total = _read_span(response)
    if start is None and total != have:
      raise _explain_failure(url, ValueError(f"HTTP {response.status}"))
    if start in (0, have):
      if start == 0:
        # In this order, so that old bytes never stand beside a new version.
        part.write_bytes(b"")
        version.write_text(_read_version(response))
      _copy(response, url, part, start, total)
  size = part.stat().st_size
  if total is not None and size != total:
    if size > total:
      part.unlink()
    raise UserError(
      f"{_shown(url)}: the connection ended after {size} of {total} bytes;"
      " run again to go on from there"
    )
  _check_digest(part, digest, remove=True, name=_shown(url))
  os.replace(part, path)
  version.unlink(missing_ok=True)


def _open(url: str, have: int = 0, version: str = ""):
  """Returns the server's answer; to be asked only for bytes from `have` on.

  Its status is 200, 206, or 416 where there are no bytes from `have` on.
  """
  headers = {"User-Agent": "vit_jax", "Accept-Encoding": "identity"}
  if have and version:
    # If the file has changed the server ignores the range and sends it whole.
    headers |= {"Range": f"bytes={have}-", "If-Range": version}
  request = urllib.request.Request(url, headers=headers)
  try:
    return urllib.request.urlopen(request, timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:
    if error.code == 416 and have:
      return error
    raise _explain_status(url, error) from error
  except (OSError, ValueError, http.client.HTTPException) as error:
    raise _explain_failure(url, error) from error


def _read_span(response) -> tuple[int | None, int | None]:
  """Returns (first byte, size of the whole file), None where not known."""
  if response.status == 200:
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None
  header = response.headers.get("Content-Range", "")
  match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", header.strip())
  if not match:
    return None, None
  start, total = match.groups()
  return (
    int(start) if start else None,
    int(total) if total != "*" else None,
  )


def _read_version(response) -> str:
  """Returns what If-Range takes, or "" where the server gives nothing."""
  tag = response.headers.get("ETag", "")
  # A weak tag does not promise the same bytes, and If-Range refuses it.
  if tag and not tag.startswith("W/"):
    return tag
  return response.headers.get("Last-Modified", "")


def _copy(response, url, part, start: int, total: int | None):
  """Appends the answer's bytes to `part`, with a line each tenth."""
  name = urllib.parse.unquote(_shown(url).rpartition("/")[2])
  of = f"{total / _MB:.1f} MB" if total else "unknown size"
  log.info(
    "%s %s, %s", "going on with" if start else "downloading", _shown(url), of
  )
  step = total / 10 if total else 100 * _MB
  size = start
  with open(part, "ab") as file:
    while chunk := _read(response, url):
      file.write(chunk)
      before, size = size, size + len(chunk)
      if size // step > before // step:
        log.info("%s: %.1f MB of %s", name, size / _MB, of)
    file.flush()
    os.fsync(file.fileno())


def _read(response, url) -> bytes:
  """Returns the next bytes of the answer, b"" at its end."""
  try:
    return response.read1(_CHUNK)
  except (OSError, http.client.HTTPException) as error:
    raise _explain_failure(url, error) from error


def _check_digest(path, digest, *, remove=False, name=None):
  """Raises UserError if a digest is given and the file has another one."""
  if digest is None:
    return
  try:
    with open(path, "rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  if found == digest:
    return
  if remove:
    path.unlink()
  action = "removed; run again to download it anew" if remove else "not used"
  raise UserError(
    f"{name or path} has SHA-256 {found}, not {digest}: damaged, or another"
    f" version; {action}, or correct the digest"
  )


def _explain_status(url, error: urllib.error.HTTPError) -> UserError:
  """Returns the line for an answer that is not the file."""
  kind, action = UserError, "run again later; what has come is kept"
  if error.code in (401, 403):
    kind, action = (
      _NotThere,
      (
        "it is not public, or not there; check the address, or download it"
        " yourself and give the local path"
      ),
    )
  elif error.code in (404, 410):
    kind, action = _NotThere, "check the address"
  reason = " ".join(f"HTTP {error.code} {error.reason}".split())
  return kind(f"cannot download {_shown(url)}: {reason}; {action}")


def _explain_failure(url, error: Exception) -> UserError:
  """Returns the line for a download without an answer, or cut short."""
  reason = getattr(error, "reason", error)
  text = " ".join(str(reason).split()) or type(reason).__name__
  action = "check the network and run again; what has come is kept"
  if isinstance(reason, TimeoutError):
    text = f"no answer within {_TIMEOUT} s"
  elif isinstance(reason, ssl.SSLCertVerificationError):
    action = "check this machine's clock and certificates (SSL_CERT_FILE)"
  return UserError(f"cannot download {_shown(url)}: {text}; {action}")
