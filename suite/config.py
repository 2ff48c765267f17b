"""Typed settings: one pydantic class is the TOML schema, the flags, the reference page and the errors."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from suite.errors import SuiteError, near

T = TypeVar("T")
C = TypeVar("C", bound="Config")

ArtifactType = Literal["model", "quantized", "adapter", "dataset", "data", "package", "receipt", "report"]


class Config(BaseModel):
    """Settings that refuse unknown keys and never change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Takes:
    """Marks a field whose value names artifacts (`@stage`, a path), and says of which types they may be."""

    types: tuple[ArtifactType, ...]

    def __init__(self, *types: ArtifactType) -> None:
        object.__setattr__(self, "types", types)


@dataclass(frozen=True)
class Launch:
    """Marks a field that says how to run, not what to make: it stays out of the cache key."""


@dataclass(frozen=True)
class Names:
    """Marks a list of names among which a path, told by its slash, is relative to the pipeline file."""


@dataclass(frozen=True)
class Beside:
    """Marks a path, or a list of paths, that a pipeline file gives relative to itself."""


ModelRef = Annotated[str, Takes("model")]
AdapterRef = Annotated[str, Takes("adapter")]
DatasetRef = Annotated[str, Takes("dataset")]


def marker(field: FieldInfo, kind: type[T]) -> T | None:
    """The field's `kind` marker, also where it sits inside `list[...]` or `... | None`."""
    for found in (*field.metadata, *_nested(field.annotation)):
        if isinstance(found, kind):
            return found
    return None


def _nested(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for argument in get_args(annotation):
        yield from _nested(argument)


def submodel(annotation: Any) -> type[BaseModel] | None:
    """The settings class inside an annotation such as `Lora | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((m for m in map(submodel, get_args(annotation)) if m), None)
    return None


def parse(model: type[C], values: Mapping[str, Any], where: Where) -> C:
    """`values` as `model`; raises one SuiteError with the place, the cause and the cure of every mistake."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # a union reports each branch: that a table is not `false` explains nothing, and one message a value is enough
        telling = [e for e in found if not (e["type"] == "literal_error" and isinstance(e["input"], dict))]
        errors = [_explain(model, e, where) for e in telling or found]
        unique = list({(e.where, e.message): e for e in errors}.values())
        if len(unique) == 1:
            raise unique[0] from None
        raise SuiteError("\n".join(str(e) for e in unique)) from None


class Where:
    """Turns a key path inside one table into a place a person can open, e.g. `pipeline.toml:12`.

    This one knows no file and gives the dotted key itself; `suite.pipeline` gives lines.
    """

    def __call__(self, path: tuple[str | int, ...]) -> str:
        return ".".join(map(str, path))


def _explain(model: type[BaseModel], e: Any, where: Where) -> SuiteError:
    loc = tuple(e["loc"])
    if e["type"] == "extra_forbidden":
        hint = near(str(loc[-1]), _fields(model, loc[:-1]))
        return SuiteError(f"unknown key '{loc[-1]}'", where=where(loc), hint=hint)
    names = _known_part(model, loc)
    if e["type"] == "missing":
        doc = _describe(model, names)
        return SuiteError(f"'{'.'.join(names)}' is missing", where=where(loc[:-1]), hint=doc)
    if e["type"] == "string_pattern_mismatch":  # what a pattern says is for no person
        said = f"'{'.'.join(names)}' cannot be {e['input']!r}"
        return SuiteError(said, where=where(loc), hint=_describe(model, names))
    text = e["msg"][0].lower() + e["msg"][1:]
    text = text.removeprefix("value error, ")
    return SuiteError(f"{'.'.join(names)}: {text}, got {e['input']!r}", where=where(loc))


def _known_part(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """`loc` without the branch names that pydantic adds for unions."""
    names: list[str] = []
    current: type[BaseModel] | None = model
    for part in loc:
        if current is not None and part in current.model_fields:
            names.append(str(part))
            current = submodel(current.model_fields[str(part)].annotation)
    return names or [str(p) for p in loc]


def _describe(model: type[BaseModel], names: list[str]) -> str:
    current: type[BaseModel] | None = model
    text = ""
    for name in names:
        if current is None or name not in current.model_fields:
            return text
        text = current.model_fields[name].description or ""
        current = submodel(current.model_fields[name].annotation)
    return text


def _fields(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    current = model
    for part in loc:
        if part in current.model_fields:
            current = submodel(current.model_fields[str(part)].annotation) or current
    return list(current.model_fields)
