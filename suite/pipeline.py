"""A pipeline file becomes a checked, ordered plan, before anything runs.

Every mistake is one SuiteError with `file:line`, what is wrong and the cure: unknown keys, wrong types, missing files,
unknown stages, references to the wrong type of artifact, cycles.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import Field

from suite import envs, runs, serve_table, store, toml
from suite import gate as gates
from suite.config import ArtifactType, Config, Names, Takes, Where, marker, parse
from suite.errors import SuiteError, near
from suite.matrix import Cell, Tables, merged
from suite.places import Flags, Lines, cell_places
from suite.references import HUBS, External, external
from suite.serve_table import Serve
from suite.stages import Artifact, Stage, kind

TOP_LEVEL_KEYS = ("name", "defaults", "stage", "serve", "env")

Source = str | External
"""Where an input comes from: the name of a stage of this plan, or an artifact that exists already."""


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
    """Conditions on what this stage measures; if one fails, what depends on it does not run."""


@dataclass(frozen=True)
class Node:
    """One stage of a plan: its settings, where its inputs come from, and what must have passed before."""

    name: str
    stage: Stage
    inputs: dict[str, list[Source]]
    needs: tuple[str, ...]
    gates: tuple[gates.Gate, ...]
    where: Where
    environment: envs.Environment | None = None

    @property
    def after(self) -> set[str]:
        """Names of all stages that must be done first."""
        read = (s for g in self.gates for s in g.stages)
        return {s for sources in self.inputs.values() for s in sources if isinstance(s, str)} | {*self.needs, *read}


@dataclass(frozen=True)
class Plan:
    """Stages in an order in which each comes after what it needs."""

    name: str
    file: Path | None
    text: str
    nodes: dict[str, Node]
    serve: Serve | None = None
    serve_sources: Mapping[tuple[str, ...], Source] | None = None
    """Where what `[serve]` names comes from, by its place there."""


def read(path: Path, overrides: list[str] | None = None) -> Plan:
    """The plan of a pipeline file, with `--set key=value` overrides applied; raises SuiteError."""
    data, lines = toml.read(path)
    places: dict[toml.KeyPath, Any] = dict(lines)
    for override in overrides or []:
        _override(data, places, override)
    return build(data, places, path)


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


def build(data: Mapping[str, Any], lines: Mapping[toml.KeyPath, Any], file: Path) -> Plan:
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
            node = replace(node, environment=_environment(node, environments))
            nodes |= {n.name: n for n in with_followers(node)}
    nodes = {**_downloads(nodes.values()), **nodes}
    for node in nodes.values():
        _check_edges(node, nodes)
    _check_targets(nodes)
    plan = Plan(str(data.get("name", file.stem)), file, file.read_text("utf-8"), _ordered(nodes))
    check_inputs(plan)
    return _with_serve(plan, data, Lines(file, lines, (("serve",),)))


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
    stage = _pinned(_placed(parse(stage_class, values, cell_places(where, table)), where.file.parent), where(()))
    inputs: dict[str, list[Source]] = {}
    for field, references in stage.references().items():
        takes = stage.accepts()[field]
        names = [n for r in references for n in tables.expand(r, where((field,)))]
        inputs[field] = [_source(n, takes, (field,), where) for n in names]
    needs = tuple(
        n[1:] for i, need in enumerate(wiring.needs) for n in tables.expand(need, where(("needs", i)), only_stages=True)
    )
    return Node(base + cell.label, stage, inputs, needs, _gates(wiring, where), where)


def _environment(node: Node, named: Mapping[str, envs.Environment]) -> envs.Environment | None:
    """The environment that a stage's settings ask for, of the pipeline's own or built in."""
    name = node.stage.environment()
    try:
        return (named.get(name) or envs.get(name)) if name else None
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
    """A path, told by its slash, from `folder`; of `program:name=path` what follows the sign."""
    named = re.match(r"\w+:[\w.-]+=", name)
    start = named.end() if named else 0
    return name[:start] + str((folder / name[start:]).resolve()) if "/" in name[start:] else name


def _kind(name: str, where: str) -> type[Stage]:
    try:
        return kind(name)
    except SuiteError as error:
        raise SuiteError(error.message, where=where, hint=error.hint) from None


def _gates(wiring: Wiring, where: Lines) -> tuple[gates.Gate, ...]:
    parsed = []
    for i, text in enumerate(wiring.gate):
        try:
            parsed.append(gates.parse(text))
        except SuiteError as error:
            raise SuiteError(error.message, where=where(("gate", i)), hint=error.hint) from None
    return tuple(parsed)


def _source(reference: str, takes: Takes, path: tuple[str, ...], where: Lines) -> Source:
    if reference.startswith("@"):
        return reference[1:]
    if _at_hub(reference, takes):
        return reference
    found = external(reference, takes, where.file.parent)
    if isinstance(found, SuiteError):
        raise SuiteError(f"{'.'.join(path)}: {found.message}", where=where(path), hint=found.hint)
    return found


def _at_hub(reference: str, takes: Takes) -> bool:
    """Whether a download can stand in its place, as a stage that is named by the address."""
    return reference.startswith(HUBS) and {"model", "quantized", "adapter"} & {*takes.types} != set()


def _downloads(nodes: Iterable[Node]) -> dict[str, Node]:
    """The stages that hub addresses among the inputs of `nodes` stand for."""
    found: dict[str, Node] = {}
    for node in nodes:
        for field, sources in node.inputs.items():
            for address in sources:
                if isinstance(address, str) and address.startswith(HUBS) and address not in found:
                    stage = download(address, node.where((field,)))
                    found[address] = Node(address, stage, {}, (), (), node.where)
    return found


def download(address: str, where: str) -> Stage:
    """The stage that fetches what lies at a hub address; an error is about the place `where` it stands."""
    try:
        return parse(kind("download"), {"address": address}, Where()).pinned()
    except SuiteError as error:
        message = error.message if address in error.message else f"{address}: {error.message}"
        raise SuiteError(message, where=where, hint=error.hint) from None


def _pinned(stage: Stage, where: str) -> Stage:
    try:
        return stage.pinned()
    except SuiteError as error:
        raise SuiteError(error.message, where=error.where or where, hint=error.hint) from None


def _check_edges(node: Node, nodes: Mapping[str, Node]) -> None:
    """Every reference names a stage, and one that makes what the field takes."""
    for field, sources in node.inputs.items():
        for source in sources:
            if isinstance(source, External):
                continue
            if source not in nodes:
                raise SuiteError(f"no stage '{source}'", where=node.where((field,)), hint=near(source, nodes))
            made, takes = nodes[source].stage.makes(), node.stage.accepts()[field].types
            if made not in takes:
                raise SuiteError(
                    f"'{field}' takes {_either(takes)}, but '{at_sign(source)}' makes {_article(made)}",
                    where=node.where((field,)),
                    hint="put a merge stage between them"
                    if made == "adapter" and "model" in takes
                    else _makers(takes, nodes),
                )
    for name in {*node.needs, *(s for g in node.gates for s in g.stages)}:
        if name not in nodes:
            where = node.where(("needs",) if name in node.needs else ("gate",))
            raise SuiteError(f"no stage '{name}'", where=where, hint=near(name, nodes))


def at_sign(source: str) -> str:
    """A stage as a reference names it: `@stage`, or the address that it downloads."""
    return source if source.startswith(HUBS) else f"@{source}"


def _check_targets(nodes: Mapping[str, Node]) -> None:
    """No two stages change the same thing outside the store: the second would undo the first."""
    known: dict[str, str] = {}
    for name, node in nodes.items():
        target = node.stage.target()
        if target in known:
            hint = "give each a name or a branch of its own"
            raise SuiteError(f"'{known[target]}' and '{name}' both write to {target}", where=node.where(()), hint=hint)
        if target:
            known[target] = name


def _makers(takes: tuple[ArtifactType, ...], nodes: Mapping[str, Node]) -> str:
    fitting = ["@" + n for n, node in nodes.items() if node.stage.makes() in takes]
    return f"these fit: {', '.join(fitting)}" if fitting else f"no stage here makes {_either(takes)}"


def _article(made: str) -> str:
    return {"quantized": "a quantized model", "adapter": "an adapter"}.get(made, f"a {made}")


def _either(takes: tuple[ArtifactType, ...]) -> str:
    return " or ".join(_article(t) for t in takes)


def _ordered(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """In the file's order as far as the references allow: what a person wrote first runs first."""
    sorter = TopologicalSorter({n: sorted(node.after) for n, node in nodes.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = error.args[1]
        where = nodes[cycle[0]].where(())
        text = " -> ".join(reversed(cycle))
        raise SuiteError(
            f"stages depend on each other: {text}", where=where, hint="remove one of these references"
        ) from None
    rank = {name: i for i, name in enumerate(nodes)}
    order: dict[str, Node] = {}
    ready: set[str] = set()
    while sorter.is_active():
        ready |= set(sorter.get_ready())
        first = min(ready, key=rank.__getitem__)
        ready.remove(first)
        order[first] = nodes[first]
        sorter.done(first)
    return order


def check_inputs(plan: Plan) -> None:
    """Let every stage check what can be known now; a failing check gets the place of its field."""
    for node in plan.nodes.values():
        known: dict[str, list[Artifact | None]] = {
            field: [s.artifact if isinstance(s, External) else None for s in sources]
            for field, sources in node.inputs.items()
        }
        check_stage(node, known)


def check_stage(node: Node, inputs: Mapping[str, list[Artifact | None]]) -> None:
    """Run one stage's own `check`, look for its environment; raises SuiteError with the line of what it names."""
    try:
        node.stage.check(inputs)
        if node.environment:
            node.environment.require()
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
    for path, (reference, takes) in settings.wanted().items():
        field = ".".join(path)
        source = _source(reference, takes, path, where)
        if isinstance(source, str):
            if source not in plan.nodes:
                raise SuiteError(f"no stage '{source}'", where=where(path), hint=near(source, plan.nodes))
            made = plan.nodes[source].stage.makes()
            if made not in takes.types:
                raise SuiteError(
                    f"'{field}' takes {_either(takes.types)}, but '@{source}' makes {_article(made)}", where=where(path)
                )
        sources[path] = source
    return Plan(plan.name, plan.file, plan.text, plan.nodes, settings, sources)


def one_stage(name: str, stage: Stage, folder: Path) -> Plan:
    """The plan of a single stage given on the command line; references are paths relative to `folder`."""
    file = folder / "command line"
    where = Flags(file, {}, ((),))
    inputs: dict[str, list[Source]] = {}
    for field, references in stage.references().items():
        inputs[field] = []
        for reference in references:
            takes = stage.accepts()[field]
            found = reference if _at_hub(reference, takes) else on_command_line(reference, takes, folder)
            if isinstance(found, SuiteError):
                raise SuiteError(found.message, where=where((field,)), hint=found.hint)
            inputs[field].append(found)
    node = Node(name, _pinned(stage, ""), inputs, (), (), where)
    node = replace(node, environment=_environment(node, {}))
    nodes = {**_downloads([node]), **{n.name: n for n in with_followers(node)}}
    for each in nodes.values():
        _check_edges(each, nodes)
    plan = Plan(name, None, "", nodes)
    check_inputs(plan)
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
