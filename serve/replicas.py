"""Which of several equal servers answers a request: of those that are ready, the one with the fewest under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Replica:
    """One of them. `life` counts its starts."""

    name: str
    url: str = ""
    life: int = 0
    ready: bool = False
    unwell: str = ""
    """What one that is ready says against itself; until it takes that back it gets no requests."""
    believed: bool = False
    """Whether errors of its /health are: it was seen to say anything else there since its start."""
    heard: float = 0.0
    """When something that it computed last came, by `time.monotonic`."""
    failed: str = ""
    """Why it will not be ready again."""
    running: int = 0
    """Requests under way."""
    served: int = 0
    """Requests since the beginning."""


class NoReplica(Exception):
    """None is ready, and none will be, or not soon; the message says why."""


class Replicas:
    """The members and who waits for one. Not thread-safe: all of it lives in one event loop."""

    def __init__(self, members: Sequence[Replica], patience: float) -> None:
        self.members = members
        self.patience = patience
        """Seconds that a request waits while none is ready, but one is being started again."""
        self.waiting = 0
        """Requests that wait for one."""
        self._changes = asyncio.Event()

    @property
    def running(self) -> int:
        """Requests under way, on all of them."""
        return sum(member.running for member in self.members)

    def pick(self, tried: Collection[Replica] = ()) -> Replica | None:
        """The one for the next request, or None while there is none; those that were `tried` come last."""
        able = [member for member in self.members if member.ready and not member.unwell]
        return min(able, key=lambda m: (m in tried, m.running, m.served), default=None)

    def changed(self) -> None:
        """Call after a member was changed: who waits looks again."""
        self._changes.set()
        self._changes = asyncio.Event()

    @contextlib.asynccontextmanager
    async def lease(self, tried: Collection[Replica] = ()) -> AsyncIterator[Replica]:
        """The one for the next request, which counts as under way in the block; waits while none is ready."""
        replica = self.pick(tried) or await self._wait()
        replica.running += 1
        replica.served += 1
        try:
            yield replica
        finally:
            replica.running -= 1
            if not replica.running:
                self.changed()

    async def until(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until something about the members is so; False when it was not after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition():
                    await self._changes.wait()
        return condition()

    async def _wait(self) -> Replica:
        self.waiting += 1
        try:
            await self.until(lambda: self.pick() is not None or self._hopeless(), self.patience)
        finally:
            self.waiting -= 1
        replica = self.pick()
        if replica is None:
            reasons = [member.failed for member in self.members if member.failed]
            raise NoReplica(reasons[0] if self._hopeless() else "no engine was ready in time")
        return replica

    def _hopeless(self) -> bool:
        return all(member.failed for member in self.members)
