"""Engines that compute elsewhere, as the relay sees them: where requests for a model go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from serve.engines.translation import Translation
from serve.families import Family
from serve.generation import Stats
from serve.replicas import Replica, Replicas
from serve.settings import Settings

CONNECT_SECONDS = 10.0
KEEP_SECONDS = 4
"""How long an idle connection is kept: uvicorn, in most engines, closes it after 5."""


class Upstream(ABC):
    """Servers with the same model and adapters, and the connections to them, which carry `key`."""

    def __init__(
        self, settings: Settings, translation: Translation, key: str, members: Sequence[Replica], patience: float
    ) -> None:
        self.settings, self.translation, self.key = settings, translation, key
        self.replicas = Replicas(members, patience)
        self.deaths = 0
        """How often one that was ready has died."""
        self.last_death: tuple[str, float | None] = "", None
        """Which one and how, and when, in seconds since the epoch."""
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """Connections to the servers, which know their key."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_SECONDS),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),  # one client's are no other's
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                read_bufsize=2**20,
            )
        return self._session

    @property
    def alive(self) -> bool:
        """Whether requests can be answered, at once or later."""
        return not all(member.failed for member in self.replicas.members)

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait: in the engines, and for one."""
        most = self.settings.max_batch
        running = sum(min(member.running, most) for member in self.replicas.members)
        return running, self.replicas.running - running + self.replicas.waiting

    def stats(self) -> Stats:
        """What is known of it from outside."""
        running, waiting = self.load
        failed = next((member.failed for member in self.replicas.members if member.failed), "")
        unwell = next((f"{member.name}: {member.unwell}" for member in self.replicas.members if member.unwell), "")
        death, when = self.last_death
        said = failed or unwell or death
        return Stats(running=running, waiting=waiting, failures=self.deaths, last_failure=said, last_failure_time=when)

    def family(self) -> Family:
        """The names that it answers to."""
        return Family(self.settings, self.load_adapter, self.unload_adapter)

    async def broke(self, replica: Replica, life: int) -> None:
        """A connection broke before there was an answer: returns when it is known whether that was its end."""
        await self.dies(replica, life)

    @abstractmethod
    async def dies(self, replica: Replica, life: int) -> bool:
        """Whether one that has answered with an error of its own is at its end, or comes to it now."""

    @abstractmethod
    def inside(self, adapter: str) -> str:
        """Its own name for an adapter, "" being the base."""

    @abstractmethod
    async def start(self) -> None:
        """Returns when requests can be answered. Raises SuiteError when they cannot be."""

    async def stop(self) -> None:
        """End what was started."""
        if self._session:
            await self._session.close()

    @abstractmethod
    async def load_adapter(self, name: str, folder: Path) -> None:
        """Add an adapter, or replace the one of that name; raises SuiteError, and nothing has changed then."""

    @abstractmethod
    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away; raises SuiteError where there is none of that name."""
