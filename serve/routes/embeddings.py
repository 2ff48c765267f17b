"""/v1/embeddings: the model's last hidden states, pooled to one vector a text."""

from __future__ import annotations

import base64
import sys
from array import array
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve import prompts, shapes
from serve.answers import Answer
from serve.bodies import aside, read
from serve.document import gives, takes
from serve.protocol import EmbeddingBody
from serve.routes.completions import answered
from serve.serving import Serving


def add(app: FastAPI, server: Serving) -> None:
    """The route."""

    @app.post("/v1/embeddings", openapi_extra=takes(EmbeddingBody), responses=gives(shapes.Embeddings))
    async def embeddings(request: Request) -> Response:
        body = await read(request, EmbeddingBody)
        served = await server.find(request, body.model, body.user)
        body.model = served.name
        engine, pooling = server.ready()[0], body.pooling or server.settings.pooling
        jobs = await aside(request, lambda: prompts.embeddings(body, served, engine, pooling))
        return await answered(server.open(request, jobs, stream=False), request, body, lambda done: _form(body, done))


def _form(body: EmbeddingBody, answers: list[Answer]) -> shapes.Embeddings:
    tokens = sum(len(answer.generation.request.prompt) for answer in answers)
    encode = _base64 if body.encoding_format == "base64" else _floats
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(answer.generation.embedding)}
            for index, answer in enumerate(answers)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _floats(vector: list[float]) -> Any:
    return vector


def _base64(vector: list[float]) -> Any:
    """Little-endian float32, as OpenAI's client asks for unless told otherwise."""
    packed = array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()
