"""/v1/aliases: names that stand for other models, changed at run time and taken back in one call.

They last as long as the server: what they are at its start stands in its flags or in the pipeline's `[serve]` table.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request

from serve.catalog import Catalog
from serve.errors import ApiError
from serve.serving import Serving, visible
from serve.traffic import Exchange
from suite.errors import SuiteError
from suite.serving import check_aliases


def add(app: FastAPI, server: Serving) -> None:
    """Listing, setting, going back and removing."""

    @app.get("/v1/aliases")
    async def listing(request: Request) -> dict[str, Any]:
        catalog, may_see = server.names, visible(request)
        return {"object": "list", "data": [_form(catalog, name) for name in catalog.aliases if may_see(name)]}

    @app.get("/v1/aliases/{name}")
    async def alias(name: str, request: Request) -> dict[str, Any]:
        catalog = server.names
        if not visible(request)(name):
            raise _unknown(name)
        return _form(catalog, name)

    @app.put("/v1/aliases/{name}")
    async def put(name: str, weights: dict[str, float], request: Request) -> dict[str, Any]:
        """The body is the split, e.g. `{"law@v2": 0.9, "law@v3": 0.1}`."""
        server.administer(request)
        catalog = server.names
        _check(catalog, name, weights)
        catalog.aliases.put(name, weights)
        Exchange.of(request).alias = name
        return _form(catalog, name)

    @app.post("/v1/aliases/{name}/rollback")
    async def rollback(name: str, request: Request) -> dict[str, Any]:
        """Return to the split before this one; 409 where there is none."""
        server.administer(request)
        catalog = server.names
        _form(catalog, name)
        before = catalog.aliases.before(name)
        if before is None:
            raise ApiError(409, f"the alias '{name}' had no split before this one", param="name")
        _check(catalog, name, before)
        catalog.aliases.rollback(name)
        Exchange.of(request).alias = name
        return _form(catalog, name)

    @app.delete("/v1/aliases/{name}")
    async def delete(name: str, request: Request) -> dict[str, Any]:
        server.administer(request)
        aliases = server.names.aliases
        if name not in aliases:
            raise _unknown(name)
        aliases.remove(name)
        Exchange.of(request).alias = name
        return {"id": name, "object": "alias", "deleted": True}


def _form(catalog: Catalog, name: str) -> dict[str, Any]:
    if name not in catalog.aliases:
        raise _unknown(name)
    aliases = catalog.aliases
    return {"id": name, "object": "alias", "targets": aliases.shares(name), "before": aliases.before(name)}


def _check(catalog: Catalog, name: str, weights: dict[str, float]) -> None:
    try:
        check_aliases({name: weights}, catalog.models)
    except SuiteError as error:
        raise ApiError(400, ". ".join(filter(None, (error.message, error.hint))), param="name") from None


def _unknown(name: str) -> ApiError:
    return ApiError(404, f"there is no alias '{name}'", param="name")
