"""/v1/load_lora_adapter and /v1/unload_lora_adapter, with the bodies, statuses and texts of vLLM's."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, Field

from serve.bodies import read
from serve.catalog import Catalog
from serve.document import CHANGING, TEXT, refuses, takes
from serve.errors import ApiError
from serve.families import Family
from serve.metrics import Metrics
from serve.offers import NAME, inside
from serve.serving import Serving
from serve.traffic import Exchange
from suite.errors import SuiteError


class LoadBody(BaseModel):
    """POST /v1/load_lora_adapter; `lora_path` lies in a folder given with --lora-dir, and may be relative to it."""

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(max_length=4096)
    model: str = Field("", max_length=256)
    """Whose adapter it is, where several models take some."""
    load_inplace: bool = False
    """Whether to replace an adapter of that name; requests that run end with the one they began with."""


class UnloadBody(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


def add(app: FastAPI, server: Serving, metrics: Metrics) -> None:
    """Both routes."""
    responses = {**TEXT, **refuses(*CHANGING)}

    @app.post("/v1/load_lora_adapter", response_class=Response, responses=responses, openapi_extra=takes(LoadBody))
    async def load(request: Request) -> PlainTextResponse:
        server.administer(request)
        body = await read(request, LoadBody)
        catalog = server.names
        _check_name(body, catalog)
        trusting = server.settings.trusting
        family = _family(body, catalog, trusting)
        try:
            folder = Path(body.lora_path) if trusting else _folder(body, family.lora_dir)
            await family.load(body.lora_name, folder)
        except SuiteError as error:
            raise ApiError(400, error.message, param="lora_path") from None
        Exchange.of(request).adapter = body.lora_name
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post(
        "/v1/unload_lora_adapter",
        response_class=Response,
        responses={**responses, **refuses(409)},
        openapi_extra=takes(UnloadBody),
    )
    async def unload(request: Request) -> PlainTextResponse:
        server.administer(request)
        body = await read(request, UnloadBody)
        catalog, name = server.names, body.lora_name
        if not name:
            raise ApiError(400, "'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
        family = catalog.family(name)
        if family is None or name not in family.folders:
            raise ApiError(404, f"The lora adapter '{name}' cannot be found.", param="lora_name")
        if used := catalog.aliases.of(name):
            raise ApiError(409, f"'{name}' is a target of the alias '{used[0]}'", param="lora_name")
        try:
            await family.unload(name)
        except SuiteError as error:
            raise ApiError(400, error.message, param="lora_name") from None
        metrics.forget(name)
        Exchange.of(request).adapter = name
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _check_name(body: LoadBody, catalog: Catalog) -> None:
    name, said = body.lora_name, ""
    if not name or not body.lora_path:
        said = "Both 'lora_name' and 'lora_path' must be provided."
    elif any(name == family.base for family in catalog.families):
        said = f"The lora adapter '{name}' conflicts with a served base model."
    elif name in catalog.aliases or not NAME.fullmatch(name):
        said = f"'{name}' is {'an alias' if name in catalog.aliases else 'no name'}"
    elif name in catalog and not body.load_inplace:
        said = (
            f"The lora adapter '{name}' has already been loaded. "
            "If you want to load the adapter in place, set 'load_inplace' to True."
        )
    if said:
        raise ApiError(400, said, param="lora_name")


def _family(body: LoadBody, catalog: Catalog, trusting: bool) -> Family:
    """The model that is to have the adapter."""
    there = {family.base: family for family in catalog.families if family.lora_dir or trusting}
    if not there:
        raise ApiError(403, "this server loads no adapters; start it with --lora-dir DIR")
    owner = catalog.family(body.lora_name)
    model = body.model or (owner.base if owner else next(iter(there)) if len(there) == 1 else "")
    if not model:
        raise ApiError(400, f"'model' says whose adapter it is: {', '.join(there)}", param="model")
    if model not in there or (owner and owner.base != model):
        said = f"'{body.lora_name}' is one of '{owner.base}'" if owner else f"no adapters are loaded for '{model}'"
        raise ApiError(400, said, param="model")
    return there[model]


def _folder(body: LoadBody, folders: list[str]) -> Path:
    folder = inside(body.lora_path, folders)
    if folder is None:
        raise ApiError(404, f"No adapter found for '{body.lora_name}' at {body.lora_path}", param="lora_path")
    return folder
