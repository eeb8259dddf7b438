"""A server of our own that speaks the Hugging Face Hub's protocol on loopback, with its faults.

What it says is what huggingface_hub 2.4 reads of the real one: a repository's files with sizes and
hashes, large ones by a redirect to another host, byte ranges, ETags, X-Repo-Commit, X-Linked-*.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 10_000
_PIECE = 64 << 10
_DRIP = 20.0


@dataclass
class Fault:
    """What goes wrong with one request; the next one is served as it should be.

    `cut_after` ends the connection after so many bytes of the body, `loris` sends twenty bytes a
    second, `instead` is another content, under the ETag of the right one with `keep_etag`; `hang`
    says nothing at all.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    loris: bool = False
    hang: bool = False
    instead: bytes | None = None
    keep_etag: bool = False


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0


class Hub:
    """Repositories with commits; `faults` by a part of the path, taken in order.

    `main` of a repository is its newest commit. `rate` bounds the bytes a second of one answer.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[Request] = []
        self.token: str | None = None
        self.rate: float | None = None
        self._content: dict[str, bytes] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def sent(self) -> int:
        """Bytes of files that went out, from the beginning."""
        return sum(r.sent for r in self.requests if not r.path.startswith("/api/"))

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Put files into a repository: the commit they are."""
        names = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in files.items()]
        before = len(self.repos.get(repo, {}))
        commit = hashlib.sha1("\n".join([str(before), *sorted(names)]).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        return commit

    def folder(self, repo: str, below: str, folder: Path) -> str:
        """Put a folder's files into a repository, below a path."""
        prefix = f"{below}/" if below else ""
        return self.commit(
            repo, {f"{prefix}{path.name}": path.read_bytes() for path in folder.iterdir()}
        )

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(repo)
        if not commits:
            return None
        commit = list(commits)[-1] if revision == "main" else revision
        return (commit, commits[commit]) if commit in commits else None

    def keep(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self._content[sha256] = data
        return sha256

    def content(self, sha256: str) -> bytes | None:
        return self._content.get(sha256)

    def fault(self, path: str) -> Fault | None:
        for part, waiting in self.faults.items():
            if part in path and waiting:
                return waiting.pop(0)
        return None


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def __init__(self, *arguments: Any) -> None:
        self.stopping = threading.Event()
        super().__init__(*arguments)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what is tested."""

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        # What a killed client will never read is not counted as sent.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        return connection, address


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._request = Request(self.command, path, headers)
        hub = self.server.hub
        hub.requests.append(self._request)
        self._fault = hub.fault(path) or Fault()
        if self._fault.hang:
            self.server.stopping.wait(60)
            self.close_connection = True
            return
        if self._fault.status:
            self._say(self._fault.status, {}, self._fault.headers)
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._info(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._send(hub.content(match[1]) or b"", f'"{match[1]}"', {})
        else:
            self._say(404, {"error": "not found"})

    def _admitted(self) -> bool:
        token = self.server.hub.token
        if token is None or self._request.headers.get("authorization") == f"Bearer {token}":
            return True
        self._say(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
        return False

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        found = self.server.hub.files(repo, revision)
        if found is None:
            known = repo in self.server.hub.repos
            code = "RevisionNotFound" if known else "RepoNotFound"
            self._say(404, {"error": code}, {"X-Error-Code": code})
        return found

    def _info(self, repo: str, revision: str) -> None:
        if not self._admitted() or (found := self._files(repo, revision)) is None:
            return
        commit, files = found
        siblings = []
        for name, data in files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _blob(data)}
            if len(data) > LARGE_BYTES:
                sha256 = self.server.hub.keep(data)
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        self._say(200, {"_id": "0", "id": repo, "sha": commit, "siblings": siblings})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if not self._admitted() or (found := self._files(repo, revision)) is None:
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            self._say(404, {"error": "no entry"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        data = files[name]
        if len(data) <= LARGE_BYTES or self._fault.instead is not None:
            self._send(data, f'"{_blob(data)}"', headers)
            return
        sha256 = self.server.hub.keep(data)
        # Another host, as the real one's: what was meant for the Hub must not get there.
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.hub.port}/cdn/{sha256}")
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        for key, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(key, value)
        self.end_headers()

    def _send(self, data: bytes, etag: str, headers: dict[str, str]) -> None:
        """A body, or the part of it that was asked for."""
        if self._fault.instead is not None:
            data, etag = self._fault.instead, etag if self._fault.keep_etag else '"another"'
        start, status = 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self._request.headers.get("range", ""))
        if asked and self._request.headers.get("if-range", etag) == etag:
            start, status = int(asked[1]), 206
            if start >= len(data):
                self._say(416, {}, {"Content-Range": f"bytes */{len(data)}"})
                return
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.send_response(status)
        headers = {"ETag": etag, "Accept-Ranges": "bytes", **headers}
        for key, value in (headers | {"Content-Length": str(len(data) - start)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self._body(data, start)

    def _body(self, data: bytes, start: int) -> None:
        cut = self._fault.cut_after
        end = len(data) if cut is None else min(len(data), start + cut)
        at = start
        while at < end:
            rate = _DRIP if self._fault.loris else self.server.hub.rate
            step = _PIECE if rate is None else min(_PIECE, max(1, int(rate / 50)))
            piece = data[at : min(at + step, end)]
            self.wfile.write(piece)
            self._request.sent += len(piece)
            at += len(piece)
            if rate is not None and self.server.stopping.wait(len(piece) / rate):
                break
        if end < len(data):
            self.close_connection = True

    def _say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = b"" if self.command == "HEAD" else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ((headers or {}) | {"Content-Type": "application/json"}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _blob(data: bytes) -> str:
    """How git names a content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
