"""A report of one evaluation: report.json for machines, report.md, report.html and junit.xml for people and CI."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evalsets import leakage
from suite import junit
from suite.document import Document, Heading, Mono, Table, html, markdown, one_line, terminal

REPORT = "report.json"
MEASURED = "metrics.json"
"""Beside the report of an endpoint: what the record of a stage holds, speed too."""
SHOWN = 10
"""Problems listed of each set; the answers have them all."""

COLUMNS = ("set", "score", "95 % interval", "questions", "failed", "unparsed", "truncated", "also")
LABELS = {
    "acc": "accuracy", "rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "bleu": "BLEU", "chrf": "chrF",
    "f1": "F1", "ppl": "perplexity", "exact": "exact match", "macro": "subject average", "step": "step score",
    "name": "right tools", "arguments": "right arguments", "valid": "valid calls", "no_call": "rightly no call",
    "checks": "rules kept",
}  # fmt: skip
PLAIN = ("low", "high", "n", "failed", "truncated", "unparsed", "tokens")
"""Figures that have a column, or say nothing about quality."""

TOO_FEW = "too few for an interval"
"""In place of an interval."""

Sets = Mapping[str, Mapping[str, Any]]


def write(out: Path, model: str, sets: Sets) -> None:
    """Leave the report in all its forms in `out`."""
    whole = {"model": model, "sets": sets}
    (out / REPORT).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")
    shown = document(model, sets)
    (out / "report.md").write_text(markdown(shown), "utf-8")
    (out / "report.html").write_text(html(shown), "utf-8")
    (out / "junit.xml").write_text(junit.xml("eval", list(cases(model, sets))), "utf-8")


def problems(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What a person should look at: failed questions first, then replies without an answer, then truncated ones."""
    failed = [(r, "failed", r["error"]) for r in rows if r["error"]]
    failed += [(r, "failed", f"options: {r['likely_error']}") for r in rows if not r["error"] and "likely_error" in r]
    unparsed = [(r, "unparsed", r["reply"]) for r in rows if not r["error"] and r.get("parsed", "") is None]
    truncated = [(r, "truncated", r["reply"]) for r in rows if r["finish"] == "length"]
    return [
        {"id": r["id"], "what": what, "text": one_line(text)}
        for group in (failed, unparsed, truncated) for r, what, text in group[:SHOWN]
    ]  # fmt: skip


def table(model: str, sets: Sets) -> Any:
    """The figures of an evaluation for a terminal."""
    return terminal(figures(sets), f"Evaluation of {model}")


def figures(sets: Sets) -> Table:
    """One row for each set."""
    return Table(COLUMNS, list(_rows(sets)))


def document(model: str, sets: Sets) -> Document:
    """The whole report for people."""
    shown = Document(f"Evaluation of {model}", [figures(sets)])
    for name, found in sets.items():
        shown.add(Heading(name), f"{found['title']}. Data {Mono(found['digest'])}.")
        shown.add(leakage.said(found, label(found["headline"])))
        if len(found["subsets"]) > 1:
            shown.add(Table(("subset", *COLUMNS[1:]), list(_rows(_as_sets(found)))))
        if categories := found["total"].get("categories"):
            by = [
                (of, number("acc", part["acc"]), between("acc", part), str(part["n"]))
                for of, part in categories.items()
            ]
            shown.add(Table(("category", label("acc"), "95 % interval", "questions"), by))
        if found["problems"]:
            listed = [(p["id"], p["what"], p["text"]) for p in found["problems"]]
            shown.add(Table(("question", "problem", "reply or error"), listed))
    return shown


def cases(suite: str, sets: Sets) -> Iterator[junit.Case]:
    """A test case for each set: it passes when every question was answered; whether the score is enough, gates say."""
    for name, found in sets.items():
        total = found["total"]
        if "not_available" in total and not total.get("failed"):
            yield junit.Case(suite, name, total["not_available"], "skipped")
            continue
        score, interval = next(_rows({name: found}))[1:3]
        sure = interval if interval == TOO_FEW else f"95 % interval {interval}"
        said = f"{score}, {sure}, {total['n']} questions"
        failed = [f"{p['id']}: {p['text']}" for p in found["problems"] if p["what"] == "failed"]
        problem = "\n".join([f"{total['failed']} of {total['n']} questions failed", *failed]) if failed else ""
        yield junit.Case(suite, name, problem, said=said)


def _as_sets(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {"headline": found["headline"], "total": total} for name, total in found["subsets"].items()}


def _rows(sets: Sets) -> Iterator[tuple[str, ...]]:
    for name, found in sets.items():
        total, headline = found["total"], found["headline"]
        if "not_available" in total:
            yield (name, f"{label(headline)}: not available", *["-"] * 5, one_line(total["not_available"]))
            continue
        yield (
            name, f"{label(headline)} {number(headline, total[headline])}",
            between(headline, total),
            str(total["n"]), str(total["failed"]), str(total.get("unparsed", "-")), str(total["truncated"]),
            ";\n".join(_also(total, headline)),
        )  # fmt: skip


def _also(total: Mapping[str, Any], headline: str) -> Iterator[str]:
    """The other figures of a set, with their intervals."""
    sure = total.get("intervals", {})
    metrics = total.get("metrics", {})
    for name, value in {**total, **{f"metrics.{name}": value for name, value in metrics.items()}}.items():
        if isinstance(value, float) and name not in (headline, *PLAIN):
            yield f"{label(name.removeprefix('metrics.'))} {number(name, value)}{_within(name, sure.get(name))}"
    if total.get("ungraded"):
        yield f"{total['ungraded']} not graded"
    if "acc" in (likelihood := total.get("likelihood", {})):
        failed = f" ({likelihood['failed']} failed)" if likelihood["failed"] else ""
        yield f"by likelihood {number('acc', likelihood['acc'])}{_within('acc', likelihood)}{failed}"
    if second := total.get("second"):
        yield f"by our reading {number('acc', second['acc'])}{_within('acc', sure.get('second.acc'))}"


def _within(figure: str, ends: Mapping[str, float] | None) -> str:
    return f" [{number(figure, ends['low'])}, {number(figure, ends['high'])}]" if ends else ""


def between(figure: str, ends: Mapping[str, float | None]) -> str:
    """The interval of a figure as people read it; so few questions as have none are said to be that."""
    if "low" not in ends:
        return TOO_FEW
    return f"{number(figure, ends['low'])} to {number(figure, ends['high'])}"


def label(figure: str) -> str:
    """What people call a figure."""
    return LABELS.get(figure, figure)


def number(headline: str, value: float | None) -> str:
    """A figure as people read it."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if headline in ("acc", "exact") else f"{value:.3f}"
