"""`suite bench-serve` against a server that notes when it read a request and wrote each chunk, on the same clock.

What the client says must be what the server did, within 3 %, however late a busy machine makes both.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from suite.cli import main

GAP = 0.05
GOLDEN = 0.618
TOKENS = 6
PROMPT = 40


class Timed:
    """An endpoint that answers after 200 to 400 ms, evenly spread, with a token each 50 ms; every 25th is refused."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.read: list[float] = []
        self.written: dict[int, list[float]] = {}

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
                body = json.loads(await reader.readexactly(length) or b"{}")
                arrived = time.perf_counter()
                if not body:
                    self.plain(writer, b'{"data": [{"id": "a"}, {"id": "b"}]}')
                else:
                    self.read.append(arrived)
                    await self.answer(len(self.read) - 1, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    @staticmethod
    def plain(writer: asyncio.StreamWriter, content: bytes, status: bytes = b"200 OK") -> None:
        head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (status, len(content)) + content)

    async def answer(self, number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if self.refuse and number % 25 == 24:
            self.plain(writer, b'{"error": {"message": "busy"}}', b"429 Too Many Requests")
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(0.2 + 0.2 * (number * GOLDEN % 1))
        self.written[number] = []
        for token in range(min(TOKENS, body["max_tokens"])):
            if token:
                await asyncio.sleep(GAP)
            self.written[number].append(time.perf_counter())
            self.event(writer, choices=[{"delta": {"content": "word "}, "finish_reason": None}])
        self.event(writer, choices=[{"delta": {}, "finish_reason": "length"}])
        words = len(body["messages"][0]["content"].split())
        self.event(writer, choices=[], usage={"prompt_tokens": 10 + 2 * words, "completion_tokens": token + 1})
        writer.write(b"0\r\n\r\n")

    @staticmethod
    def event(writer: asyncio.StreamWriter, **body: Any) -> None:
        content = b"data: " + json.dumps(body).encode() + b"\n\n"
        writer.write(b"%x\r\n" % len(content) + content + b"\r\n")

    def truth(self, first: int) -> dict[str, list[float]]:
        """Milliseconds of each request from number `first` on, as this side has them."""
        found: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": [], "e2e": []}
        for number, written in self.written.items():
            if number >= first:
                sent = self.read[number]
                found["ttft"].append(1000 * (written[0] - sent))
                found["e2e"].append(1000 * (written[-1] - sent))
                found["tpot"].append(1000 * (written[-1] - written[0]) / (len(written) - 1))
                found["itl"] += list(1000 * np.diff(written))
        return found


@pytest.fixture
def timed(request: pytest.FixtureRequest) -> Iterator[tuple[str, Timed]]:
    fake = Timed(refuse=bool(getattr(request, "param", False)))
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(fake.connected, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", fake
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def bench(capsys: pytest.CaptureFixture[str], url: str, *flags: str) -> dict[str, Any]:
    shape = ["--prompt-tokens", str(PROMPT), "--new-tokens", str(TOKENS), "--json"]
    assert main(["bench-serve", "--url", url, "--model", "a,b", *shape, *flags]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("how", [("--concurrency", "16"), ("--rate", "40")])
def test_figures_are_what_the_server_did(
    timed: tuple[str, Timed], how: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    url, fake = timed
    found = bench(capsys, url, "--requests", "96", *how, "--goodput", "ttft:355,tpot:500")
    warm = len(fake.read) - 96
    assert warm >= 2 + 2  # two that tell how long prompts are, and two models
    truth = fake.truth(warm)
    assert (found["requests"], found["failed"], len(truth["ttft"])) == (96, 0, 96)
    for measure, values in truth.items():
        assert found[measure]["mean"] == pytest.approx(np.mean(values), rel=0.03)
        for p in (50, 90, 95):
            assert found[measure][f"p{p}"] == pytest.approx(np.percentile(values, p), rel=0.03)
    seconds = max(w[-1] for n, w in fake.written.items() if n >= warm) - fake.read[warm]
    assert found["seconds"] == pytest.approx(seconds, rel=0.03)
    assert found["new_tokens_per_s"] == pytest.approx(96 * TOKENS / seconds, rel=0.03)
    assert (found["prompt_tokens"], found["new_tokens"]) == (PROMPT, TOKENS)
    assert found["goodput"]["share"] == pytest.approx(np.mean(np.less(truth["ttft"], 350)), abs=0.1)
    assert {name: part["requests"] for name, part in found["models"].items()} == {"a": 48, "b": 48}


@pytest.mark.parametrize("timed", [True], indirect=True)
def test_a_refusal_is_counted_and_timed_as_nothing(
    timed: tuple[str, Timed], capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(capsys, timed[0], "--requests", "60", "--concurrency", "30")
    assert 2 <= found["failed"] <= 3
    assert found["errors"] == {"HTTP 429: busy": found["failed"]}
    assert found["ttft"]["p50"] >= 200


def test_the_search_ends_at_a_rate_that_was_tried(
    timed: tuple[str, Timed], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "rates.png"
    flags = ("--requests", "12", "--find-saturation", "--probes", "3", "--goodput", "e2e:2000", "--plot", str(plot))
    found = bench(capsys, timed[0], *flags)
    assert len(found["probes"]) == 3  # the server bears any rate
    assert found["saturation"] == max(probe["rate"] for probe in found["probes"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_said(timed: tuple[str, Timed], capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--find-saturation"], "needs limits to keep"), (["--goodput", "tfft:3"], "did you mean 'ttft'"),
        (["--model", "c"], "serves no model 'c'"), (["--rate", "0"], "--rate must be more than 0"),
    ):  # fmt: skip
        assert main(["bench-serve", "--url", timed[0], "--model", "a", *flags]) == 2
        assert message in capsys.readouterr().err
    assert main(["bench-serve", "--url", timed[0], "--model", "a", "--requests", "4", "--new-tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert "time to first token" in shown
    assert "new tokens/s" in shown
