"""What the OpenAPI document says of bodies that `serve.bodies` reads, and of the answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve import shapes

SCHEMAS = "#/components/schemas/{model}"
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": shapes.ErrorBody, "description": "The request says what cannot be done"},
    401: {"model": shapes.ErrorBody, "description": "No API key, or a wrong one"},
    404: {"model": shapes.ErrorBody, "description": "No such model"},
    413: {"model": shapes.ErrorBody, "description": "The body is too large"},
    415: {"model": shapes.ErrorBody, "description": "The body is no JSON by its Content-Type"},
    429: {"model": shapes.ErrorBody, "description": "Too many requests wait, or a limit of the key is reached"},
    500: {"model": shapes.ErrorBody, "description": "The engine failed"},
    503: {"model": shapes.ErrorBody, "description": "The model is loading, or the server ends"},
    504: {"model": shapes.ErrorBody, "description": "The answer took longer than the server's limit"},
}
"""The statuses of routes that compute."""


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route whose body is a `kind`."""
    schema = {"$ref": SCHEMAS.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def gives(kind: Any, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers with a `kind`, or with a `stream` where it is asked to."""
    answer: dict[str, Any] = {"model": kind, "description": "The answer"}
    if stream:
        answer["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: answer, **ERRORS}


def document(app: FastAPI, bodies: list[type[BaseModel]]) -> None:
    """Let the document of `app` define `bodies` too."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, defined = models_json_schema([(kind, "validation") for kind in bodies], ref_template=SCHEMAS)
            made["components"]["schemas"] |= defined["$defs"]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
