"""Requests to engines of other programs, relayed as bytes: whatever an engine understands reaches it.

request ──> which replica, by the fewest under way ──> engine ──> its own bytes, as they come
               └── it broke off or died, and nothing was sent yet: another one, or the same in its next life
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from serve.engines.upstream import Upstream
from serve.errors import ApiError
from serve.families import Found
from serve.replicas import NoReplica, Replica
from serve.serving import Serving
from serve.tally import Tally
from serve.traffic import Exchange

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank",
    "/v1/score", "/tokenize", "/detokenize",
)  # fmt: skip
"""What is relayed; an engine may have none behind some. Routes that administer an engine are never among them."""

UNCOMPUTED = ("/tokenize", "/detokenize")
"""What a server answers whose engine is lost: no sign of life."""

TRIES = 3
"""How often a request is sent to an engine, while each breaks off before anything was sent to the client."""

OWN_HEADERS = {
    b"host", b"authorization", b"content-length", b"connection", b"keep-alive", b"transfer-encoding", b"te",
    b"trailer", b"upgrade", b"proxy-authorization", b"proxy-connection", b"expect", b"accept-encoding", b"cookie",
    b"origin",
}  # fmt: skip
"""Of a request: what belongs to the connection, or is for us."""
TOLD_HEADERS = ("content-type", "cache-control", "retry-after")
"""Of an answer: what is passed on."""


class Broken(Exception):
    """The engine's connection broke before anything was sent."""


@dataclass
class Asked:
    """A request on its way to an engine."""

    path: str
    headers: dict[str, str]
    raw: bytes
    """The client's own body."""
    fields: dict[str, Any]
    """What it says."""
    wanted: dict[str, Any]
    """What the engine is to read; the very same where the client's words are right for it."""
    found: Found
    """Which model was asked for."""
    exchange: Exchange
    upstream: Upstream
    """Who answers it."""

    def inside(self) -> str:
        """The engine's name of the model now: adapters are replaced while requests wait. Raises ApiError 404."""
        try:
            return self.upstream.inside(self.found.adapter)
        except KeyError:
            gone = f"The model '{self.found.name}' was taken away."
            raise ApiError(404, gone, param="model", code="model_not_found") from None

    def body(self, inside: str) -> bytes:
        """What is sent to the engine: byte by byte what came, where nothing of it has to be changed."""
        if inside == self.fields["model"] and self.wanted is self.fields:
            return self.raw
        return json.dumps({**self.wanted, "model": inside}).encode()

    def renamed(self, inside: str) -> tuple[bytes, bytes] | None:
        """The engine's name of the model in its answers, and ours, where they differ."""
        if inside == self.found.name:
            return None
        there, here = (json.dumps(name, ensure_ascii=False) for name in (inside, self.found.name))
        return f'"model":{there}'.encode(), f'"model":{here}'.encode()


