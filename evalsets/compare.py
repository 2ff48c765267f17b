"""Two evaluations of the same questions: what changed, and is it real?"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evalsets.report import REPORT
from evalsets.statistics import paired
from suite.errors import SuiteError


def compare(before: Path, after: Path) -> dict[str, dict[str, Any]]:
    """How the report in `after` differs from the one in `before`, by set that both have.

    Each set gives {"verdict", "n", "before", "after", "difference", "low", "high", "p", "gained", "lost", "left_out"}.
    Questions are paired by what they ask; those that failed or are missing on a side are counted in `left_out`. Choice
    sets compare right answers, qa sets the score of each question, perplexity sets bits per byte, which different
    tokenizers share. `gained` and `lost` are the ids that did better and worse. A set without a pair is "cannot tell".
    Raises SuiteError where a folder is no report.
    """
    old, new = _report(before), _report(after)
    return {name: _set(before, after, name, new[name]["kind"]) for name in new if name in old}


def _report(folder: Path) -> dict[str, Any]:
    try:
        sets = json.loads((folder / REPORT).read_text("utf-8"))["sets"]
    except (OSError, ValueError, KeyError):
        raise SuiteError(f"no evaluation report in {folder}", hint="give the folder that an eval stage made") from None
    return dict(sets)


def _answers(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """The rows of a set by question digest; none where the set was not available."""
    path = folder / "answers" / f"{name}.jsonl"
    lines = path.read_text("utf-8").split("\n") if path.is_file() else []
    return {row["digest"]: row for row in map(json.loads, filter(None, lines))}


def _set(before: Path, after: Path, name: str, kind: str) -> dict[str, Any]:
    old, new = _answers(before, name), _answers(after, name)
    pairs = [(old[d], row) for d, row in new.items() if d in old and not row["error"] and not old[d]["error"]]
    left_out = len(old.keys() | new.keys()) - len(pairs)
    if not pairs:
        return {"verdict": "cannot tell", "n": 0, "gained": [], "lost": [], "left_out": left_out}
    if kind == "perplexity":
        scores = [(a["nll"] / math.log(2), b["nll"] / math.log(2)) for a, b in pairs]
        weights = [float(a["bytes"]) for a, _ in pairs]
    else:
        scores, weights = [(a["score"], b["score"]) for a, b in pairs], None
    lower = kind == "perplexity"
    change = paired([a for a, _ in scores], [b for _, b in scores], weights=weights, lower_is_better=lower)
    rose = [row["id"] for (_, row), (a, b) in zip(pairs, scores, strict=True) if b > a]
    fell = [row["id"] for (_, row), (a, b) in zip(pairs, scores, strict=True) if b < a]
    gained, lost = (fell, rose) if lower else (rose, fell)
    return asdict(change) | {"gained": gained, "lost": lost, "left_out": left_out}
