"""What is known of an artifact that a gate may name: metrics, size, and how sure a score is.

Who can say how sure is told by the artifact's type and imported when asked, so that the runner needs no question sets.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from suite.stages import Artifact
from suite.store import tree_files

READERS = {"report": "evalsets.evidence:ReportEvidence"}
"""Where the evidence of a type of artifact lives, if it has more than metrics; imported when used."""


class Unmeasured(Exception):
    """A value that nothing holds, or of which nobody knows how sure it is."""


class Bounds(NamedTuple):
    """Where a value lies with the stated confidence; `beside` is the other's value on the `n` questions of both.

    `remark` is what to know of the two.
    """

    low: float
    high: float
    n: int
    beside: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Evidence:
    """What an artifact's record holds; measured exactly, or at least without an interval."""

    artifact: Artifact

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        """Everything measured, by name, and `bytes` and `seconds`, its size and how long it took to make."""
        found = {"bytes": size(self.artifact)} | self.artifact.metrics
        seconds = self.artifact.record.get("seconds")
        return found if seconds is None else found | {"seconds": seconds}

    def bounds(self, path: str, confidence: float, against: Evidence | None) -> Bounds:  # noqa: ARG002
        """The interval of the value at `path`, beside that of `against` if given; raises Unmeasured."""
        raise Unmeasured(f"'{path}' has no interval: only scores of questions do")

    def flips(self, against: Evidence, name: str) -> tuple[int, int]:  # noqa: ARG002
        """How many questions only this one and only `against` answers right, in the set of that name or in all sets.

        Raises Unmeasured.
        """
        raise Unmeasured("only evaluations have questions that could be compared")


def evidence(artifact: Artifact) -> Evidence:
    """What is known of `artifact`."""
    where = READERS.get(artifact.type)
    if where is None:
        return Evidence(artifact)
    module, _, name = where.partition(":")
    found: Evidence = getattr(importlib.import_module(module), name)(artifact)
    return found


def size(artifact: Artifact) -> int:
    """The bytes of an artifact's files."""
    return int(artifact.record.get("bytes") or sum(p.stat().st_size for p in tree_files(artifact.path)))
