"""Engines are probed before they get requests: what becomes of those that fail, die of it, or confuse the probe itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.engines import remote
from serve.engines.fleet import Ask, Fleet
from serve.engines.process import Patience
from suite.errors import SuiteError
from suite.processes import importing
from tests.contract.pretended import Pretended, Running, gateway, model_and_adapters

Judge = Callable[[Ask, Mapping[str, Any]], Awaitable[None]]
HASTY = Patience(stop=2, poll=0.02, pause=0.02, longest_pause=0.05, end=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_adapters(tmp_path_factory.mktemp("probed"))


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Judge], None]:
    """Sets what takes the place of the probe."""

    def replace(judge: Judge) -> None:
        class Probe:
            async def prepare(self, _: Any) -> None:
                pass

            async def __call__(self, ask: Ask, adapters: Mapping[str, Any]) -> None:
                await judge(ask, adapters)

        monkeypatch.setattr(remote, "ParityProbe", lambda *_, **__: Probe())
        monkeypatch.setattr(remote, "Fleet", partial(Fleet, patience=HASTY))

    return replace


def probed(folder: Path, scratch: Path, **options: Any) -> AbstractContextManager[Running]:
    return gateway(folder, scratch, Pretended({}), probe=True, **options)


async def ask_for(ask: Ask, text: str) -> None:
    status, said = await ask.post("/v1/chat/completions", {"model": "base", "messages": [{"content": text}]})
    assert status == 200, said


def test_every_replica_is_probed_and_again_in_its_next_life(
    folder: Path, tmp_path: Path, probe: Callable[[Judge], None]
) -> None:
    asked: list[tuple[str, list[str]]] = []

    async def judge(ask: Ask, adapters: Mapping[str, Any]) -> None:
        """Finds "x" wrong on the replica that is asked second, and has a bug."""
        asked.append((ask.url, [*adapters]))
        if ["x"] in [names for _, names in asked[:-1]] and "x" in adapters:
            raise SuiteError("the adapter 'x' has no effect in this engine")
        if "bug" in adapters:
            raise KeyError("token_ids")

    probe(judge)
    options: dict[str, Any] = {"replicas": 2, "lora_dir": [str(folder / "more")]}
    with probed(folder, tmp_path, **options) as running:

        def load(name: str, path: str) -> httpx.Response:
            # each on a connection of its own: uvicorn ends the one on which there was a bug
            return httpx.post(f"{running.url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})

        def news(count: int) -> list[list[str]]:
            """What replicas were asked about since the last time: each once."""
            running.until(lambda: len(asked) >= count)
            assert len({url for url, _ in asked}) == count
            found = [names for _, names in asked]
            asked.clear()
            return found

        assert news(2) == [["a"], ["a"]]
        running.until(lambda: len({a.json()["id"] for a in running.together(["x"] * 4)}) == 2)
        assert load("d", "b").status_code == 200
        assert news(2) == [["d"], ["d"]]
        refused = load("x", "c")
        assert (refused.status_code, "no effect" in refused.text) == (400, True)
        assert news(2) == [["x"], ["x"]]
        assert running.chat("x", "x").status_code == 404
        assert len(running.lines("/v1/unload_lora_adapter")) == 2
        assert load("bug", "c").status_code == 500
        assert news(1) == [["bug"]]
        assert running.chat("x", "bug").status_code == 404
        assert len(running.lines("/v1/unload_lora_adapter")) == 4
        assert running.chat("die once").status_code == 200
        assert news(1) == [["a", "d"]]


def test_an_engine_that_dies_of_the_probe_could_not_start_and_its_log_stays(
    folder: Path, tmp_path: Path, probe: Callable[[Judge], None]
) -> None:
    probe(lambda ask, _: ask_for(ask, "die"))
    with (
        pytest.raises(SuiteError, match=r"(?s)could not start.*killed by what was asked") as failed,
        probed(folder, tmp_path),
    ):
        pass
    assert Path(failed.value.hint.removeprefix("log: ")).is_file()


def test_one_that_lives_and_does_not_answer_the_probe_is_refused_with_its_last_lines(
    folder: Path, tmp_path: Path, probe: Callable[[Judge], None]
) -> None:
    probe(lambda ask, _: ask_for(ask, "drop"))
    with (
        pytest.raises(SuiteError, match=r"(?s)runs, but fails: .* does not answer /v1/chat/completions.*its log ends"),
        probed(folder, tmp_path),
    ):
        pass


def test_a_death_under_a_later_probe_is_one_more_restart_and_nothing_that_waits_is_lost(
    folder: Path, tmp_path: Path, probe: Callable[[Judge], None]
) -> None:
    lives: list[str] = []

    async def judge(ask: Ask, _: Mapping[str, Any]) -> None:
        lives.append(ask.url)
        if len(lives) == 2:
            await ask_for(ask, "die")

    probe(judge)
    with probed(folder, tmp_path) as running:
        answers = running.together(["x", "y", "die once", "z"])
        assert [answer.status_code for answer in answers] == [200] * 4
        assert len(lives) == 3


def test_a_bug_in_the_probe_ends_the_start(folder: Path, tmp_path: Path, probe: Callable[[Judge], None]) -> None:
    async def judge(*_: Any) -> None:
        raise KeyError("token_ids")

    probe(judge)
    with pytest.raises(SuiteError, match="KeyError: 'token_ids'"), probed(folder, tmp_path):
        pass


HANG = """
import os, sys, time
if "serve.torch.reference" in sys.orig_argv:
    with open({pid!r}, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)
"""
ASK = "from pathlib import Path; from serve.probe import references; references(Path({folder!r}), {{}})"


def test_nobody_computes_what_our_engine_would_say_for_one_that_was_killed(folder: Path, tmp_path: Path) -> None:
    """It may take the memory of a whole model, and minutes; here it hangs."""
    file, code = tmp_path / "pid", ASK.format(folder=str(folder / "base"))
    (tmp_path / "sitecustomize.py").write_text(HANG.format(pid=str(file)))
    paths = os.pathsep.join([importing()["PYTHONPATH"], str(tmp_path)])
    asking = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    deadline = time.monotonic() + 30
    while not file.is_file() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asking.kill()
    asking.wait()
    computing = int(file.read_text())
    try:
        while not ended(computing):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(computing, signal.SIGKILL)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except OSError:
        return True
