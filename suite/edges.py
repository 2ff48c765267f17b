"""Where a stage's inputs come from, whether they fit, and in which order that lets stages run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

from suite.config import ArtifactType, Takes, Where, parse
from suite.errors import SuiteError, near
from suite.places import Lines
from suite.plan import Node, Source
from suite.references import HUBS, external
from suite.stages import Stage, kind


def source_of(reference: str, takes: Takes, path: tuple[str, ...], where: Lines) -> Source:
    """What the setting at `path` of a pipeline file names; raises SuiteError."""
    if reference.startswith("@"):
        return reference[1:]
    if at_hub(reference, takes):
        return reference
    found = external(reference, takes, where.file.parent)
    if isinstance(found, SuiteError):
        raise SuiteError(f"{'.'.join(path)}: {found.message}", where=where(path), hint=found.hint)
    return found


def at_hub(reference: str, takes: Takes) -> bool:
    """Whether a download can stand in its place, as a stage that is named by the address."""
    return reference.startswith(HUBS) and {"model", "quantized", "adapter", "data"} & {*takes.types} != set()


def downloads(nodes: Iterable[Node]) -> dict[str, Node]:
    """The stages that hub addresses among the inputs of `nodes` stand for."""
    found: dict[str, Node] = {}
    for node in nodes:
        for field, sources in node.inputs.items():
            for address in sources:
                if isinstance(address, str) and address.startswith(HUBS) and address not in found:
                    found[address] = download_node(address, node.where((field,)))
    return found


def download_node(address: str, where: str) -> Node:
    """The stage of a plan that a hub address stands for; an error is about the place `where` it stands."""

    class Place(Where):
        def __call__(self, path: tuple[str | int, ...]) -> str:  # noqa: ARG002
            return where

    return Node(address, download(address, where), {}, (), (), Place())


def download(address: str, where: str) -> Stage:
    """The stage that fetches what lies at a hub address; an error is about the place `where` it stands."""
    try:
        return parse(kind("download"), {"address": address}, Where()).pinned()
    except SuiteError as error:
        message = error.message if address in error.message else f"{address}: {error.message}"
        raise SuiteError(message, where=where, hint=error.hint) from None


def pinned(stage: Stage, where: str) -> Stage:
    try:
        return stage.pinned()
    except SuiteError as error:
        raise SuiteError(error.message, where=error.where or where, hint=error.hint) from None


def check_edges(node: Node, nodes: Mapping[str, Node]) -> None:
    """Every reference names a stage, and one that makes what the field takes."""
    for field, sources in node.inputs.items():
        for source in sources:
            if isinstance(source, str):
                check_edge(source, node.stage.accepts()[field], field, node.where((field,)), nodes)
    for name in {*node.needs, *(s for g in node.gates for s in g.stages)}:
        if name not in nodes:
            where = node.where(("needs",) if name in node.needs else ("gate",))
            raise SuiteError(f"no stage '{name}'", where=where, hint=near(name, nodes))


def check_edge(source: str, takes: Takes, field: str, where: str, nodes: Mapping[str, Node]) -> None:
    """That there is a stage `source`, and that it makes what `field` takes; raises SuiteError about `where`."""
    if source not in nodes:
        raise SuiteError(f"no stage '{source}'", where=where, hint=near(source, nodes))
    made = nodes[source].stage.makes()
    if made not in takes.types:
        unmerged = made == "adapter" and "model" in takes.types
        raise SuiteError(
            f"'{field}' takes {either(takes.types)}, but '{at_sign(source)}' makes {article(made)}",
            where=where,
            hint="put a merge stage between them" if unmerged else _makers(takes.types, nodes),
        )


def at_sign(source: str) -> str:
    """A stage as a reference names it: `@stage`, or the address that it downloads."""
    return source if source.startswith(HUBS) else f"@{source}"


def check_targets(nodes: Mapping[str, Node]) -> None:
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
    return f"these fit: {', '.join(fitting)}" if fitting else f"no stage here makes {either(takes)}"


def article(made: str) -> str:
    return {"quantized": "a quantized model", "adapter": "an adapter", "data": "data"}.get(made, f"a {made}")


def either(takes: tuple[ArtifactType, ...]) -> str:
    return " or ".join(article(t) for t in takes)


def ordered(nodes: Mapping[str, Node]) -> dict[str, Node]:
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
