"""How a server ends, and what it does when too much is asked: real processes, and streams while signals come.

The engine is ours; in the last tests it is another program behind the relay, which `tests/upstream.py` stands for.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.pretended import pretended_vllm
from tests.contract.suite_server import Running, suite_serve
from tests.tiny.tiny_models import tiny_model

LONG = {"model": "base", "prompt": "The", "max_tokens": 2000, "temperature": 0, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("draining") / "base")


@pytest.fixture
def server(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    with suite_serve(tmp_path, "--model", folder, "--name", "base", "--max-batch", "2", *request.param) as running:
        yield running


class Stream(threading.Thread):
    """A client that reads a long answer to its end; `begun` is set with its first piece."""

    def __init__(self, server: Running, **more: Any) -> None:
        super().__init__()
        self.url, self.body, self.begun, self.text = server.http.base_url, {**LONG, **more}, threading.Event(), ""
        self.start()

    def run(self) -> None:
        with (
            contextlib.suppress(httpx.RemoteProtocolError),  # the server ended before the answer did
            httpx.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=60) as answer,
        ):
            for piece in answer.iter_text():
                self.text += piece
                self.begun.set()


def until(server: Running, condition: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition(health := server.http.get("/health").json()):
        assert time.monotonic() < deadline, health
        time.sleep(0.02)


def draining(health: dict[str, Any]) -> bool:
    return bool(health["status"] == "draining")


@pytest.mark.parametrize("server", [["--max-queue", "24", "--drain", "60"]], indirect=True)
def test_too_many_are_told_when_to_come_again_and_those_that_run_end(server: Running) -> None:
    streams = [Stream(server, max_tokens=250, n=8) for _ in range(4)]
    until(server, lambda health: health["waiting"] >= 24)
    refused = server.http.post("/v1/completions", json={**LONG, "stream": False})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    server.process.send_signal(signal.SIGTERM)
    until(server, draining)
    assert [server.http.get(path).status_code for path in ("/ready", "/health", "/v1/models")] == [503, 200, 503]
    refused = server.http.post("/v1/completions", json=LONG)
    assert refused.status_code == 503
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    for stream in streams:
        stream.join(60)
        assert stream.text.count('"finish_reason":"length"') == 8
        assert stream.text.endswith("data: [DONE]\n\n")
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.errors.read_text()


@pytest.mark.parametrize("server", [["--drain", "0.5"]], indirect=True)
def test_what_does_not_end_in_time_is_ended(server: Running) -> None:
    streams = [Stream(server, n=16) for _ in range(2)]
    idle = socket.create_connection((server.http.base_url.host, server.http.base_url.port))
    until(server, lambda health: health["running"] == 2 and health["waiting"] == 30)
    server.process.send_signal(signal.SIGTERM)
    for stream in streams:
        stream.join(30)
        assert "the server is shutting down" in stream.text
    assert server.process.wait(30) == 0
    idle.close()
    with pytest.raises(httpx.ConnectError):
        server.http.get("/health")
    assert "Traceback" not in server.errors.read_text()


@pytest.mark.parametrize("server", [["--drain", "600"]], indirect=True)
def test_a_second_signal_ends_at_once(server: Running) -> None:
    stream = Stream(server, n=16)
    assert stream.begun.wait(30)
    server.process.send_signal(signal.SIGINT)
    until(server, draining)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    stream.join(30)
    assert "[DONE]" not in stream.text


@contextlib.contextmanager
def relaying(folder: Path, scratch: Path, *options: str, **given: Any) -> Iterator[tuple[Running, Path]]:
    """A server with an engine behind it, and the engine's journal; nothing of that engine is left when it has ended."""
    journal, child = scratch / "journal", scratch / "child"
    python = pretended_vllm(scratch, {"journal": str(journal), "child": str(child), **given})
    own = ["--backend", "vllm", "--env-python", python, "--no-probe"]
    with suite_serve(scratch, "--model", folder, "--name", "base", *own, *options) as server:
        yield server, journal
        assert server.process.wait(30) == 0
        assert not (Path("/proc") / child.read_text()).exists()
        assert "Traceback" not in server.errors.read_text()


def ask(server: Running, text: str, *, stream: bool = True) -> Stream:
    return Stream(server, messages=[{"role": "user", "content": text}], stream=stream)


def answered(asked: Stream) -> bool:
    """Whether it has ended as it should."""
    asked.join(60)
    if asked.body["stream"]:
        return asked.text.count('"delta"') == 5 and asked.text.endswith("data: [DONE]\n\n")
    return "usage" in json.loads(asked.text)


def test_streams_of_an_engine_behind_the_relay_end_before_it_does(folder: Path, tmp_path: Path) -> None:
    with relaying(folder, tmp_path, "--drain", "60", pace=0.02) as (server, _):
        streams = [ask(server, str(i)) for i in range(4)]
        assert all(stream.begun.wait(30) for stream in streams)
        server.process.send_signal(signal.SIGTERM)
        until(server, draining)
        refused = server.http.post("/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is shutting down")
        assert [answered(stream) for stream in streams] == [True] * 4


@pytest.mark.parametrize(("drain", "enough"), [("60", True), ("0.1", False)])
def test_what_waits_for_an_engine_that_starts_again(folder: Path, tmp_path: Path, drain: str, enough: bool) -> None:
    """It is answered by its next life, or told when the time is over."""
    with relaying(folder, tmp_path, "--drain", drain, delay=1) as (server, journal):
        asked = [ask(server, "hang once")]
        until(server, lambda _: "asked hang" in journal.read_text())
        asked.append(ask(server, "die once", stream=False))
        until(server, lambda health: health["waiting"] == 2)
        asked += [ask(server, str(i), stream=i % 2 == 0) for i in range(6)]
        until(server, lambda health: health["waiting"] == 8)
        server.process.send_signal(signal.SIGTERM)
        if enough:
            assert [answered(each) for each in asked] == [True] * 8
        else:
            for each in asked:
                each.join(60)
                assert json.loads(each.text)["error"]["message"] == "the server is shutting down"
