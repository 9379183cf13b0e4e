"""A web server on this machine: plain files, and as much of the Hugging Face
hub as huggingface_hub's downloads and uploads ask for.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading

TOKEN = "hf_good"


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server, path = self.server, self.path.partition("?")[0]
    server.requests.append(self.path)
    if self.path in server.files:
      body = server.files[self.path]
      self._answer(200, body[: server.cut], {"Content-Length": str(len(body))})
    elif match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
      self._repo(*match.groups(), self._describe)
    elif match := re.fullmatch(r"/api/models/(.+)/tree/(.+)", path):
      self._repo(*match.groups(), self._list)
    elif match := re.fullmatch(r"/(.+)/resolve/(.+?)/(.+)", path):
      name, revision, file = match.groups()
      self._repo(
        name, revision, lambda sha, files: self._file(sha, files, file)
      )
    else:
      self._answer(server.missing)

  do_HEAD = do_GET

  def do_POST(self):
    server = self.server
    body = self.rfile.read(int(self.headers["Content-Length"]))
    if self.headers["Authorization"] != f"Bearer {TOKEN}":
      return self._answer(401)
    if self.path == "/api/repos/create":
      made = json.loads(body)
      name = f"{made['organization']}/{made['name']}"
      server.private[name] = made.get("visibility") or made["private"]
      server.repos.setdefault(name, {"main": {}})
      return self._json({"url": f"{server.base}/{name}"})
    if match := re.fullmatch(r"/api/models/(.+)/preupload/main.*", self.path):
      files = [f["path"] for f in json.loads(body)["files"]]
      modes = [
        {"path": f, "uploadMode": "regular", "shouldIgnore": False}
        for f in files
      ]
      return self._json({"files": modes})
    if match := re.fullmatch(r"/api/models/(.+)/commit/main.*", self.path):
      for line in body.splitlines()[1:]:
        value = json.loads(line)["value"]
        content = base64.b64decode(value["content"])
        server.repos[match[1]]["main"][value["path"]] = content
      url = f"{server.base}/{match[1]}/commit/{'1' * 40}"
      return self._json({"commitOid": "1" * 40, "commitUrl": url})
    return self._json({})  # the model card is right

  def _repo(self, name, revision, answer):
    """Answers for one revision of a repository, or with the hub's errors."""
    server = self.server
    if name in server.gated:
      return self._answer(403, headers={"X-Error-Code": "GatedRepo"})
    if name not in server.repos:
      return self._answer(401, headers={"X-Error-Code": "RepoNotFound"})
    shas = {_sha(name, r): files for r, files in server.repos[name].items()}
    sha = revision if revision in shas else _sha(name, revision)
    if sha not in shas:
      return self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
    return answer(sha, shas[sha])

  def _describe(self, sha, files):
    siblings = [{"rfilename": name} for name in files]
    self._json({"id": "x/y", "sha": sha, "siblings": siblings})

  def _list(self, sha, files):
    self._json(
      [
        {
          "type": "file",
          "path": name,
          "size": len(x),
          "oid": _sha(name, str(x)),
        }
        for name, x in files.items()
      ]
    )

  def _file(self, sha, files, name):
    if name not in files:
      return self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
    body = files[name]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{_sha(name, str(body))}"'}
    headers["Content-Length"] = str(len(body))
    return self._answer(200, body[: self.server.cut], headers)

  def _json(self, value):
    body = json.dumps(value).encode()
    headers = {"Content-Type": "application/json"}
    self._answer(200, body, headers | {"Content-Length": str(len(body))})

  def _answer(self, status, body=b"", headers=None):
    self.send_response(status)
    for name, value in (headers or {"Content-Length": str(len(body))}).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def log_message(self, *args):
    pass


class Server(http.server.ThreadingHTTPServer):
  """What there is, and how badly it is served."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.base = f"http://127.0.0.1:{self.server_port}"
    self.files = {}  # {path: bytes}
    self.repos = {}  # {"OWNER/NAME": {revision: {file: bytes}}}
    self.gated, self.private = set(), {}
    self.cut = None  # bytes after which a file's connection ends
    self.missing = 404
    self.requests = []


@contextlib.contextmanager
def serve():
  """Yields a running server."""
  with Server() as server:
    threading.Thread(
      target=server.serve_forever, args=(0.01,), daemon=True
    ).start()
    yield server
    server.shutdown()


def _sha(*parts):
  return hashlib.sha1("/".join(parts).encode()).hexdigest()
