"""/v1/aliases: names that stand for other models, changed at run time and taken back in one call.

They last as long as the server: what they are at its start stands in its flags or in the pipeline's `[serve]` table.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from pydantic import RootModel

from serve import shapes
from serve.bodies import read
from serve.catalog import Catalog
from serve.document import CHANGING, LOOKING, refuses, takes
from serve.errors import ApiError
from serve.serving import Serving, visible
from serve.traffic import Exchange
from suite.errors import SuiteError
from suite.serving import check_aliases


class SplitBody(RootModel[dict[str, float]]):
    """PUT /v1/aliases/NAME: how much of the requests each model gets, e.g. `{"law@v2": 0.9, "law@v3": 0.1}`."""


def add(app: FastAPI, server: Serving) -> None:
    """Listing, setting, going back and removing."""

    @app.get("/v1/aliases", responses=refuses(*LOOKING))
    async def listing(request: Request) -> shapes.Aliases:
        catalog, may_see = server.names, visible(request)
        return {"object": "list", "data": [_form(catalog, name) for name in catalog.aliases if may_see(name)]}

    @app.get("/v1/aliases/{name}", responses=refuses(404, *LOOKING))
    async def alias(name: str, request: Request) -> shapes.Alias:
        catalog = server.names
        if not visible(request)(name):
            raise _unknown(name)
        return _form(catalog, name)

    @app.put("/v1/aliases/{name}", responses=refuses(*CHANGING), openapi_extra=takes(SplitBody))
    async def put(name: str, request: Request) -> shapes.Alias:
        server.administer(request)
        catalog, weights = server.names, (await read(request, SplitBody)).root
        _check(catalog, name, weights)
        catalog.aliases.put(name, weights)
        Exchange.of(request).alias = name
        return _form(catalog, name)

    @app.post("/v1/aliases/{name}/rollback", responses=refuses(*CHANGING, 409))
    async def rollback(name: str, request: Request) -> shapes.Alias:
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

    @app.delete("/v1/aliases/{name}", responses=refuses(403, 404, *LOOKING))
    async def delete(name: str, request: Request) -> shapes.Deleted:
        server.administer(request)
        aliases = server.names.aliases
        if name not in aliases:
            raise _unknown(name)
        aliases.remove(name)
        Exchange.of(request).alias = name
        return {"id": name, "object": "alias", "deleted": True}


def _form(catalog: Catalog, name: str) -> shapes.Alias:
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
