"""Models and adapters from hubs: which files, at which commit, what is fetched again, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from export.hub import Listed
from export.hub.download import Download, chosen
from suite import pipeline, store
from suite.commands import named
from suite.errors import SuiteError
from suite.plan import Plan
from suite.runner import Runner
from suite.runs import new_run
from suite.stages import Job
from tests.hub_server import Hub
from tests.tiny.test_hub import ROOT, hub
from tests.tiny.tiny_models import tiny_adapter, tiny_model

__all__ = ["hub"]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
WASTE = {"original/consolidated.safetensors": b"x", "pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "a.gguf": b"x"}


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def model(hub: Hub, tmp_path: Path) -> Path:
    """A tiny model, which the hub has as org/tiny, among files that nobody needs."""
    folder = tiny_model(tmp_path / "model")
    hub.add("org/tiny", {**files(folder), **WASTE}, private=False)
    return folder


def made(plan: Plan, run: Path) -> dict[str, Any]:
    class Silent:
        def event(self, stage: str, event: Any) -> None: ...
        def tick(self) -> None: ...

    at = store.Store(store.home())
    outcomes = Runner(plan, at, new_run(at, plan.name, plan.text, []), Silent()).run()
    assert [str(o.error) for o in outcomes.values() if o.error] == []
    return outcomes


def test_a_stage_takes_an_address_and_the_store_keeps_what_lies_there(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("org/style", files(tiny_adapter(model, tmp_path / "style")), private=False)
    file = tmp_path / "p.toml"
    file.write_text(
        '[stage.merge]\nbase = "hf:org/tiny"\nadapter = "hf:org/style"\n[stage.export]\nmodel = "@merge"\nto = "hf"\n'
    )
    plan = pipeline.read(file)
    assert {*plan.nodes} == {"hf:org/tiny", "hf:org/style", "merge", "export"}
    outcomes = made(plan, tmp_path)
    fetched = outcomes["hf:org/tiny"].artifact
    assert {n: c for n, c in files(fetched.path).items() if n != "artifact.json"} == files(model)
    assert fetched.record["metrics"]["downloaded"]["commit"] == hub.repos["org/tiny"].branches["main"]
    assert outcomes["merge"].artifact.metrics["parity"]["kl"] < 1e-4
    assert "base_model: org/tiny\n" in (outcomes["export"].artifact.path / "README.md").read_text()
    hub.log.clear()
    assert {o.state for o in made(pipeline.read(file), tmp_path).values()} == {"cached"}
    assert not [r for r in hub.log if r.path.endswith(".safetensors")]


def test_a_moved_branch_is_fetched_again_and_a_commit_never(hub: Hub, model: Path, tmp_path: Path) -> None:
    first = hub.repos["org/tiny"].branches["main"]
    old = named.artifact(f"hf:org/tiny@{first}", "--model", "model")
    hub.repos["org/tiny"].commit("main", "more", {"README.md": (b"changed", "")})
    new = named.artifact("hf:org/tiny", "--model", "model")
    assert (new.path / "README.md").read_text() == "changed"
    assert not (old.path / "README.md").exists()
    hub.log.clear()
    assert named.artifact(f"hf:org/tiny@{first}", "--model", "model").path == old.path
    assert hub.log == []


def test_the_command_makes_a_folder(hub: Hub, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "suite.cli", "download", "--address", "hf:org/tiny", "--out", str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert files(model).items() <= files(out).items()


def test_a_killed_download_continues(hub: Hub, model: Path, tmp_path: Path) -> None:
    fault = hub.fail("GET", r"/resolve/.*model\.safetensors", threading.Event())
    command = [sys.executable, "-m", "suite.cli", "download", "--address", "hf:org/tiny"]
    running = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    assert fault.reached.wait(60)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    found = named.artifact("hf:org/tiny", "--model", "model")
    assert files(model).items() <= files(found.path).items()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf:org/nothing", "no repository org/nothing"),
        ("hf:org/tiny@v9", "no such commit, branch or tag"),
        ("hf:org/notes", "holds no model"),
        ("hf:tiny", "address"),
    ],
)
def test_what_cannot_be_is_said_while_planning(hub: Hub, model: Path, tmp_path: Path, address: str, said: str) -> None:
    hub.add("org/notes", {"README.md": b"nothing else"}, private=False)
    file = tmp_path / "p.toml"
    file.write_text(f'[stage.merge]\nbase = "{address}"\nadapter = "@x"\n')
    with pytest.raises(SuiteError, match=said) as caught:
        pipeline.read(file)
    assert caught.value.where == f"{file}:2"


def test_the_wrong_kind_and_data_and_no_network(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SuiteError, match="holds model, and adapter is expected"):
        named.artifact("hf:org/tiny", "--lora", "adapter")
    file = tmp_path / "p.toml"
    file.write_text('[stage.train]\nbase = "nano"\ndata = "hf:org/data"\n')
    with pytest.raises(SuiteError, match="no hub address can stand here"):
        pipeline.read(file)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SuiteError, match="HF_HUB_OFFLINE is set"):
        named.artifact("hf:org/tiny", "--model", "model")


def test_bytes_that_are_not_the_hubs_are_refused(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Download(address="hf:org/tiny").pinned()
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    fetch = "export.hub.huggingface.HuggingFace.fetch"

    def torn(self: Any, folder: Path, commit: str, wanted: dict[str, Listed]) -> None:
        for name, file in wanted.items():
            (folder / name).write_bytes(b"0" * file.size)

    monkeypatch.setattr(fetch, torn)
    with pytest.raises(SuiteError, match="is not what the hub says it is"):
        stage.run(Job("download", {}, tmp_path / "out", tmp_path / "scratch"))


def test_only_what_is_needed_is_chosen() -> None:
    one = Listed(1, "")
    names = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE.txt", "README.md"]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    every = [*names, *weights, *WASTE, "training_args.bin", "optimizer.pt", "modeling_x.py", "assets/logo.png"]
    assert {*chosen(dict.fromkeys(every, one))} == {*names, *weights}
    assert "pytorch_model.bin" in chosen(dict.fromkeys([*names, *WASTE], one))
    with pytest.raises(SuiteError, match="no weights"):
        chosen({"model.gguf": one})
    assert json.loads(json.dumps(Download(address="hf:org/a@v1").recipe())) == {
        "repository": "hf:org/a", "commit": "", "holds": "",
    }  # fmt: skip
