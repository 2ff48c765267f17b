"""`matrix`: one table becomes a stage for each combination of its axes; `@name[*]` opens one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from suite.config import Where
from suite.errors import SuiteError

REFERENCE = re.compile(r"@(?P<base>[A-Za-z][\w-]*)(?P<cell>\[.*\])?")


@dataclass(frozen=True)
class Cell:
    """One combination of a matrix: its settings, and its label such as `[gptq,4]` (empty without a matrix)."""

    values: dict[str, Any]
    label: str


@dataclass(frozen=True)
class Tables:
    """The `[stage.*]` tables of one file."""

    stages: Mapping[str, Mapping[str, Any]]
    where: Where

    def use(self, base: str) -> str:
        """The kind of a table: its `use`, or its own name."""
        return str(self.stages[base].get("use", base))

    def cells(self, base: str, opening: tuple[str, ...] = ()) -> list[Cell]:
        """All combinations of a table's matrix without those in `skip`; one empty cell where there is no matrix."""
        place = self.where(("stage", base))
        if base in opening:
            chain = " -> ".join((*opening, base))
            raise SuiteError(
                f"matrices depend on each other: {chain}", where=place, hint="name the stages instead of [*]"
            )
        table = self.stages[base]
        axes: dict[str, list[Any]] = {}
        for name, values in flattened(table.get("matrix", {})).items():
            at = self.where(("stage", base, "matrix", *name.split(".")))
            if not isinstance(values, list) or not values:
                raise SuiteError(
                    f"matrix.{name} must be a list of values", where=at, hint=f'e.g. matrix.{name} = ["a", "b"]'
                )
            if nested(table, name) is not None:
                raise SuiteError(f"'{name}' is set twice: in the table and in its matrix", where=at, hint="remove one")
            axes[name] = [v for value in values for v in self._opened(value, at, (*opening, base))]
        if not axes:
            return [Cell({}, "")]
        skip = [flattened(s) for s in table.get("skip", [])]
        combinations = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
        cells = [c for c in combinations if not any(s.items() <= c.items() for s in skip)]
        labels = [f"[{','.join(_label(v) for v in c.values())}]" for c in cells]
        double = next((x for x in labels if labels.count(x) > 1), None)
        if double:
            raise SuiteError(
                f"two cells of the matrix are both called {base}{double}", where=place, hint="rename one value"
            )
        return [Cell(unflattened(c), label) for c, label in zip(cells, labels, strict=True)]

    def _opened(self, value: Any, place: str, opening: tuple[str, ...]) -> list[Any]:
        if isinstance(value, str) and value.startswith("@") and value.endswith("[*]"):
            return self.expand(value, place, opening=opening)
        return [value]

    def expand(
        self, reference: str, place: str, *, only_stages: bool = False, opening: tuple[str, ...] = ()
    ) -> list[str]:
        """`@name[*]` as one reference a cell; others as they are, once they can be read."""
        if not isinstance(reference, str) or not reference.startswith("@"):
            if only_stages:
                raise SuiteError(
                    f"expected a reference to a stage, got {reference!r}", where=place, hint="write '@name'"
                )
            return [reference]
        match = REFERENCE.fullmatch(reference)
        if not match:
            raise SuiteError(
                f"cannot read the reference '{reference}'", where=place, hint="write '@name' or '@name[cell]'"
            )
        base, cell = match["base"], match["cell"]
        if base not in self.stages:
            return [reference]  # reported with its field, where the names of all stages are known
        cells = self.cells(base, opening)
        if cell == "[*]":
            return [f"@{base}{c.label}" for c in cells]
        if cell is None and cells and cells[0].label:
            these = ", ".join(f"@{base}{c.label}" for c in cells)
            raise SuiteError(
                f"'@{base}' has a matrix", where=place, hint=f"take all with '@{base}[*]', or one of {these}"
            )
        return [reference]


def _label(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text[1:] if text.startswith("@") else PurePath(text).name or text


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, table by table."""
    both = {
        k: merged(under[k], v) if isinstance(v, Mapping) and isinstance(under.get(k), Mapping) else v
        for k, v in over.items()
    }
    return {**under, **both}


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"lora": {"rank": 8}}` as `{"lora.rank": 8}`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def unflattened(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flattened`."""
    table: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = table
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return table


def nested(table: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name, or None."""
    node: Any = table
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
