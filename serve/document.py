"""What the OpenAPI document says of bodies that `serve.bodies` reads, and of the answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve import shapes

SCHEMAS = "#/components/schemas/{model}"
ERRORS: dict[int, str] = {
    400: "The request says what cannot be done",
    401: "No API key, or a wrong one",
    403: "Not for this API key, or not on this server",
    404: "No such model, adapter or alias",
    408: "The body stalled on its way",
    409: "Something else needs it as it is",
    413: "The body is too large",
    415: "The body is no JSON by its Content-Type",
    422: "What the answer must be cannot be kept to: a schema, regex or grammar that does not compile",
    429: "Too many requests wait, or a limit of the key is reached",
    500: "The engine failed",
    503: "The model is loading, or the server ends",
    504: "The answer took longer than the server's limit",
}
FOREIGN = "HTTPValidationError"
"""What FastAPI says of every route with parameters."""
LOOKING = 401, 503
"""The errors of routes that only tell something."""
CHANGING = 400, 401, 403, 404, 408, 413, 415, 429, 503
"""Of those that change the server."""
COMPUTING = 400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504
"""Of those that ask a model."""
TEXT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
"""The `responses` of a route that answers with plain text; its `response_class` must name no other type."""


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route whose body is a `kind`."""
    schema = {"$ref": SCHEMAS.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def gives(kind: Any, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that asks a model for a `kind`, or for a `stream` where the request says so."""
    answer: dict[str, Any] = {"model": kind, "description": "The answer"}
    if stream:
        answer["content"] = {"text/event-stream": {}}
    return {200: answer, **refuses(*COMPUTING)}


def refuses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for these errors."""
    return {status: {"model": shapes.ErrorBody, "description": ERRORS[status]} for status in statuses}


def document(app: FastAPI, bodies: list[type[BaseModel]]) -> None:
    """Let the document of `app` define `bodies` too, and leave out FastAPI's own form of errors: it is never sent."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operation in (each for path in made["paths"].values() for each in path.values()):
                if FOREIGN in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
            for name in (FOREIGN, "ValidationError"):
                made["components"]["schemas"].pop(name, None)
            _, defined = models_json_schema([(kind, "validation") for kind in bodies], ref_template=SCHEMAS)
            made["components"]["schemas"] |= defined["$defs"]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
