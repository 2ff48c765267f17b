"""10,000 requests at once 256 of them: no error, no leak, whoever goes away and whatever fails. Minutes, not seconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import pytest

from tests.tiny.tiny_models import tiny_adapter, tiny_model

ROOT = Path(__file__).parents[2]
REQUESTS, WARM, TOGETHER = 10_000, 2_000, 256
MODELS = ["base", "a", "b"]
NEW = 8
GROWTH = 20 * 2**20
"""Bytes that the server may grow by after it is warm: it goes up and down by half of that, which is less than a leak of
3 KB a request."""
SERVER = """
import ctypes, gc, random, signal, sys
from pathlib import Path
from serve.server import listen, run
from serve.settings import Settings
from serve.torch.forward import Forward

rate, forward, rng = float(sys.argv[2]), Forward.run, random.Random(0)

def failing(self, *given):
    if rng.random() < rate:
        raise ArithmeticError("injected")
    return forward(self, *given)

def tidy(*_):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

Forward.run = failing
signal.signal(signal.SIGUSR1, tidy)
folder = Path(sys.argv[1])
adapters = {name: folder / name for name in "ab"}
sock = listen("127.0.0.1", 0)
settings = Settings(model=folder / "base", adapters=adapters, log="off", cache_memory=16 * 2**20)
sys.exit(run(settings, sock, lambda: print(sock.getsockname()[1], flush=True)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("load")
    base = tiny_model(root / "base")
    for seed, name in enumerate("ab", 1):
        tiny_adapter(base, root / name, seed=seed)
    return root


@dataclass
class Server:
    """A server process, and its address."""

    url: str
    process: psutil.Process

    def health(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/health", timeout=60).json())

    def rest(self) -> dict[str, Any]:
        """How it is when nothing runs; the requests of clients that left end first."""
        deadline = time.monotonic() + 60
        while (health := self.health())["running"] or health["waiting"]:
            assert time.monotonic() < deadline, "answers that nobody reads go on"
            time.sleep(0.05)
        return health

    def memory(self) -> int:
        """Bytes that it holds, without those that the allocator only keeps for later."""
        self.process.send_signal(signal.SIGUSR1)
        self.health()
        time.sleep(1)
        return int(self.process.memory_info().rss)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name}{{"))


@contextlib.contextmanager
def serving(folder: Path, rate: float = 0.0) -> Iterator[Server]:
    """Serve the model and its adapters; steps fail at that rate."""
    command = [sys.executable, "-c", SERVER, str(folder), str(rate)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # the clients need the other processor
    with subprocess.Popen(
        command, cwd=ROOT, env=alone, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        try:
            assert child.stdout is not None
            yield Server(f"http://127.0.0.1:{child.stdout.readline().strip()}", psutil.Process(child.pid))
        finally:
            child.terminate()
            assert child.wait(60) == 0


def body(rng: random.Random) -> dict[str, Any]:
    """One of few chats that begin alike, so that its answer is known, or a prompt like no other."""
    asked: dict[str, Any] = {"model": rng.choice(MODELS), "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    if rng.random() < 0.2:
        return {**asked, "prompt": [rng.randrange(3, 500) for _ in range(rng.randrange(1, 200))], "n": 2}
    system = {"role": "system", "content": "Answer in one word, and do not think about it for long."}
    return {**asked, "messages": [system, {"role": "user", "content": f"What is {rng.randrange(8)} plus 5?"}]}


@dataclass
class Load:
    """What came back: how many requests ended how, and every answer that one chat was given by one model."""

    url: str
    ends: Counter[str] = field(default_factory=Counter)
    answers: dict[str, set[str]] = field(default_factory=dict)

    async def run(self, count: int, seed: int) -> None:
        numbers = iter(range(count))
        connector = aiohttp.TCPConnector(limit=TOGETHER)
        async with aiohttp.ClientSession(self.url, connector=connector) as client, asyncio.TaskGroup() as tasks:
            for worker in range(TOGETHER):
                tasks.create_task(self.work(client, numbers, random.Random(f"{seed} {worker}")))

    async def work(self, client: aiohttp.ClientSession, numbers: Iterator[int], rng: random.Random) -> None:
        for _ in numbers:
            try:
                self.ends[await self.ask(client, body(rng), rng)] += 1
            except Injected:
                self.ends["failed"] += 1

    async def ask(self, client: aiohttp.ClientSession, asked: dict[str, Any], rng: random.Random) -> str:
        """Ask in one of four ways; returns how it ended."""
        way = rng.random()
        if way < 0.1:  # gone before the answer
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.random() * 0.5):
                    await self.whole(client, {**asked, "max_tokens": 100})
            return "left"
        if way < 0.2:  # gone in the middle of a stream
            pieces = self.pieces(client, {**asked, "max_tokens": 100})
            for _ in range(rng.randrange(1, 5)):
                await anext(pieces, None)
            await pieces.aclose()
            return "left"
        if way < 0.5:
            text = "".join([piece async for piece in self.pieces(client, asked)])
        else:
            text = await self.whole(client, asked)
        if "messages" in asked:
            self.answers.setdefault(json.dumps(asked), set()).add(text)
        return "ended"

    async def whole(self, client: aiohttp.ClientSession, asked: dict[str, Any]) -> str:
        async with client.post(route(asked), json=asked) as response:
            answer = await response.json()
            check(answer)
            assert response.status == 200, answer
            assert answer["usage"]["completion_tokens"] <= asked["max_tokens"] * asked.get("n", 1)
            choice = answer["choices"][0]
            return str(choice["message"]["content"] if "message" in choice else choice["text"])

    async def pieces(self, client: aiohttp.ClientSession, asked: dict[str, Any]) -> AsyncIterator[str]:
        async with client.post(route(asked), json={**asked, "stream": True}) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    check(event)
                    choice = event["choices"][0]
                    yield (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]


class Injected(Exception):
    """A request failed with the error that the server was made to raise."""


def check(answer: dict[str, Any]) -> None:
    if "injected" in answer.get("error", {}).get("message", ""):
        raise Injected


def route(asked: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in asked else "/v1/completions"


def test_ten_thousand_requests_leave_nothing_behind(folder: Path) -> None:
    with serving(folder) as server:
        load = Load(server.url)
        asyncio.run(load.run(WARM, seed=0))
        server.rest()
        warm, files, threads = server.memory(), server.process.num_fds(), server.process.num_threads()
        started = time.monotonic()
        asyncio.run(load.run(REQUESTS - WARM, seed=1))
        rate = (REQUESTS - WARM) / (time.monotonic() - started)
        health = server.rest()
        growth = server.memory() - warm
        print(f"{rate:.0f} requests/s; grew by {growth / 2**20:.1f} MiB from {warm / 2**20:.0f} MiB")
        assert (health["status"], health["failed_steps"]) == ("ready", 0)
        assert load.ends["ended"] + load.ends["left"] == REQUESTS
        assert load.ends["left"] > REQUESTS / 10
        assert all(len(answers) == 1 for answers in load.answers.values()), load.answers
        assert len(load.answers) == 8 * len(MODELS)
        assert server.metric("suite_engine_cells_used") == 0
        assert server.metric("suite_engine_prefix_cells_used") <= server.metric("suite_engine_prefix_cells")
        assert server.metric("suite_engine_prefix_hits_total") > 0
        assert growth < GROWTH
        # a connection may be about to close, a pool of threads not full yet
        assert server.process.num_fds() < files + 16
        assert server.process.num_threads() < threads + 16


def test_steps_that_fail_fail_their_requests_only(folder: Path) -> None:
    with serving(folder) as server:
        right = Load(server.url)
        asyncio.run(right.run(300, seed=0))
    with serving(folder, rate=0.02) as server:
        load = Load(server.url)
        asyncio.run(load.run(1_000, seed=0))
        health = server.rest()
        assert health["status"] == "ready"
        assert health["failed_steps"] > 0
        assert health["last_failure"] == "ArithmeticError: injected"
        assert 0 < load.ends["failed"] < load.ends["ended"]
        for asked, answers in right.answers.items():
            assert load.answers.get(asked, answers) == answers
