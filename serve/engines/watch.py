"""Is an engine that runs busy, or unwell? A busy one is waited for; one that is unwell for long is ended.

What tells the two apart is what comes out of it. However late a busy engine answers /health, or says there that a step
takes long, answers that it computes come meanwhile, token by token; from one that is lost or hangs there come none.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from serve.engines.process import Patience
from serve.replicas import Replica


async def until_unwell(
    health: Callable[[float], Awaitable[float]], replica: Replica, patience: Patience, changed: Callable[[], None]
) -> str:
    """Returns when the replica's engine has to be ended, with the reason; never while it is well.

    `health(seconds)` is the status of its /health, infinite where none came in that time; errors are believed once it
    was seen to say anything else. `replica.unwell` holds meanwhile what it says against itself, from when nothing is
    heard of it until it takes that back; `changed` is called after each change of it.
    """
    well = time.monotonic()

    def quiet() -> float:
        return time.monotonic() - max(well, replica.heard)

    while True:
        status = await health(max(patience.look, patience.silent - quiet()))
        if status < 500:  # one without that route has nothing to say of itself
            well, replica.believed = time.monotonic(), True
        says = complaint(status) if replica.believed else ""
        if says != replica.unwell and (status < 500 or (says and quiet() > patience.look)):
            replica.unwell = says
            changed()
        if says and quiet() > patience.unwell:
            return f"was unwell for {quiet():.0f} s ({says})"
        if status == math.inf and quiet() > patience.silent:
            return f"did not answer for {quiet():.0f} s"
        pause = patience.again if replica.unwell else patience.look
        before = time.monotonic()
        await asyncio.sleep(pause)
        if time.monotonic() - before > pause + patience.look:
            well = time.monotonic()  # this process stood still itself, and what it watches may have too


def complaint(status: float) -> str:
    """What an engine says against itself by that status of its /health; "" where it says nothing, or not a word."""
    return f"its /health answers {status:g}" if 500 <= status < math.inf else ""
