"""Requests go to the replica with the fewest under way; who finds none waits, and is told when that is in vain."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.replicas import NoReplica, Replica, Replicas


def ready(count: int) -> Replicas:
    return Replicas([Replica(str(i), ready=True, life=1) for i in range(count)], patience=5)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 4))
def test_no_replica_is_ever_two_requests_behind(ends: list[int], count: int) -> None:
    """Requests that only begin are spread evenly; those that end early make room where they ended."""

    async def scenario() -> None:
        replicas = ready(count)
        held: list[tuple[Any, Replica]] = []
        for end in ends:
            fewest = min(member.running for member in replicas.members)
            lease = replicas.lease()
            replica = await lease.__aenter__()
            assert replica.running == fewest + 1
            held.append((lease, replica))
            if end < len(held) - 1:
                await held.pop(end)[0].__aexit__(None, None, None)
        for lease, _ in held:
            await lease.__aexit__(None, None, None)
        assert replicas.running == 0
        assert sum(member.served for member in replicas.members) == len(ends)

    asyncio.run(scenario())


def test_equally_loaded_ones_take_turns() -> None:
    async def scenario() -> list[str]:
        replicas = ready(3)
        names = []
        for _ in range(6):
            async with replicas.lease() as replica:
                names.append(replica.name)
        return names

    assert asyncio.run(scenario()) == ["0", "1", "2", "0", "1", "2"]


def test_what_was_tried_comes_last() -> None:
    replicas = ready(3)
    first, second, third = replicas.members
    second.running = 5
    assert replicas.pick([first, third]) is second
    second.ready = False
    assert replicas.pick([first]) is third
    third.ready = False
    assert replicas.pick([first]) is first


def test_who_finds_none_waits_for_the_first_that_is_ready() -> None:
    async def scenario() -> None:
        replicas = ready(1)
        (member,) = replicas.members
        member.ready = False
        waiting = asyncio.create_task(replicas.lease([member]).__aenter__())
        await asyncio.sleep(0)
        assert (replicas.waiting, waiting.done()) == (1, False)
        member.ready = True
        replicas.changed()
        assert await waiting is member
        assert replicas.waiting == 0

    asyncio.run(scenario())


def test_waiting_ends_when_all_have_failed_or_time_is_over() -> None:
    async def scenario() -> None:
        replicas = ready(2)
        for member in replicas.members:
            member.ready = False
        replicas.patience = 0.01
        with pytest.raises(NoReplica, match="in time"):
            await replicas.lease().__aenter__()
        replicas.patience = 60
        waiting = asyncio.create_task(replicas.lease().__aenter__())
        await asyncio.sleep(0)
        replicas.members[0].failed = "out of memory"
        replicas.changed()
        await asyncio.sleep(0)
        assert not waiting.done()
        replicas.members[1].failed = "died"
        replicas.changed()
        with pytest.raises(NoReplica, match="out of memory"):
            await waiting

    asyncio.run(scenario())
