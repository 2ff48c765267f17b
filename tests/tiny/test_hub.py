"""Pushing packages: what arrives at a hub, what is sent again after trouble, and what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from export import hf
from export.hub.push import Push
from suite import pipeline
from suite.config import ArtifactType
from suite.errors import SuiteError
from suite.stages import Artifact, Job, Stage
from tests.hub_server import TOKEN, Hub
from tests.huggingface_server import HuggingFaceHandler

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's use of httpx
ROOT = Path(__file__).parents[2]
PART = 1000
CARD = "---\nlicense: mit\n---\n\n# tiny\n"
OURS = {"README.md", "checksums.txt", "config.json", "model.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process, and those it starts, take for Hugging Face's; large files go by LFS, in parts."""
    with Hub(HuggingFaceHandler, part_size=PART).serving() as hub:
        environment = {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        patched = {
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        }  # fmt: skip
        for name, value in patched.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf-home" / "token"))
        monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return packaged(tmp_path / "package")


def packaged(folder: Path, *, seed: int = 0, **others: bytes) -> Path:
    """A small package: a card, a configuration, and weights of three and a half parts."""
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(random.Random(seed).randbytes(3 * PART + PART // 2))
    for name, content in others.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    hf.write_checksums(folder)
    return folder


def push(package: Path, to: str = "hf:org/tiny", **settings: Any) -> dict[str, Any]:
    """Check and run the stage on `package`; returns what it says was pushed."""
    artifact = Artifact(package, "package")
    stage = Push(package="package", to=to, **settings)
    stage.check({"package": [artifact]})
    out = package.parent / "receipt"
    out.mkdir(exist_ok=True)
    pushed: dict[str, Any] = stage.run(Job("push", {"package": [artifact]}, out, out))["pushed"]
    return pushed


def test_a_package_arrives_whole_in_a_private_repository(hub: Hub, package: Path) -> None:
    pushed = push(package)
    there = hub.repos["org/tiny"]
    assert there.private
    held = {path: entry.content for path, entry in there.files().items() if path != ".gitattributes"}
    assert held == {file.name: file.read_bytes() for file in package.iterdir()}
    assert there.files()["model.safetensors"].lfs == hf.sha256(package / "model.safetensors")
    assert pushed == {
        "to": "hf:org/tiny", "url": f"{hub.url}/org/tiny", "commit": there.branches["main"], "public": False,
        "sent": 4, "removed": 0,
    }  # fmt: skip
    receipt = json.loads((package.parent / "receipt" / "receipt.json").read_text())
    assert receipt["commit"] == pushed["commit"]
    assert set(receipt["files"]) == OURS


def test_what_is_there_is_not_sent_again(hub: Hub, package: Path) -> None:
    first = push(package)
    hub.log.clear()
    again = push(package)
    assert (again["commit"], again["sent"]) == (first["commit"], 0)
    assert {r.method for r in hub.log} == {"GET"}


def test_a_new_version_replaces_ours_and_keeps_what_others_added(hub: Hub, package: Path, tmp_path: Path) -> None:
    old = packaged(tmp_path / "old", seed=1, extra_safetensors=b"an old shard")
    push(old)
    there = hub.add("org/tiny", {"LICENSE": b"added by hand"})
    pushed = push(package)
    assert (pushed["sent"], pushed["removed"]) == (2, 1)  # weights and checksums; the card and the configuration stay
    assert set(there.files()) == OURS | {".gitattributes", "LICENSE"}
    assert push(old)["sent"] == 3  # back to the version before


def test_files_of_others_are_not_overwritten_unless_said(hub: Hub, package: Path) -> None:
    push(package)
    there = hub.add("org/tiny", {"README.md": b"edited by hand"})
    with pytest.raises(SuiteError, match=r"no push of the suite put there: README\.md"):
        push(package)
    assert there.files()["README.md"].content == b"edited by hand"
    assert push(package, overwrite=True)["sent"] == 1
    assert there.files()["README.md"].content == CARD.encode()


def test_public_is_only_what_is_said_to_be(hub: Hub, package: Path) -> None:
    push(package, public=True)
    assert not hub.repos["org/tiny"].private
    created = next(i for i, r in enumerate(hub.log) if r.path == "/api/repos/create")
    opened = next(i for i, r in enumerate(hub.log) if r.path.endswith("/settings"))
    sent = next(i for i, r in enumerate(hub.log) if r.path.endswith("/commit/main"))
    assert created < sent < opened  # nobody sees it half full
    with pytest.raises(SuiteError, match="hf:org/tiny is public"):
        push(package)


def test_a_branch_is_made_and_filled(hub: Hub, package: Path) -> None:
    push(package)
    hub.log.clear()
    pushed = push(packaged(package.parent / "next", seed=1), "hf:org/tiny@next/1")
    there = hub.repos["org/tiny"]
    assert there.branches["next/1"] == pushed["commit"] != there.branches["main"]
    assert there.files()["model.safetensors"].content == (package / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("method", "path", "act"),
    [
        ("GET", "/tree/", 503),
        ("POST", "/info/lfs/objects/batch", 500),
        ("PUT", "/part/3", 500),
        ("PUT", "/part/2", "drop"),
        ("POST", "/complete", 502),
        ("POST", "/commit/", 500),
        ("POST", "/commit/", "drop"),
    ],
)
def test_trouble_that_passes_costs_only_what_it_hit(
    hub: Hub, package: Path, method: str, path: str, act: int | str
) -> None:
    struck = hub.fail(method, path, act)
    push(package)
    assert struck.reached.is_set()
    assert set(hub.repos["org/tiny"].files()) == OURS | {".gitattributes"}
    assert [r.path[-1] for r in hub.sent("/part/")] == ["1", "2", "3", "4"]  # each part arrived once
    assert len(hub.sent("/commit/", "POST")) == 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: Hub, package: Path) -> None:
    lost = hub.fail("POST", "/commit/", "forget")
    pushed = push(package)
    assert lost.reached.is_set()
    assert hub.repos["org/tiny"].branches["main"] == pushed["commit"]
    assert len(hub.repos["org/tiny"].titles) == 2


def test_trouble_that_stays_ends_with_the_cure(hub: Hub, package: Path) -> None:
    hub.fail("POST", "/commit/", 503, times=100)
    with pytest.raises(SuiteError, match="503") as error:
        push(package)
    assert "the same command continues" in error.value.hint
    hub.faults.clear()
    hub.log.clear()
    push(package)
    assert not hub.sent("/part/")


def test_a_file_that_the_hub_drops_is_missed(hub: Hub, package: Path) -> None:
    hub.ignored.add("config.json")
    with pytest.raises(SuiteError, match=r"took changes that it does not show: config\.json"):
        push(package)


def test_somebody_who_commits_meanwhile_is_not_run_over(hub: Hub, package: Path) -> None:
    push(package)
    newer = packaged(package.parent / "newer", seed=1)
    hold = threading.Event()
    fault = hub.fail("POST", "/commit/", hold)

    def meddle() -> None:
        fault.reached.wait(20)
        hub.add("org/tiny", {"model.safetensors": b"theirs"})
        hold.set()

    thread = threading.Thread(target=meddle)
    thread.start()
    with pytest.raises(SuiteError, match=r"model\.safetensors"):
        push(newer)
    thread.join()
    assert hub.repos["org/tiny"].files()["model.safetensors"].content == b"theirs"


@pytest.mark.parametrize(
    ("token", "to", "message"),
    [
        ("hf_wrong", "hf:org/tiny", "does not accept the token"),
        (TOKEN, "hf:others/tiny", "no permission for others/tiny"),
    ],
)
def test_a_refusal_is_said_without_the_token(
    hub: Hub, package: Path, monkeypatch: pytest.MonkeyPatch, token: str, to: str, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SuiteError, match=message) as error:
        push(package, to)
    assert token not in str(error.value)
    assert not hub.repos


def test_what_cannot_work_is_said_before_anything_runs(
    hub: Hub, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[str, Callable[[], None]]] = [
        ("Cannot have -- or .. in repo_id", lambda: None),
        ("HF_HUB_OFFLINE", lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)),
    ]
    for message, arrange in cases:
        arrange()
        to = "hf:org/ti..ny" if "repo_id" in message else "hf:org/tiny"
        with pytest.raises(SuiteError, match=message) as error:
            push(package, to)
        assert error.value.where == "to"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SuiteError, match="there is no token"):
        push(package)
    assert not hub.log


