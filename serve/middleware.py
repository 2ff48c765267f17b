"""What stands before every route: API keys with their limits, and the limit of a body."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError
from serve.keys import Keys
from serve.traffic import OPEN_PATHS, Exchange

BODY_SECONDS = 60.0
"""How long a client may take from one piece of its body to the next."""


class BodyLimit:
    """Refuses a body of more than `limit` bytes with 413, before or while it is read, and one that stalls with 408."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float = BODY_SECONDS) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what is received."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = ApiError(413, f"the body is larger than {self.limit} bytes")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            await too_large.response()(scope, receive, send)
            return
        read, whole, refused = 0, False, None

        async def counted() -> Message:
            nonlocal read, whole, refused
            if whole:  # what comes now is the disconnect, which may take its time
                return await receive()
            try:
                async with asyncio.timeout(self.seconds):
                    message = await receive()
            except TimeoutError:
                refused = ApiError(408, f"nothing more of the body came for {self.seconds:.0f} s")
            else:
                read += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                refused = too_large if read > self.limit else None
            return {"type": "http.disconnect"} if refused else message

        async def guarded(message: Message) -> None:
            if not refused:
                await send(message)

        try:
            await self.app(scope, counted, guarded)
        except ClientDisconnect:
            if not refused:
                raise
        if refused:
            await refused.response()(scope, receive, send)


class ApiKeys:
    """Wants `Authorization: Bearer KEY`, and keeps each key within its limits; health needs none."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self.app, self.keys, self.open_paths = app, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through, or answer 401 or 429."""
        if scope["type"] != "http" or scope["path"] in self.open_paths:
            await self.app(scope, receive, send)
            return
        scheme, _, secret = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        found = self.keys.find(secret.strip()) if scheme.lower() == b"bearer" else None
        if found is None:
            error = ApiError(401, "missing or wrong API key", code="invalid_api_key")
            error.headers["WWW-Authenticate"] = "Bearer"
            await error.response()(scope, receive, send)
            return
        key, meter = found
        exchange = Exchange.of(Request(scope))
        exchange.key = key
        if scope["method"] != "POST":  # looking costs nothing
            await self.app(scope, receive, send)
            return
        if no := meter.refused():
            error = ApiError(429, no[0], kind="rate_limit_error", code="rate_limit_exceeded", retry_after=no[1])
            await error.response()(scope, receive, send)
            return
        meter.begin()
        try:
            await self.app(scope, receive, send)
        finally:
            meter.end(sum(exchange.tokens))
