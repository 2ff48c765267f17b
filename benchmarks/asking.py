"""Loads for a server: many chats at once, one chat watched closely, and the gateway with nothing behind it."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.peers import Server

NEW = 64
_numbers = itertools.count(1000)
"""Questions that nobody was asked before: what a server keeps of earlier ones says nothing of new ones."""
FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError)
HEADERS = {"Content-Type": "application/json"}


def body(model: str, number: int) -> dict[str, Any]:
    """A short conversation; no two numbers ask the same."""
    question = f"What is {number} plus {number * 7 % 100}? Then say who you are."
    return {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": NEW, "temperature": 0,
    }  # fmt: skip


def turns(names: Sequence[str], count: int) -> list[str]:
    """`count` models, the names taking turns."""
    return list(itertools.islice(itertools.cycle(names), count))


def chats(server: Server, models: Sequence[str]) -> float:
    """New tokens per second of as many chats as there are models, sent at once.

    Raises ValueError where an answer has not the tokens that it was asked for.
    """

    async def ask() -> float:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

            async def one(number: int, model: str) -> int:
                async with session.post(f"{server.url}/chat/completions", json=body(model, number)) as response:
                    answer = await response.read()
                if response.status != 200:
                    raise ValueError(f"HTTP {response.status}: {answer[:200].decode(errors='replace')}")
                return int(json.loads(answer)["usage"]["completion_tokens"])

            began = time.perf_counter()
            tokens = await asyncio.gather(*map(one, _numbers, models))
            seconds = time.perf_counter() - began
        if min(tokens) < NEW - 1:  # some do not count the last
            raise ValueError(f"an answer of {min(tokens)} tokens in place of {NEW}")
        return sum(tokens) / seconds

    return asyncio.run(ask())


def one(server: Server, times: int = 5) -> dict[str, float]:
    """Milliseconds to the first token and for each further one, of one chat at a time: medians of a few."""
    found = sorted(_watched(server, next(_numbers)) for _ in range(times))
    return {"first": found[times // 2][0], "token": sorted(token for _, token in found)[times // 2]}


def _watched(server: Server, number: int) -> tuple[float, float]:
    host = server.url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(host, timeout=120)
    began = time.perf_counter()
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({**body(server.base, number), "stream": True}), HEADERS
    )
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"HTTP {response.status}: {response.read()[:200].decode(errors='replace')}")
    times = []
    for line in response:
        if line.startswith(b"data: {") and any(c["delta"].get("content") for c in json.loads(line[6:])["choices"]):
            times.append(time.perf_counter())
    connection.close()
    return 1000 * (times[0] - began), 1000 * (times[-1] - times[0]) / (NEW - 1)


class Zipf:
    """Draws names m0, m1, ...: the n-th is asked for 1/n as often as the first."""

    def __init__(self, count: int) -> None:
        self.names = [f"m{number}" for number in range(count)]
        self.weights = [1 / (number + 1) for number in range(count)]

    def draw(self, count: int, seed: int) -> list[str]:
        """`count` names, the same for the same seed."""
        return random.Random(seed).choices(self.names, self.weights, k=count)


class Generate:
    """`transformers.generate` in this process, one chat after the other."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def rate(self, count: int) -> float:
        """New tokens per second of `count` chats."""
        began = time.perf_counter()
        for number in range(count):
            prompt = self.tokenizer.apply_chat_template(
                body("", number)["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            self.model.generate(**prompt, max_new_tokens=NEW, min_new_tokens=NEW, max_length=None, do_sample=False)
        return count * NEW / (time.perf_counter() - began)


def gateway_alone(folder: Path, times: int) -> list[float]:
    """Seconds of each of `times` requests, one after the other, to a gateway whose engine answers at once."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_gateway, args=(folder, sending), daemon=True)
    process.start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", receiving.recv(), timeout=60)
        ask = _asker(connection)
        while not ask():
            time.sleep(0.05)
        found = []
        for _ in range(times):
            began = time.perf_counter()
            ask()
            found.append(time.perf_counter() - began)
        return found
    finally:
        process.terminate()
        process.join()


def _asker(connection: http.client.HTTPConnection) -> Callable[[], bool]:
    text = json.dumps(body("base", 1))

    def ask() -> bool:
        connection.request("POST", "/v1/chat/completions", text, HEADERS)
        response = connection.getresponse()
        response.read()
        return response.status == 200

    return ask


def _gateway(folder: Path, port: Connection) -> None:
    from serve.generation import Generation, Request, Stats
    from serve.server import listen, run
    from serve.settings import Settings

    class Instant:
        """An engine that ends a request with some tokens in the call that submits it."""

        max_length, alive, load = 1024, True, (0, 0)

        def __init__(self, notify: Callable[[list[Generation]], None]) -> None:
            self.notify = notify

        def submit(self, request: Request) -> Generation:
            generation = Generation(request)
            generation.tokens += [300 + i for i in range(request.max_tokens)]
            generation.end("length")
            self.notify([generation])
            return generation

        def stats(self) -> Stats:
            return Stats()

        def cancel(self, *_: Any) -> None:
            """Nothing runs."""

        close = load_adapter = unload_adapter = cancel

    class Alone(Settings):
        def start_engine(self, notify: Any) -> Any:
            return Instant(notify)

    with listen("127.0.0.1", 0) as sock:
        port.send(sock.getsockname()[1])
        run(Alone(model=folder, name="base", log="off"), sock)
