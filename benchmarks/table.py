"""Rows of RESULTS.md from what a benchmark prints.

    python benchmarks/serve.py --json | python benchmarks/table.py serve.py

Lines that are no JSON objects (what libraries print) are passed over.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def lines(script: str, printed: Iterable[str]) -> Iterator[str]:
    """One line of Markdown for each figure, with its lowest and highest where a script gives them."""
    for text in printed:
        if not text.startswith("{"):
            continue
        row = json.loads(text)
        if "ratio" not in row:
            print(text, end="", file=sys.stderr)  # why something was not measured
            continue
        met = "yes" if row["met"] else "**no**"
        figures = f"{_figure(row, 'ours')} | {_figure(row, 'theirs')} | {row['unit']} | {row['ratio']} | {row['goal']}"
        yield f"| `{script}` | {row['measure']} | {figures} | {met} |"


def _figure(row: dict[str, Any], side: str) -> str:
    low, high = row.get(f"{side}_spread") or (None, None)
    return str(row[side]) + (f" ({low} to {high})" if low != high else "")


if __name__ == "__main__":
    for line in lines(sys.argv[1], sys.stdin):
        print(line)
