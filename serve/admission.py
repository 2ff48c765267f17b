"""How many requests may wait, and when the next one may come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from serve.errors import ApiError
from serve.traffic import Exchange

MOST_SECONDS = 60
"""The longest that a client is asked to wait: by then the rate may be another."""
MEMORY_SECONDS = 30.0
"""The present rate is mostly that of about so long."""


class Rate:
    """Events per second at present: an exponentially decaying count, by the time that it has been counting."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._since = self._at = clock()
        self._count = 0.0

    def note(self, events: int = 1) -> None:
        """They happened now."""
        self._decay()
        self._count += events

    @property
    def now(self) -> float:
        """Unbiased from the start: a steady rate is seen as what it is."""
        self._decay()
        seen = MEMORY_SECONDS * -math.expm1(-(self._at - self._since) / MEMORY_SECONDS)
        return self._count / seen if seen else 0.0

    def _decay(self) -> None:
        now = self.clock()
        self._count *= math.exp((self._at - now) / MEMORY_SECONDS)
        self._at = now


class Admission:
    """Refuses requests to one of the `models`, with all its adapters, while `max_queue` wait for it."""

    def __init__(self, max_queue: int, models: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.max_queue = max_queue
        self._ended = {model: Rate(clock) for model in models}

    def check(self, model: str, waiting: int) -> None:
        """Raise ApiError 429 that says when those that wait will be gone."""
        if waiting >= self.max_queue:
            seconds = waiting / rate if (rate := self._ended[model].now) else MOST_SECONDS
            raise ApiError(
                429,
                f"{waiting} requests wait already",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=max(1, min(MOST_SECONDS, math.ceil(seconds))),
            )

    def __call__(self, exchange: Exchange) -> None:
        """A request has ended."""
        if exchange.base:
            self._ended[exchange.base].note(len(exchange.answers))
