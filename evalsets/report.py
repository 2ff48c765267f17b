"""A report as report.json, as Markdown, and as a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

REPORT = "report.json"
SHOWN = 10
"""Problems listed of each set; the answers have them all."""

COLUMNS = ("set", "score", "95 % interval", "questions", "failed", "unparsed", "truncated", "also")
LABELS = {"acc": "accuracy", "rougeL": "ROUGE-L", "ppl": "perplexity", "exact": "exact match"}
ALSO = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "exact": "exact match",
    "macro": "subject average",
}


def write(out: Path, model: str, sets: Mapping[str, Mapping[str, Any]]) -> None:
    """Leave report.json and report.md in `out`."""
    whole = {"model": model, "sets": sets}
    (out / REPORT).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (out / "report.md").write_text(markdown(model, sets), "utf-8")


def problems(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What a person should look at: failed questions first, then replies without an answer, then truncated ones."""
    failed = [(r, "failed", r["error"]) for r in rows if r["error"]]
    unparsed = [(r, "unparsed", r["reply"]) for r in rows if not r["error"] and r.get("parsed", "") is None]
    truncated = [(r, "truncated", r["reply"]) for r in rows if r["finish"] == "length"]
    return [
        {"id": r["id"], "what": what, "text": _excerpt(text)}
        for group in (failed, unparsed, truncated) for r, what, text in group[:SHOWN]
    ]  # fmt: skip


def _excerpt(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= 120 else one_line[:119] + "…"


def table(model: str, sets: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures of an evaluation for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, title=f"Evaluation of {model}", title_justify="left")
    for column in COLUMNS:
        shown.add_column(column, justify="right" if column in COLUMNS[3:7] else "left")
    for cells in _rows(sets):
        shown.add_row(*cells)
    return shown


def markdown(model: str, sets: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole report for people."""
    parts = [f"# Evaluation of {model}\n", _markdown_table(COLUMNS, _rows(sets))]
    for name, found in sets.items():
        parts.append(f"\n## {name}\n\n{found['title']}. Data `{found['digest']}`.\n")
        if len(found["subsets"]) > 1:
            parts.append(_markdown_table(("subset", *COLUMNS[1:]), _rows(_as_sets(found))))
        if found["problems"]:
            listed = [(p["id"], p["what"], p["text"]) for p in found["problems"]]
            parts.append(_markdown_table(("question", "problem", "reply or error"), listed))
    return "\n".join(parts)


def _as_sets(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {"headline": found["headline"], "total": total} for name, total in found["subsets"].items()}


def _rows(sets: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, found in sets.items():
        total, headline = found["total"], found["headline"]
        label = LABELS[headline]
        if "not_available" in total:
            yield (name, f"{label}: not available", *["-"] * 5, _excerpt(total["not_available"]))
            continue
        also = "  ".join(f"{text} {total[key]:.3f}" for key, text in ALSO.items() if key in total and key != headline)
        yield (
            name, f"{label} {_number(headline, total[headline])}",
            f"{_number(headline, total['low'])} to {_number(headline, total['high'])}",
            str(total["n"]), str(total["failed"]), str(total.get("unparsed", "-")), str(total["truncated"]), also,
        )  # fmt: skip


def _number(headline: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if headline in ("acc", "exact") else f"{value:.3f}"


def _markdown_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"
