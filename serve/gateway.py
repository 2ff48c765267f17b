"""OpenAI's API as one application: routes, the order of middleware, the form of errors, loading and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve.answers import Bridge, Engine
from serve.catalog import Catalog
from serve.middleware import ApiKeys, BodyLimit
from serve.protocol import ApiError
from serve.routes import completions, state
from serve.serving import Serving
from suite.errors import SuiteError

log = logging.getLogger("serve")

BODY_LIMIT = 16 * 2**20

Notify = Callable[[list[Any]], None]
StartEngine = Callable[[Notify], Engine]


def create_app(
    model: Path,
    adapters: Mapping[str, Path],
    name: str,
    start_engine: StartEngine,
    *,
    api_keys: Sequence[str] = (),
    body_limit: int = BODY_LIMIT,
    loaded: Callable[[SuiteError | None], None] = lambda _: None,
) -> FastAPI:
    """The application; the model is loaded in the background and `loaded` told how that went."""
    server = Serving()

    async def load() -> None:
        loop = asyncio.get_running_loop()
        server.bridge = Bridge(loop)
        error = None
        try:
            server.catalog = await asyncio.to_thread(Catalog, model, adapters, name)
            server.engine = await asyncio.to_thread(start_engine, server.bridge.notify)
        except SuiteError as refused:
            error = refused
        except Exception as failed:
            log.exception("loading failed")
            error = SuiteError(f"the model cannot be loaded: {type(failed).__name__}: {failed}", where=str(model))
        server.problem = str(error) if error else ""
        loaded(error)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load())
        yield
        await loading
        if server.engine is not None:
            await asyncio.to_thread(server.engine.close)

    app = FastAPI(title="suite", lifespan=lifespan)
    _add_errors(app)
    for routes in (state, completions):
        routes.add(app, server)
    app.add_middleware(BodyLimit, limit=body_limit)
    if api_keys:
        app.add_middleware(ApiKeys, keys=api_keys)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            refused = ApiError(400, f"the body is no JSON: {first['ctx']['error']}")
        else:
            what = first["msg"].removeprefix("Value error, ")
            refused = ApiError(400, f"{'.'.join(path)}: {what}" if path else what, param=path[0] if path else None)
        return JSONResponse(refused.body, refused.status)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        # uvicorn logs it with its traceback
        failed = ApiError(500, f"the server failed: {type(error).__name__}", kind="server_error")
        return JSONResponse(failed.body, failed.status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)
