"""Question sets by name, ours and those of other programs."""

from __future__ import annotations

from collections import Counter

from evalsets import sets
from evalsets.external import harness
from evalsets.external.harness import External
from evalsets.sets import EvalSet
from suite.errors import SuiteError

RESERVED = ("speed", "memory")
"""What metrics have beside sets."""


def load(names: list[str], shots: int | None = None) -> list[EvalSet | External]:
    """The sets of these names; raises SuiteError for a name of none, or where two would be reported under one.

    `shots` is for those of ours that have solved examples.
    """
    found = [harness.parse(name) or sets.load(name, shots) for name in names]
    if not found:
        raise SuiteError("no question sets", hint="known: " + ", ".join(sets.names()))
    counts = Counter(asked.name for asked in found)
    for name in (*(n for n, count in counts.items() if count > 1), *(n for n in counts if n in RESERVED)):
        raise SuiteError(f"two sets would be reported as '{name}'", hint="rename the folder of one of them")
    return found
