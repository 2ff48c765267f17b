"""Busy engines are not taken for unwell ones."""

from __future__ import annotations

import asyncio
import itertools
import math
import time

import pytest

from serve.engines.process import Patience
from serve.engines.watch import until_unwell
from serve.replicas import Replica

HASTY = Patience(look=0.06, again=0.06, unwell=0.05, silent=0.05)


class Enough(Exception):
    """The engine was looked at as often as the test needs."""


def watched(statuses: list[float], *, heard: bool = False, late: float = 0.0) -> tuple[str, list[str]]:
    """How it ends, and what the replica said of itself meanwhile; `heard` gives a sign of life at each look."""
    replica, said, coming = Replica("a", ready=True), list[str](), iter(statuses)

    async def health(seconds: float) -> float:
        await asyncio.sleep(late)
        status = next(coming, None)
        if status is None:
            raise Enough
        if heard:
            replica.heard = time.monotonic()
        return status

    try:
        return asyncio.run(until_unwell(health, replica, HASTY, lambda: said.append(replica.unwell))), said
    except Enough:
        return "", said


@pytest.mark.parametrize(("status", "reason"), [(503, "its /health answers 503"), (math.inf, "did not answer for")])
def test_what_it_computes_tells_a_busy_engine_from_one_that_is_unwell(status: float, reason: str) -> None:
    assert reason in watched([status] * 9)[0]
    assert not watched([status] * 9, heard=True)[0]


def test_a_late_word_is_a_word() -> None:
    assert watched([200, 404, 200], late=0.1) == ("", [])


def test_what_it_says_against_itself_can_be_taken_back() -> None:
    complaint = "its /health answers 500"
    assert watched([200, *itertools.repeat(500, 2), 200], heard=True) == ("", [complaint, ""])
