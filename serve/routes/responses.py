"""/v1/responses. Nothing is stored, so there is nothing to look up afterwards."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve import prompts
from serve.bodies import aside, checked, read
from serve.document import gives, takes
from serve.responses import forms
from serve.responses.protocol import ResponsesBody
from serve.routes.completions import answered, noted
from serve.serving import Serving
from serve.streams import EventStream


def add(app: FastAPI, server: Serving) -> None:
    """The route."""

    @app.post("/v1/responses", openapi_extra=takes(ResponsesBody), responses=gives(dict[str, Any], True))
    async def responses(request: Request) -> Response:
        body = await read(request, ResponsesBody)
        chat = await aside(request, lambda: checked(body.chat))
        served = await server.find(request, body.model, body.user)
        engine, inline = server.ready()[0], server.settings.inline_reasoning
        jobs, replies, constraint = await aside(
            request, lambda: prompts.conversation(chat, served, engine, inline=inline)
        )
        jobs = await server.constrain(jobs, constraint, served)
        response = forms.Response(body, served.name, replies[0])
        context = server.open(request, jobs, bool(body.stream))
        if body.stream:
            return noted(EventStream(context, request, response.lines), body)
        return await answered(context, request, body, lambda done: response.whole(done[0]))
