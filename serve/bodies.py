"""Bodies of requests: JSON, read strictly, and long ones in a thread so that nobody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from serve.answers import Engine
from serve.catalog import Served
from serve.protocol import ApiError, Body
from serve.serving import Serving

B = TypeVar("B", bound=Body)
T = TypeVar("T")

INLINE = 16 * 2**10
"""Bytes up to which reading a body, and preparing what it asks for, takes less time than a thread is worth."""


async def prepared(
    request: Request, kind: type[B], server: Serving, prepare: Callable[[B, Served, Engine], T]
) -> tuple[B, T]:
    """The body of `request`, and what `prepare` makes of it for the model that answers, whose name the body gets.

    Raises ApiError 400 or 415 for what is no such body, 404 for a model that there is not.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json")
    try:
        raw = await request.body()
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    body = await _run(raw, partial(_read, raw, kind))
    served = await server.find(request, body.model, body.user)
    body.model = served.name
    return body, await _run(raw, partial(prepare, body, served, server.ready()[0]))


async def _run(raw: bytes, work: Callable[[], T]) -> T:
    return work() if len(raw) <= INLINE else await asyncio.to_thread(work)


def _read(raw: bytes, kind: type[B]) -> B:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _refused(error) from None


def _refused(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}")
    path = [str(part) for part in first["loc"]]
    what = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{'.'.join(path)}: {what}" if path else what, param=path[0] if path else None)
