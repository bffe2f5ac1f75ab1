"""A stand-in for the Hugging Face hub: serves local folders through the part of its HTTP API that downloads use."""

import hashlib
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

INVALID = "Invalid credentials in Authorization header"


class HubServer:
    """Serves `ORG/NAME` folders. Use it as a context manager, with `HF_ENDPOINT` set to its `url`.

    Attributes:
        url: Its address.
        requests: What was asked for: (method, path, the `Range` header or None).
        cut_after: Break the connection after this many bytes of a file that is longer; None serves files whole. May be changed at any time.
        cuts: How often to do that, from now on.
        ranges: Whether parts of files are served.
        failures: How many of the next requests for files are answered with status 503.
        refused: Access tokens that the hub does not know.
    """

    def __init__(
        self,
        folder: Path,
        tokens: Mapping[str, str | list[str]] | None = None,
        cut_after: int | None = None,
        cuts: int = 1_000_000,
    ) -> None:
        """Open a port; nothing is answered before `__enter__`.

        Args:
            folder: Holds `ORG/NAME` folders.
            tokens: For each gated repository, the access tokens that have rights to it.
            cut_after: See the attribute.
            cuts: See the attribute.
        """
        self.folder, self.cut_after, self.cuts = folder, cut_after, cuts
        self.ranges, self.failures, self.refused = True, 0, {"refused"}
        self.tokens = {name: [allowed] if isinstance(allowed, str) else list(allowed) for name, allowed in (tokens or {}).items()}
        self.requests: list[tuple[str, str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self, file: str) -> list[str | None]:
        """Return the `Range` header of each time that a file's contents were asked for."""
        return [span for method, path, span in self.requests if method == "GET" and path.endswith(f"/{file}")]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def _respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self._token() in self.hub.refused:
            self._json({"error": INVALID}, 401, {"X-Error-Message": INVALID})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._info(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?", path):
            self._tree(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(match[1], match[2])
        else:
            self._refuse(404, "", "Not Found")

    def _files(self, repo_id: str) -> list[Path] | None:
        folder = self.hub.folder / repo_id
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else None

    def _info(self, repo_id: str) -> None:
        files = self._files(repo_id)
        if files is None:
            self._refuse(404 if self._token() else 401, "RepoNotFound", "Repository not found")
            return
        folder = self.hub.folder / repo_id
        siblings = [{"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size} for file in files]
        gated = "manual" if repo_id in self.hub.tokens else False
        described = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": commit(repo_id), "private": False, "gated": gated, "tags": []}
        self._json(described | {"downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, repo_id: str) -> None:
        files = self._files(repo_id)
        if files is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return
        folder = self.hub.folder / repo_id
        self._json([{"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": commit(str(f))} for f in files])

    def _file(self, repo_id: str, name: str) -> None:
        files = self._files(repo_id)
        if self.hub.failures > 0:
            self.hub.failures -= 1
            self._refuse(503, "", "Service Unavailable")
        elif files is None:
            self._refuse(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        elif repo_id in self.hub.tokens and self._token() not in self.hub.tokens[repo_id]:
            self._refuse(403 if self._token() else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        elif self.hub.folder / repo_id / name not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._contents(repo_id, (self.hub.folder / repo_id / name).read_bytes())

    def _contents(self, repo_id: str, contents: bytes) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "") if self.hub.ranges else None
        start = int(span[1]) if span else 0
        body = contents[start : int(span[2]) + 1 if span and span[2] else None]
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(contents)}")
        self.send_header("ETag", f'"{hashlib.sha256(contents).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit(repo_id))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.hub.cut_after
        if limit is not None and self.hub.cuts > 0 and len(body) > limit:
            self.hub.cuts -= 1
            self.wfile.write(body[:limit])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message} if code else {})

    def _json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def commit(name: str) -> str:
    """Return something that looks like the id of a commit."""
    return hashlib.sha1(name.encode()).hexdigest()
