"""TOML with positions: tomllib gives values but no lines, and errors need lines."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from suite.errors import SuiteError

KeyPath = tuple[str | int, ...]


def read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The values of a TOML file, and for each key path the line of its statement; raises SuiteError."""
    try:
        return load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SuiteError(f"no such file: {path}", hint="give the path of a pipeline file (.toml)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"cannot be read: {error}", where=str(path)) from None
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        where = f"{path}:{place[1]}:{place[2]}" if place else f"{path}:{_last_line(path)}"
        text = re.sub(r" \(at .*\)$", "", str(error))
        raise SuiteError(
            f"not valid TOML: {text[0].lower() + text[1:]}", where=where, hint="see https://toml.io"
        ) from None


def _last_line(path: Path) -> int:
    return max(1, len(path.read_text("utf-8").splitlines()))


def load(text: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Parse `text`; also map each key path to the 1-based line of its statement.

    Works statement by statement: lines are gathered until tomllib accepts them, so strings and arrays that span lines
    need no tokenizer of ours. Raises tomllib.TOMLDecodeError.
    """
    data = tomllib.loads(text)
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    rows: dict[KeyPath, int] = {}
    gathered, start = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        if not gathered:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            start = number
        gathered += line + "\n"
        try:
            statement = tomllib.loads(gathered)
        except tomllib.TOMLDecodeError:
            continue
        if gathered.lstrip().startswith("["):
            table = _header(statement, rows)
            for i in range(len(table)):
                lines.setdefault(table[: i + 1], start)
        else:
            _record(statement, table, start, lines)
        gathered = ""
    return data, lines


def _header(node: Any, rows: dict[KeyPath, int]) -> KeyPath:
    """The key path that a `[a.b]` or `[[a.b]]` line opens; `rows` counts the rows of arrays of tables."""
    path: KeyPath = ()
    while node:
        if isinstance(node, list):  # [[a.b]]: a new row
            rows[path] = rows.get(path, -1) + 1
            path, node = (*path, rows[path]), node[0]
        else:
            ((key, node),) = node.items()
            path = (*path, key)
            if path in rows and not isinstance(node, list):  # [a.b] inside the last row of [[a]]
                path = (*path, rows[path])
    return path


def _record(node: Any, path: KeyPath, line: int, lines: dict[KeyPath, int]) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        lines.setdefault((*path, key), line)
        _record(value, (*path, key), line, lines)
