"""How the server is, and what it serves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_PLAIN_1_0_0

from serve.metrics import Metrics
from serve.protocol import ApiError
from serve.serving import Serving, visible
from serve.traffic import Exchange


def add(app: FastAPI, server: Serving, metrics: Metrics) -> None:
    """/health, /ready, /metrics and /v1/models."""

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """200 while there is no reason to start the server again, with what it does at the moment.

        Answers 500 when loading or the engine failed.
        """
        state = server.state
        if state == "failed":
            raise ApiError(500, server.problem or "the engine has ended", kind="server_error")
        if server.engine is None:
            return {"status": state}
        stats = server.engine.stats()
        return {
            "status": state,
            "running": stats.running,
            "waiting": stats.waiting,
            "failed_steps": stats.failures,
            "last_failure": stats.last_failure or None,
            "last_failure_time": stats.last_failure_time,
        }

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """200 while requests are answered; 503 before, and while the server shuts down."""
        if server.state != "ready":
            raise ApiError(503, server.problem or f"the server is {server.state}", kind="server_error", retry_after=1)
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics_page(request: Request) -> Response:
        """For Prometheus. The names of all models are in it, so a key that may not use all of them may not read it."""
        key = Exchange.of(request).key
        if key is not None and not key.sees_all:
            raise ApiError(403, "this API key may not see all models, so not the metrics either")
        return Response(metrics.text(), media_type=CONTENT_TYPE_PLAIN_1_0_0)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        return server.ready()[1].listing(visible(request))

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        return server.ready()[1].card(name, visible(request))
