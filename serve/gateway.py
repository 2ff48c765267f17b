"""OpenAI's API as one application: routes, the order of middleware, the form of errors, loading and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import IO

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from serve.admission import Admission
from serve.document import document
from serve.errors import ApiError
from serve.keys import Key, Keys
from serve.metrics import Metrics
from serve.middleware import ApiKeys, BodyLimit
from serve.protocol import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from serve.responses.protocol import ResponsesBody
from serve.routes import adapters, aliases, completions, embeddings, responses, state, tokens
from serve.serving import Serving
from serve.settings import Settings
from serve.traffic import OPEN_PATHS, Observed, Observer, RequestLog
from suite.errors import SuiteError

log = logging.getLogger("serve")

BODIES: list[type[BaseModel]] = [
    ChatBody, CompletionBody, EmbeddingBody, TokenizeBody, DetokenizeBody, ResponsesBody, adapters.LoadBody,
    adapters.UnloadBody, aliases.SplitBody,
]  # fmt: skip
"""Of all requests that have one."""


def create_app(
    settings: Settings,
    *,
    keys: Sequence[Key] = (),
    log_to: IO[str] | None = None,
    loaded: Callable[[SuiteError | None], None] = lambda _: None,
) -> FastAPI:
    """The application; the model is loaded in the background and `loaded` told how that went.

    Its `state.serving` is what a server needs to end it.
    """
    admission = Admission(settings.max_queue, [each.name for each in settings.models])
    server = Serving(settings, admission, named=not keys)
    metrics = Metrics(lambda: {name: engine.stats() for name, engine in server.engines.items()})

    async def load() -> None:
        error = None
        try:
            await server.load()
        except SuiteError as refused:
            error = refused
        except Exception as failed:
            log.exception("loading failed")
            error = SuiteError(
                f"the model cannot be loaded: {type(failed).__name__}: {failed}", where=str(settings.model)
            )
        server.problem = str(error) if error else ""
        loaded(error)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load())
        yield
        await loading
        await server.close()

    app = FastAPI(title="suite", lifespan=lifespan)
    app.state.serving = server
    _add_errors(app)
    state.add(app, server, metrics)
    adapters.add(app, server, metrics)
    aliases.add(app, server)
    if settings.in_process:
        for routes in (completions, embeddings, responses, tokens):
            routes.add(app, server)
    else:  # its client of other servers takes a while to import
        from serve import relay
        from serve.engines.remote import upstreams

        server.upstreams = upstreams(settings.models)
        relay.add(app, server)
    document(app, BODIES)
    # the last one added is the first one asked
    app.add_middleware(BodyLimit, limit=settings.max_body)
    if keys:
        opened = OPEN_PATHS | {"/metrics"} if settings.open_metrics else OPEN_PATHS
        file = Path(settings.api_key_file) if settings.api_key_file else None
        app.add_middleware(ApiKeys, keys=Keys(keys, file), open_paths=opened)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-model", "retry-after"],
        )
    observers: list[Observer] = [metrics, admission, *([RequestLog(log_to)] if log_to else [])]
    app.add_middleware(Observed, traffic=server.traffic, observers=observers, routes=app.routes)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        # uvicorn logs it with its traceback
        failed = ApiError(500, f"the server failed: {type(error).__name__}", kind="server_error")
        return failed.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)
