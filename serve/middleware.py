"""What stands before every route: the limit of a body, and API keys."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.protocol import ApiError

OPEN_PATHS = {"/health", "/ready"}


class BodyLimit:
    """Refuses a body of more than `limit` bytes with 413, before or while it is read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what is received."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = ApiError(413, f"the body is larger than {self.limit} bytes")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return message if read <= self.limit else {"type": "http.disconnect"}

        async def guarded(message: Message) -> None:
            if read <= self.limit:
                await send(message)

        await self.app(scope, counted, guarded)
        if read > self.limit:
            await JSONResponse(error.body, error.status)(scope, receive, send)


class ApiKeys:
    """Wants `Authorization: Bearer <one of keys>`; health needs none. Keys are compared in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            # all keys are compared, so that the time does not tell which one came close
            matches = [hmac.compare_digest(given.strip(), key) for key in self.keys]
            if scheme.lower() != b"bearer" or not any(matches):
                error = ApiError(401, "missing or wrong API key", code="invalid_api_key")
                headers = {"WWW-Authenticate": "Bearer"}
                await JSONResponse(error.body, error.status, headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)
