"""How the server is, and what it serves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from serve.serving import Serving


def add(app: FastAPI, server: Serving) -> None:
    """/health, /ready and /v1/models."""

    @app.get("/health")
    @app.get("/ready")
    async def health() -> dict[str, Any]:
        """200 once requests are answered, with what the engine does at the moment."""
        engine = server.ready()[0]
        running, waiting = engine.load
        return {"status": "ready", "running": running, "waiting": waiting, "failed_steps": engine.failures}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return server.ready()[1].listing()

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        catalog = server.ready()[1]
        return catalog.card(catalog.find(name).name)
