"""The requests of a load: prompts of one length that no cache knows, and when each is sent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "number", "night", "point", "home", "water", "room", "mother", "area", "money",
    "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue", "side",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What is asked: of which models in turn, how long prompts are in words, and how long answers in tokens.

    `extra` are more fields of each request. The same `seed` gives the same prompts.
    """

    models: Sequence[str]
    words: int
    new_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def bodies(self, count: int, first: int = 0) -> list[dict[str, Any]]:
        """`count` requests from number `first` on; no two of a seed begin alike."""
        models = islice(cycle(self.models), first, first + count)
        return [self._body(model, first + i) for i, model in enumerate(models)]

    def _body(self, model: str, number: int) -> dict[str, Any]:
        draw = random.Random(f"{self.seed} {number}")
        text = " ".join([str(draw.randrange(10**6)), *draw.choices(WORDS, k=max(0, self.words - 1))])
        return {
            "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": self.new_tokens,
            "temperature": 0, **self.extra,
        }  # fmt: skip


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When `count` requests of a Poisson process of `rate` a second come, in seconds from the start.

    Given that so many come in count / rate seconds, their times are independent and uniform in it (Kingman, Poisson
    Processes, 1993, section 2.4): the rate asked for is the rate offered, also where they are few.
    """
    draw = random.Random(seed)
    return sorted(draw.uniform(0, count / rate) for _ in range(count))
