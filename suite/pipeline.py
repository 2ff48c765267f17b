"""A pipeline file becomes a checked, ordered plan, before anything runs.

Every mistake is one SuiteError with `file:line`, what is wrong and the cure: unknown keys, wrong types, missing files,
unknown stages, references to the wrong type of artifact, cycles.
"""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from suite import edges, envs, runs, serve_table, store, toml
from suite import gate as gates
from suite.config import Config, Names, Takes, Where, marker, parse
from suite.errors import SuiteError, near
from suite.matrix import Cell, Tables, merged
from suite.places import Flags, Lines, cell_places
from suite.plan import Node, Plan, Source
from suite.references import HUBS, External, external
from suite.serve_table import Serve
from suite.stages import Artifact, Stage, kind

Provide = Callable[[envs.Environment], None]
"""What is done about an environment that a stage needs."""

TOP_LEVEL_KEYS = ("name", "defaults", "stage", "serve", "env")


def require(environment: envs.Environment) -> None:
    """Its absence is an error."""
    environment.require()


class Wiring(Config):
    """The keys of a stage's table that belong to the pipeline; all others are the stage's own settings."""

    use: str = ""
    """The kind of stage; the table's name by default."""
    matrix: dict[str, Any] = Field(default_factory=dict)
    """Lists of values by setting: one stage for each combination."""
    skip: list[dict[str, Any]] = Field(default_factory=list)
    """Combinations of the matrix to leave out."""
    needs: list[str] = Field(default_factory=list)
    """Stages that must have passed before this one starts."""
    gate: list[str] = Field(default_factory=list)
    """Conditions on what is measured, e.g. `ceval-mini.acc >= @before.ceval-mini.acc - 0.02 at 95 %`, `bytes < 4e9`,
    `forgotten(@before) <= 3`, `ceval-mini.leakage.share < 0.05`; if one fails, what depends on this stage does not
    run."""


def read(path: Path, overrides: list[str] | None = None, provide: Provide = require) -> Plan:
    """The plan of a pipeline file, with `--set key=value` overrides applied; raises SuiteError."""
    data, lines = toml.read(path)
    places: dict[toml.KeyPath, Any] = dict(lines)
    for override in overrides or []:
        _override(data, places, override)
    return build(data, places, path, provide)


