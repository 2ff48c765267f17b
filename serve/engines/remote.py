"""Engines of other programs as the gateway sees them: what must be there to start one, and one that runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn

from serve.engines.fleet import Fleet
from serve.engines.kind import Kind, check_extra, flags
from serve.engines.vllm import Vllm
from serve.generation import Generation, Request, Stats
from serve.probe import ParityProbe
from serve.settings import Settings
from suite import envs, store
from suite.envs import Environment
from suite.errors import SuiteError

KINDS: dict[str, Kind] = {"vllm": Vllm()}


def environment(settings: Settings) -> Environment:
    """Where the engine is installed: the suite's own environment, or an interpreter that the user names."""
    python = str(Path(settings.env_python).absolute()) if settings.env_python else ""
    return envs.get(settings.backend, envs.Settings(python=python) if python else None)


def check(settings: Settings) -> None:
    """Raise SuiteError for what can be known to fail before anything is started."""
    kind, where = KINDS[settings.backend], environment(settings)
    where.require()
    if settings.max_prompt is not None:
        hint = "limit prompt and answer together with --max-length"
        raise SuiteError(f"{kind.name} has no limit of the prompt alone", where="max_prompt", hint=hint)
    check_extra(kind, where, flags(settings.extra))


def fleet(settings: Settings) -> Fleet:
    """The engine's replicas, not started yet."""
    logs = store.home() / "engines" / "logs" / str(os.getpid())
    logs.mkdir(parents=True, exist_ok=True)
    kind = KINDS[settings.backend]
    exact = kind.precision(settings) == "float32"
    probe = ParityProbe(settings.model, settings.name, exact=exact) if settings.probe else None
    return Fleet(kind, settings, environment(settings), logs, probe=probe)


async def start(fleet: Fleet) -> RemoteEngine:
    """Start the replicas; returns when one is ready. Raises SuiteError."""
    engine = RemoteEngine(fleet)
    await fleet.start()
    return engine


class RemoteEngine:
    """A started fleet with the face of an engine; requests do not pass through it, they are relayed."""

    max_length = 0

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._loop = asyncio.get_running_loop()

    def submit(self, request: Request) -> NoReturn:
        """Never called."""
        raise NotImplementedError(request)

    def cancel(self, generation: Generation) -> NoReturn:
        """Never called."""
        raise NotImplementedError(generation)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self.fleet.alive

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait: in the engines, and for one."""
        return self.fleet.load

    def stats(self) -> Stats:
        """What is known of it from outside."""
        running, waiting = self.load
        return Stats(running=running, waiting=waiting, failures=self.fleet.deaths)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make an adapter known, or replace the one of that name; raises SuiteError. Called in another thread."""
        self._wait(self.fleet.load_adapter(name, folder))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Called in another thread."""
        self._wait(self.fleet.unload_adapter(name))

    def close(self) -> None:
        """End all processes. Called in another thread."""
        self._wait(self.fleet.stop())

    def _wait(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
