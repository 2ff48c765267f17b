"""How far an artifact may be from the one it came from, by what was done to it; `export.parity.require` enforces it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What `parity.measure` may find at most, and for `top1` and `greedy` at least; `cure` says what to do beyond."""

    kl: float = math.inf
    """Mean KL(parent || child), nats a token."""
    max_dlogit: float = math.inf
    """Largest difference of a logit."""
    top1: float = 0.0
    """Share of positions where both prefer the same next token, or one as good."""
    greedy: float = 0.0
    """Share of greedy answers that are equal up to their end, or up to the first of two tokens that are as good."""
    cure: str = ""
