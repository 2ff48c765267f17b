"""Question sets by name, ours and those of other programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from evalsets import sets
from evalsets.external import harness
from evalsets.external.harness import External
from evalsets.sets import EvalSet, Remote
from suite.errors import SuiteError

RESERVED = ("speed", "memory", "backend")
"""What metrics have beside sets."""


def load(
    names: list[str], shots: int | None = None, fetched: Mapping[str, Path] | None = None
) -> list[EvalSet | External]:
    """The sets of these names; raises SuiteError for a name of none, or where two would be reported under one.

    `shots` is for those of ours that have solved examples; `fetched` are the folders of what lies at hubs, by address.
    """
    found: list[EvalSet | External] = []
    for asked in planned(names, shots, fetched):
        if isinstance(asked, Remote):
            hint = f"suite download --address {asked.address} --out FOLDER, and give that"
            raise SuiteError(f"the data of '{asked.name}' is at a hub", hint=hint)
        found.append(asked)
    return found


def planned(
    names: list[str], shots: int | None = None, fetched: Mapping[str, Path] | None = None
) -> list[EvalSet | External | Remote]:
    """The same, where data at a hub may not be `fetched` yet."""
    found: list[EvalSet | External | Remote] = []
    for name in names:
        asked = harness.parse(name) or sets.find(name, shots)
        folder = (fetched or {}).get(asked.address) if isinstance(asked, Remote) else None
        found.append(asked.at(folder) if isinstance(asked, Remote) and folder else asked)
    if not found:
        raise SuiteError("no question sets", hint="known: " + ", ".join(sets.names()))
    counts = Counter(asked.name for asked in found)
    for name in (*(n for n, count in counts.items() if count > 1), *(n for n in counts if n in RESERVED)):
        raise SuiteError(f"two sets would be reported as '{name}'", hint="rename the folder of one of them")
    return found
