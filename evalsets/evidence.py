"""How sure an evaluation is of its scores, for gates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evalsets.compare import Difference, Report, difference, score
from evalsets.statistics import Interval, bootstrap, mean_interval
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
        name = self._set(path)
        if against is not None:
            return _beside(self._difference(against, name, confidence), confidence)
        kind, rows = self.report.sets[name]["kind"], self.report.answers(name)
        if "not_available" in (total := self.report.sets[name]["total"]):
            raise Unmeasured(f"'{path}' is not available: {total['not_available']}")
        if not rows:
            raise Unmeasured(f"'{name}' has no answers to single questions, so '{path}' has no interval")
        if kind == "perplexity":
            answered = [row for row in rows if not row["error"]]
            found = bootstrap([r["nll"] for r in answered], [r["tokens"] for r in answered], confidence)
            return Bounds(math.exp(found.low), math.exp(found.high), len(answered))
        return Bounds(*mean_interval([score(kind, row) for row in rows], confidence), len(rows))

    def flips(self, against: Evidence, name: str) -> tuple[int, int]:
        names = [name] if name else [n for n, found in self.report.sets.items() if found["kind"] != "perplexity"]
        found = [self._difference(against, n) for n in names]
        return sum(len(d.learnt) for d in found), sum(len(d.forgotten) for d in found)

    def _set(self, path: str) -> str:
        """The set whose deciding figure is at `path`."""
        name, _, figure = path.rpartition(".")
        if name not in self.report.sets:
            raise Unmeasured(f"'{path}' has no interval; with one are: {', '.join(self._deciding())}")
        if self.report.sets[name]["headline"] != figure:
            raise Unmeasured(f"'{path}' has no interval, '{name}.{self.report.sets[name]['headline']}' has one")
        return name

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
            raise Unmeasured(f"no question of '{name}' was answered on both sides")
        return found


def _parity(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {"parity": metrics["parity"]} if "parity" in metrics else {}


def _beside(found: Difference, confidence: float) -> Bounds:
    """This side's value as the paired interval has it, given the other side's on the same questions.

    Perplexity moves by a factor: exp of the difference of the negative log likelihood of a token.
    """
    assert found.change
    change = found.change
    if found.kind != "perplexity":
        return Bounds(change.before + change.low, change.before + change.high, change.n, change.before)
    nll = [[row["nll"] for row in side] for side in zip(*found.pairs, strict=True)]
    tokens = [[row["tokens"] for row in side] for side in zip(*found.pairs, strict=True)]
    if tokens[0] != tokens[1]:
        raise Unmeasured("the two have different tokenizers, whose perplexities cannot be compared")
    moved: Interval = bootstrap([b - a for a, b in zip(*nll, strict=True)], tokens[0], confidence)
    before = math.exp(math.fsum(nll[0]) / sum(tokens[0]))
    return Bounds(before * math.exp(moved.low), before * math.exp(moved.high), change.n, before)
