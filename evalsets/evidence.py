"""How sure an evaluation is of its scores, for gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evalsets.compare import Difference, Report, Row, difference
from evalsets.intervals import Moved, interval, moved, part
from evalsets.statistics import Change, Interval, are_shares, bootstrap, few
from suite.evidence import Bounds, Evidence, Unmeasured, size


@dataclass(frozen=True)
class ReportEvidence(Evidence):
    """The evidence of an `eval` stage: its questions, and the size and parity of what was evaluated.

    A question that failed counts as it does in the score: nobody passes a gate by not answering.
    """

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        subject = self.artifact.input("model")
        about = {"bytes": size(subject), **_parity(subject.metrics)} if subject else {}
        return self.artifact.metrics | about

    @cached_property
    def report(self) -> Report:
        return Report.read(self.artifact.path)

    def bounds(self, path: str, confidence: float, against: Evidence | None) -> Bounds:
        name, figure = self._figure(path)
        about = self.report.sets[name]
        if "not_available" in about["total"]:
            raise Unmeasured(f"'{path}' is not available: {about['total']['not_available']}")
        if figure not in (sure := _sure(about)):
            raise Unmeasured(f"'{path}' has no interval; of '{name}' one have: {', '.join(sure)}")
        of = "score" if figure == about["headline"] else figure
        if against is not None:
            found = self._difference(against, name, confidence)
            for side in zip(*found.pairs, strict=True):
                _enough(path, found.kind, of, side, confidence)
            return _beside(found, confidence) if of == "score" else _moved(found, path, of, confidence)
        if not (rows := self.report.answers(name)):
            raise Unmeasured(f"'{name}' has no answers to single questions, so '{path}' has no interval")
        _enough(path, about["kind"], of, rows, confidence)
        if about["kind"] == "perplexity":
            return _perplexity(path, rows, confidence)
        ends = interval(of, rows, confidence)
        if ends is None:
            raise Unmeasured(f"no question of '{name}' has a '{figure}'")
        return Bounds(*ends, sum(part(figure, row) is not None for row in rows) or len(rows))

    def flips(self, against: Evidence, name: str) -> tuple[int, int]:
        names = [name] if name else [n for n, found in self.report.sets.items() if found["kind"] != "perplexity"]
        found = [self._difference(against, n) for n in names]
        return sum(len(d.learnt) for d in found), sum(len(d.forgotten) for d in found)

    def _figure(self, path: str) -> tuple[str, str]:
        """The set, whose name may have dots, and the figure at `path`."""
        names = [name for name in self.report.sets if path.startswith(f"{name}.")]
        if not names:
            raise Unmeasured(f"'{path}' has no interval; with one are: {', '.join(self._deciding())}")
        name = max(names, key=len)
        return name, path.removeprefix(f"{name}.")

    def _deciding(self) -> list[str]:
        return [f"{name}.{found['headline']}" for name, found in self.report.sets.items()]

    def _difference(self, against: Evidence, name: str, confidence: float = 0.95) -> Difference:
        if not isinstance(against, ReportEvidence):
            raise Unmeasured(f"'{against.artifact.name}' is no evaluation")
        for side in (self, against):
            if name not in side.report.sets:
                known = ", ".join(side.report.sets)
                raise Unmeasured(f"'{side.artifact.name}' was not asked '{name}'; it was: {known}")
        found = difference(against.report, self.report, name, confidence, failed=True)
        if not found.change:
            raise Unmeasured(f"'{name}' cannot be compared: {found.remarks[0]}")
        return found


def _sure(about: Mapping[str, Any]) -> list[str]:
    """The figures of a set that have an interval."""
    total = about["total"]
    return [
        about["headline"],
        *total.get("intervals", ()),
        *(["likelihood.acc"] if "acc" in total.get("likelihood", ()) else []),
    ]


def _perplexity(path: str, rows: Sequence[Row], confidence: float) -> Bounds:
    if failed := sum(bool(row["error"]) for row in rows):
        raise Unmeasured(f"'{path}' was not measured: {failed} texts failed")
    ends = bootstrap([r["nll"] for r in rows], [r["tokens"] for r in rows], confidence)
    return Bounds(math.exp(ends.low), math.exp(ends.high), len(rows))


def _enough(path: str, kind: str, figure: str, rows: Sequence[Row], confidence: float) -> None:
    """Raise Unmeasured for so few values of no known scale that they do not tell how much others may differ."""
    values = [found.value for row in rows if (found := part(figure, row))]
    scaled = kind != "perplexity" and (kind != "external" or are_shares(values))
    if few(len(rows), confidence) and not scaled:
        raise Unmeasured(f"'{path}' has no interval: {len(rows)} are too few for one at {100 * confidence:.4g} %")


def _moved(found: Difference, path: str, figure: str, confidence: float) -> Bounds:
    """The same as `_beside` of a figure that does not decide comparisons, over the questions that have it."""
    change = moved(figure, found.pairs, confidence)
    if change is None:
        raise Unmeasured(f"'{path}' has no interval beside another's: it is no mean over the same questions")
    return _around(found, change)


def _parity(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The parity of a model, of a GGUF file what llama.cpp computes."""
    found = metrics.get("parity") or metrics.get("llamacpp", {}).get("parity")
    return {"parity": found} if found else {}


def _beside(found: Difference, confidence: float) -> Bounds:
    """This side's value as the paired interval has it, given the other side's on the same questions.

    Perplexity moves by a factor: exp of the difference of the negative log likelihood of a token.
    """
    assert found.change
    change = found.change
    if found.kind != "perplexity":
        return _around(found, change)
    nll = [[row["nll"] for row in side] for side in zip(*found.pairs, strict=True)]
    tokens = [[row["tokens"] for row in side] for side in zip(*found.pairs, strict=True)]
    if tokens[0] != tokens[1]:
        raise Unmeasured("the two have different tokenizers, whose perplexities cannot be compared")
    moved: Interval = bootstrap([b - a for a, b in zip(*nll, strict=True)], tokens[0], confidence)
    before = math.exp(math.fsum(nll[0]) / sum(tokens[0]))
    low, high = (before * math.exp(end) for end in moved)
    return Bounds(low, high, change.n, before, "; ".join(found.remarks))


def _around(found: Difference, change: Change | Moved) -> Bounds:
    """This side's value where the other's is what it was before the change."""
    low, high = change.before + change.low, change.before + change.high
    if found.kind != "external":  # whose scores are on scales of their own
        low, high = max(0.0, low), min(1.0, high)
    return Bounds(low, high, change.n, change.before, "; ".join(found.remarks))
