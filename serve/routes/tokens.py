"""/tokenize and /detokenize, in vLLM's shapes: what a prompt is to the model."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve import forms, prompts, shapes
from serve.bodies import aside, read
from serve.document import gives, takes
from serve.protocol import DetokenizeBody, TokenizeBody
from serve.serving import Serving


def add(app: FastAPI, server: Serving) -> None:
    """Both routes."""

    @app.post("/tokenize", openapi_extra=takes(TokenizeBody), responses=gives(shapes.Tokenized))
    async def tokenize(request: Request) -> Response:
        body = await read(request, TokenizeBody)
        served = await server.find(request, body.model or server.ready()[1].base)
        limit = server.ready()[0].max_length
        ids = await aside(request, lambda: prompts.tokens(body, served))
        answer: shapes.Tokenized = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None}
        if body.return_token_strs:
            answer["token_strs"] = served.tokenizer.convert_ids_to_tokens(ids)
        return forms.Json(answer)

    @app.post("/detokenize", openapi_extra=takes(DetokenizeBody), responses=gives(shapes.Detokenized))
    async def detokenize(request: Request) -> Response:
        body = await read(request, DetokenizeBody)
        served = await server.find(request, body.model or server.ready()[1].base)
        text = await aside(request, lambda: prompts.decoded(body.tokens, served, "tokens"))
        answer: shapes.Detokenized = {"prompt": text}
        return forms.Json(answer)
