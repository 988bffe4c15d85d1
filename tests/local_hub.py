"""A Hub on the loopback interface: real HTTP, kept in memory, with faults on demand.

Speaks what huggingface_hub sends to create, read, write, tag and load model repositories, over LFS or Xet (whose store
of chunks is a folder that hf_xet itself reads and writes). Laws: a token decides what may be seen and done; a request
is read and checked whole before anything changes, and changes under one lock, so a refused or broken one leaves every
ref as it was; a page that is not known is recorded in `unknown`.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import socket
import struct
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hub_state import GITATTRIBUTES, LFS_ABOVE, Blob, Fault, Hub, Refusal, Repo, card_errors


class _Broken(Exception):
    """The connection was broken on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
    hub: Hub
    user: str | None
    may_write: bool

    def log_message(self, *args):
        pass

    def handle_any(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        self.base = f"http://{self.headers['Host']}"
        with self.hub.lock:
            self.hub.log.append((self.command, self.path))
            fault = next((f for f in self.hub.faults if f.strikes(self.command, self.path)), None)
        try:
            self._strike_early(fault)
            body = self._body(cut=fault is not None and fault.how == "cut")
            if callable(getattr(fault, "how", None)):
                fault.how()
            self.lost, self.halved = (fault is not None and fault.how == how for how in ("lose", "halve"))
            try:
                with self.hub.lock:
                    self._authenticate()
                    self._refuse_by(fault)
                    self._route(url.path, body)
            except Refusal as error:
                headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
                self._send({"error": error.message}, error.status, **headers, **error.headers)
        except _Broken:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _strike_early(self, fault: Fault | None):
        if fault is not None and fault.how == "drop":
            self._break()

    def _refuse_by(self, fault: Fault | None):
        if fault is None:
            return
        if isinstance(fault.how, int):
            raise Refusal(fault.how, "as the test asked", **fault.headers)
        if fault.how == "echo":
            raise Refusal(500, f"could not handle {self.headers['Authorization']}")

    def _break(self):
        """Resets the connection: the client sees an error, never an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Broken

    def _body(self, cut: bool) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                if cut:
                    self._break()
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length // 2 if cut else length)
        if cut:
            self._break()
        return body

    def _send(self, content: object = None, status: int = 200, **headers: str):
        if self.lost:
            self._break()
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.halved else data)
        if self.halved:
            self._break()

    # Who asks, and what they may see.

    def _authenticate(self):
        self.user, self.may_write = None, False
        if header := self.headers.get("Authorization"):
            token = header.removeprefix("Bearer ")
            if token not in self.hub.users:
                raise Refusal(401, "Invalid credentials in Authorization header")
            self.user, self.may_write = self.hub.users[token]

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and repo_id.split("/")[0] != self.user):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, repo_id: str, *, by_anybody: bool = False) -> Repo:
        repo = self._repo(repo_id)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if not self.may_write or not (by_anybody or repo_id.split("/")[0] == self.user):
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    # Pages. Groups of the patterns are unquoted one by one: a revision may hold slashes (refs%2Fpr%2F1).

    def _route(self, path: str, body: bytes):
        for method, pattern, page in _ROUTES:
            if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                return page(self, body, *(group and urllib.parse.unquote(group) for group in match.groups()))
        self.hub.unknown.append(f"{self.command} {path}")
        raise Refusal(404, f"no such page: {path}")

    def whoami(self, body):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if self.may_write else "read"}
        auth = {"type": "access_token", "accessToken": token}
        self._send({"type": "user", "id": "0", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth})

    def agent_harnesses(self, body):
        raise Refusal(404, "huggingface_hub does without this list")

    def validate_yaml(self, body):
        errors = [{"message": error} for error in card_errors(json.loads(body)["content"])]
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self, body):
        asked = json.loads(body)
        owner = asked.get("organization") or self.user
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if not self.may_write or owner != self.user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        repo_id = f"{owner}/{asked['name']}"
        url = {"url": f"{self.base}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return self._send({"error": "You already created this model repo", **url}, 409)
        self.hub.repos[repo_id] = Repo(asked.get("visibility") == "private")
        self.hub.commit(repo_id, {".gitattributes": Blob(GITATTRIBUTES, False)}, title="initial commit")
        return self._send(url)

    def info(self, body, repo_id, revision=None):
        repo = self._repo(repo_id)
        commit = repo.resolve(revision or "main")
        about = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repo.private}
        about |= {"tags": [], "downloads": 0, "likes": 0, "gated": repo.gated and "auto"}
        self._send({**about, "siblings": [{"rfilename": path} for path in sorted(commit.files)]})

    def refs(self, body, repo_id):
        groups: dict[str, list] = {"heads": [], "tags": [], "pr": []}
        for ref, oid in self._repo(repo_id).refs.items():
            _, kind, name = ref.split("/", 2)
            groups[kind].append({"name": name, "ref": ref, "targetCommit": oid})
        pulls = {"pullRequests": groups["pr"]} if "include_prs" in self.query else {}
        self._send({"branches": groups["heads"], "tags": groups["tags"], "converts": [], **pulls})

    def tree(self, body, repo_id, revision, folder=None):
        commit = self._repo(repo_id).resolve(revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in commit.files.items() if path.startswith(prefix)}
        if not inside:
            headers = {"X-Repo-Commit": commit.oid}
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound", **headers)
        recursive = self.query.get("recursive", "").lower() == "true"
        files = [path for path in inside if recursive or "/" not in path[len(prefix) :]]
        folders = {prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
        entries += [self._entry(path, inside[path]) for path in sorted(files)]
        first = int(self.query.get("cursor", 0))
        last = first + self.hub.page_size
        following = urllib.parse.urlencode({**self.query, "cursor": last})
        link = {"Link": f'<{self.base}{urllib.parse.urlsplit(self.path).path}?{following}>; rel="next"'}
        self._send(entries[first:last], **(link if last < len(entries) else {}))

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict:
        size = len(blob.content)
        pointer = Blob(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob.oid}\nsize {size}\n".encode(), False
        )
        lfs = {"lfs": {"oid": blob.oid, "size": size, "pointerSize": len(pointer.content)}} if blob.lfs else {}
        return {"type": "file", "path": path, "size": size, "oid": (pointer if blob.lfs else blob).oid, **lfs}

    def resolve(self, body, repo_id, revision, path):
        repo = self._repo(repo_id)
        if repo.gated and repo_id.split("/")[0] != self.user:
            raise Refusal(403 if self.user else 401, f"Access to model {repo_id} is restricted", "GatedRepo")
        commit = repo.resolve(revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        size = len(blob.content)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(size)}
            if self.hub.xet_store is not None and blob.oid in self.hub.xet_hashes:
                page = f"{self.base}/api/models/{repo_id}/xet-read-token/{commit.oid}"
                headers |= {"X-Xet-Hash": self.hub.xet_hashes[blob.oid], "Link": f'<{page}>; rel="xet-auth"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self.hub.served[path] += size if self.command == "GET" else 0
            return self._send(blob.content, **headers)
        first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        if first > last:
            raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        self.hub.served[path] += last + 1 - first
        return self._send(
            blob.content[first : last + 1], 206, **headers, **{"Content-Range": f"bytes {first}-{last}/{size}"}
        )

    def preupload(self, body, repo_id, revision):
        asked = json.loads(body)
        commit = self._writable(repo_id, by_anybody="create_pr" in self.query).resolve(revision)
        ignored = asked.get("gitIgnore") or commit.files.get(".gitignore", Blob(b"", False)).content.decode()
        patterns = [line for line in ignored.splitlines() if line and not line.startswith("#")]
        attributes = commit.files.get(".gitattributes", Blob(b"", False)).content.decode().splitlines()
        lfs = [line.split()[0] for line in attributes if "filter=lfs" in line]
        answers = []
        for file in asked["files"]:
            path, present = file["path"], commit.files.get(file["path"])
            binary = b"\0" in base64.b64decode(file["sample"])
            large = binary or file["size"] > LFS_ABOVE or any(fnmatch.fnmatch(path, pattern) for pattern in lfs)
            ignore = any(fnmatch.fnmatch(path, pattern) for pattern in patterns)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": ignore}
            answers.append(answer | ({"oid": present.oid} if present else {}))
        self._send({"files": answers})

    # LFS. As at the Hub's storage, the links themselves carry the permission.

    def lfs_batch(self, body, repo_id):
        self._writable(repo_id, by_anybody=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.base}/lfs/{wanted['oid']}"}
                if self.hub.part_size and wanted["size"] > self.hub.part_size:
                    numbers = range(1, -(-wanted["size"] // self.hub.part_size) + 1)
                    parts = {str(n): f"{self.base}/lfs-part/{wanted['oid']}/{n}" for n in numbers}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **parts}
                verify = {"href": f"{self.base}/{repo_id}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self._send({"transfer": "basic", "objects": objects})

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content does not have this hash")
        self.hub.lfs[oid] = body
        self._send()

    def lfs_part(self, body, oid, number):
        self.hub.lfs[f"{oid}/{number}"] = body
        self._send(None, 200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def lfs_complete(self, body, oid):
        parts = [self.hub.lfs.pop(f"{oid}/{part['partNumber']}") for part in json.loads(body)["parts"]]
        self.lfs_put(b"".join(parts), oid)

    def lfs_verify(self, body, repo_id):
        self._writable(repo_id, by_anybody=True)
        asked = json.loads(body)
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "object not found")
        self._send({})

    # Xet. The chunks go past the server, between hf_xet and the store that the server names.

    def xet_token(self, body, repo_id, kind, revision):
        if kind == "write":
            self._writable(repo_id, by_anybody="create_pr" in self.query)
        else:
            self._repo(repo_id)
        if self.hub.xet_store is None:
            raise Refusal(404, "this Hub has no Xet")
        store, expires = f"local://{self.hub.xet_store}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        self._send({"casUrl": store, "accessToken": "xet", "exp": expires}, **headers)

    def _from_xet(self, oid: str, size: int, path: str) -> bytes:
        """A file put together from the chunks in the store, as the Hub does before it takes a commit."""
        import hf_xet

        with tempfile.TemporaryDirectory() as folder:
            target = os.path.join(folder, "file")
            try:
                group = hf_xet.XetSession().new_file_download_group(endpoint=f"local://{self.hub.xet_store}")
                with group:
                    group.start_download_file(hf_xet.XetFileInfo(self.hub.xet_hashes[oid], size), target)
                with open(target, "rb") as file:
                    content = file.read()
            except (KeyError, OSError, RuntimeError) as error:
                raise Refusal(400, f"{path} points to an object that was not uploaded ({error!r})") from error
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, f"the content of {path} does not have this hash")
        return content

    # What moves refs.

    def make_commit(self, body, repo_id, revision):
        create_pr = "create_pr" in self.query
        repo = self._writable(repo_id, by_anybody=create_pr)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in repo.refs:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head, parent = repo.refs[ref], header.get("parentCommit")
        if parent and parent != head and not (create_pr and parent in repo.commits):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes = dict(self._change(line, repo.commits[parent or head].files) for line in lines[1:])
        if not changes:
            raise Refusal(400, "No files in the commit")
        if card := changes.get("README.md"):
            if errors := card_errors(card.content.decode()):
                raise Refusal(400, "; ".join(errors))
        number = 1 + max((int(r.split("/")[2]) for r in repo.refs if r.startswith("refs/pr/")), default=0)
        target = f"refs/pr/{number}" if create_pr else ref
        commit = self.hub.commit(repo_id, changes, ref=target, parent=parent or head, title=header["summary"])
        url = f"{self.base}/{repo_id}"
        pull = {"pullRequestUrl": f"{url}/discussions/{number}"} if create_pr else {}
        answer = {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{url}/commit/{commit.oid}",
            "hookOutput": "",
        }
        self._send({**answer, **pull})

    def _change(self, line: dict, files: dict[str, Blob]) -> tuple[str, Blob | None]:
        kind, value = line["key"], line["value"]
        if kind == "file":
            return value["path"], Blob(base64.b64decode(value["content"]), False)
        if kind == "lfsFile":
            if self.hub.xet_store is not None:
                return value["path"], Blob(self._from_xet(value["oid"], value["size"], value["path"]), True)
            if value["oid"] not in self.hub.lfs:
                raise Refusal(400, f"LFS pointer of {value['path']} points to an object that was not uploaded")
            return value["path"], Blob(self.hub.lfs[value["oid"]], True)
        if kind == "deletedFile" and value["path"] in files:
            return value["path"], None
        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")

    def make_branch(self, body, repo_id, branch):
        repo = self._writable(repo_id)
        if f"refs/heads/{branch}" in repo.refs:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        start = repo.resolve(json.loads(body or b"{}").get("startingPoint") or "main")
        repo.refs[f"refs/heads/{branch}"] = start.oid
        self._send({}, 201)

    def make_tag(self, body, repo_id, revision):
        repo, name = self._writable(repo_id), json.loads(body)["tag"]
        if f"refs/tags/{name}" in repo.refs:
            raise Refusal(409, f"Tag reference exists already: {name}")
        repo.refs[f"refs/tags/{name}"] = repo.resolve(revision).oid
        self._send({}, 201)

    def delete_ref(self, body, repo_id, kind, name):
        repo, ref = self._writable(repo_id), f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}"
        if ref == "refs/heads/main" or repo.refs.pop(ref, None) is None:
            raise Refusal(404 if ref != "refs/heads/main" else 403, f"cannot delete {ref}")
        self._send({})


_ID = "([^/]+/[^/]+)"
_API = f"/api/models/{_ID}"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("GET", "/api/agent-harnesses", _Handler.agent_harnesses),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", _API, _Handler.info),
    ("GET", f"{_API}/revision/([^/]+)", _Handler.info),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("GET", f"{_API}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    ("GET HEAD", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("POST", f"{_API}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/verify", _Handler.lfs_verify),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", "/lfs/([0-9a-f]{64})", _Handler.lfs_complete),
    ("PUT", "/lfs-part/([0-9a-f]{64})/([0-9]+)", _Handler.lfs_part),
    ("GET", f"{_API}/xet-(read|write)-token/(.+)", _Handler.xet_token),
    ("POST", f"{_API}/commit/([^/]+)", _Handler.make_commit),
    ("POST", f"{_API}/branch/([^/]+)", _Handler.make_branch),
    ("POST", f"{_API}/tag/([^/]+)", _Handler.make_tag),
    ("DELETE", f"{_API}/(branch|tag)/([^/]+)", _Handler.delete_ref),
]


@contextmanager
def serve(users: dict[str, tuple[str, bool]]) -> Iterator[tuple[str, Hub]]:
    """Runs a Hub for users, token -> (name, may write); yields its endpoint and its state."""
    hub = Hub(users)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
