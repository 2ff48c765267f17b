"""The `[serve]` table: which models one endpoint serves, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import Field

from suite.config import Beside, Config, Takes, Where, marker, parse
from suite.errors import SuiteError
from suite.serving import Adapters, Engine, Options, Others, check_aliases

Place = tuple[str, ...]
"""The keys that lead to something in the table."""
C = TypeVar("C", bound=Config)

MODEL, ADAPTER, PACKAGE = Takes("model", "quantized"), Takes("adapter"), Takes("package")


class Model(Adapters, Others, Engine):
    """One of several models, in a table `[serve.models.NAME]`; what it leaves out, `[serve]` says for all of them."""

    model: str = ""
    """The model: `@stage`, or a folder."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Its adapters by the name that requests give as `model`."""
    url: str = ""
    """An OpenAI endpoint that runs already, in place of a model: its first model is called NAME here, and each of
    several NAME/ITS-NAME; keys, limits and metrics are ours."""
    api_key_env: str = ""
    """The environment variable with the key that the endpoint asks for."""


class Shared(Config):
    """What one endpoint serves."""

    base: str = ""
    """The model that every adapter shares: `@stage`, or a folder. Several models have a table each instead."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Adapters by the name that requests give as `model`."""
    models: dict[str, Model] = Field(default_factory=dict)
    """Several models behind one endpoint: tables `[serve.models.NAME]`, NAME being what requests call it."""


class Serve(Options, Shared):
    """The `[serve]` table: what `suite run --serve` and `suite serve --config` put behind one endpoint."""

    @property
    def name(self) -> str:
        """What requests call the only model."""
        return Path(self.base.lstrip("@")).name

    def each(self) -> Iterator[tuple[Place, str, Model]]:
        """All models: where their tables are, their names, and what is said of them."""
        if self.base:
            said = {name: getattr(self, name) for name in INHERITED}
            yield (), self.name, Model(**said, model=self.base, adapters=self.adapters)
        for name, model in self.models.items():
            yield ("models", name), name, model

    def wanted(self) -> dict[Place, tuple[str, Takes]]:
        """The references in it by their places, with what each of them may be."""
        found: dict[Place, tuple[str, Takes]] = {}
        for place, _, model in self.each():
            if not model.url:
                found[place_of(place)] = (model.model, PACKAGE if model.backend == "llamacpp" else MODEL)
            found |= {(*place, "adapters", name): (text, ADAPTER) for name, text in model.adapters.items()}
        return found


INHERITED = (*Engine.model_fields, *Others.model_fields, *Adapters.model_fields)
"""What `[serve]` says for all models."""
ELSEWHERE = ("url", "api_key_env")
"""All that can be said of an endpoint that runs already."""


def place_of(table: Place) -> Place:
    """Where the table of a model names the model itself."""
    return (*table, "model") if table else ("base",)


class Places(Protocol):
    """Gives the places of what stands in a table below `[serve]`."""

    def __call__(self, *table: str) -> Where:
        """Of the table at that path."""


def read(table: Mapping[str, Any], places: Places, folder: Path) -> Serve:
    """The table, with its paths, which are relative to `folder`, made absolute; raises SuiteError."""
    here, tables = places(), table.get("models", {})
    settings = parse(Serve, {k: v for k, v in table.items() if k != "models"}, here)
    if not isinstance(tables, Mapping) or not all(isinstance(own, Mapping) for own in tables.values()):
        raise SuiteError("'models' must be tables", where=here(("models",)), hint="write [serve.models.<name>]")
    if bool(settings.base) == bool(tables):
        hint = f"base: {Serve.model_fields['base'].description}"
        raise SuiteError(
            "[serve] needs either a `base`, or tables such as [serve.models.small]", where=here(()), hint=hint
        )
    if tables and settings.adapters:
        where = here(("adapters",))
        raise SuiteError("adapters belong to one of the models", where=where, hint="write them into its table")
    shared = {name: value for name, value in table.items() if name in INHERITED}
    models = {name: _model(own, shared, places("models", name)) for name, own in tables.items()}
    placed = {name: _beside(model, folder) for name, model in models.items()}
    settings = _beside(settings, folder).model_copy(update={"models": placed})
    _check_names(settings, here)
    return settings


def _model(own: Mapping[str, Any], shared: Mapping[str, Any], where: Where) -> Model:
    elsewhere = "url" in own
    model = parse(Model, own if elsewhere else {**shared, **own}, where)
    if bool(model.model) == bool(model.url):
        raise SuiteError("a model has either a `model` or a `url`", where=where(()))
    if elsewhere and (other := next((name for name in own if name not in ELSEWHERE), None)):
        raise SuiteError(f"'{other}' is for models that are started here, not for a `url`", where=where((other,)))
    return model


def _beside(settings: C, folder: Path) -> C:
    """The settings with paths made absolute."""
    fields = [name for name, info in type(settings).model_fields.items() if marker(info, Beside)]
    given = {name: value for name in fields if (value := getattr(settings, name))}
    placed = {n: str(folder / v) if isinstance(v, str) else [str(folder / p) for p in v] for n, v in given.items()}
    return settings.model_copy(update=placed)


def _check_names(settings: Serve, where: Where) -> None:
    """No two models or adapters share a name, and aliases stand for some that are there.

    What a folder of adapters holds, and an endpoint serves, is seen when it is served; all else is known now.
    """
    owners: dict[str, str] = {}
    for place, base, model in settings.each():
        for name in (base, *model.adapters):
            if name in owners:
                said = f"two models or adapters are called '{name}'"
                raise SuiteError(
                    said, where=where((*place, "adapters", name)), hint="requests could not tell them apart"
                )
            owners[name] = base
    if any(model.lora_dir or model.url for _, _, model in settings.each()):
        return
    try:
        check_aliases(settings.alias, owners)
    except SuiteError as error:
        raise SuiteError(error.message, where=where(tuple(error.where.split(".", 1))), hint=error.hint) from None
