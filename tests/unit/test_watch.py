"""Busy engines are not taken for unwell ones."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace

import pytest

from serve.engines.process import Patience
from serve.engines.watch import until_unwell
from serve.replicas import Replica

HASTY = Patience(look=0.06, again=0.06, unwell=0.05, silent=0.05)
COMPLAINT = "its /health answers 500"


class Enough(Exception):
    """The engine was looked at as often as the test needs."""


def watched(
    statuses: list[float], *, heard: bool = False, late: float = 0.0, patience: Patience = HASTY
) -> tuple[str, list[str]]:
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
        return asyncio.run(until_unwell(health, replica, patience, lambda: said.append(replica.unwell))), said
    except Enough:
        return "", said


@pytest.mark.parametrize(("status", "reason"), [(500, COMPLAINT), (math.inf, "did not answer for")])
def test_what_it_computes_tells_a_busy_engine_from_one_that_is_unwell(status: float, reason: str) -> None:
    assert reason in watched([200, *[status] * 9])[0]
    assert watched([200, *[status] * 9], heard=True) == ("", [])


def test_a_late_word_is_a_word() -> None:
    assert watched([200, 404, 200], late=0.1) == ("", [])


def test_one_that_was_never_seen_to_be_well_says_nothing_by_an_error() -> None:
    assert watched([503] * 5) == ("", [])


def test_what_it_says_against_itself_can_be_taken_back() -> None:
    patient = replace(HASTY, unwell=60)
    assert watched([200, 500, 500, 200], patience=patient) == ("", [COMPLAINT, ""])
