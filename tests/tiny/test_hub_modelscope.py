"""Pushing packages to ModelScope, through its library, to a local server that speaks its protocol."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from export import hf
from export.hub.download import Download
from suite.errors import SuiteError
from suite.stages import Job
from tests.hub_server import TOKEN, Hub
from tests.modelscope_server import ModelScopeHandler
from tests.tiny.test_hub import CARD, OURS, command, packaged, push

pytest.importorskip("modelscope_hub", reason="the extra 'modelscope' is not installed")
TO = "ms:org/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub(ModelScopeHandler).serving() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms-home"))
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield hub


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return packaged(tmp_path / "package")


def test_a_package_arrives_whole_and_private_and_once(hub: Hub, package: Path) -> None:
    pushed = push(package, TO)
    there = hub.repos["org/tiny"]
    assert there.private
    assert {path: e.content for path, e in there.files("master").items()} == {
        file.name: file.read_bytes() for file in package.iterdir()
    }  # the README.md that the hub makes itself gives way
    assert (pushed["sent"], pushed["url"]) == (4, f"{hub.url}/models/org/tiny")
    hub.log.clear()
    assert push(package, TO)["sent"] == 0
    assert {r.method for r in hub.log} == {"GET"}


def test_a_new_version_replaces_ours_and_spares_what_others_edited(hub: Hub, package: Path, tmp_path: Path) -> None:
    push(packaged(tmp_path / "old", seed=1, extra_safetensors=b"an old shard"), TO)
    there = hub.repos["org/tiny"]
    there.commit("master", "by hand", {"LICENSE": (b"by hand", "")})
    assert (push(package, TO)["removed"]) == 1
    assert set(there.files("master")) == OURS | {"LICENSE"}
    there.commit("master", "by hand", {"README.md": (b"edited by hand", "")})
    with pytest.raises(SuiteError, match=r"no push of the suite put there: README\.md"):
        push(package, TO)
    assert push(package, TO, overwrite=True)["sent"] == 1
    assert there.files("master")["README.md"].content == CARD.encode()


def test_trouble_that_passes_is_waited_out(hub: Hub, package: Path) -> None:
    for method, path in (("GET", "/openapi/"), ("PUT", "/lfs/"), ("POST", "/commit/")):
        hub.fail(method, path, 500)
    hub.fail("PUT", "/lfs/", "drop")
    push(package, TO)
    assert not any(fault.times for fault in hub.faults)
    assert len(hub.sent(hf.sha256(package / "model.safetensors"))) == 1


def test_what_lies_there_is_fetched_and_a_changed_list_is_noticed(hub: Hub, package: Path, tmp_path: Path) -> None:
    push(package, TO)
    stage = Download(address=TO).pinned()
    assert stage.makes() == "model"
    (out := tmp_path / "out").mkdir()
    fetched = stage.run(Job("download", {}, out, tmp_path))["downloaded"]
    assert {file.name for file in out.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert (out / "model.safetensors").read_bytes() == (package / "model.safetensors").read_bytes()
    assert fetched["from"] == f"{hub.url}/models/org/tiny"
    hub.repos["org/tiny"].commit("master", "by hand", {"config.json": (b"{} ", "")})
    with pytest.raises(SuiteError, match="has changed meanwhile"):
        stage.run(Job("download", {}, out, tmp_path))


def test_killed_half_way_the_same_command_continues(hub: Hub, tmp_path: Path, suite_home: Path) -> None:
    package = packaged(tmp_path / "package", second_safetensors=random.Random(1).randbytes(5000))
    first, second = (hf.sha256(package / name) for name in ("model.safetensors", "second.safetensors"))
    hold = threading.Event()
    fault = hub.fail("PUT", f"/lfs/org/tiny/{second}", hold)
    arguments = ("push", "--package", "package", "--to", TO)
    killed = command(*arguments, cwd=tmp_path)
    assert fault.reached.wait(30)
    while first not in hub.repos["org/tiny"].objects:  # both go at the same time
        assert not hold.wait(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert fault.abandoned.wait(30)
    assert second not in hub.repos["org/tiny"].objects
    hub.log.clear()
    again = command(*arguments, cwd=tmp_path)
    said = again.communicate(timeout=60)[0]
    assert again.returncode == 0, said
    assert not hub.sent(first)  # the file that had arrived was not sent again
    assert len(hub.sent(second)) == 1
    there = hub.repos["org/tiny"].files("master")
    assert there["second.safetensors"].content == (package / "second.safetensors").read_bytes()
    assert TOKEN not in said + "".join(f.read_text(errors="replace") for f in suite_home.rglob("*") if f.is_file())


def test_public_is_said_at_the_beginning_or_not_at_all(hub: Hub, package: Path) -> None:
    push(package, TO, public=True)
    assert not hub.repos["org/tiny"].private
    with pytest.raises(SuiteError, match="ms:org/tiny is public"):
        push(package, TO)
    push(package, "ms:org/hidden")
    with pytest.raises(SuiteError, match="cannot open it"):
        push(package, "ms:org/hidden", public=True)


def test_refusals_are_said_without_the_token(hub: Hub, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SuiteError, match="no permission for others/tiny"):
        push(package, "ms:others/tiny")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-wrong")
    with pytest.raises(SuiteError, match="does not accept the token") as error:
        push(package, TO)
    assert "ms-wrong" not in str(error.value)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    with pytest.raises(SuiteError, match="there is no token") as error:
        push(package, TO)
    assert error.value.where == "to"