class Relay:
    """An ASGI endpoint for `PATHS`. Clients' keys stay here; the engines have one of their own."""

    def __init__(self, server: Serving) -> None:
        self._server = server
        self._most = server.settings.max_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay one request; a client that goes away takes its request with it. Raises ApiError before the answer."""
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        ending = _Ending()
        leaving = asyncio.create_task(_gone(receive, ending.stop))
        late = self._late(request, ending)
        self._server.groups.add(ending)
        try:
            await self._relay(request, body, sent)
        except asyncio.CancelledError:
            if not ending.stopped:
                raise
            ending.task.uncancel()
            if ending.error:
                await _end(ending.error, begun, send)
        finally:
            self._server.groups.discard(ending)
            leaving.cancel()
            if late:
                late.cancel()

    def _late(self, request: Request, ending: _Ending) -> asyncio.TimerHandle | None:
        limit = self._server.settings.timeout
        if limit is None:
            return None
        error = ApiError(504, "the request took longer than this server allows", kind="server_error")
        left = Exchange.of(request).started + limit - time.monotonic()
        return asyncio.get_running_loop().call_later(max(0.0, left), ending.stop, error)

    async def _relay(self, request: Request, body: bytes, send: Send) -> None:
        asked = await self._asked(request, body)
        self._server.admission.check(asked.exchange.base, asked.upstream.load[1])
        tried: list[Replica] = []
        while True:
            try:
                async with asked.upstream.replicas.lease(tried) as replica:
                    life = replica.life
                    try:
                        await self._on(replica, asked, send)
                        return
                    except Broken as error:
                        tried.append(replica)
                        if len(tried) == TRIES:
                            raise ApiError(502, f"the engine broke off: {error}", kind="server_error") from None
                        await asked.upstream.broke(replica, life)
            except NoReplica as error:
                raise ApiError(503, str(error), kind="server_error", retry_after=1) from None

    async def _asked(self, request: Request, body: bytes) -> Asked:
        fields = read_body(request, body)
        found, upstream = await self._server.behind(request, fields["model"], _user(fields))
        path = str(request.scope["path"])
        wanted = _limited(path, upstream.translation.ask(path, fields), self._most)
        if query := request.scope["query_string"]:
            path += f"?{query.decode('latin-1')}"
        told = [(name, value) for name, value in request.scope["headers"] if name not in OWN_HEADERS]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in told}
        return Asked(path, headers, body, fields, wanted, found, Exchange.of(request), upstream)

    async def _on(self, replica: Replica, asked: Asked, send: Send) -> None:
        """One try; raises Broken while nothing was sent."""
        life, tally, translation = replica.life, Tally(), asked.upstream.translation
        inside = asked.inside()
        renamed = asked.renamed(inside)
        async with contextlib.AsyncExitStack() as stack:
            try:
                session, url = asked.upstream.session, replica.url + asked.path
                call = session.post(url, data=asked.body(inside), headers=asked.headers)
                answer = await stack.enter_async_context(call)
                streamed = answer.content_type == "text/event-stream"
                chunks = aiter(answer.content.iter_any())
                body = await _head(chunks) if streamed else await answer.read()
            except (aiohttp.ClientError, OSError) as error:
                raise Broken(f"{type(error).__name__} {error}") from None
            status, told = answer.status, {k: answer.headers[k] for k in TOLD_HEADERS if k in answer.headers}
            if streamed and (failure := _failure(body)):
                status, body, streamed = *failure, False
            if status >= 500 and await asked.upstream.dies(replica, life):
                raise Broken(f"it answered {status}, and has ended or will be")
            if status < 400 and not asked.path.startswith(UNCOMPUTED):
                replica.heard = time.monotonic()
            if streamed:
                stream = translation.stream(asked.fields, _unbroken(body, chunks, replica))
                if renamed:
                    stream = _renamed(stream, renamed)
                try:
                    await _send_stream(tally.of(stream), told, send)
                finally:
                    asked.exchange.answers.append(tally.answered())
                return
        if status >= 400:
            status, body = translation.error(status, body)
            told["content-type"] = "application/json"
        else:
            body = translation.answer(asked.fields, body)
            tally.feed(body)
            asked.exchange.answers.append(tally.answered())
        body = _named(body, renamed) if renamed else body
        raw = [(k.encode(), v.encode("latin-1")) for k, v in {**told, "content-length": str(len(body))}.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


class _Ending:
    """Ends this task early, and says why: with an error, or with none where the client has left."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task
        self.task = task
        self.stopped = False
        self.error: ApiError | None = None

    def stop(self, error: ApiError | None = None) -> None:
        """The first reason counts."""
        if not self.stopped:
            self.stopped, self.error = True, error
            self.task.cancel()

    def cancel(self) -> None:
        """The server's time is over."""
        self.stop(ApiError(503, "the server is shutting down", kind="server_error"))


