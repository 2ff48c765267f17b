"""The pool of adapters: nothing in use leaves, nothing leaks, nobody starves, and memory stays below the budget."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.torch.pool import Pool

SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8}
KEYS = st.sampled_from(sorted(SIZES))


class PoolMachine(RuleBasedStateMachine):
    """Requests that come, wait, go on and end in any order, beside a disk that may fail."""

    @initialize(budget=st.integers(8, 20))
    def start(self, budget: int) -> None:
        self.pool: Pool[str, str, int] = Pool(budget, SIZES.__getitem__)
        self.asked: dict[int, str] = {}
        self.running: dict[int, str] = {}
        self.disk: list[str] = []
        self.gone: set[str] = set()

    @rule(key=KEYS)
    def park(self, key: str) -> None:
        number = len(self.asked)
        self.asked[number] = key
        self.gone.discard(key)
        self.pool.park(number, key)

    @rule()
    def admit(self) -> None:
        before = list(self.pool.parked)
        go, load = self.pool.admit(set(self.running.values()))
        assert go == [w for w, _ in before if w in go], "not in order of arrival"
        for waiter in go:
            assert self.asked[waiter] in self.pool.resident
            assert waiter not in self.running
            self.running[waiter] = self.asked[waiter]
        assert not set(load) & set(self.disk), "loaded twice"
        assert not set(load) & set(self.pool.resident)
        self.disk += load

    @precondition(lambda self: self.disk)
    @rule(data=st.data(), works=st.booleans())
    def read(self, data: st.DataObject, works: bool) -> None:
        key = self.disk.pop(data.draw(st.integers(0, len(self.disk) - 1)))
        if works:
            self.pool.loaded(key, key.upper())
        else:
            waiting = [w for w, k in self.pool.parked if k == key]
            assert self.pool.failed(key) == waiting

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        del self.running[data.draw(st.sampled_from(sorted(self.running)))]

    @precondition(lambda self: self.pool.parked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiter, _ = data.draw(st.sampled_from(self.pool.parked))
        assert self.pool.remove(waiter)
        assert not self.pool.remove(waiter)

    @rule(key=KEYS)
    def retire(self, key: str) -> None:
        self.pool.retire(key)
        self.gone.add(key)

    @invariant()
    def holds(self) -> None:
        pool = self.pool
        assert pool.used == sum(SIZES[key] for key in [*pool.resident, *self.disk]) <= pool.budget
        assert set(self.running.values()) <= set(pool.resident), "evicted while in use"
        assert all(value == key.upper() for key, value in pool.resident.items())

    def teardown(self) -> None:
        """Whatever happened, everything goes on once the disk works and those that run end."""
        waiting = [waiter for waiter, _ in self.pool.parked]
        for _ in range(2 * len(waiting) + 2):
            self.admit()
            while self.disk:
                self.pool.loaded(key := self.disk.pop(0), key.upper())
                self.holds()
            self.running.popitem() if self.running else None
        assert self.pool.parked == []
        self.running.clear()
        self.pool.admit(set())
        assert not self.gone & set(self.pool.resident), "unloaded, and still there"
        assert self.pool.idle
        stats = self.pool.stats()
        assert stats.hits + stats.misses == len(self.asked)
        assert stats.resident == len(self.pool.resident)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def served(pool: Pool[str, str, str], in_use: set[str]) -> list[str]:
    """Admit and load until nothing moves."""
    found: list[str] = []
    while True:
        go, load = pool.admit(in_use)
        found += go
        for key in load:
            pool.loaded(key, key)
        if not go and not load:
            return found


def test_the_least_recently_used_leaves() -> None:
    pool: Pool[str, str, str] = Pool(6, SIZES.__getitem__)
    for key in "abcab":
        pool.park(key, key)
        served(pool, set())
    pool.park("d", "d")
    assert served(pool, set()) == ["d"]
    assert list(pool.resident) == ["d"]
    assert pool.stats().hits == 2


def test_nothing_is_evicted_in_vain() -> None:
    pool: Pool[str, str, str] = Pool(8, SIZES.__getitem__)
    for key in "ab":
        pool.park(key, key)
    served(pool, set())
    pool.park("e", "e")
    assert served(pool, {"b"}) == []
    assert set(pool.resident) == {"a", "b"}
    assert served(pool, set()) == ["e"]


def test_who_waits_for_memory_is_not_overtaken_for_ever() -> None:
    pool: Pool[str, str, str] = Pool(8, SIZES.__getitem__)
    pool.park("first", "d")
    served(pool, set())
    pool.park("large", "e")
    pool.park("again", "d")
    assert served(pool, {"d"}) == [], "an adapter in use would keep the large one out"
    assert served(pool, set()) == ["large", "again"]


def test_a_disk_that_is_slow_for_one_holds_up_nobody_else() -> None:
    pool: Pool[str, str, str] = Pool(8, SIZES.__getitem__)
    pool.park("slow", "a")
    assert pool.admit(set()) == ([], ["a"])
    pool.park("other", "b")
    assert pool.admit(set()) == ([], ["b"])
    pool.loaded("b", "b")
    assert pool.admit(set()) == (["other"], [])


def test_a_key_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="8 bytes"):
        Pool(7, SIZES.__getitem__).park("w", "e")
