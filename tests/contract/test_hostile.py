"""What no well-meaning client sends: every one gets an answer in OpenAI's form, none a 5xx, and nobody else waits."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.contract.conftest import Served

QUESTION = [{"role": "user", "content": "Who are you?"}]
CHAT: dict[str, Any] = {"model": "base", "messages": QUESTION, "max_tokens": 2}
JSON = {"Content-Type": "application/json"}


def raw(served: Served, path: str, body: bytes) -> httpx.Response:
    return served.http.post(path, content=body, headers=JSON)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b'"text"',
        b"\x00",
        b'{"model": "base"',
        b'{"model": "base", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "temperature": 1e309}',
        b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1e309}',
        b'{"model": "base", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "base", "messages": ' + b"[" * 100_000,
        b'{"a": ' * 50_000,
    ],
)
def test_bytes(served: Served, body: bytes) -> None:
    answer = raw(served, "/v1/chat/completions", body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "more",
    [
        {"messages": "text"},
        {"messages": [1]},
        {"messages": [{"role": 5, "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": {"text": "x"}}]},
        {"messages": [{"role": "user", "content": [5]}]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": 5}]}]},
        {"messages": [{"role": "assistant", "tool_calls": "x"}]},
        {"max_tokens": "5"},
        {"max_tokens": True},
        {"max_tokens": -(10**30)},
        {"n": 10**9},
        {"stop": ["x"] * 1000},
        {"stop": "x" * 10_000},
        {"stop": [None]},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"5": "x"}},
        {"logit_bias": []},
        {"top_logprobs": 10**6, "logprobs": True},
        {"tools": [{}]},
        {"tools": [{"type": "function", "function": {"name": 5}}]},
        {"tools": {}},
        {"tool_choice": "sometimes"},
        {"tool_choice": "required"},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": []},
        {"stream_options": 5},
        {"response_format": {"type": "xml"}},
        {"model": None},
        {"model": 5},
    ],
)
def test_fields(served: Served, more: dict[str, Any]) -> None:
    answer = served.http.post("/v1/chat/completions", json={**CHAT, **more})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 10**18, "stop": ["a", "b", "c", "d", "e", " "]},
        {"seed": -(2**63)},
        {"temperature": 1e-300},
        {"metadata": {"deep": 1}, "unknown": [None]},
        {"messages": [{"role": "user", "content": "\x00\x1b[2J\u202e\ufffe\U0010ffff"}]},
        {"messages": [{"role": "user", "content": "{{ 7 * 7 }}{% raise %}"}]},
        {"user": "\r\nX-Injected: 1"},
    ],
)
def test_odd_and_yet_right(served: Served, more: dict[str, Any]) -> None:
    answer = served.http.post("/v1/chat/completions", json={**CHAT, **more})
    assert answer.status_code == 200, answer.text
    assert "x-injected" not in answer.headers


def test_deep_json(served: Served) -> None:
    for levels in (50, 5_000):
        body = json.dumps({**CHAT, "metadata": None}).encode()[:-1] + b', "x": ' + _nested(levels) + b"}"
        answer = raw(served, "/v1/chat/completions", body)
        assert answer.status_code in (200, 400), answer.text


def _nested(levels: int) -> bytes:
    return b'{"a":[' * levels + b"1" + b"]}" * levels


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_prompt_far_beyond_the_limit_makes_nobody_wait(served: Served, path: str) -> None:
    text = "word " * 1_000_000
    body = {"model": "base", "messages": [{"role": "user", "content": text}], "prompt": text, "max_tokens": 1}
    body.pop("prompt" if "chat" in path else "messages")
    content = json.dumps(body).encode()
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(raw(served, path, content)))
    asking.start()
    answered = 0
    while asking.is_alive():
        answered += served.http.get("/health").status_code == 200
    asking.join()
    assert answered > 0
    assert answers[0].status_code == 400
    assert answers[0].json()["error"]["code"] == "context_length_exceeded"


def test_a_context_that_is_a_little_too_long(served: Served) -> None:
    for body, param in [
        ({"prompt": [40] * 2048}, "prompt"),
        ({"messages": [{"role": "user", "content": "x " * 2100}]}, "messages"),
    ]:
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        error = served.http.post(path, json={"model": "base", "max_tokens": 1, **body}).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert "maximum context length is 2048 tokens" in error["message"]


def test_only_json_is_read(served: Served) -> None:
    """A web page can make a browser send any other kind of body to this machine without asking it first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = served.http.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"Content-Type": kind})
        assert answer.status_code == 415
        assert "Content-Type" in answer.json()["error"]["message"]


def test_what_is_not_heeded_is_named(served: Served) -> None:
    answer = served.http.post("/v1/chat/completions", json={**CHAT, "frobnicate": 1, "a\r\nb": 2})
    assert answer.headers["x-ignored-fields"] == "frobnicate"


class Connection:
    """A client below HTTP."""

    def __init__(self, served: Served) -> None:
        url = urlsplit(served.endpoint.url)
        assert url.hostname
        assert url.port
        self.socket = socket.create_connection((url.hostname, url.port), timeout=30)

    def post(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self.socket.sendall(head.encode() + content)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.socket.close()


def idle(served: Served, seconds: float = 60) -> bool:
    """Whether nothing runs or waits any more: soon, where the machine is not busy with something else."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        health = served.http.get("/health").json()
        if (health["running"], health["waiting"]) == (0, 0):
            return True
        time.sleep(0.05)
    return False


LONG: dict[str, Any] = {"model": "base", "messages": QUESTION, "max_tokens": 1900, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_break_off_free_their_places(served: Served, stream: bool) -> None:
    """More than the server computes at once: some of them still wait in the queue."""
    connections = [Connection(served) for _ in range(80)]
    for connection in connections:
        connection.post({**LONG, "stream": stream})
    if stream:
        assert connections[0].socket.recv(1000).startswith(b"HTTP/1.1 200")
    time.sleep(0.3)
    for number, connection in enumerate(connections):
        connection.reset() if number % 2 else connection.socket.close()
    assert idle(served)


def test_a_reader_that_stops_reading_holds_no_place(served: Served) -> None:
    connection = Connection(served)
    connection.post({**LONG, "max_tokens": 500, "stream": True, "logprobs": True, "top_logprobs": 20})
    assert idle(served)
    connection.socket.close()


def test_half_a_request(served: Served) -> None:
    connection = Connection(served)
    connection.socket.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    connection.socket.close()
    garbage = Connection(served)
    garbage.socket.sendall(b"\x16\x03\x01\x00\xff garbage\r\n\r\n")
    assert garbage.socket.recv(100).startswith(b"HTTP/1.1 400")
    assert served.http.get("/health").json()["failed_steps"] == 0


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: ",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: ",
    ],
)
def test_heads_and_trailers_without_end_are_cut_off(served: Served, begun: bytes) -> None:
    address = urlsplit(served.endpoint.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as client:
        client.sendall(begun)
        with pytest.raises(OSError, match=r"Connection reset|Broken pipe"):
            for _ in range(64):
                client.sendall(bytes(2**20).replace(b"\0", b"x"))
    assert served.http.get("/health").status_code == 200
