"""One model behind the relay: its engine's processes, the adapters they have, and the names that requests may use.

adapters come and go:   an engine that takes them while it runs is told, on every replica
                        another is drained and started again, one replica after the other, while requests wait
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote

import aiohttp

from serve.engines.causes import brief
from serve.engines.kind import Kind
from serve.engines.process import EngineProcess, Launch, Patience, Unanswered
from serve.engines.translation import Translation
from serve.engines.upstream import Upstream
from serve.engines.watch import complaint, until_unwell
from serve.folders import check_fits, read_adapter, read_model
from serve.offers import offers
from serve.replicas import Replica
from serve.settings import Settings
from suite.envs import Environment
from suite.errors import SuiteError

CALM = Patience()
ANSWER_SECONDS = 5.0
LOAD_SECONDS = 300.0


@dataclass(frozen=True)
class Ask:
    """How the probe and the fleet speak to one replica."""

    session: aiohttp.ClientSession
    url: str
    translation: Translation

    async def post(self, path: str, body: Mapping[str, Any], seconds: float = LOAD_SECONDS) -> tuple[int, Any]:
        """Status and answer: JSON where it is some, else text. Raises Unanswered where there is none."""
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self.session.post(self.url + path, json=body, timeout=timeout) as answer:
                is_json = answer.content_type == "application/json"
                return answer.status, await (answer.json() if is_json else answer.text())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unanswered(f"the engine does not answer {path}: {type(error).__name__} {error}") from None


@dataclass(frozen=True)
class Loaded:
    """An adapter that the engine has, under its name `inside` there."""

    inside: str
    folder: Path


class Probe(Protocol):
    """Sees to it that the engine answers as it should."""

    async def prepare(self, adapters: Mapping[str, Path]) -> None:
        """Find out what the right answers are, while the engine does not run yet and all memory is free."""

    async def __call__(self, ask: Ask, adapters: Mapping[str, Loaded]) -> None:
        """Ask a replica about the base and these adapters; raises SuiteError with the evidence where it is wrong."""


log = logging.getLogger("serve")


class Fleet(Upstream):
    """Replicas of one engine with the same model and adapters.

    `probe` is asked about each replica each time that it was started, and about adapters that are added later. The
    replicas are counted from `first` among all on this machine, so that each has GPUs of its own.
    """

    def __init__(
        self,
        kind: Kind,
        settings: Settings,
        environment: Environment,
        logs: Path,
        *,
        probe: Probe | None = None,
        patience: Patience = CALM,
        first: int = 0,
    ) -> None:
        members = [Replica(f"{settings.name}-{i}") for i in range(settings.replicas)]
        # clients may lose their patience sooner
        super().__init__(settings, kind.translation(settings), secrets.token_urlsafe(24), members, patience.start)
        self.kind, self.environment = kind, environment
        # one that cannot take them later has those that are offered from the start
        offered = {} if kind.loads_adapters else offers(settings.lora_dir, settings.adapters)
        folders = {**settings.adapters, **offered}
        self.adapters = {name: Loaded(self.translation.inside(name), folder) for name, folder in folders.items()}
        """By the names that requests use."""
        self._probe, self._patience, self._first = probe, patience, first
        self._serving = False
        """Whether it has started: from then on a failure is for the log."""
        self._versions = 0
        self._changing = asyncio.Lock()
        self.processes = [
            EngineProcess(
                partial(self._launch, i),
                self._answers,
                logs / f"{quote(replica.name, safe='')}.log",
                admit=self._admit,
                watch=partial(self._until_unwell, replica),
                changed=partial(self._changed, i),
                patience=patience,
            )
            for i, replica in enumerate(self.replicas.members)
        ]
        self._taken = [0] * settings.replicas
        """Adapters that each process was given in its life."""

    async def start(self) -> None:
        """Start all replicas; returns when the first one is ready.

        Raises SuiteError when one cannot start or fails the probe.
        """
        if self._probe:
            await self._probe.prepare({name: loaded.folder for name, loaded in self.adapters.items()})
        for process in self.processes:
            process.start()
        await self.replicas.until(lambda: any(m.ready or m.failed for m in self.replicas.members))
        if errors := [process.error for process in self.processes if process.error]:
            await self.stop()
            raise errors[0]
        self._serving = True

    async def stop(self) -> None:
        """End all processes; logs that say nothing of a failure go with them."""
        failed = any(process.error for process in self.processes)
        await asyncio.gather(*(process.stop() for process in self.processes))
        for file in () if failed else (process.log for process in self.processes):
            file.unlink(missing_ok=True)
        await super().stop()

    def inside(self, adapter: str) -> str:
        """The engine's own name for an adapter, "" being the base."""
        return self.adapters[adapter].inside if adapter else self.settings.name

    async def dies(self, replica: Replica, life: int) -> bool:
        """It is asked itself: one that has lost a process of its own takes seconds to see it, and to end."""

        def over() -> bool:
            return replica.life != life or not replica.ready or bool(replica.unwell)

        if over():
            return True
        status = await self._status(f"{replica.url}/health")
        if not over() and replica.believed and (said := complaint(status)):
            replica.unwell = said
            self.replicas.changed()
        return status >= 500 and await self.replicas.until(over, self._patience.end)

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Add an adapter, or replace the one of that name: requests under way end with what they began with.

        Raises SuiteError where it cannot be, and nothing has changed then.
        """
        check_fits(read_adapter(folder), read_model(self.settings.model), inner=False)
        async with self._changing:
            if name in self.adapters and self.adapters[name].folder == folder and not self.kind.loads_adapters:
                return
            # under a new name inside: what the engine cached for the old one is not taken for the new one's
            self._versions += 1
            inside = (
                f"{name}@{self._versions}"
                if self.kind.loads_adapters and name in self.adapters
                else self.translation.inside(name)
            )
            await self._change({**self.adapters, name: Loaded(inside, folder)}, name)

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away; raises SuiteError where there is none of that name."""
        async with self._changing:
            if name not in self.adapters:
                raise SuiteError(f"there is no adapter '{name}'")
            await self._change({k: v for k, v in self.adapters.items() if k != name}, name)

    async def _change(self, adapters: dict[str, Loaded], name: str) -> None:
        before = self.adapters
        old, new = before.get(name), adapters.get(name)
        if new is None or not self.kind.loads_adapters:
            self.adapters = adapters  # nobody finds a name that is about to go
        lives: dict[int, int] = {}
        try:
            for index, replica in enumerate(self.replicas.members):
                # one that starts at the moment has the adapters of before
                await self._settled(replica)
                if not self.kind.loads_adapters or (new and self._full(index)):
                    self.adapters = adapters
                    await self._restart(index)
                elif new:
                    await self._tell(replica, "load", new)
                    self._taken[index] += 1
                    if self._probe and replica.ready:
                        await self._probe(self._ask(replica.url), {name: new})
                lives[index] = replica.life
        except Exception:
            self.adapters = before
            await self._undo(new)
            raise
        self.adapters = adapters
        for index, replica in enumerate(self.replicas.members):
            if replica.life != lives[index]:  # it died meanwhile
                await self._restart(index)
            elif old and self.kind.loads_adapters:
                await self._tell(replica, "unload", old)

    def _full(self, index: int) -> bool:
        room = self.kind.room(self.settings)
        return room is not None and self._taken[index] >= room

    async def _undo(self, new: Loaded | None) -> None:
        for index, replica in enumerate(self.replicas.members):
            with contextlib.suppress(SuiteError):
                if not self.kind.loads_adapters or replica.failed:
                    await self._restart(index)
                elif new:
                    await self._tell(replica, "unload", new)

    async def _tell(self, replica: Replica, what: Literal["load", "unload"], adapter: Loaded) -> None:
        if not replica.ready:
            return
        body = {"lora_name": adapter.inside, **({"lora_path": str(adapter.folder)} if what == "load" else {})}
        status, said = await self._ask(replica.url).post(f"/v1/{what}_lora_adapter", body)
        if status >= 400:
            message = said["error"]["message"] if isinstance(said, dict) and "error" in said else said
            raise SuiteError(f"{self.kind.name} does not {what} '{adapter.inside}': {message}")

    async def _restart(self, index: int) -> None:
        """Let what is under way end, and start with the adapters of now; other replicas answer meanwhile."""
        process, replica = self.processes[index], self.replicas.members[index]
        replica.ready = False
        await self.replicas.until(lambda: not replica.running)
        await process.stop()
        process.start()
        await self._settled(replica)
        if process.error:
            raise process.error

    async def _settled(self, replica: Replica) -> None:
        await self.replicas.until(lambda: replica.ready or bool(replica.failed))

    # processes

    def _ask(self, url: str) -> Ask:
        return Ask(self.session, url, self.translation)

    def _with(self, adapters: dict[str, Path]) -> Settings:
        return self.settings.model_copy(update={"adapters": adapters})

    def _launch(self, index: int, port: int) -> Launch:
        self._taken[index] = len(self.adapters)
        inside = {loaded.inside: loaded.folder for loaded in self.adapters.values()}
        return self.kind.launch(self._with(inside), self.environment, port, self.key, self._first + index)

    async def _answers(self, url: str) -> bool:
        return await self._status(f"{url}/v1/models") == 200

    async def _until_unwell(self, replica: Replica) -> str:
        health = partial(self._status, f"{replica.url}/health")
        return await until_unwell(health, replica, self._patience, self.replicas.changed)

    async def _status(self, url: str, seconds: float = ANSWER_SECONDS) -> float:
        """Of the answer there; infinite where there is none in time."""
        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with self.session.get(url, timeout=timeout) as answer:
                return answer.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return math.inf

    async def _admit(self, url: str) -> None:
        """The probe must have nothing against one that has just come up."""
        if self._probe:
            await self._probe(self._ask(url), self.adapters)

    def _changed(self, index: int) -> None:
        process, replica = self.processes[index], self.replicas.members[index]
        if process.state == "starting" and replica.ready:
            self.deaths += 1
            self.last_death = f"{replica.name} {process.ended}, and was started again", time.time()
            log.warning("%s %s, and is started again; its log: %s", replica.name, process.ended, process.log)
        if process.state == "failed" and self._serving:
            log.error("%s: %s", replica.name, process.error)
        replica.url, replica.life = process.url, process.starts
        replica.ready, replica.unwell, replica.believed = process.state == "ready", "", False
        replica.failed = brief(process.error) if process.error else ""
        self.replicas.changed()