def test_a_damaged_package_and_a_bad_card_stay_here(hub: Hub, package: Path) -> None:
    (package / "config.json").write_text("{ }")
    with pytest.raises(SuiteError, match=r"config\.json is not what checksums\.txt says"):
        push(package)
    (package / "README.md").write_text("---\nlicense: My Own\n---\n")
    hf.write_checksums(package)
    with pytest.raises(SuiteError, match='refuses the model card: "license" must be one of'):
        push(package)
    assert set(hub.repos["org/tiny"].files()) == {".gitattributes"}


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """`suite ...` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "suite.cli", *arguments],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_killed_half_way_the_same_command_continues(hub: Hub, tmp_path: Path, suite_home: Path) -> None:
    package = packaged(tmp_path / "package", second_safetensors=random.Random(1).randbytes(5 * PART))
    hold = threading.Event()
    second = hf.sha256(package / "second.safetensors")
    fault = hub.fail("PUT", f"{second}/part/4", hold)
    arguments = ("push", "--package", "package", "--to", "hf:org/tiny")
    killed = command(*arguments, cwd=tmp_path)
    assert fault.reached.wait(30)
    first = hf.sha256(package / "model.safetensors")
    while first not in hub.repos["org/tiny"].objects:  # both go at the same time
        assert not hold.wait(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert fault.abandoned.wait(30)
    assert second not in hub.repos["org/tiny"].objects
    hub.log.clear()
    hub.parts.clear()
    again = command(*arguments, cwd=tmp_path)
    said = again.communicate(timeout=60)[0]
    assert again.returncode == 0, said
    assert not hub.sent(first)  # the file that had arrived was not sent again
    assert len(hub.sent(f"{second}/part/")) == 5
    assert hub.repos["org/tiny"].files()["second.safetensors"].content == (package / "second.safetensors").read_bytes()
    shown = command("show", "@push", "--json", cwd=tmp_path).communicate(timeout=60)[0]
    assert json.loads(shown)["metrics"]["pushed"]["commit"] == hub.repos["org/tiny"].branches["main"]
    everything = said + "".join(f.read_text(errors="replace") for f in suite_home.rglob("*") if f.is_file())
    assert TOKEN not in everything


class Pack(Stage):
    """A stage that makes a package and, as the export does, asks for its push."""

    push: str = ""

    def makes(self) -> ArtifactType:
        return "package"

    def followers(self) -> dict[str, tuple[str, Stage]]:
        return {"push": ("package", Push(package="@", to=self.push))} if self.push else {}

    def run(self, job: Job) -> dict[str, Any]:
        job.out.rmdir()
        packaged(job.out)
        return {}


def test_a_cached_package_is_pushed_when_the_hub_lacks_it(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('[stage.pack]\nuse = "tests.tiny.test_hub:Pack"\npush = "hf:org/tiny"\n')

    def states() -> dict[str, str]:
        said = command("run", "p.toml", "--json", cwd=tmp_path).communicate(timeout=60)[0]
        events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        return {e["stage"]: e["state"] for e in events if e["event"] == "state"}

    assert states() == {"pack": "done", "pack.push": "done"}
    first = hub.repos["org/tiny"].branches["main"]
    assert states() == {"pack": "cached", "pack.push": "done"}
    assert hub.repos["org/tiny"].branches["main"] == first  # nothing was sent
    del hub.repos["org/tiny"]
    assert states() == {"pack": "cached", "pack.push": "done"}
    assert set(hub.repos["org/tiny"].files()) == OURS | {".gitattributes"}


def test_two_stages_may_not_push_to_one_place(hub: Hub, tmp_path: Path) -> None:
    stage = 'use = "tests.tiny.test_hub:Pack"\npush = "hf:org/tiny"\n'
    (tmp_path / "p.toml").write_text(f"[stage.a]\n{stage}[stage.b]\n{stage}")
    with pytest.raises(SuiteError, match=r"'a\.push' and 'b\.push' both write to hf:org/tiny") as error:
        pipeline.read(tmp_path / "p.toml")
    assert error.value.where.endswith("p.toml:4")


def test_the_default_transfer_works_too(hub: Hub, package: Path, tmp_path: Path) -> None:
    os.environ.pop("HF_HUB_DISABLE_XET")
    done = command("push", "--package", "package", "--to", "hf:org/tiny", cwd=tmp_path)
    said = done.communicate(timeout=60)[0]
    assert done.returncode == 0, said
    assert hub.sent("/v1/xorbs/", "POST")
    assert not hub.sent("/lfs/")
    held = hub.repos["org/tiny"].files()["model.safetensors"].content
    assert held == (package / "model.safetensors").read_bytes()


def test_what_was_pushed_can_be_downloaded(hub: Hub, package: Path, tmp_path: Path) -> None:
    push(package)
    folder = Path(huggingface_hub.snapshot_download("org/tiny", local_dir=tmp_path / "down"))
    for file in package.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
