"""Bodies of requests: JSON, read strictly, and long ones in a thread so that nobody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from serve.errors import ApiError

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")

INLINE = 16 * 2**10
"""Bytes of a body up to which work with it takes less time than a thread is worth."""


async def read(request: Request, kind: type[B]) -> B:
    """The body of `request`. Raises ApiError 400 or 415 for what is none of that `kind`."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json")
    try:
        raw = await request.body()
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    return await aside(request, partial(checked, partial(kind.model_validate_json, raw)))


async def aside(request: Request, work: Callable[[], T]) -> T:
    """`work` on what was `read` from `request`: in a thread where that was long."""
    return work() if len(await request.body()) <= INLINE else await asyncio.to_thread(work)


def checked(make: Callable[[], T]) -> T:
    """What `make` gives; raises ApiError 400 where pydantic refuses it."""
    try:
        return make()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is no JSON: {first['ctx']['error']}")
    path = [str(part) for part in first["loc"]]
    what = first["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"{'.'.join(path)}: {what}" if path else what, param=path[0] if path else None)
