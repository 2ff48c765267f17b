"""Names that stand for other models: each request takes one of them by its share."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Iterator, Mapping

Weights = dict[str, float]
"""Models with what they weigh against each other; they need not sum to 1."""

HISTORY = 32
"""Splits of one alias that can be gone back to."""


def pick(weights: Mapping[str, float], by: str) -> str:
    """The target for everything that is asked `by` the same name, each target with its share of all names.

    Weighted rendezvous hashing: -w / ln(h) is highest for a target with probability w / sum(w), where h in (0, 1) is a
    hash of name and target. When weights change, no one moves between two targets whose own did not (Schindelhauer and
    Schomaker, "Weighted distributed hash tables", 2005).
    """

    def score(target: str) -> float:
        digest = hashlib.sha256(f"{target}\0{by}".encode("utf-8", "surrogatepass")).digest()
        h = (int.from_bytes(digest[:8]) + 0.5) / 2**64
        return -weights[target] / math.log(h) if h < 1 else math.inf

    return max((target for target in weights if weights[target] > 0), key=score)


class Aliases:
    """All aliases, each with the splits that it had before. Used by one thread."""

    def __init__(self, aliases: Mapping[str, Mapping[str, float]]) -> None:
        self._splits: dict[str, list[Weights]] = {name: [dict(weights)] for name, weights in aliases.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._splits

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def pick(self, name: str, user: str = "") -> str:
        """A target for one request; requests of one `user` stay with theirs."""
        return pick(self._splits[name][-1], user or uuid.uuid4().hex)

    def shares(self, name: str) -> Weights:
        """Its targets with their shares, which sum to 1; KeyError for an unknown one."""
        weights = self._splits[name][-1]
        total = sum(weights.values())
        return {target: weight / total for target, weight in weights.items()}

    def of(self, model: str) -> list[str]:
        """The aliases that stand for a model now."""
        return [name for name, splits in self._splits.items() if model in splits[-1]]

    def put(self, name: str, weights: Weights) -> None:
        """Make an alias, or give it another split."""
        splits = self._splits.setdefault(name, [])
        splits.append(weights)
        del splits[:-HISTORY]

    def before(self, name: str) -> Weights | None:
        """The split that `rollback` returns to; KeyError for an unknown one."""
        splits = self._splits[name]
        return splits[-2] if len(splits) > 1 else None

    def rollback(self, name: str) -> None:
        """Return to the split before; KeyError for an unknown one, IndexError where there is none before."""
        splits = self._splits[name]
        if len(splits) == 1:
            raise IndexError(name)
        splits.pop()

    def remove(self, name: str) -> None:
        """Forget it; KeyError for an unknown one."""
        del self._splits[name]
