"""A model hub on 127.0.0.1 that speaks huggingface.co's protocol as huggingface_hub does, for tests.

Listings by pages, card validation, uploads by LFS (in one piece or in parts) and by Xet, downloads with ranges.
By hand: python -m tests.huggingface_server
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.hub_server import DATA_NAME, NAME, TOKEN, Entry, Handler, Hub, Refusal, Repo

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
RELATIONS = ("finetune", "adapter", "quantized", "merge")


class HuggingFaceHandler(Handler):
    """The pages that huggingface_hub and hf_xet ask for."""

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


HuggingFaceHandler.routes = (
    ("GET", "/api/whoami-v2", False, HuggingFaceHandler.whoami),
    ("POST", "/api/validate-yaml", True, HuggingFaceHandler.validate_yaml),
    ("POST", "/api/repos/create", False, HuggingFaceHandler.create),
    ("PUT", f"/api/models/{NAME}/settings", False, HuggingFaceHandler.settings),
    ("GET", f"/api/models/{NAME}", False, HuggingFaceHandler.info),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", False, HuggingFaceHandler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", False, HuggingFaceHandler.tree),
    ("GET", f"/api/{DATA_NAME}", False, HuggingFaceHandler.info),
    ("GET", f"/api/{DATA_NAME}/revision/([^/]+)", False, HuggingFaceHandler.info),
    ("GET", f"/api/{DATA_NAME}/tree/([^/]+)", False, HuggingFaceHandler.tree),
    ("GET", f"/{DATA_NAME}/resolve/([^/]+)/(.+)", True, HuggingFaceHandler.resolve),
    ("POST", f"/api/models/{NAME}/paths-info/([^/]+)", False, HuggingFaceHandler.paths_info),
    ("GET", f"/api/models/{NAME}/refs", False, HuggingFaceHandler.refs),
    ("POST", f"/api/models/{NAME}/branch/([^/]+)", False, HuggingFaceHandler.branch),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", False, HuggingFaceHandler.preupload),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", False, HuggingFaceHandler.commit),
    ("GET", f"/api/models/{NAME}/xet-write-token/([^/]+)", False, HuggingFaceHandler.xet_token),
    ("POST", rf"/cas/{NAME}/v1/xorbs/default/\w+", True, HuggingFaceHandler.xorb),
    ("POST", rf"/cas/{NAME}/v1/shards", True, HuggingFaceHandler.xet_shard),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", False, HuggingFaceHandler.lfs_batch),
    ("PUT", rf"/lfs/{NAME}/(\w+)", True, HuggingFaceHandler.lfs_put),
    ("PUT", rf"/lfs/{NAME}/(\w+)/part/(\d+)", True, HuggingFaceHandler.lfs_part),
    ("POST", rf"/lfs/{NAME}/(\w+)/complete", True, HuggingFaceHandler.lfs_complete),
    ("POST", rf"/lfs/{NAME}/(\w+)/verify", False, HuggingFaceHandler.lfs_verify),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", True, HuggingFaceHandler.resolve),
)


def main() -> None:
    """Serve until Ctrl-C, to try a command by hand: it prints what to export."""
    with Hub(HuggingFaceHandler).serving() as hub:
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
