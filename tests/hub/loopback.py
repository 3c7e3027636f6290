"""A Hub on this machine that the real client is content with, and that misbehaves when told to.

Two servers: the Hub itself, and the storage that it redirects to for large files, on another port, which refuses to
see a token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

GOOD, BAD = "hf_good", "hf_bad"
"""A token that opens every door, and one that is not valid."""
PAGE = 3
"""Entries of a tree per answer."""
LARGE = (".safetensors", ".bin", ".gguf")


class Request(NamedTuple):
    """What a client asked for."""

    server: str
    """``hub`` or ``storage``."""
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    moved_to: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """How answers to some requests go wrong."""

    kind: str
    """``truncate`` (cut off half-way, the connection closed), ``restart`` (the same, and ranges are ignored), ``mute``
    (never answered), ``drip`` (a byte at a time), ``slow`` (in half a second), ``flip`` (one bit), ``short`` (a byte
    less, and said so), ``whole`` (ranges are ignored), ``nonsense`` (a page of HTML), or a status code."""
    times: int = 1 << 30
    retry_after: int | None = None


class Loopback:
    """The Hub and its storage, serving until the ``with`` block ends."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.stop = threading.Event()
        self._faults: list[tuple[re.Pattern[str], Fault]] = []
        self._servers = {name: self._serve(name) for name in ("hub", "storage")}
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers.values())

    def _serve(self, name: str) -> ThreadingHTTPServer:
        handler = type("Bound", (Handler,), {"hub": self, "name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Go down, as a network does."""
        self.stop.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], *, private: bool = False, gated: bool = False) -> str:
        """Create a repository with one commit and return it."""
        self.repositories[name] = Repository(private, gated)
        return self.commit(name, files)

    def commit(self, name: str, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Commit on top of a branch."""
        repository = self.repositories[name]
        whole = {**repository.commits.get(repository.refs.get(branch, ""), {}), **files}
        sha = hashlib.sha1(json.dumps([len(repository.commits), name, sorted(whole)]).encode()).hexdigest()
        repository.commits[sha] = whole
        repository.refs[branch] = sha
        return sha

    def rename(self, old: str, new: str) -> None:
        self.repositories[new] = self.repositories.pop(old)
        self.repositories[old] = Repository(moved_to=new)

    def misbehave(self, pattern: str, kind: str | int, *, times: int = 1 << 30, retry_after: int | None = None) -> None:
        """Let requests go wrong whose ``METHOD /path RANGE`` matches, with ``whole`` for no range."""
        self._faults.append((re.compile(pattern), Fault(str(kind), times, retry_after)))

    def behave(self) -> None:
        self._faults.clear()

    def fault(self, line: str) -> Fault | None:
        for pattern, fault in self._faults:
            if fault.times > 0 and pattern.search(line):
                fault.times -= 1
                return fault
        return None

    def stored(self, sha256: str) -> bytes | None:
        everything = (
            data for item in self.repositories.values() for files in item.commits.values() for data in files.values()
        )
        return next((data for data in everything if hashlib.sha256(data).hexdigest() == sha256), None)

    def asked(self, method: str, mark: str, server: str = "") -> list[Request]:
        """Requests so far of a method whose path holds a word."""
        return [item for item in self.requests if item.method == method and mark in item.path and server in item.server]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms
    hub: Loopback
    name: str
    fault: Fault | None = None

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        asked = Request(self.name, self.command, unquote(url.path), self.headers.get("Range"), token)
        self.hub.requests.append(asked)
        self.fault = fault = self.hub.fault(f"{asked.method} {asked.path} {asked.range or 'whole'}")
        if fault and fault.kind.isdigit():
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            self.fail(int(fault.kind), "", headers)
        elif fault and fault.kind == "mute":
            self.hub.stop.wait(60)
            self.close_connection = True
        elif fault and fault.kind == "nonsense":
            self.answer(200, b"<!doctype html><title>Sign in to the airport</title>", {"Content-Type": "text/html"})
        elif self.name == "storage":
            self.store(url.path, token)
        else:
            self.route(url.path, parse_qs(url.query), token)

    def do_HEAD(self) -> None:
        self.do_GET()

    def route(self, path: str, query: Mapping[str, list[str]], token: str | None) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, what, revision = match.groups()
            rest = path.removeprefix(f"/api/models/{name}")
            if found := self.find(name, unquote(revision or "main"), token, lambda new: f"/api/models/{new}{rest}"):
                repository, sha = found
                files = repository.commits[sha]
                if what == "tree":
                    self.tree(path, files, int(query.get("cursor", ["0"])[0]))
                else:
                    info = {"id": name, "sha": sha, "private": repository.private, "siblings": []}
                    self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = match.groups()
            rest = f"/resolve/{revision}/{file}"
            if found := self.find(name, unquote(revision), token, lambda new: f"/{new}{rest}"):
                self.resolve(*found, unquote(file), token)
        else:
            self.fail(404, "")

    def find(
        self, name: str, revision: str, token: str | None, moved: Callable[[str], str]
    ) -> tuple[Repository, str] | None:
        """The repository and commit that a request is about; answers itself where there is none."""
        repository = self.hub.repositories.get(name)
        if token == BAD:
            self.fail(401, "", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or (repository.private and token != GOOD):
            self.fail(404 if token else 401, "RepoNotFound")
        elif repository.moved_to:
            self.answer(307, b"", {"Location": moved(repository.moved_to)})
        else:
            sha = repository.refs.get(revision, revision)
            if sha in repository.commits:
                return repository, sha
            self.fail(404, "RevisionNotFound")
        return None

    def tree(self, path: str, files: Mapping[str, bytes], cursor: int) -> None:
        rows = []
        for name, data in list(files.items())[cursor : cursor + PAGE]:
            large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
            rows.append({"type": "file", "path": name, "size": len(data), "oid": git_oid(data)})
            rows[-1] |= large if name.endswith(LARGE) else {}
        headers = {"Content-Type": "application/json"}
        if cursor + PAGE < len(files):
            headers["Link"] = f'<{self.hub.url}{path}?recursive=true&cursor={cursor + PAGE}>; rel="next"'
        self.answer(200, json.dumps(rows).encode(), headers)

    def resolve(self, repository: Repository, sha: str, file: str, token: str | None) -> None:
        data = repository.commits[sha].get(file)
        if repository.gated and token != GOOD:
            self.fail(403 if token else 401, "GatedRepo")
            return
        if data is None:
            self.fail(404, "EntryNotFound", {"X-Repo-Commit": sha})
            return
        large = file.endswith(LARGE)
        sha256 = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{sha256 if large else git_oid(data)}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256}"'}
            headers |= {"Location": f"{self.hub.storage}/{quote(file)}/{sha256}?signature=x"}
            self.answer(302, b"", headers)
        else:
            self.content(data, headers)

    def store(self, path: str, token: str | None) -> None:
        data = self.hub.stored(path.rpartition("/")[2])
        if token or data is None:
            self.fail(400 if token else 404, "")  # a signed address and a token at once are refused
        else:
            self.content(data, {})

    def content(self, data: bytes, headers: dict[str, str]) -> None:
        status, start, end = 200, 0, len(data) - 1
        asked = "" if self.fault and self.fault.kind in ("whole", "restart") else self.headers.get("Range") or ""
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", asked):
            start, end = int(match[1]), min(int(match[2] or end), end)
            status = 206 if start <= end else 416
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        self.answer(status, data[start : end + 1], headers)

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        kind = self.fault.kind if self.fault and self.command == "GET" else ""
        if kind == "short":
            body = body[:-1]
        elif kind == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind in ("truncate", "restart"):
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif kind == "drip":
            self.drip(body, 1, 0.05)
        elif kind == "slow":
            self.drip(body, len(body) // 10 or 1, 0.05)
        else:
            self.wfile.write(body)

    def drip(self, body: bytes, size: int, pause_s: float) -> None:
        for start in range(0, len(body), size):
            if self.hub.stop.is_set():
                return
            self.wfile.write(body[start : start + size])
            time.sleep(pause_s)

    def fail(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        self.answer(status, json.dumps({"error": code}).encode(), {**named, **(headers or {})})
