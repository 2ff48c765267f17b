"""Where a setting came from: a line of the pipeline file, an override, or a flag; so that errors can say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite import toml
from suite.config import Where


@dataclass
class Lines(Where):
    """Places of key paths in one stage's table; settings that it inherits are found in `[defaults.<kind>]`."""

    file: Path
    lines: Mapping[toml.KeyPath, int]
    tables: tuple[toml.KeyPath, ...]

    def __call__(self, path: tuple[str | int, ...]) -> str:
        own = self.tables[0]
        inner = [(*table, *path[:n]) for n in range(len(path), 0, -1) for table in self.tables]
        outer = [own[:n] for n in range(len(own), 0, -1)]
        line = next((self.lines[key] for key in (*inner, *outer) if key in self.lines), None)
        if line is None:
            return str(self.file)
        return f"{self.file}:{line}" if isinstance(line, int) else str(line)


class Flags(Lines):
    """Places of settings that came from the command line: their flags."""

    def __call__(self, path: tuple[str | int, ...]) -> str:
        return "--" + ".".join(str(p) for p in path if isinstance(p, str)).replace("_", "-") if path else ""


def cell_places(where: Lines, table: Mapping[str, Any]) -> Where:
    """Places for a stage's settings, of which some are axes of its matrix."""
    axes = table.get("matrix", {})

    class Cells(Where):
        def __call__(self, path: tuple[str | int, ...]) -> str:
            return where(("matrix", *path) if path and path[0] in axes else path)

    return Cells()
