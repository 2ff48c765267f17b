"""Processes of engines: ready when they answer, started again when they die, and never left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.engines.process import EngineProcess, Launch, Patience, State, unwatched

UPSTREAM = Path(__file__).parents[1] / "upstream.py"
HASTY = Patience(start=20, stop=2, poll=0.02, pause=0.02, longest_pause=0.05, starts=3)


async def answers(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True


class Watched:
    """An engine's process, and the states that it went through."""

    def __init__(
        self,
        tmp_path: Path,
        port: int | None = None,
        patience: Patience = HASTY,
        watch: Any = unwatched,
        **settings: Any,
    ) -> None:
        self.states: list[State] = []
        self.ports: list[int] = []
        self.settings = settings
        self._fixed = port

        def launch(free: int) -> Launch:
            port = self._fixed if self._fixed and not self.ports else free
            self.ports.append(port)
            return Launch(
                [sys.executable, "-S", str(UPSTREAM), str(port), json.dumps(self.settings)], {"UPSTREAM_KEY": "k"}
            )

        self.process = EngineProcess(
            launch, answers, tmp_path / "log", watch=watch, changed=self._note, patience=patience
        )

    def _note(self) -> None:
        self.states.append(self.process.state)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def at(self, state: State) -> None:
        await self.until(lambda: self.process.state == state)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_it_is_ready_when_it_answers_and_gone_when_it_is_stopped(tmp_path: Path) -> None:
    async def scenario() -> None:
        watched = Watched(tmp_path, child=str(tmp_path / "child"), delay=0.1)
        watched.process.start()
        await watched.at("ready")
        child = int((tmp_path / "child").read_text())
        assert await answers(watched.process.url)
        await watched.process.stop()
        assert watched.states == ["starting", "ready", "draining", "stopped"]
        assert not await answers(watched.process.url)
        assert not alive(child)

    asyncio.run(scenario())


def test_one_that_dies_is_started_again_with_what_it_left_behind_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        watched = Watched(tmp_path, child=str(tmp_path / "child"))
        watched.process.start()
        await watched.at("ready")
        child = int((tmp_path / "child").read_text())
        os.kill(upstream(watched.ports[0]), signal.SIGKILL)
        await watched.until(lambda: watched.states[-2:] == ["starting", "ready"] and watched.process.starts == 2)
        assert not alive(child)
        await watched.process.stop()

    asyncio.run(scenario())


def test_a_guard_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        watched = Watched(tmp_path, child=str(tmp_path / "child"))
        watched.process.start()
        await watched.at("ready")
        left = [upstream(watched.ports[0]), int((tmp_path / "child").read_text())]
        os.kill(upstream(watched.ports[0], guard=True), signal.SIGKILL)
        await watched.until(lambda: watched.process.starts == 2 and watched.process.state == "ready")
        await watched.until(lambda: not any(map(alive, left)))
        await watched.process.stop()

    asyncio.run(scenario())


def upstream(port: int, *, guard: bool = False) -> int:
    """The process that listens there, or the one that guards it."""

    def is_it(folder: Path) -> bool:
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            return False
        return str(UPSTREAM) in words and str(port) in words and ("serve.engines.guard" in words) == guard

    (found,) = (int(folder.name) for folder in Path("/proc").glob("[0-9]*") if is_it(folder))
    return found


def test_one_that_never_answered_fails_at_once_with_its_last_lines(tmp_path: Path) -> None:
    async def scenario() -> None:
        watched = Watched(tmp_path, refuse="no such model: /nowhere")
        watched.process.start()
        await watched.at("failed")
        assert watched.process.starts == 1
        assert "no such model: /nowhere" in str(watched.process.error)
        assert str(tmp_path / "log") in str(watched.process.error)

    asyncio.run(scenario())