def _override(data: dict[str, Any], places: dict[toml.KeyPath, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise SuiteError(f"--set {text}: expected key=value", hint="e.g. --set stage.train.lr=2e-4")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    if keys[0] == "stage" and len(keys) > 1 and keys[1] not in data.get("stage", {}):
        raise SuiteError(f"--set {text}: no stage '{keys[1]}'", hint=near(keys[1], data.get("stage", {})))
    node = data
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise SuiteError(f"--set {text}: '{key}' is a value, not a table")
    node[keys[-1]] = parsed
    places[tuple(keys)] = f"--set {text}"


def read_environments(path: Path) -> dict[str, envs.Environment]:
    """What the `[env.NAME]` tables of a pipeline file name; nothing else in it is checked."""
    data, lines = toml.read(path)
    return _environments(data, lines, path)


def _environments(
    data: Mapping[str, Any], lines: Mapping[toml.KeyPath, Any], file: Path
) -> dict[str, envs.Environment]:
    found = {}
    for name, table in _table(data, "env", Lines(file, lines, ((),))).items():
        settings = parse(envs.Settings, table, Lines(file, lines, (("env", name),)))
        found[name] = envs.get(name, settings, file)
    return found


def build(data: Mapping[str, Any], lines: Mapping[toml.KeyPath, Any], file: Path, provide: Provide = require) -> Plan:
    """The plan of a parsed pipeline; paths in it are relative to the folder of `file`."""
    top = Lines(file, lines, ((),))
    for key in data:
        _check_known(key, top)
    for key in ("stage", "defaults", "env"):
        for name, table in _table(data, key, top).items():
            if not isinstance(table, Mapping):
                raise SuiteError(
                    f"'{key}.{name}' must be a table", where=top((key, name)), hint=f"write [{key}.{name}]"
                )
    for name in data.get("defaults", {}):
        _kind(name, top(("defaults", name)))
    if not data.get("stage"):
        raise SuiteError("no stages", where=str(file), hint="add a table such as [stage.train]")
    tables = Tables(data["stage"], top)
    environments = _environments(data, lines, file)
    nodes: dict[str, Node] = {}
    for base in data["stage"]:
        for cell in tables.cells(base):
            where = Lines(file, lines, (("stage", base), ("defaults", tables.use(base))))
            node = _node(base, cell, tables, data, where)
            node = replace(node, environments=_asked_for(node, environments))
            nodes |= {n.name: n for n in with_followers(node)}
    nodes = {**edges.downloads(nodes.values()), **nodes}
    for node in nodes.values():
        edges.check_edges(node, nodes)
    edges.check_targets(nodes)
    plan = Plan(str(data.get("name", file.stem)), file, file.read_text("utf-8"), edges.ordered(nodes))
    plan = _with_serve(plan, data, Lines(file, lines, (("serve",),)))
    check_inputs(plan, provide)
    return plan


def _check_known(key: str, top: Where) -> None:
    if key not in TOP_LEVEL_KEYS:
        raise SuiteError(f"unknown table '{key}'", where=top((key,)), hint=near(key, TOP_LEVEL_KEYS))


def _table(data: Mapping[str, Any], key: str, where: Where) -> Mapping[str, Any]:
    table = data.get(key, {})
    if not isinstance(table, Mapping):
        raise SuiteError(f"'{key}' must be a table", where=where((key,)), hint=f"write [{key}.<name>]")
    return table


def _node(base: str, cell: Cell, tables: Tables, data: Mapping[str, Any], where: Lines) -> Node:
    use = tables.use(base)
    stage_class = _kind(use, where(("use",)))
    table = tables.stages[base]
    own = {k: v for k, v in table.items() if k not in Wiring.model_fields}
    wiring = parse(Wiring, {k: v for k, v in table.items() if k in Wiring.model_fields}, where)
    values = merged(merged(data.get("defaults", {}).get(use, {}), own), cell.values)
    stage = edges.pinned(_placed(parse(stage_class, values, cell_places(where, table)), where.file.parent), where(()))
    inputs: dict[str, list[Source]] = {}
    for field, references in stage.references().items():
        takes = stage.accepts()[field]
        names = [n for r in references for n in tables.expand(r, where((field,)))]
        inputs[field] = [edges.source_of(n, takes, (field,), where) for n in names]
    needs = tuple(
        n[1:] for i, need in enumerate(wiring.needs) for n in tables.expand(need, where(("needs", i)), only_stages=True)
    )
    return Node(base + cell.label, stage, inputs, needs, _gates(wiring, base, where), where)


def _asked_for(node: Node, own: Mapping[str, envs.Environment]) -> dict[str, envs.Environment]:
    """The environments that a stage's settings ask for, of the pipeline's own or built in."""
    try:
        return {name: own.get(name) or envs.get(name) for name in node.stage.environments()}
    except SuiteError as error:
        raise SuiteError(error.message, where=node.where(()), hint=error.hint) from None


def with_followers(node: Node) -> list[Node]:
    """A node, and those of the stages that its settings ask for; their mistakes are found in its table."""
    found = [node]
    for suffix, (field, stage) in node.stage.followers().items():
        found.append(Node(f"{node.name}.{suffix}", stage, {field: [node.name]}, (), (), node.where))
    return found


def _placed(stage: Stage, folder: Path) -> Stage:
    """The stage with paths among its names made absolute."""
    fields = [name for name, info in type(stage).model_fields.items() if marker(info, Names)]
    return stage.model_copy(update={n: [_absolute(v, folder) for v in getattr(stage, n)] for n in fields})


def _absolute(name: str, folder: Path) -> str:
    """A path, told by its slash, from `folder`; of `program:name=path` what follows the sign; no address at a hub."""
    if name.startswith(HUBS):
        return name
    named = re.match(r"\w+:[\w.-]+=", name)
    if not named:
        return str((folder / name).resolve()) if "/" in name else name
    return named[0] + str((folder / name[named.end() :]).resolve())


def _kind(name: str, where: str) -> type[Stage]:
    try:
        return kind(name)
    except SuiteError as error:
        raise SuiteError(error.message, where=where, hint=error.hint) from None


def _gates(wiring: Wiring, name: str, where: Lines) -> tuple[gates.Gate, ...]:
    parsed = []
    for i, text in enumerate(wiring.gate):
        try:
            parsed.append(gates.parse(text, name))
        except SuiteError as error:
            raise SuiteError(error.message, where=where(("gate", i)), hint=error.hint) from None
    return tuple(parsed)


def check_inputs(plan: Plan, provide: Provide = require) -> None:
    """Let every stage check what can be known now, and then provide what they need."""
    for node in plan.nodes.values():
        with _in_table_of(node):
            node.stage.check(_known(node))
    # after all of them: no mistake is told only when something has been installed
    for node in plan.nodes.values():
        _provide(node, provide, _known(node))


def _known(node: Node) -> dict[str, list[Artifact | None]]:
    """The inputs of a stage that no stage has to make."""
    return {
        field: [s.artifact if isinstance(s, External) else None for s in sources]
        for field, sources in node.inputs.items()
    }


def check_stage(node: Node, inputs: Mapping[str, list[Artifact | None]]) -> None:
    """Run one stage's own `check`, look for its environment; raises SuiteError with the line of what it names."""
    with _in_table_of(node):
        node.stage.check(inputs)
    _provide(node, require, inputs)


def _provide(node: Node, provide: Provide, inputs: Mapping[str, list[Artifact | None]]) -> None:
    with _in_table_of(node):
        for environment in node.environments.values():
            provide(environment)
        node.stage.check_in({name: found.python for name, found in node.environments.items()}, inputs)


@contextlib.contextmanager
def _in_table_of(node: Node) -> Iterator[None]:
    """Errors raised inside get the line of the setting that they name."""
    try:
        yield
    except SuiteError as error:
        field = error.where.split(".")
        if error.where and field[0] not in type(node.stage).model_fields:
            raise  # a place in another file, e.g. a data file's line
        place = node.where(tuple(field) if error.where else ())
        prefix = f"{error.where}: " if error.where and not error.message.startswith(error.where) else ""
        raise SuiteError(prefix + error.message, where=place, hint=error.hint) from None


def read_serve(path: Path, overrides: Mapping[str, Any]) -> Serve:
    """The `[serve]` table of a file, with what flags say; its stages are not looked at."""
    data, lines = toml.read(path)
    top = Lines(path, lines, ((),))
    for key in data:
        _check_known(key, top)
    if "serve" not in data:
        raise SuiteError("the file has no [serve] table", where=str(path))
    places: dict[toml.KeyPath, Any] = {**lines}
    places |= {("serve", name): f"--{name.replace('_', '-')}" for name in overrides}
    return _serve_table({**_table(data, "serve", top), **overrides}, places, path)


def _serve_table(table: Mapping[str, Any], lines: Mapping[toml.KeyPath, Any], file: Path) -> Serve:
    def places(*inner: str) -> Where:
        return Lines(file, lines, (("serve", *inner), *((("serve",),) if inner else ())))

    return serve_table.read(table, places, file.parent)


def _with_serve(plan: Plan, data: Mapping[str, Any], where: Lines) -> Plan:
    if "serve" not in data:
        return plan
    settings = _serve_table(_table(data, "serve", where), where.lines, where.file)
    sources: dict[tuple[str, ...], Source] = {}
    nodes = plan.nodes
    for path, (reference, takes) in settings.wanted().items():
        found = sources[path] = edges.source_of(reference, takes, path, where)
        if isinstance(found, str):
            if found.startswith(HUBS) and found not in nodes:
                nodes = {found: edges.download_node(found, where(path)), **nodes}
            edges.check_edge(found, takes, ".".join(path), where(path), nodes)
    return replace(plan, nodes=nodes, serve=settings, serve_sources=sources)


def one_stage(
    name: str, stage: Stage, folder: Path, environments: Mapping[str, envs.Environment] | None = None,
    provide: Provide = require,
) -> Plan:  # fmt: skip
    """The plan of a single stage given on the command line; references are paths relative to `folder`.

    `environments` stand in for built-in ones of the same names, and `provide` for the error where one is missing.
    """
    file = folder / "command line"
    where = Flags(file, {}, ((),))
    inputs: dict[str, list[Source]] = {}
    for field, references in stage.references().items():
        inputs[field] = []
        for reference in references:
            takes = stage.accepts()[field]
            found = reference if edges.at_hub(reference, takes) else on_command_line(reference, takes, folder)
            if isinstance(found, SuiteError):
                raise SuiteError(found.message, where=where((field,)), hint=found.hint)
            inputs[field].append(found)
    node = Node(name, edges.pinned(_placed(stage, folder), ""), inputs, (), (), where)
    node = replace(node, environments=_asked_for(node, environments or {}))
    nodes = {**edges.downloads([node]), **{n.name: n for n in with_followers(node)}}
    for each in nodes.values():
        edges.check_edges(each, nodes)
    plan = Plan(name, None, "", nodes)
    check_inputs(plan, provide)
    return plan


def on_command_line(reference: str, takes: Takes, folder: Path) -> External | SuiteError:
    """The artifact that a flag names: a path, or `@stage` for what the newest run with that stage made."""
    if not reference.startswith("@"):
        return external(reference, takes, folder)
    try:
        path = runs.newest(store.home(), reference[1:])
    except SuiteError as error:
        return error
    found = external(str(path), takes, folder)
    if isinstance(found, SuiteError):
        return SuiteError(found.message.replace(str(path), reference), hint=found.hint)
    return External(reference, found.artifact)
