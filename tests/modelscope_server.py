"""A model hub on 127.0.0.1 that speaks ModelScope's protocol as `modelscope-hub` does, for tests."""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.hub_server import DATA_NAME, NAME, Handler, Refusal, Repo

BRANCH = "master"
PUBLIC = 5


class ModelScopeHandler(Handler):
    """Repositories, commits and LFS objects as the other hub has them, under other names."""

    def info(self, _: Any, body: bytes, repo: str) -> None:
        there = self.repo(repo)
        self.reply({"success": True, "data": {"id": repo, "private": there.private}})

    def create(self, _: Any, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['Path']}/{asked['Name']}"
        if asked["Path"] != "org":
            raise Refusal(403, "no permission")
        if name in self.hub.repos:
            raise Refusal(409, "the model exists already")
        there = self.hub.repos[name] = Repo(asked["Visibility"] != PUBLIC)
        there.commit(BRANCH, "System init", {"README.md": (f"# {name}\n---\nlicense: {asked['License']}".encode(), "")})
        self.reply({"Code": 200, "Success": True, "Data": {"Name": asked["Name"], "Path": asked["Path"]}})

    def files(self, query: dict[str, str], _: bytes, repo: str) -> None:
        """Small files without their digest: whoever needs it must read them."""
        files = self.entries(repo, query["Revision"])
        listed = [
            {"Path": path, "Name": path, "Type": "blob", "Size": len(e.content), "Sha256": e.lfs}
            for path, e in files.items()
        ]
        page, size = int(query.get("PageNumber", 1)), int(query.get("PageSize", 3000))
        shown = listed[(page - 1) * size : page * size]
        self.reply({"Code": 200, "Success": True, "Data": {"Files": shown}})

    def download(self, query: dict[str, str], _: bytes, repo: str) -> None:
        entry = self.entries(repo, query["Revision"]).get(query["FilePath"])
        if entry is None:
            raise Refusal(404, "no such file")
        self.reply(entry.content)

    def lfs_batch(self, _: Any, body: bytes, repo: str) -> None:
        there = self.repo(repo)
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{repo}/{asked['oid']}"}}
            objects.append({"oid": asked["oid"], "actions": {} if asked["oid"] in there.objects else upload})
        self.reply({"Code": 200, "Success": True, "Data": {"objects": objects}})

    def commit(self, _: Any, body: bytes, repo: str, branch: str) -> None:
        there, asked = self.repo(repo), json.loads(body)
        changes: dict[str, tuple[bytes, str] | None] = {}
        for action in asked["actions"]:
            if action["action"] == "delete":
                changes[action["path"]] = None
            elif action["type"] == "lfs":
                if action["sha256"] not in there.objects:
                    raise Refusal(400, "the object was not uploaded")
                changes[action["path"]] = (there.objects[action["sha256"]], action["sha256"])
            else:
                changes[action["path"]] = (base64.b64decode(action["content"]), "")
        oid = there.commit(branch, asked["commit_message"], changes)
        self.reply({"Code": 200, "Success": True, "Data": {"oid": oid}}, size=len(body))


ModelScopeHandler.routes = (
    ("GET", f"/openapi/v1/models/{NAME}", False, ModelScopeHandler.info),
    ("GET", f"/api/v1/models/{NAME}", False, ModelScopeHandler.info),
    ("POST", "/api/v1/models", False, ModelScopeHandler.create),
    ("GET", f"/api/v1/models/{NAME}/repo/files", False, ModelScopeHandler.files),
    ("GET", f"/api/v1/models/{NAME}/repo", False, ModelScopeHandler.download),
    ("GET", f"/api/v1/{DATA_NAME}/repo/tree", False, ModelScopeHandler.files),
    ("GET", f"/api/v1/{DATA_NAME}/repo", False, ModelScopeHandler.download),
    ("POST", f"/api/v1/repos/models/{NAME}/info/lfs/objects/batch", False, ModelScopeHandler.lfs_batch),
    ("PUT", rf"/lfs/{NAME}/(\w+)", False, ModelScopeHandler.lfs_put),
    ("POST", f"/api/v1/repos/models/{NAME}/commit/([^/]+)", False, ModelScopeHandler.commit),
)
