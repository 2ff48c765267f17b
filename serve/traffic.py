"""What is noted of every HTTP request, whichever engine answers it: for its log line, the metrics, and a clean end."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError
from serve.generation import Generation
from serve.keys import Key

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Asked by machines that have no key, and answered to the last."""
CLIENT_GONE = 499
"""nginx's status for a client that closed the connection before there was an answer; it is only ever logged."""
OTHER = "other"
"""Stands for every path that is no route: what clients make up becomes no label and no log line."""

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(frozen=True)
class Answered:
    """One answer to a request: its tokens, and when its parts happened in seconds after it was submitted, if at all."""

    prompt_tokens: int
    new_tokens: int
    finish: str
    queued: float | None
    first_token: float | None
    ended: float | None

    @staticmethod
    def of(generation: Generation, prompt_tokens: int) -> Answered:
        """As our own engine tells it."""

        def after(moment: float | None) -> float | None:
            return None if moment is None else moment - generation.submitted

        started, first, ended = map(after, (generation.started, generation.first_token, generation.ended))
        return Answered(prompt_tokens, generation.count, generation.finish or "cancelled", started, first, ended)


@dataclass(eq=False)
class Exchange:
    """One HTTP request on its way. Routes fill in which model answers, and its answers; never any contents."""

    id: str
    method: str
    started: float
    """On the clock of `time.monotonic`, as `ended` is."""
    route: str = OTHER
    key: Key | None = None
    model: str = ""
    """The name of the model that answers, "" where none was found."""
    base: str = ""
    """The model that this name is of: itself, or the one whose adapter it is."""
    alias: str = ""
    """The name that was asked for, where it stands for others."""
    adapter: str = ""
    answers: list[Answered] = field(default_factory=list)
    status: int = 500
    gone: bool = False
    """Whether the client went away before it had everything."""
    ended: float = 0.0

    @staticmethod
    def of(request: Request) -> Exchange:
        """What `Observed` noted of a request."""
        exchange: Exchange = request.state.exchange
        return exchange

    @property
    def tokens(self) -> tuple[int, int]:
        """How many were read and generated."""
        return sum(a.prompt_tokens for a in self.answers), sum(a.new_tokens for a in self.answers)

    def line(self) -> str:
        """Its line of the log: one JSON object."""
        prompt, new = self.tokens
        entries = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "key": self.key.name if self.key else None,
            "method": self.method,
            "route": self.route,
            "alias": self.alias or None,
            "model": self.model or None,
            "adapter": self.adapter or None,
            "status": self.status,
            "prompt_tokens": prompt,
            "new_tokens": new,
            "queue_ms": _milliseconds(a.queued for a in self.answers),
            "ttft_ms": _milliseconds(a.first_token for a in self.answers),
            "total_ms": _milliseconds([self.ended - self.started]),
            "finish": ",".join(dict.fromkeys(a.finish for a in self.answers)) or None,
            "gone": self.gone,
        }
        return json.dumps(entries, ensure_ascii=False)


def _milliseconds(seconds: Iterable[float | None]) -> float | None:
    """Of several answers, the first one's."""
    known = [value for value in seconds if value is not None]
    return round(1000 * min(known), 1) if known else None


class Traffic:
    """The requests that run at the moment, and whether new ones are still taken."""

    def __init__(self) -> None:
        self.running: set[Exchange] = set()
        self.until: float | None = None
        """When what runs will be cancelled, once the server drains."""

    def drain(self, seconds: float) -> None:
        """Take no new requests."""
        self.until = time.monotonic() + seconds

    @property
    def drained(self) -> bool:
        """Whether nothing runs any more, or its time is over."""
        return self.until is not None and (not self.running or time.monotonic() >= self.until)


Observer = Callable[[Exchange], None]
"""Told of each request when it has ended."""


class Observed:
    """Notes each request in an `Exchange`, gives it an id, and tells `observers` when it has ended."""

    def __init__(
        self, app: ASGIApp, traffic: Traffic, observers: Sequence[Observer], routes: Sequence[BaseRoute]
    ) -> None:
        self.app, self.traffic, self.observers, self.routes = app, traffic, observers, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stand around everything else."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        exchange = Exchange(asked if _ID.fullmatch(asked) else uuid.uuid4().hex, scope["method"], time.monotonic())
        scope.setdefault("state", {})["exchange"] = exchange
        started = complete = False

        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not complete:
                exchange.gone = True
                exchange.status = exchange.status if started else CLIENT_GONE
            return message

        async def sent(message: Message) -> None:
            nonlocal started, complete
            if message["type"] == "http.response.start":
                started = True
                exchange.status = CLIENT_GONE if exchange.gone else message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = exchange.id
                if exchange.model:
                    headers["x-model"] = quote(exchange.model, safe="/@:")
            else:
                complete = not message.get("more_body", False)
            await send(message)

        if self.traffic.until is not None and scope["path"] not in OPEN_PATHS:
            seconds = max(1, math.ceil(self.traffic.until - time.monotonic()))
            error = ApiError(503, "the server is shutting down", kind="server_error", retry_after=seconds)
            await error.response()(scope, received, sent)
            self._end(exchange, scope)
            return
        self.traffic.running.add(exchange)
        try:
            await self.app(scope, received, sent)
        finally:
            self.traffic.running.discard(exchange)
            self._end(exchange, scope)

    def _end(self, exchange: Exchange, scope: Scope) -> None:
        exchange.ended = time.monotonic()
        # what was refused on its way never came to its route
        found = scope.get("route") or next((r for r in self.routes if r.matches(scope)[0] is Match.FULL), None)
        exchange.route = getattr(found, "path", OTHER)
        for observe in self.observers:
            observe(exchange)


class RequestLog:
    """Writes one line a request."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def __call__(self, exchange: Exchange) -> None:
        """Write the line at once, so that a server that is killed loses none; where that fails, requests go on."""
        if exchange.route not in OPEN_PATHS:  # probes ask every few seconds
            with contextlib.suppress(OSError):
                self.stream.write(exchange.line() + "\n")
                self.stream.flush()