LENGTHS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
"""Fields that bound an answer; the first is set where a request has none."""


def _limited(path: str, fields: dict[str, Any], most: int | None) -> dict[str, Any]:
    """The fields with `most` new tokens at most; the very same where they ask for no more."""
    names = LENGTHS.get(path, ())
    if most is None or not names:
        return fields
    given = [name for name in names if fields.get(name) is not None] or names[:1]
    over = {name: most for name in given if not (isinstance(fields.get(name), int) and fields[name] <= most)}
    return {**fields, **over} if over else fields


def read_body(request: Request, body: bytes) -> dict[str, Any]:
    """The fields of a request; raises ApiError: 415 or 400 for what is no JSON object with a model's name."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is no JSON object")
    if not isinstance(fields.get("model"), str):
        raise ApiError(400, "model: the name of a model is needed", param="model")
    return fields


def _user(fields: Mapping[str, Any]) -> str | None:
    user = fields.get("user")
    return user if isinstance(user, str) else None


async def _gone(receive: Receive, stop: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stop()


_DATA = re.compile(rb"^data:(.*)\n", re.MULTILINE)


async def _head(chunks: AsyncIterator[bytes]) -> bytes:
    """The beginning of a stream, with the data of its first event."""
    head = b""
    async for chunk in chunks:
        head += chunk
        if _DATA.search(head):
            break
    return head


def _failure(head: bytes) -> tuple[int, bytes] | None:
    """Status and body, where a stream begins with an error: its engine had said 200 before it knew."""
    event = _DATA.search(head)
    if event is None or b'"error"' not in event[1]:
        return None
    try:
        said = json.loads(event[1])
    except ValueError:
        return None
    error = said.get("error") if isinstance(said, dict) else None
    if not error:
        return None
    code = error.get("code") if isinstance(error, dict) else None
    return (code if isinstance(code, int) and 400 <= code < 600 else 500), event[1].strip()


async def _unbroken(first: bytes, rest: AsyncIterator[bytes], replica: Replica) -> AsyncIterator[bytes]:
    """All chunks; a connection that breaks among them becomes OpenAI's error, because the status is sent already."""
    yield first
    try:
        async for chunk in rest:
            replica.heard = time.monotonic()
            yield chunk
    except (aiohttp.ClientError, OSError) as error:
        yield _last_words(ApiError(502, f"the engine broke off: {type(error).__name__}", kind="server_error"))


def _last_words(error: ApiError) -> bytes:
    """The end of a stream that cannot go on; it may stand in the middle of an event."""
    return f"\n\ndata: {json.dumps(error.body)}\n\ndata: [DONE]\n\n".encode()


async def _renamed(chunks: AsyncIterator[bytes], names: tuple[bytes, bytes]) -> AsyncIterator[bytes]:
    """With the model's name as ours, which a border between two chunks may cut: then it takes whole events."""
    kept = b""
    async for chunk in chunks:
        whole, end, kept = (kept + chunk).rpartition(b"\n\n")
        if end:
            yield _named(whole + end, names)
    if kept:
        yield kept


def _named(answer: bytes, names: tuple[bytes, bytes]) -> bytes:
    """With our name; some servers put a space before theirs."""
    there, here = names
    return answer.replace(there, here).replace(there.replace(b":", b": ", 1), here)


async def _send_stream(chunks: AsyncIterator[bytes], headers: Mapping[str, str], send: Send) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
    async for chunk in chunks:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _end(error: ApiError, begun: bool, send: Send) -> None:
    """End an answer early: by its status, or where that is sent, as a stream's last event."""
    if not begun:
        raise error
    await send({"type": "http.response.body", "body": _last_words(error)})


def add(app: FastAPI, server: Serving) -> None:
    """All of `PATHS`."""
    relay = Relay(server)
    # most requests are for these, so they are looked for first
    app.router.routes[:0] = [Route(path, relay, methods=["POST"]) for path in PATHS]
