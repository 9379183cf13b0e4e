"""A stand-in for Cloud Storage on this machine, with a folder behind it.

gs://BUCKET/NAME is FOLDER/BUCKET/NAME. It answers as much of the JSON and XML
APIs as ArrayRecord, TensorStore (Orbax) and TensorFlow use.

  python tests/fake_gcs.py [--latency=0.1] FOLDER COMMAND...

runs a command whose gs:// is this folder, then prints the requests and bytes.
TensorFlow's GCS file system has fixed addresses: its requests come through
`https_proxy`, with a certificate that the program `openssl` makes.
"""

import argparse
import contextlib
import functools
import http.server
import io
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

_MARKER = ".marker"  # the file of an object whose name ends in a slash
_OPENSSL = """openssl req -x509 -nodes -days 3 -subj /CN=fake -newkey ec
-pkeyopt ec_paramgen_curve:P-256 -out certificate -keyout key -addext
subjectAltName=DNS:storage.googleapis.com,DNS:www.googleapis.com"""


class _Refused(Exception):
  """Ends a request; the argument is the HTTP status."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True

  def do_CONNECT(self):
    """Becomes the server that the client wants to reach."""
    self.send_response(200)
    self.end_headers()
    self.request = self.server.tls.wrap_socket(self.request, server_side=True)
    self.setup()

  def do_GET(self):
    body = self._read_body()
    url = urlsplit(self.path)
    self.query, names = dict(parse_qsl(url.query)), []
    with self.server.count(self) as fault:
      self.drops = fault == "drop"
      try:
        if isinstance(fault, int):
          raise _Refused(fault)
        for pattern, route in _ROUTES.items():
          if match := re.fullmatch(pattern, f"{self.command} {url.path}"):
            names = [unquote(name) for name in match.groups()]
            return route(self, body, *names)
        raise _Refused(501)
      except ConnectionError:  # the client has enough
        self.close_connection = True
      except OSError:
        self._answer(404)
      except _Refused as e:
        self._answer(e.args[0])

  do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

  def _read_body(self):
    if self.headers["Transfer-Encoding"] != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    parts = []
    while size := int(self.rfile.readline(), 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def bucket(self, _, bucket):
    if not (self.server.folder / bucket).is_dir():
      raise _Refused(404)
    self._answer_json({"name": bucket})

  def list(self, _, bucket):
    prefix, delimiter, after, first, end = (
      self.query.get(key, "")
      for key in (
        "prefix",
        "delimiter",
        "pageToken",
        "startOffset",
        "endOffset",
      )
    )
    found = {}  # {object or prefix: whether it is a prefix}
    for name in self.server.list(bucket):
      if name.startswith(prefix) and first <= name < (end or "\U0010ffff"):
        head, cut, _ = name[len(prefix) :].partition(delimiter or "\0")
        found[prefix + head + cut] = bool(cut)
    names = sorted(name for name in found if name > after)
    shown = names[: int(self.query.get("maxResults", 1000))]
    items = [self._describe(bucket, x) for x in shown if not found[x]]
    page = {"items": items, "prefixes": [x for x in shown if found[x]]}
    if len(names) > len(shown):
      page["nextPageToken"] = shown[-1]
    self._answer_json(page)

  def get(self, body, bucket, name):
    if self.query.get("alt") == "media":
      return self.read(body, bucket, name)
    self._check(bucket, name)
    self._answer_json(self._describe(bucket, name))

  def read(self, _, bucket, name):
    """Sends an object, or a range of it, until the client closes."""
    self._check(bucket, name)
    path = self.server.path(bucket, name)
    with path.open("rb") as file:
      end = size = os.fstat(file.fileno()).st_size
      headers = {"X-Goog-Generation": path.stat().st_mtime_ns}
      span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "")
      if not span:
        return self._answer(200, file, size, headers)
      first, last = span.groups()
      if first and last:
        end = min(size, int(last) + 1)
      begin = int(first) if first else max(0, size - int(last))
      if begin >= size:
        raise _Refused(416)
      file.seek(begin)
      headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
      self._answer(206, file, end - begin, headers)

  def delete(self, _, bucket, name):
    self._check(bucket, name)
    path = self.server.path(bucket, name)
    path.unlink()
    with contextlib.suppress(OSError):  # a folder that has more in it
      while (path := path.parent) != self.server.folder / bucket:
        path.rmdir()
    self._answer(204)

  def copy(self, _, bucket, name, other, new_name):
    content = self.server.path(bucket, name).read_bytes()
    resource = self._write(other, new_name, content)
    self._answer_json({"done": True, "resource": resource})

  def upload(self, body, bucket):
    """Takes a whole object, or begins to take one in parts."""
    if "upload_id" in self.query:
      return self._take_part(body, bucket)
    name = self.query.get("name") or json.loads(body)["name"]
    if self.query["uploadType"] == "media":
      return self._answer_json(self._write(bucket, name, body))
    number = len(self.server.uploads)
    self.server.uploads.append((name, bytearray()))
    scheme = "https" if isinstance(self.connection, ssl.SSLSocket) else "http"
    place = f"{scheme}://{self.headers['Host']}{self.path}&upload_id={number}"
    self._answer(200, headers={"Location": place})

  def _take_part(self, body, bucket):
    """Takes a part of an object: all but the last are answered by 308."""
    name, content = self.server.uploads[int(self.query["upload_id"])]
    span, _, total = self.headers.get("Content-Range", "/").partition("/")
    if match := re.fullmatch(r"bytes (\d+)-\d+", span):
      del content[int(match[1]) :]
    content += body
    if total in ("", str(len(content))):
      return self._answer_json(self._write(bucket, name, content))
    last = len(content) - 1
    self._answer(308, headers={"Range": f"bytes=0-{last}"} if content else {})

  def _write(self, bucket, name, content):
    with self.server.lock:
      self._check(bucket, name, is_read=False)
      path = self.server.path(bucket, name)
      path.parent.mkdir(parents=True, exist_ok=True)
      partial = self.server.folder / ".partial"
      partial.write_bytes(content)
      os.utime(partial, ns=(time.time_ns(),) * 2)  # the generation
      partial.replace(path)
      return self._describe(bucket, name)

  def _check(self, bucket, name, is_read=True):
    """Refuses what is not there, or not as a precondition has it."""
    path = self.server.path(bucket, name)
    now = path.stat().st_mtime_ns if path.is_file() else 0
    if is_read and not now:
      raise _Refused(404)
    if int(self.query.get("ifGenerationMatch", now)) != now:
      raise _Refused(412)
    if int(self.query.get("ifGenerationNotMatch", -1)) == now:
      raise _Refused(304)

  def _describe(self, bucket, name):
    status = self.server.path(bucket, name).stat()
    when = datetime.fromtimestamp(status.st_mtime, UTC)
    texts = ("size", status.st_size), ("generation", status.st_mtime_ns)
    return {
      "bucket": bucket,
      "name": name,
      "updated": f"{when:%Y-%m-%dT%H:%M:%S.%f}Z",
      **{key: str(value) for key, value in texts},
    }

  def _answer_json(self, value):
    body = json.dumps(value).encode()
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    self._answer(200, io.BytesIO(body), len(body), headers)

  def _answer(self, status, file=None, length=0, headers=None):
    """Sends the head, and `length` bytes of a file from where it stands."""
    self.send_response(status)
    for name, value in ({"Content-Length": length} | (headers or {})).items():
      self.send_header(name, str(value))
    self.end_headers()
    left = length // 2 if self.drops else length
    while left and self.command != "HEAD":
      self.wfile.write(data := file.read(min(left, 1 << 16)))
      left -= len(data)
      with self.server.lock:
        self.server.sent += len(data)
    self.close_connection |= self.drops

  def log_message(self, *args):
    pass


_O = "/b/([^/]+)/o/([^/]+)"
_ROUTES = {
  "GET /storage/v1/b/([^/]+)(?:/storageLayout)?": _Handler.bucket,
  "GET /storage/v1/b/([^/]+)/o/?": _Handler.list,
  f"GET /storage/v1{_O}": _Handler.get,
  f"DELETE /storage/v1{_O}": _Handler.delete,
  f"POST /storage/v1{_O}/rewriteTo{_O}": _Handler.copy,
  "(?:POST|PUT) /upload/storage/v1/b/([^/]+)/o": _Handler.upload,
  "(?:GET|HEAD) /([^/]+)/(.+)": _Handler.read,  # the XML API
}


class Server(http.server.ThreadingHTTPServer):
  """What it has been asked for, and how badly it serves.

  Attributes:
    latency: seconds before each answer.
    fault: of the number of a request, from 1, and "METHOD /path?query RANGE",
      returns None, an HTTP status such as 503, or "drop": the connection ends
      in half of the body.
    requests: "METHOD /path?query RANGE" of all requests.
    sent: bytes of the bodies of answers.
    peak: the most requests at once.
  """

  daemon_threads = True
  request_queue_size = 1024

  def __init__(self, folder, scratch, latency):
    super().__init__(("127.0.0.1", 0), _Handler)
    # Else 4 MB, which would count as sent, are on their way when a client that
    # has enough closes its request.
    self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    self.folder, self.scratch, self.latency = Path(folder), scratch, latency
    self.fault = lambda number, request: None
    self.lock, self.uploads, self._active = threading.RLock(), [], 0
    self.reset()

  def reset(self):
    """Counts from here on."""
    self.requests, self.sent, self.peak = [], 0, 0

  @contextlib.contextmanager
  def count(self, request):
    """Counts a request, waits, and yields its fault."""
    text = f"{request.command} {request.path} {request.headers['Range'] or ''}"
    with self.lock:
      self.requests.append(text.strip())
      fault = self.fault(len(self.requests), text)
      self._active += 1
      self.peak = max(self.peak, self._active)
    try:
      time.sleep(self.latency)
      yield fault
    finally:
      with self.lock:
        self._active -= 1

  def path(self, bucket, name):
    """Returns the file of an object."""
    name = name + _MARKER if name.endswith("/") else name
    return self.folder / bucket / name

  def list(self, bucket):
    """Returns the names of all objects of a bucket."""
    root = self.folder / bucket
    files = (p for p in root.rglob("*") if p.is_file())
    names = (p.relative_to(root).as_posix() for p in files)
    return [name.removesuffix(_MARKER) for name in names]

  @functools.cached_property
  def tls(self):
    """What makes a connection one to Google; the certificate is made now."""
    command = _OPENSSL.split()
    subprocess.run(command, cwd=self.scratch, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self.scratch / "certificate", self.scratch / "key")
    return context

  def environment(self):
    """Returns the variables with which the libraries find it."""
    assert self.tls
    base = f"http://127.0.0.1:{self.server_port}"
    return {
      "CLOUD_STORAGE_EMULATOR_ENDPOINT": base,  # ArrayRecord
      "TENSORSTORE_GCS_HTTP_URL": base,
      "STORAGE_EMULATOR_HOST": base,  # google.cloud.storage, of Orbax
      "https_proxy": base,  # TensorFlow
      "CURL_CA_BUNDLE": str(self.scratch / "certificate"),
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }

  def handle_error(self, request, client_address):
    if not isinstance(sys.exception(), ConnectionError):  # closed by a client
      super().handle_error(request, client_address)


@contextlib.contextmanager
def serve(folder, latency=0.0):
  """Yields a running server."""
  with (
    tempfile.TemporaryDirectory() as scratch,
    Server(folder, Path(scratch), latency) as server,
  ):
    loop = threading.Thread(target=server.serve_forever, args=(0.01,))
    loop.start()
    try:
      yield server
    finally:
      server.shutdown()
      loop.join()


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--latency", type=float, default=0)
  parser.add_argument("folder")
  parser.add_argument("command", nargs=argparse.REMAINDER)
  args = parser.parse_args()
  with serve(args.folder, args.latency) as server:
    environment = os.environ | server.environment()
    code = subprocess.run(args.command, env=environment).returncode
  count, sent = len(server.requests), server.sent / 1e6
  print(f"{count:,} requests, at most {server.peak} at once; {sent:,.1f} MB")
  return code


if __name__ == "__main__":
  sys.exit(main())
