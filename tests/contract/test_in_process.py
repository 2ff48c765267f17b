"""Our own server with what is put into it: faults, clients that do not read, a template of another form."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from serve.gateway import create_app
from serve.http import Protocol
from serve.keys import Key, Rights
from serve.server import listen
from serve.serving import Serving
from serve.settings import Settings
from tests.contract.threaded import threaded
from tests.tiny.tiny_models import tiny_adapter, tiny_model

LONG: dict[str, Any] = {"model": "base", "prompt": "The", "max_tokens": 1500, "ignore_eos": True}
HEADERS = {"Authorization": "Bearer sk-one"}
SMALL = 4096
"""Bytes that each end of a connection keeps: nothing of an answer disappears in them."""


TEMPLATES = Path(__file__).parents[1] / "tiny" / "templates"


class Impatient(Protocol):
    patience = 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("in_process") / "base")


@contextmanager
def server(model: Path, **adapters: Path) -> Iterator[tuple[Serving, httpx.Client]]:
    """One whose only key may have one request at a time."""
    ready = threading.Event()
    keys = [Key.of("sk-one", "one", Rights(concurrent=1, admin=True))]
    app = create_app(Settings(model=model, adapters=adapters), keys=keys, loaded=lambda _: ready.set())
    sock = listen("127.0.0.1", 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    with (
        threaded(app, sock, http=Impatient) as url,
        httpx.Client(base_url=url, headers=HEADERS, timeout=60) as http,
    ):
        assert ready.wait(30)
        yield app.state.serving, http


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_client_that_does_not_read_holds_no_slot(model: Path) -> None:
    """Neither the engine's nor its API key's."""
    with server(model) as (_, http), socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        reader.connect((http.base_url.host, http.base_url.port))
        body = json.dumps({**LONG, "logprobs": 20, "stream": True})
        head = {"Host": "x", **HEADERS, "Content-Type": "application/json", "Content-Length": len(body)}
        lines = ["POST /v1/completions HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", body]
        reader.sendall("\r\n".join(lines).encode())
        assert reader.recv(12) == b"HTTP/1.1 200"

        def status() -> int:
            return http.post("/v1/completions", json={**LONG, "max_tokens": 1}).status_code

        assert status() == 429
        until(lambda: status() == 200)
        assert http.get("/health").json()["running"] == 0
        reader.settimeout(30)
        assert b"[DONE]" not in b"".join(iter(lambda: reader.recv(2**16), b""))


def test_an_engine_whose_thread_has_ended_says_why(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(model) as (serving, http):
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(http.post("/v1/completions", json=LONG)))
        asking.start()
        until(lambda: http.get("/health").json()["running"] == 1)

        def fail() -> None:
            raise RuntimeError("out of luck")

        serving.engine._collect = fail  # type: ignore[union-attr]
        asking.join()
        assert (answers[0].status_code, answers[0].json()["error"]["type"]) == (500, "server_error")
        assert "out of luck" in answers[0].json()["error"]["message"]
        health = http.get("/health")
        assert (health.status_code, "RuntimeError: out of luck" in health.json()["error"]["message"]) == (500, True)
        assert [http.get("/ready").status_code, http.post("/v1/completions", json=LONG).status_code] == [503, 503]
        monkeypatch.setattr(type(serving.engine), "alive", True)  # it ended after somebody looked
        late = http.post("/v1/completions", json=LONG)
        assert (late.status_code, "out of luck" in late.json()["error"]["message"]) == (503, True)


def test_an_adapter_that_goes_while_a_request_for_it_comes(model: Path) -> None:
    with server(model, law=tiny_adapter(model, model.parent / "law")) as (serving, http):
        assert serving.engine
        serving.engine.unload_adapter("law")
        answer = http.post("/v1/completions", json={**LONG, "model": "law"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "law"}).status_code == 400
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["base"]


def test_a_required_call_is_made_in_the_form_of_the_template(model: Path) -> None:
    tagged = tiny_model(model.parent / "tagged", template=(TEMPLATES / "tagged-calls.jinja").read_text())
    day = {"type": "integer", "minimum": 1, "maximum": 7}
    parameters = {"type": "object", "properties": {"day": day, "unit": {"enum": ["C", "F"]}}, "required": ["day"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters, "strict": True}}
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "?"}],
        "max_tokens": 400,
        "tool_choice": "required",
    }
    with server(tagged) as (_, http):
        answer = http.post("/v1/chat/completions", json={**body, "tools": [tool], "n": 4, "seed": 1}).raise_for_status()
    for choice in answer.json()["choices"]:
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        for call in choice["message"]["tool_calls"]:
            jsonschema.validate(
                json.loads(call["function"]["arguments"]), {**parameters, "additionalProperties": False}
            )
