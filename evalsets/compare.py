"""Evaluations of the same questions side by side: what changed, is it real, and which questions did it?"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evalsets.intervals import Moved, moved
from evalsets.report import REPORT
from evalsets.statistics import ROUNDING, Change, holm, paired
from suite.errors import SuiteError

Row = dict[str, Any]
ALPHA = 0.05
AVERAGES = ("macro", "bleu")
"""Figures beside the deciding one of which no question has a part: how they differ takes all questions together."""
LN2 = math.log(2)
NONE_SHARED = "no question was answered on both sides"


@dataclass(frozen=True)
class Report:
    """One evaluation on disk: `sets` as in report.json; the rows of a set are read when asked for.

    Sets may be of other evaluations of the same, whose folders are `elsewhere` by set.
    """

    folder: Path
    model: str
    sets: dict[str, dict[str, Any]]
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Report:
        """The report in a folder; raises SuiteError where there is none."""
        try:
            whole = json.loads((folder / REPORT).read_text("utf-8"))
            return cls(folder, str(whole["model"]), dict(whole["sets"]))
        except (OSError, ValueError, KeyError, TypeError):
            hint = "give the folder that an eval stage made"
            raise SuiteError(f"no evaluation report in {folder}", hint=hint) from None

    def answers(self, name: str) -> list[Row]:
        """The rows of a set in their order; none where the set was not available."""
        path = self.elsewhere.get(name, self.folder) / "answers" / f"{name}.jsonl"
        lines = path.read_text("utf-8").split("\n") if path.is_file() else []
        return [json.loads(line) for line in lines if line]

    def rows(self, name: str) -> dict[str, Row]:
        """The rows of a set by question digest."""
        return {row["digest"]: row for row in self.answers(name)}


@dataclass(frozen=True)
class Difference:
    """One set in two reports, paired by what the questions ask.

    `pairs` are the rows of the questions that both sides answered; `left_out` counts those that failed or are missing
    on a side. `change` is None where nothing can be compared; `remarks` say why, and what else a reader must know.
    `others` are figures of both sides that are no mean over questions.
    """

    kind: str
    pairs: list[tuple[Row, Row]]
    left_out: int
    change: Change | None
    p_corrected: float | None = None
    remarks: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @cached_property
    def averages(self) -> dict[str, Moved]:
        """How the `others` differ on the same questions; nothing is decided by them."""
        found = {name: moved(name, self.pairs) for name in self.others if self.change}
        return {name: change for name, change in found.items() if change}

    @property
    def verdict(self) -> str:
        return self.change.verdict if self.change else "cannot tell"

    @property
    def gained(self) -> list[Row]:
        """The later rows of the questions that did better."""
        return [b for a, b in self.pairs if self.better(a, b)]

    @property
    def lost(self) -> list[Row]:
        """The later rows of the questions that did worse."""
        return [b for a, b in self.pairs if self.better(b, a)]

    @property
    def forgotten(self) -> list[Row]:
        """The later rows of the questions that were right before and are not now; of perplexity none."""
        return [b for a, b in self.pairs if self.kind != "perplexity" and right(a) and not right(b)]

    @property
    def learnt(self) -> list[Row]:
        """The reverse of `forgotten`."""
        return [b for a, b in self.pairs if self.kind != "perplexity" and right(b) and not right(a)]

    def better(self, a: Row, b: Row) -> bool:
        """Whether row b did better than row a."""
        old, new = score(self.kind, a), score(self.kind, b)
        return new < old if self.kind == "perplexity" else new > old

    def subjects(self) -> dict[str, dict[str, int]]:
        """Questions, gains and losses of each subset, those that lost most first."""
        rows = (b for _, b in self.pairs)
        n, up, down = (Counter(str(row["subset"]) for row in some) for some in (rows, self.gained, self.lost))
        worst = sorted(n, key=lambda name: (up[name] - down[name], name))
        return {name: {"n": n[name], "gained": up[name], "lost": down[name]} for name in worst}

    def json(self) -> dict[str, Any]:
        """The fields of `Change`, but lists of ids for what gained, lost, was forgotten or learnt; and by subject."""
        found = asdict(self.change) if self.change else {"verdict": self.verdict, "n": 0}
        for name in ("gained", "lost", "forgotten", "learnt"):
            found[name] = [row["id"] for row in getattr(self, name)]
        about = {"left_out": self.left_out, "p_corrected": self.p_corrected, "remarks": list(self.remarks)}
        averages = {name: change._asdict() for name, change in self.averages.items()}
        return found | {"subjects": self.subjects(), "averages": averages, **about}


def counts(kind: str, row: Row, failed: bool) -> bool:
    """Whether a row can be compared: it has a number, and did not fail, unless those that `failed` count too."""
    return (failed or not row["error"]) and row["nll" if kind == "perplexity" else "score"] is not None


def right(row: Row) -> bool:
    """Whether a question has the whole score."""
    return bool(row["score"] > 1 - ROUNDING)


def score(kind: str, row: Row) -> float:
    """What one question counts: its score, or the bits that a text took."""
    return float(row["nll"] / LN2 if kind == "perplexity" else row["score"])


def difference(before: Report, after: Report, name: str, confidence: float = 0.95, failed: bool = False) -> Difference:
    """How a set differs between two reports; questions that `failed` are left out, or count as they do in the score.

    Perplexity sets compare bits per byte, which different tokenizers share, and only where no text failed: which texts
    are measured decides it. All others compare the score of each question.
    """
    kind = str(after.sets[name]["kind"])
    old, new = before.rows(name), after.rows(name)
    both = [(old[digest], row) for digest, row in new.items() if digest in old]
    pairs = [(a, b) for a, b in both if counts(kind, a, failed) and counts(kind, b, failed)]
    left_out = len(old.keys() | new.keys()) - len(pairs)
    remarks = tuple(_versions(before.sets[name], after.sets[name], len(both), len(old.keys() | new.keys())))
    if why := _incomparable(before.sets[name], after.sets[name], both) or ("" if pairs else NONE_SHARED):
        return Difference(kind, pairs, left_out, None, remarks=(why, *remarks))
    first, second = ([score(kind, pair[side]) for pair in pairs] for side in (0, 1))
    weights = [float(a["bytes"]) for a, _ in pairs] if kind == "perplexity" else None
    change = paired(first, second, weights=weights, lower_is_better=kind == "perplexity", confidence=confidence)
    others = tuple(figure for figure in AVERAGES if all(figure in side.sets[name]["total"] for side in (before, after)))
    return Difference(kind, pairs, left_out, change, remarks=remarks, others=others)


def _incomparable(old: Mapping[str, Any], new: Mapping[str, Any], both: Sequence[tuple[Row, Row]]) -> str:
    """Why the scores of a set in two reports mean different things; empty where they mean the same."""
    for side in (old, new):
        if "not_available" in side["total"]:
            return f"not available: {side['total']['not_available']}"
    if (old["kind"], old["headline"]) != (new["kind"], new["headline"]):
        return f"{old['headline']} and {new['headline']} are different scores"
    failed = sum(bool(row["error"]) for pair in both for row in pair)
    if old["kind"] == "perplexity" and failed:
        return f"not measured: {failed} texts failed"
    return ""


def _versions(old: Mapping[str, Any], new: Mapping[str, Any], shared: int, known: int) -> Iterator[str]:
    """What to know where replies were read otherwise, or a question or a setting of the set was changed."""
    if old.get("scoring") != new.get("scoring"):
        yield "scored by two versions of the suite, which may read replies differently: evaluate both anew"
    if old["digest"] != new["digest"]:
        yield f"two versions of the set ({old['digest']}, {new['digest']}): {shared} of {known} questions are in both"


def differences(before: Path, after: Path) -> dict[str, Difference]:
    """Every set that two reports share; raises SuiteError where a folder is no report."""
    old, new = Report.read(before), Report.read(after)
    return {name: difference(old, new, name) for name in new.sets if name in old.sets}


def compare(before: Path, after: Path) -> dict[str, dict[str, Any]]:
    """`differences` as plain values, by set."""
    return {name: found.json() for name, found in differences(before, after).items()}


def corrected(family: Sequence[Difference], alpha: float = ALPHA) -> list[Difference]:
    """All of them decided as one family: p-values by Holm's method, and the verdicts that follow.

    Where it cannot be told, `needed` plans for the strictest of its tests.
    """
    tested = [found.change for found in family if found.change]
    values = iter(holm([change.p for change in tested]))
    decided = []
    for found in family:
        if found.change:
            p = next(values)
            found = replace(found, p_corrected=p, change=found.change.decided(p, alpha, len(tested)))
        decided.append(found)
    return decided
