"""`suite bench-serve` against a server that notes when it read a request and wrote each chunk, on the same clock.

What the client says must be what the server did, within 3 %, however late a busy machine makes both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalsets.load.requests import arrivals
from evalsets.load.saturation import CLOSE, SHARE
from suite.cli import main

GAP, LONG_GAP = 0.05, 0.25
GOLDEN = 0.618
TOKENS = 6
PROMPT = 40
LIMITS = {"ttft": 320.0, "tpot": 70.0}
"""Milliseconds, far from what any answer takes."""
SERVICE = 0.01


def wait(number: int) -> float:
    """Seconds to the first token: 200 to 280 ms, of every third answer 360 to 400."""
    spread = number * GOLDEN % 1
    return 0.2 + 0.08 * spread if number % 3 else 0.36 + 0.04 * spread


class Timed:
    """An endpoint that answers after `wait`, with a token each 50 ms, and every eighth time a last one after 250 ms.

    Where it may `refuse`, it refuses every 25th request.
    """

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
        await asyncio.sleep(wait(number))
        self.written[number] = []
        count = min(TOKENS, body["max_tokens"])
        for token in range(count):
            if token:
                await asyncio.sleep(LONG_GAP if token == TOKENS - 1 and number % 8 == 0 else GAP)
            self.word(number, writer)
        self.end(writer, body, count)

    def word(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.written[number].append(time.perf_counter())
        self.event(writer, choices=[{"delta": {"content": "word "}, "finish_reason": None}])

    def end(self, writer: asyncio.StreamWriter, body: dict[str, Any], tokens: int) -> None:
        self.event(writer, choices=[{"delta": {}, "finish_reason": "length"}])
        words = len(body["messages"][0]["content"].split())
        self.event(writer, choices=[], usage={"prompt_tokens": 10 + 2 * words, "completion_tokens": tokens})
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


class OneAtATime(Timed):
    """An endpoint that bears exactly 100 requests a second: each takes it 10 ms, and those that come meanwhile wait."""

    free = 0.0

    async def answer(self, number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        now = time.perf_counter()
        self.free = max(self.free, now) + SERVICE  # its own schedule: sleeping too long once delays nobody else
        await asyncio.sleep(self.free - now)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.written[number] = []
        self.word(number, writer)
        self.end(writer, body, 1)


@contextlib.contextmanager
def served(fake: Timed) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(fake.connected, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.run_until_complete(hang_up())
    loop.close()


async def hang_up() -> None:
    """End what still waits for requests on connections that are gone."""
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.fixture
def timed(request: pytest.FixtureRequest) -> Iterator[tuple[str, Timed]]:
    fake = Timed(refuse=bool(getattr(request, "param", False)))
    with served(fake) as url:
        yield url, fake


def bench(capsys: pytest.CaptureFixture[str], url: str, *flags: str) -> dict[str, Any]:
    shape = ["--prompt-tokens", str(PROMPT), "--new-tokens", str(TOKENS), "--json"]
    assert main(["bench-serve", "--url", url, "--model", "a,b", *shape, *flags]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("how", [("--concurrency", "16"), ("--rate", "40")])
def test_figures_are_what_the_server_did(
    timed: tuple[str, Timed], how: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    url, fake = timed
    limits = ",".join(f"{measure}:{limit}" for measure, limit in LIMITS.items())
    found = bench(capsys, url, "--requests", "96", *how, "--goodput", limits)
    warm = len(fake.read) - 96
    assert warm >= 2 + 2  # two that tell how long prompts are, and two models
    truth = fake.truth(warm)
    assert (found["requests"], found["failed"], len(truth["ttft"])) == (96, 0, 96)
    for measure, values in truth.items():
        assert found[measure]["mean"] == pytest.approx(np.mean(values), rel=0.03)
        for p in (50, 90, 95, 99):
            assert found[measure][f"p{p}"] == pytest.approx(np.percentile(values, p), rel=0.03)
    seconds = max(w[-1] for n, w in fake.written.items() if n >= warm) - fake.read[warm]
    kept = int(np.all([np.less(truth[measure], limit) for measure, limit in LIMITS.items()], axis=0).sum())
    assert 40 < kept < 70
    assert (found["prompt_tokens"], found["new_tokens"]) == (PROMPT, TOKENS)
    goodput = found["goodput"]
    for figure, expected in (
        (found["seconds"], seconds), (found["requests_per_s"], 96 / seconds),
        (found["new_tokens_per_s"], 96 * TOKENS / seconds), (found["prompt_tokens_per_s"], 96 * PROMPT / seconds),
        (goodput["share"], kept / 96), (goodput["requests_per_s"], kept / seconds),
    ):  # fmt: skip
        assert figure == pytest.approx(expected, rel=0.03)
    assert {name: part["requests"] for name, part in found["models"].items()} == {"a": 48, "b": 48}


@pytest.mark.parametrize("timed", [True], indirect=True)
def test_a_refusal_is_counted_and_timed_as_nothing(
    timed: tuple[str, Timed], capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(capsys, timed[0], "--requests", "60", "--concurrency", "30")
    assert 2 <= found["failed"] <= 3
    assert found["errors"] == {"HTTP 429: busy": found["failed"]}
    assert found["ttft"]["p50"] >= 200


def bears(rate: float, limit: float, requests: int) -> bool:
    """Whether enough of the requests that come at this rate are done within `limit` seconds, one after the other."""
    free, kept = 0.0, 0
    for came in arrivals(requests, rate, 0):
        free = max(free, came) + SERVICE
        kept += free - came <= limit
    return kept / requests >= SHARE


def test_the_search_finds_what_a_server_is_known_to_bear(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A queue of known speed keeps a limit up to a rate that its own arithmetic tells."""
    plot = tmp_path / "rates.png"
    low, high = 10.0, 1000.0
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if bears(middle, 0.06, 60) else (low, middle)
    with served(OneAtATime()) as url:
        flags = ("--requests", "60", "--find-saturation", "--rate", "40", "--goodput", "e2e:60")
        found = bench(capsys, url, *flags, "--plot", str(plot))
    assert low / CLOSE / 1.03 <= found["saturation"] <= low * 1.03
    assert found["saturation"] == max(probe["rate"] for probe in found["probes"] if probe["kept"])
    assert not found["at_least"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_a_limit_allows_to_wait_is_no_rate_that_is_borne(capsys: pytest.CaptureFixture[str]) -> None:
    """All of a short burst is answered within 2 s at any rate: it is asked again, longer, and as slowly answered."""
    flags = ("--requests", "60", "--find-saturation", "--rate", "75", "--goodput", "e2e:2000", "--probes")
    with served(OneAtATime()) as url:
        found = bench(capsys, url, *flags, "2")
        kept, slow = found["probes"]
        assert (found["saturation"], found["at_least"], kept["requests"]) == (75, False, 60)
        assert slow["requests"] > 60
        assert not slow["kept"]
        assert main(["bench-serve", "--url", url, "--model", "a", "--new-tokens", "1", *flags, "1"]) == 0
    assert "at least 75 requests/s keep the limits" in capsys.readouterr().out


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
