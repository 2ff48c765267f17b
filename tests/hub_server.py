"""A model hub on 127.0.0.1 for tests, which can misbehave: what hubs have in common, whatever protocol they speak.

Repositories have branches, commits, small files and LFS objects. `fail` makes chosen requests fail, break off or wait;
`log` says what was asked and sent. The protocols are in `tests.huggingface_server` and `tests.modelscope_server`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_thetokenofatest"
NAME = r"([\w.-]+/[\w.-]+)"
DATA_NAME = r"(datasets/[\w.-]+/[\w.-]+)"
"""Repositories of data, which are kept under this name."""


def git_hash(content: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a commit: its content, or the sha256 of an LFS object; and the commit that brought it."""

    content: bytes
    lfs: str
    commit: str
    title: str

    @property
    def oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.lfs}\nsize {len(self.content)}\n"
        return git_hash(pointer.encode() if self.lfs else self.content)


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, title: str, changes: dict[str, tuple[bytes, str] | None]) -> str:
        """Add a commit with `changes` (None deletes) to a branch; returns its id."""
        files = dict(self.commits.get(self.branches.get(branch, ""), {}))
        oid = hashlib.sha1(f"{branch} {title} {len(self.titles)}".encode()).hexdigest()
        for path, change in changes.items():
            if change is None:
                files.pop(path, None)
            else:
                files[path] = Entry(*change, oid, title)
        self.commits[oid], self.branches[branch] = files, oid
        self.titles.append(title)
        return oid

    def files(self, revision: str = "main") -> dict[str, Entry]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    method: str
    path: re.Pattern[str]
    act: int | str | threading.Event
    after: int
    times: int
    reached: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    size: int
    status: int


class Hub:
    """The server's state, and what tests say to it."""

    def __init__(self, handler: type[Handler], part_size: int = 0) -> None:
        self.handler, self.part_size = handler, part_size
        self.repos: dict[str, Repo] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.ignored: set[str] = set()
        self.url = ""
        self.lock = threading.Lock()

    def fail(
        self, method: str, path: str, act: int | str | threading.Event, *, after: int = 0, times: int = 1
    ) -> Fault:
        """Answer `times` requests that match `path` with a status, "drop" the connection half way, do what is asked but
        "forget" to answer, or wait for an event.

        The first `after` matching requests go well. The fault that is returned says when it was `reached`, and when
        a client that waited was gone (`abandoned`).
        """
        fault = Fault(method, re.compile(path), act, after, times)
        self.faults.append(fault)
        return fault

    def struck(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path.search(path) and fault.times:
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    fault.reached.set()
                    return fault
        return None

    def sent(self, pattern: str, method: str = "PUT") -> list[Request]:
        """Requests that went well and match."""
        return [r for r in self.log if r.method == method and re.search(pattern, r.path) and r.status < 400]

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = True, title: str = "by hand") -> Repo:
        """What somebody else put there."""
        there = self.repos.setdefault(repo, Repo(private))
        there.commit("main", title, {path: (content, "") for path, content in files.items()})
        return there

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        """Answer requests at `url` until the block ends."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (self.handler,), {"hub": self}))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            for fault in self.faults:
                if isinstance(fault.act, threading.Event):
                    fault.act.set()
            server.shutdown()
            server.server_close()


Page = tuple[str, str, bool, Callable[..., None]]
"""Method, path, whether it needs no token, and who answers."""


class Refusal(Exception):
    """An answer with an error status and the headers by which huggingface_hub tells errors apart."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    routes: tuple[Page, ...] = ()
    forgets = False
    disable_nagle_algorithm = True
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silence; the hub keeps its own log."""

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.struck(self.command, parts.path)
        if fault and fault.act == "drop":
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(size) if size else self._chunked()
        if fault and isinstance(fault.act, threading.Event):
            while not fault.act.wait(0.02) and not self.left():
                pass
        if len(body) < size or self.left():
            self.close_connection = True
            if fault:
                fault.abandoned.set()
            return
        try:
            if fault and isinstance(fault.act, int):
                raise Refusal(fault.act, "injected by a test")
            self.forgets = bool(fault and fault.act == "forget")
            self.answer(parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()}, body)
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self.reply({"error": str(refusal)}, refusal.status, headers, size=len(body))
        except BrokenPipeError:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any  # noqa: N815

    def left(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def _chunked(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None, *, size: int | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.hub.log.append(Request(self.command, urlsplit(self.path).path, size or 0, status))
        if self.forgets:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Request-Id": "test", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer(self, path: str, query: dict[str, str], body: bytes) -> None:
        for method, pattern, open_to_all, route in self.routes:
            match = re.fullmatch(pattern, path)
            if match and method in (self.command, "GET" if self.command == "HEAD" else ""):
                if not open_to_all:
                    self.authorize()
                route(self, query, body, *map(unquote, match.groups()))
                return
        raise Refusal(404, f"no such page: {self.command} {path}")

    def authorize(self) -> None:
        given = self.headers.get("Authorization", "")
        if given != f"Bearer {TOKEN}":
            raise Refusal(
                401, "Invalid credentials in Authorization header" if given else "Invalid username or password."
            )

    def repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[name]

    def entries(self, repo: str, revision: str) -> dict[str, Entry]:
        there = self.repo(repo)
        if revision not in there.branches and revision not in there.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return there.files(revision)

    def store(self, repo: str, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content is not what its sha256 says")
        self.repo(repo).objects[oid] = content

    def lfs_put(self, _: Any, body: bytes, repo: str, oid: str) -> None:
        self.store(repo, oid, body)
        self.reply({}, size=len(body))
