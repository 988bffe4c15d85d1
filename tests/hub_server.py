"""A local HTTP server that speaks as much of the Hub's protocol as reading a data set needs, over real sockets."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    datasets: dict[str, dict[str, bytes]]  # repository id -> path -> content
    requests: list[str]

    def log_message(self, *args):
        pass

    def _send(self, code: int, content: bytes = b"", **headers: str):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object, code: int = 200, **headers: str):
        self._send(code, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def _entries(self, files: dict[str, bytes], kind: str, folder: str | None) -> list[dict]:
        """Files asked for by name (paths-info), or the files and folders right inside a folder (tree)."""
        if kind == "paths-info":
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            names = [name for name in asked if name in files]
            folders: set[str] = {name for name in asked if any(path.startswith(name + "/") for path in files)}
        else:
            prefix = f"{folder}/" if folder else ""
            inside = [name for name in files if name.startswith(prefix)]
            names = [name for name in inside if "/" not in name[len(prefix) :]]
            folders = {prefix + name[len(prefix) :].split("/")[0] for name in set(inside) - set(names)}
        entries = [{"type": "file", "path": n, "size": len(files[n]), "oid": _git_sha(files[n])} for n in names]
        return entries + [{"type": "directory", "path": name, "oid": COMMIT} for name in sorted(folders)]

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path} {self.headers.get('Range') or ''}".strip())
        if api := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path):
            files = self.datasets.get(api[1])
            if files is None:
                return self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            if api[2] in ("tree", "paths-info"):
                return self._json(self._entries(files, api[2], api[4]))
            siblings = [{"rfilename": name} for name in files]
            return self._json({"_id": "0", "id": api[1], "sha": COMMIT, "siblings": siblings, "tags": []})
        if resolve := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.datasets.get(resolve[1], {}).get(resolve[2])
            if content is None:
                return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{_git_sha(content)}"', "Accept_Ranges": "bytes"}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
                headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
                return self._send(206, content[first : last + 1], **headers)
            return self._send(200, content, **headers)
        return self._json({"error": f"no such page: {path}"}, 404)

    do_HEAD = do_POST = do_GET


@contextmanager
def serve(datasets: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serves data sets on the loopback interface; yields the endpoint and the growing list of requests."""
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"datasets": datasets, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
