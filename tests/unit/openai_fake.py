"""An OpenAI endpoint whose answers, delays and faults a test decides: a real HTTP server on the loopback, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse


@dataclass
class Say:
    """An answer: `text` and `calls`, or another HTTP status, or the raw `body`; after `delay` seconds, or cut off in the
    middle."""

    text: str = ""
    calls: Sequence[dict[str, Any]] = ()
    finish: str = "stop"
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False


@dataclass
class Fake:
    """The running endpoint: `url`, and what was asked of it."""

    rule: Callable[[dict[str, Any]], Say | dict[str, Any]]
    models: list[str] | None = field(default_factory=lambda: ["m"])
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            said = self.rule(body)
            said = said if isinstance(said, Say) else Say(body=json.dumps(said).encode())
            await _wait(request, said.delay)
        finally:
            self.at_once -= 1
        whole = chat(said.text, said.finish, said.calls) if said.status == 200 else b""
        content = said.body if said.body is not None else whole
        if said.cut:
            return StreamingResponse(_cut(content), headers={"content-length": str(len(content))})
        return Response(content, said.status, said.headers, media_type="application/json")


async def _cut(content: bytes) -> AsyncIterator[bytes]:
    yield content[: len(content) // 2]
    raise ConnectionAbortedError


async def _wait(request: Request, delay: float) -> None:
    """So many seconds, or until nobody waits for the answer any more."""
    await asyncio.sleep(0)  # others get their turn
    ends = asyncio.get_running_loop().time() + delay
    while (left := ends - asyncio.get_running_loop().time()) > 0 and not await request.is_disconnected():
        await asyncio.sleep(min(left, 0.05))


def chat(text: str, finish: str = "stop", calls: Sequence[dict[str, Any]] = ()) -> bytes:
    """A chat completion as an OpenAI endpoint sends it."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        functions = [{"name": call["name"], "arguments": json.dumps(call["arguments"])} for call in calls]
        message["tool_calls"] = [
            {"id": f"call-{i}", "type": "function", "function": function} for i, function in enumerate(functions)
        ]
    usage = {"prompt_tokens": 9, "completion_tokens": len(text.split()), "total_tokens": 9 + len(text.split())}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}).encode()


@contextlib.contextmanager
def serve(
    rule: Callable[[dict[str, Any]], Say | dict[str, Any]],
    models: list[str] | None = None,
    card: Mapping[str, Any] | None = None,
    port: int = 0,
) -> Iterator[Fake]:
    """Serve `rule` on a port, a free one when left out, until the block ends; `models` are listed, m when left out.

    What is in `card` is listed with each of them.
    """
    fake = Fake(rule, models if models is not None else ["m"])
    app = FastAPI()
    app.post("/v1/chat/completions")(fake.answer)
    app.post("/v1/completions")(fake.answer)
    if fake.models:
        app.get("/v1/models")(lambda: {"data": [{"id": name, **(card or {})} for name in fake.models or []]})
    listening = socket.create_server(("127.0.0.1", port), backlog=512)
    fake.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
