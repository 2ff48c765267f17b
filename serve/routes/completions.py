"""/v1/chat/completions and /v1/completions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve import forms, prompts, shapes
from serve.answers import Answer, Group
from serve.bodies import aside, read
from serve.document import gives, takes
from serve.protocol import ChatBody, CompletionBody
from serve.serving import Serving
from serve.streams import EventStream, cancelled_when_gone, chat_lines, completion_lines

Form = Callable[[list[Answer]], Mapping[str, Any]]


class Noted(Protocol):
    """A body that knows what of it is not heeded."""

    @property
    def ignored(self) -> list[str]:
        """Names of fields."""


def add(app: FastAPI, server: Serving) -> None:
    """Both routes."""

    @app.post("/v1/chat/completions", openapi_extra=takes(ChatBody), responses=gives(shapes.ChatCompletion, True))
    async def chat(request: Request) -> Response:
        body = await read(request, ChatBody)
        served = await server.find(request, body.model, body.user)
        body.model = served.name  # an alias: the answer says who gave it
        engine, inline = server.ready()[0], server.settings.inline_reasoning
        jobs, replies, constraint = await aside(
            request, lambda: prompts.conversation(body, served, engine, inline=inline)
        )
        jobs = await server.constrain(jobs, constraint, served)
        context = server.open(request, jobs, bool(body.stream), body.samples)
        if body.stream:
            return noted(EventStream(context, request, lambda group: chat_lines(group, body, replies)), body)
        return await answered(context, request, body, lambda done: forms.chat_completion(body, done, replies))

    @app.post("/v1/completions", openapi_extra=takes(CompletionBody), responses=gives(shapes.Completion, True))
    async def completions(request: Request) -> Response:
        body = await read(request, CompletionBody)
        served = await server.find(request, body.model, body.user)
        body.model = served.name
        engine = server.ready()[0]
        jobs, echoes, constraint = await aside(request, lambda: prompts.completions(body, served, engine))
        jobs = await server.constrain(jobs, constraint, served)
        context = server.open(request, jobs, bool(body.stream), body.samples)
        if body.stream:
            return noted(EventStream(context, request, lambda group: completion_lines(group, body, echoes)), body)
        return await answered(context, request, body, lambda done: forms.completion(body, done, echoes))


async def answered(
    context: contextlib.AbstractContextManager[Group], request: Request, body: Noted, form: Form
) -> Response:
    """All answers at once, in the shape that `form` gives them."""
    with context as group:
        async with cancelled_when_gone(request, group):
            return noted(forms.Json(form(await group.wait())), body)


def noted(response: Response, body: Noted) -> Response:
    """`response`, with the names of fields that it does not heed."""
    if names := [name for name in body.ignored if name.isidentifier() and name.isascii()]:
        response.headers["X-Ignored-Fields"] = ", ".join(names[:32])
    return response
