"""How the server is, and what it serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_PLAIN_1_0_0

from serve.document import LOOKING, TEXT, refuses
from serve.errors import ApiError
from serve.metrics import Metrics
from serve.serving import Running, Serving, visible
from serve.traffic import Exchange


def add(app: FastAPI, server: Serving, metrics: Metrics) -> None:
    """/health, /ready, /metrics and /v1/models."""

    @app.get("/health", responses=refuses(500))
    async def health() -> dict[str, Any]:
        """200 while there is no reason to start the server again, with what it does at the moment.

        Answers 500, with the cause, when loading or every engine failed. A server without keys tells it for each of
        its models too.
        """
        state = server.state
        if state == "failed":
            said = server.problem or ": ".join(filter(None, ("the engine has ended", _failure(server.engines)[0])))
            raise ApiError(500, said, kind="server_error")
        if not server.engines:
            return {"status": state}
        return {"status": state, **_of_all(server.engines, named=server.named)}

    @app.get("/ready", responses=refuses(404, 503))
    async def ready(model: str = "") -> dict[str, str]:
        """200 while requests are answered; 503 before, and while the server shuts down. `?model=` asks about one."""
        if server.state != "ready":
            raise ApiError(503, server.problem or f"the server is {server.state}", kind="server_error", retry_after=1)
        if model and model not in server.engines:
            raise ApiError(404, f"there is no model '{model}'", param="model")
        if model and not server.engines[model].alive:
            raise ApiError(503, f"the engine of '{model}' has ended", kind="server_error")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={**TEXT, **refuses(403, *LOOKING)})
    async def metrics_page(request: Request) -> Response:
        """For Prometheus. The names of all models are in it, so a key that may not use all of them may not read it."""
        key = Exchange.of(request).key
        if key is not None and not key.sees_all:
            raise ApiError(403, "this API key may not see all models, so not the metrics either")
        return Response(metrics.text(), media_type=CONTENT_TYPE_PLAIN_1_0_0)

    @app.get("/v1/models", responses=refuses(*LOOKING))
    async def models(request: Request) -> dict[str, Any]:
        return server.names.listing(visible(request))

    @app.get("/v1/models/{name:path}", responses=refuses(404, *LOOKING))
    async def model(name: str, request: Request) -> dict[str, Any]:
        return server.names.card(name, visible(request))


def _of_all(engines: Mapping[str, Running], *, named: bool) -> dict[str, Any]:
    """The sum of what they do; with `named`, what each of them does too."""
    stats = {name: engine.stats() for name, engine in engines.items()}
    failure, failure_time = _failure(engines)
    whole = {
        "running": sum(one.running for one in stats.values()),
        "waiting": sum(one.waiting for one in stats.values()),
        "failed_steps": sum(one.failures for one in stats.values()),
        "last_failure": failure or None,
        "last_failure_time": failure_time,
    }
    if not named:
        return whole
    each = {
        name: {
            "status": "ready" if engines[name].alive else "failed",
            "running": one.running,
            "waiting": one.waiting,
            "failed_steps": one.failures,
        }
        for name, one in stats.items()
    }
    return {**whole, "models": each}


def _failure(engines: Mapping[str, Running]) -> tuple[str, float | None]:
    """What failed last and when, in seconds since the epoch; "" and None where nothing did."""
    failures = [(stats.last_failure, stats.last_failure_time) for stats in (e.stats() for e in engines.values())]
    return max(failures, key=lambda one: (one[1] or 0.0, one[0]), default=("", None))