def test_one_that_never_answers_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        watched = Watched(tmp_path, patience=replace(HASTY, start=1.5), delay=600, child=str(tmp_path / "child"))
        watched.process.start()
        await watched.at("failed")
        assert "was not ready after 1.5 s" in str(watched.process.error)
        assert not alive(int((tmp_path / "child").read_text()))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("no such model: /nowhere", "no such model: /nowhere"),
        ("(Worker pid=7) ERROR 11-22 [x.py:1] ValueError: 9 GiB is less than requested memory for kv" + "\n#" * 20,
         "\n  ValueError: 9 GiB is less than requested memory for kv\nits log ends with:\n  #"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "hint: lower --memory or --cache-memory"),
        ("ILL", "it was built for processors with instructions that this one lacks"),
        ("KILL", "it was killed, as the system does where memory runs out"),
    ],
)  # fmt: skip
def test_an_error_says_the_cause_and_what_to_lower(tmp_path: Path, said: str, shown: str) -> None:
    async def scenario() -> None:
        watched = Watched(tmp_path, refuse=said)
        watched.process.start()
        await watched.at("failed")
        assert shown in str(watched.process.error)

    asyncio.run(scenario())


def test_one_that_dies_again_and_again_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        watched = Watched(tmp_path)
        watched.process.start()
        await watched.at("ready")
        watched.settings["refuse"] = "out of memory"
        os.kill(upstream(watched.ports[0]), signal.SIGKILL)
        await watched.at("failed")
        assert watched.process.starts == HASTY.starts
        assert "died 3 times" in str(watched.process.error)
        assert "out of memory" in str(watched.process.error)

    asyncio.run(scenario())


def test_one_that_is_unwell_in_every_life_fails(tmp_path: Path) -> None:
    async def unwell() -> str:
        await asyncio.sleep(0.1)  # longer than what counts as steady
        return "was unwell"

    async def scenario() -> None:
        watched = Watched(tmp_path, patience=replace(HASTY, steady=0.05, silent=30), watch=unwell)
        watched.process.start()
        await watched.at("failed")
        assert "was unwell 3 times" in str(watched.process.error)

    asyncio.run(scenario())


def test_loading_is_no_steady_life(tmp_path: Path) -> None:
    """One that loads for longer than a life must last to be steady, and dies before it is ready, is given up too."""

    async def scenario() -> None:
        watched = Watched(tmp_path, patience=replace(HASTY, steady=0.3))
        watched.process.start()
        await watched.at("ready")
        watched.settings |= {"refuse": "out of memory", "delay": 0.4}
        os.kill(upstream(watched.ports[0]), signal.SIGKILL)
        await watched.at("failed")
        assert "died 3 times" in str(watched.process.error)

    asyncio.run(scenario())


def test_a_port_that_somebody_took_is_no_reason_to_fail(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            watched = Watched(tmp_path, port=port)
            watched.process.start()
            await watched.at("ready")
            assert watched.ports[0] == port != watched.ports[1]
            await watched.process.stop()

    asyncio.run(scenario())


HOLD = """
import asyncio, sys
from pathlib import Path
from serve.engines.process import EngineProcess, Launch

async def main():
    async def answers(url):
        return Path(sys.argv[1], "child").exists()
    command = [sys.executable, "-S", *sys.argv[2:]]
    engine = EngineProcess(lambda port: Launch([c.replace("PORT", str(port)) for c in command]), answers, Path(sys.argv[1], "log"))
    engine.start()
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_kill_9_of_the_gateway_leaves_nothing(tmp_path: Path) -> None:
    settings = json.dumps({"child": str(tmp_path / "child")})
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(UPSTREAM), "PORT", settings]
    gateway = subprocess.Popen(command, cwd=UPSTREAM.parents[1], env={**os.environ, "UPSTREAM_KEY": "k"})
    deadline = time.monotonic() + 20
    while not (tmp_path / "child").is_file() or not (tmp_path / "child").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child = int((tmp_path / "child").read_text())
    gateway.kill()
    gateway.wait()
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


@pytest.mark.parametrize("command", [["/nowhere/vllm"], [str(UPSTREAM)]])
def test_a_program_that_cannot_be_run(tmp_path: Path, command: list[str]) -> None:
    async def scenario() -> None:
        process = EngineProcess(lambda _: Launch(command), answers, tmp_path / "log", patience=HASTY)
        process.start()
        async with asyncio.timeout(20):
            while process.state != "failed":
                await asyncio.sleep(0.01)
        assert command[0] in str(process.error)

    asyncio.run(scenario())
