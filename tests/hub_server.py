"""A model hub on 127.0.0.1 that speaks huggingface.co's protocol as huggingface_hub does, for tests; it can misbehave.

Repositories with branches, commits, small files and LFS objects (in one piece or in parts), listings, card validation,
downloads with ranges. `fail` makes chosen requests fail, break off or wait; `log` says what was asked and sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_thetokenofatest"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
RELATIONS = ("finetune", "adapter", "quantized", "merge")


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

    def __init__(self, part_size: int = 0, handler: type[Handler] | None = None) -> None:
        self.part_size, self.handler = part_size, handler or Handler
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

    # -- what is asked -------------------------------------------------------------------------------------------

    def whoami(self, *_: Any) -> None:
        self.reply({"type": "user", "name": "org", "fullname": "A Test", "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self, _: Any, body: bytes) -> None:
        front = json.loads(body)["content"].split("---\n")[1]
        metadata = yaml.safe_load(front)
        errors = []
        if "license" in metadata and not re.fullmatch(r"[a-z0-9.+-]+", str(metadata["license"])):
            errors.append('"license" must be one of [apache-2.0, mit, other]')
        if metadata.get("base_model_relation", "finetune") not in RELATIONS:
            errors.append(f'"base_model_relation" must be one of {list(RELATIONS)}')
        self.reply(
            {"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200,
        )  # fmt: skip

    def create(self, _: Any, body: bytes) -> None:
        asked = json.loads(body)
        if asked["organization"] not in ("org", None):
            raise Refusal(403, "You don't have the rights to create a model under this namespace")
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self.reply({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        self.hub.repos[name].commit("main", "initial commit", {".gitattributes": (b"*.safetensors filter=lfs\n", "")})
        self.reply({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def settings(self, _: Any, body: bytes, repo: str) -> None:
        asked = json.loads(body)
        self.repo(repo).private = asked.get("private", asked.get("visibility") == "private")
        self.reply({})

    def info(self, _: Any, body: bytes, repo: str, revision: str = "main") -> None:
        files, there = self.entries(repo, revision), self.repo(repo)
        siblings = [{"rfilename": path} for path in files]
        sha = there.branches.get(revision, revision)
        self.reply(
            {"id": repo, "modelId": repo, "sha": sha, "private": there.private, "tags": [], "siblings": siblings}
        )

    def described(self, path: str, entry: Entry) -> dict[str, Any]:
        commit = {"id": entry.commit, "title": entry.title, "date": "2026-01-01T00:00:00.000Z"}
        found = {"type": "file", "path": path, "size": len(entry.content), "oid": entry.oid, "lastCommit": commit}
        lfs = {"oid": entry.lfs, "size": len(entry.content), "pointerSize": 130}
        return {**found, "lfs": lfs} if entry.lfs else found

    def tree(self, query: dict[str, str], _: bytes, repo: str, revision: str) -> None:
        """Two files a page, so that whoever forgets the next page is found out."""
        files = [self.described(path, entry) for path, entry in sorted(self.entries(repo, revision).items())]
        start = int(query.get("cursor", 0))
        headers = {}
        if start + 2 < len(files):
            rest = "&".join(f"{k}={v}" for k, v in {**query, "cursor": str(start + 2)}.items())
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{rest}>; rel="next"'
        self.reply(files[start : start + 2], headers=headers)

    def paths_info(self, _: Any, body: bytes, repo: str, revision: str) -> None:
        wanted = parse_qs(body.decode())["paths"]
        self.reply([self.described(p, e) for p, e in self.entries(repo, revision).items() if p in wanted])

    def refs(self, _: Any, body: bytes, repo: str) -> None:
        branches = self.repo(repo).branches.items()
        named = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in branches]
        self.reply({"branches": named, "converts": [], "tags": []})

    def branch(self, _: Any, body: bytes, repo: str, branch: str) -> None:
        there = self.repo(repo)
        if branch in there.branches:
            raise Refusal(409, "Reference already exists")
        there.branches[branch] = there.branches["main"]
        self.reply({})

    # -- uploads -------------------------------------------------------------------------------------------------

    def preupload(self, _: Any, body: bytes, repo: str, revision: str) -> None:
        files = self.entries(repo, revision)
        asked = json.loads(body)["files"]
        self.reply(
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": f["path"] in self.hub.ignored,
                        "oid": (e.lfs or e.oid) if (e := files.get(f["path"])) else None,
                    }
                    for f in asked
                ]
            }
        )

    def lfs_batch(self, _: Any, body: bytes, repo: str) -> None:
        there = self.repo(repo)
        objects: list[dict[str, Any]] = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in there.objects:
                header, href = {}, f"{self.hub.url}/lfs/{repo}/{oid}"
                if 0 < self.hub.part_size < size:
                    count = -(-size // self.hub.part_size)
                    header = {str(i + 1): f"{href}/part/{i + 1}" for i in range(count)}
                    header["chunk_size"] = str(self.hub.part_size)
                    href += "/complete"
                verify = {"href": f"{self.hub.url}/lfs/{repo}/{oid}/verify"}
                found["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(found)
        self.reply({"transfer": "basic", "objects": objects})

    def xet_token(self, _: Any, body: bytes, repo: str, revision: str) -> None:
        self.entries(repo, revision)
        self.reply({"casUrl": f"{self.hub.url}/cas/{repo}", "accessToken": "xet", "exp": int(time.time()) + 3600})

    def xorb(self, _: Any, body: bytes, repo: str) -> None:
        """Chunks behind headers: version, packed size (3 bytes), packing, size (3 bytes); then a footer.

        Only whole files of unpacked (incompressible) chunks become objects here; a real hub reads the shard for that.
        """
        content, at = b"", 0
        while at < len(body) and body[at] == 0:
            size = int.from_bytes(body[at + 1 : at + 4], "little")
            content += body[at + 8 : at + 8 + size]
            at += 8 + size
        self.repo(repo).objects[hashlib.sha256(content).hexdigest()] = content
        self.reply({"was_inserted": True}, size=len(body))

    def xet_shard(self, *_: Any) -> None:
        self.reply({"result": 1})

    def store(self, repo: str, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content is not what its sha256 says")
        self.repo(repo).objects[oid] = content

    def lfs_put(self, _: Any, body: bytes, repo: str, oid: str) -> None:
        self.store(repo, oid, body)
        self.reply({}, size=len(body))

    def lfs_part(self, _: Any, body: bytes, repo: str, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = body
        self.reply({}, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, size=len(body))

    def lfs_complete(self, _: Any, body: bytes, repo: str, oid: str) -> None:
        asked, parts = json.loads(body), self.hub.parts.pop(oid)
        etags = {p["partNumber"]: p["etag"] for p in asked["parts"]}
        if etags != {n: f'"{hashlib.md5(part).hexdigest()}"' for n, part in parts.items()}:
            raise Refusal(400, "parts are missing or damaged")
        self.store(repo, oid, b"".join(parts[n] for n in sorted(parts)))
        self.reply({})

    def lfs_verify(self, _: Any, body: bytes, repo: str, oid: str) -> None:
        if len(self.repo(repo).objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refusal(404, "no such object")
        self.reply({})

    def commit(self, _: Any, body: bytes, repo: str, branch: str) -> None:
        self.entries(repo, branch)
        there = self.repo(repo)
        header: dict[str, Any] = {}
        changes: dict[str, tuple[bytes, str] | None] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                changes[value["path"]] = (base64.b64decode(value["content"]), "")
            elif line["key"] == "lfsFile":
                if value["oid"] not in there.objects:
                    raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
                changes[value["path"]] = (there.objects[value["oid"]], value["oid"])
            else:
                changes[value["path"]] = None
        with self.hub.lock:
            if header.get("parentCommit", there.branches[branch]) != there.branches[branch]:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            oid = there.commit(branch, header["summary"], changes)
        self.reply({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid}, size=len(body))

    # -- downloads -----------------------------------------------------------------------------------------------

    def resolve(self, _: Any, body: bytes, repo: str, revision: str, path: str) -> None:
        if self.repo(repo).private:
            self.authorize()
        entry = self.entries(repo, revision).get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        there = self.repo(repo)
        headers = {
            "ETag": f'"{entry.lfs or entry.oid}"',
            "X-Repo-Commit": there.branches.get(revision, revision),
            "X-Linked-Size": str(len(entry.content)),
            "X-Linked-Etag": f'"{entry.lfs or entry.oid}"',
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.reply(entry.content, headers=headers)
            return
        start, end = int(wanted[1]), int(wanted[2] or len(entry.content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(entry.content)}"
        self.reply(entry.content[start : end + 1], 206, headers)


NAME = r"([\w.-]+/[\w.-]+)"
Handler.routes = (
    ("GET", "/api/whoami-v2", False, Handler.whoami),
    ("POST", "/api/validate-yaml", True, Handler.validate_yaml),
    ("POST", "/api/repos/create", False, Handler.create),
    ("PUT", f"/api/models/{NAME}/settings", False, Handler.settings),
    ("GET", f"/api/models/{NAME}", False, Handler.info),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", False, Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", False, Handler.tree),
    ("POST", f"/api/models/{NAME}/paths-info/([^/]+)", False, Handler.paths_info),
    ("GET", f"/api/models/{NAME}/refs", False, Handler.refs),
    ("POST", f"/api/models/{NAME}/branch/([^/]+)", False, Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", False, Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", False, Handler.commit),
    ("GET", f"/api/models/{NAME}/xet-write-token/([^/]+)", False, Handler.xet_token),
    ("POST", rf"/cas/{NAME}/v1/xorbs/default/\w+", True, Handler.xorb),
    ("POST", rf"/cas/{NAME}/v1/shards", True, Handler.xet_shard),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", False, Handler.lfs_batch),
    ("PUT", rf"/lfs/{NAME}/(\w+)", True, Handler.lfs_put),
    ("PUT", rf"/lfs/{NAME}/(\w+)/part/(\d+)", True, Handler.lfs_part),
    ("POST", rf"/lfs/{NAME}/(\w+)/complete", True, Handler.lfs_complete),
    ("POST", rf"/lfs/{NAME}/(\w+)/verify", False, Handler.lfs_verify),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", True, Handler.resolve),
)


def main() -> None:
    """Serve until Ctrl-C, to try a command by hand: it prints what to export."""
    with Hub().serving() as hub:
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
