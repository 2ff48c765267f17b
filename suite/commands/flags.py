"""Command-line flags from settings classes: one flag a field, its help the field's own description."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from suite.config import Takes, marker, submodel
from suite.errors import SuiteError, near


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes look like all others: one message, a hint, exit code 2."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise SuiteError instead of printing the usage and leaving."""
        raise SuiteError(message, hint=f"see {self.prog} --help")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; an unknown flag is answered with the closest known one."""
        values, unknown = self.parse_known_args(list(arguments))
        if unknown:
            flags = [f for action in self._actions for f in action.option_strings]
            raise SuiteError(f"unknown argument '{unknown[0]}'", hint=near(unknown[0], flags))
        return values


def add_settings(parser: argparse.ArgumentParser | argparse._ArgumentGroup, settings: type[BaseModel]) -> None:
    """A flag for every field of `settings`, fields of tables inside it as `--table.field`.

    A switch is `--NAME`, `--NAME=false` or `--no-NAME`; the last one given counts.
    """
    for name, info in walk(settings):
        required = " (required)" if info.is_required() else _default(info)
        text = f"{info.description or ''}{required}".replace("%", "%%")
        flag, dest = "--" + name.replace("_", "-"), f"setting {name}"
        if set(_kinds(info.annotation)) == {bool}:
            off = f"--no-{flag[2:]}"
            parser.add_argument(
                flag, dest=dest, metavar="BOOL", help=f"{text}; {off}: false", action="append", nargs="?", const="true"
            )
            parser.add_argument(off, dest=dest, action="append_const", const="false", help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, dest=dest, metavar=type_text(info), help=text, action="append")


def walk(settings: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All fields, depth first, by dotted name."""
    for name, info in settings.model_fields.items():
        yield prefix + name, info
        inner = submodel(info.annotation)
        if inner:
            yield from walk(inner, f"{prefix}{name}.")


def values_of(settings: type[BaseModel], arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, as nested tables for `suite.config.parse`."""
    values: dict[str, Any] = {}
    for name, info in walk(settings):
        given = getattr(arguments, f"setting {name}")
        if given is None:
            continue
        *parents, last = name.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise SuiteError(f"--{name} and --{parent} exclude each other")
        node[last] = _value(name, info, given)
    return values


def _value(name: str, info: FieldInfo, given: list[str]) -> Any:
    kinds = list(_kinds(info.annotation))
    if dict in kinds:
        return pairs(f"--{name}", given)
    choices = {str(choice).lower(): choice for choice in _choices(info.annotation)}
    if list in kinds:
        return [choices.get(part, part) for item in given for part in item.split(",") if part]
    if given[-1] in ("true", "false") and str not in kinds:
        return given[-1] == "true"
    return choices.get(given[-1], given[-1])


def pairs(flag: str, given: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as a table; a value is TOML, or else plain text."""
    split = [word.partition("=") for word in given]
    if any(not equals for _, equals, _ in split):
        raise SuiteError(f"{flag}: expected KEY=VALUE, got '{' '.join(given)}'")
    return {key: _toml(value) for key, _, value in split}


def key_in(variable: str | None) -> str | None:
    """The API key that an environment variable holds; None where none is named. Raises SuiteError when it is empty."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise SuiteError(f"--api-key-env: {variable} is not set", hint=f"export {variable}=...")
    return key


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation allows, through unions and Annotated."""
    origin = get_origin(annotation)
    if origin in (list, dict):
        yield origin
    elif isinstance(annotation, type):
        yield annotation
    elif origin is not Literal:
        for argument in get_args(annotation):
            yield from _kinds(argument)


def _choices(annotation: Any) -> Iterator[Any]:
    """The values that a `Literal` inside an annotation allows."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
        return
    for argument in get_args(annotation):
        yield from _choices(argument)


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def type_text(info: FieldInfo) -> str:
    """What a field takes, in a word or two for people."""
    takes = marker(info, Takes)
    if takes:
        several = list in _kinds(info.annotation)
        return "FILE,..." if takes.types == ("dataset",) else "PATH|@STAGE,..." if several else "PATH|@STAGE"
    kinds = list(_kinds(info.annotation))
    if dict in kinds:
        return "KEY=VALUE"
    if choices := list(_choices(info.annotation)):
        return "|".join(str(c).lower() for c in choices)
    words = {int: "INT", float: "FLOAT", str: "STR", bool: "BOOL", ByteSize: "SIZE"}
    return "A,B" if list in kinds else next((words[kind] for kind in kinds if kind in words), "VALUE")


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=False)
    if value is PydanticUndefined or value is None or isinstance(value, BaseModel) or value in ({}, []):
        return ""
    return f" [{','.join(map(str, value)) if isinstance(value, list) else value}]"
