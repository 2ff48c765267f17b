"""Which adapters are in memory: the least recently used leave, under a budget. A plain algorithm; no torch, no threads.

    park ──> parked ──admit──> goes on             a request whose adapter is resident goes on
               └ its key ──> loading ──> resident  what is missing is read meanwhile, and nobody else waits for it
                                            └────> evicted, when there is need and no request uses it

Requests go on in the order in which they can. Where the first that needs memory cannot have any, as all of it is in
use, nobody behind it goes on either: else adapters that are always in use would starve it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Set
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Waiter = TypeVar("Waiter")


@dataclass(frozen=True)
class PoolStats:
    """What a pool holds, and what it did since its start; `used` and `budget` are bytes."""

    resident: int = 0
    used: int = 0
    budget: int = 0
    hits: int = 0
    """Requests that found their adapter in memory."""
    misses: int = 0
    loads: int = 0
    failures: int = 0
    """Loads that failed."""
    evictions: int = 0


class Pool(Generic[Key, Value, Waiter]):
    """Values by key, of `size(key)` bytes each; those resident and those on their way have at most `budget` bytes."""

    def __init__(self, budget: int, size: Callable[[Key], int]) -> None:
        self.budget = budget
        self.resident: OrderedDict[Key, Value] = OrderedDict()
        """The least recently used first."""
        self.parked: list[tuple[Waiter, Key]] = []
        self.used = 0
        self._size = size
        self._loading: set[Key] = set()
        self._retired: set[Key] = set()
        self._hits = self._misses = self._loads = self._failures = self._evictions = 0

    def park(self, waiter: Waiter, key: Key) -> None:
        """Queue a request behind the others; raises ValueError for a key that can never fit."""
        if self._size(key) > self.budget:
            raise ValueError(f"{self._size(key)} bytes are more than all of the pool's {self.budget}")
        if key in self.resident:
            self._hits += 1
        else:
            self._misses += 1
        self.parked.append((waiter, key))

    def remove(self, waiter: Waiter) -> bool:
        """Forget a parked request; False if it is not parked."""
        before = len(self.parked)
        self.parked = [pair for pair in self.parked if pair[0] is not waiter]
        return len(self.parked) < before

    def retire(self, key: Key) -> None:
        """Nobody will park for `key` any more: it leaves as soon as nobody uses it or waits for it."""
        self._retired.add(key)

    @property
    def idle(self) -> bool:
        """Whether `admit` has nothing to do."""
        return not (self.parked or self._retired)

    def admit(self, in_use: Set[Key]) -> tuple[list[Waiter], list[Key]]:
        """The requests that go on now, and the keys to load; each of these must be followed by `loaded` or `failed`.

        `in_use` are the keys of all requests that went on and have not ended.
        """
        pinned = set(in_use)
        go: list[Waiter] = []
        load: list[Key] = []
        still: list[tuple[Waiter, Key]] = []
        for position, (waiter, key) in enumerate(self.parked):
            if key in self.resident:
                self.resident.move_to_end(key)
                pinned.add(key)
                go.append(waiter)
                continue
            if key not in self._loading:
                if not self._make_room(self._size(key), pinned):
                    still += self.parked[position:]
                    break
                self._loading.add(key)
                self.used += self._size(key)
                load.append(key)
            still.append((waiter, key))
        self.parked = still
        if self._retired:
            for key in self._retired - pinned - {key for _, key in still} - self._loading:
                self._retired.remove(key)
                if key in self.resident:
                    self._drop(key)
        return go, load

    def loaded(self, key: Key, value: Value) -> None:
        """Note that a key is resident now; the next `admit` lets those who wait for it go on."""
        self._loading.remove(key)
        self._loads += 1
        self.resident[key] = value

    def failed(self, key: Key) -> list[Waiter]:
        """Note that a key could not be loaded; returns those who waited for it, forgotten."""
        self._loading.remove(key)
        self._failures += 1
        self.used -= self._size(key)
        waiters = [waiter for waiter, other in self.parked if other == key]
        self.parked = [pair for pair in self.parked if pair[1] != key]
        return waiters

    def stats(self) -> PoolStats:
        """How it is at the moment."""
        return PoolStats(
            len(self.resident),
            self.used,
            self.budget,
            self._hits,
            self._misses,
            self._loads,
            self._failures,
            self._evictions,
        )

    def _make_room(self, size: int, pinned: Set[Key]) -> bool:
        """Evict what is needed, or nothing where that would not do."""
        free = self.budget - self.used
        leaving = []
        for key in self.resident:
            if free >= size:
                break
            if key not in pinned:
                leaving.append(key)
                free += self._size(key)
        if free < size:
            return False
        for key in leaving:
            self._drop(key)
        self._evictions += len(leaving)
        return True

    def _drop(self, key: Key) -> None:
        del self.resident[key]
        self.used -= self._size(key)
