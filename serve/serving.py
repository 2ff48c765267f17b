"""What all routes share: who answers a request, on which terms, and what is noted of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from starlette.requests import Request as HttpRequest

from serve.admission import Admission
from serve.answers import Bridge, Engine, Group
from serve.catalog import Catalog
from serve.errors import ApiError
from serve.families import Family, Found
from serve.generation import Request, Stats
from serve.grammar import Constraint, Grammars
from serve.preload import libraries
from serve.served import Served, Tokenized
from serve.settings import Settings
from serve.text import TextStream
from serve.traffic import Answered, Exchange, Traffic
from suite.errors import SuiteError

if TYPE_CHECKING:
    from serve.engines.upstream import Upstream


class Cancellable(Protocol):
    """Something that runs."""

    def cancel(self) -> object:
        """End it early."""


class Running(Protocol):
    """What is asked of an engine, wherever it computes."""

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""

    @property
    def load(self) -> tuple[int, int]:
        """How many answers run, and how many wait."""

    def stats(self) -> Stats:
        """What it does at the moment, and did since its start."""


@dataclass
class Serving:
    """A server, starting or running. Its catalog is None until all engines run; else `problem` says why."""

    settings: Settings
    admission: Admission
    named: bool = True
    """Whether anybody may know the names of the models: there are no API keys."""
    traffic: Traffic = field(default_factory=Traffic)
    engine: Engine | None = None
    """The one that computes in this process, if there is one."""
    upstreams: dict[str, Upstream] = field(default_factory=dict)
    """Those that compute elsewhere, by the names of their models."""
    catalog: Catalog | None = None
    bridge: Bridge | None = None
    problem: str = ""
    grammars: Grammars = field(default_factory=Grammars)
    groups: set[Cancellable] = field(default_factory=set)
    """What runs at the moment."""

    async def load(self) -> None:
        """Load tokenizers and models; raises SuiteError."""
        self.bridge = Bridge(asyncio.get_running_loop())
        if self.upstreams:
            families: list[Family] = [upstream.family() for upstream in self.upstreams.values()]
            from serve.engines.remote import start

            await start(self.upstreams)
        else:
            await asyncio.to_thread(libraries, self.settings.model)
            families = [await asyncio.to_thread(Tokenized, self.settings, self._load_adapter, self._unload_adapter)]
            self.engine = await asyncio.to_thread(self.settings.start_engine, self.bridge.notify)
        self.catalog = Catalog(families, self.settings.alias)

    async def close(self) -> None:
        """End the engines."""
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close)
        await asyncio.gather(*(upstream.stop() for upstream in self.upstreams.values()))

    @property
    def engines(self) -> Mapping[str, Running]:
        """By the names of their models; empty while loading."""
        if self.catalog is None:
            return {}
        return {self.settings.name: self.engine} if self.engine is not None else self.upstreams

    @property
    def state(self) -> Literal["loading", "ready", "draining", "failed"]:
        """Where it is between its start and its end; one of several models that failed leaves it ready."""
        engines = self.engines.values()
        if self.problem or (engines and not any(engine.alive for engine in engines)):
            return "failed"
        if self.traffic.until is not None:
            return "draining"
        return "ready" if engines else "loading"

    @property
    def names(self) -> Catalog:
        """The catalog; raises ApiError 503 while loading."""
        if self.catalog is None:
            raise ApiError(503, self.problem or "the model is still loading", kind="server_error", retry_after=1)
        return self.catalog

    def ready(self) -> tuple[Engine, Catalog, Bridge]:
        """For routes of our own engine. Raises ApiError 503 while it cannot answer."""
        catalog = self.names
        assert self.engine is not None
        assert self.bridge is not None
        if not self.engine.alive:
            raise ApiError(503, self.problem or "the engine has ended; /health says why", kind="server_error")
        return self.engine, catalog, self.bridge

    async def find(self, request: HttpRequest, name: str, user: str | None = None) -> Served:
        """The model that answers this request: an alias shares them out, by `user` where the client names one.

        Raises ApiError: 503 while loading, 404 for what does not exist, or not for the request's API key.
        """
        self.ready()
        found = await self._find(request, name, user)
        assert isinstance(found, Served)
        return found

    async def behind(self, request: HttpRequest, name: str, user: str | None = None) -> tuple[Found, Upstream]:
        """As `find`, where engines compute elsewhere: what answers, and the engine behind it."""
        found = await self._find(request, name, user)
        return found, self.upstreams[found.base]

    async def _find(self, request: HttpRequest, name: str, user: str | None) -> Found:
        found = await self.names.find(name, user or "", visible(request))
        exchange = Exchange.of(request)
        exchange.model, exchange.base, exchange.adapter = found.name, found.base, found.adapter
        exchange.alias = name if name != found.name else ""
        return found

    async def constrain(
        self, jobs: Sequence[tuple[Request, TextStream]], constraint: Constraint | None, served: Served
    ) -> list[tuple[Request, TextStream]]:
        """The jobs of one request, bound to its `constraint`; raises ApiError 422 where that cannot be kept to."""
        if constraint is None:
            return [*jobs]
        hidden = frozenset(jobs[0][1].hidden)
        try:
            grammar = await self.grammars.compile(constraint, served.tokenizer, served.stops, hidden)
        except SuiteError as error:
            raise ApiError(422, error.message, param=error.where) from None
        return [(replace(request, grammar=grammar), text) for request, text in jobs]

    @contextlib.contextmanager
    def open(
        self, request: HttpRequest, prompts: Sequence[tuple[Request, TextStream]], stream: bool, samples: int = 1
    ) -> Iterator[Group]:
        """Submit the prompts of one request, `samples` of each in a row, and note how they end.

        Raises ApiError: 429 when too many wait, 400 for a prompt that is too long.
        """
        engine, _, bridge = self.ready()
        self.admission.check(self.settings.name, engine.load[1])
        exchange = Exchange.of(request)
        bounded = [(self._bounded(prompt, exchange.started), text) for prompt, text in prompts]
        with bridge.open(engine, bounded, stream) as group:
            self.groups.add(group)
            try:
                yield group
            finally:
                self.groups.discard(group)
                exchange.answers += [
                    # the prompt of several samples counts once
                    Answered.of(a.generation, len(a.generation.request.prompt) if i % samples == 0 else 0)
                    for i, a in enumerate(group.answers)
                ]

    def _bounded(self, request: Request, since: float) -> Request:
        """The request within the server's limits."""
        limits = self.settings
        if limits.max_prompt is not None and len(request.prompt) > limits.max_prompt:
            said = f"the prompt has {len(request.prompt)} tokens; this server takes {limits.max_prompt}"
            raise ApiError(400, said, param="prompt", code="context_length_exceeded")
        most = request.max_tokens if limits.max_tokens is None else min(request.max_tokens, limits.max_tokens)
        deadline = None if limits.timeout is None else since + limits.timeout
        return replace(request, max_tokens=most, deadline=deadline)

    def administer(self, request: HttpRequest) -> None:
        """Raise ApiError 403 unless the request may change the server.

        That takes an API key with admin rights; where there are no keys, only this machine itself may, and no web page.
        """
        key, origin = Exchange.of(request).key, request.headers.get("origin")
        if key is not None and not key.rights.admin:
            raise ApiError(403, f"this needs an API key with admin = true, and '{key.name}' has not")
        if key is None and not self.settings.local:
            raise ApiError(403, "this needs an API key with admin = true, and this server has none")
        if key is None and origin is not None and origin not in self.settings.cors:
            raise ApiError(403, f"web pages of {origin} may not change this server")

    async def _load_adapter(self, name: str, folder: Path) -> None:
        await asyncio.to_thread(self.ready()[0].load_adapter, name, folder)

    async def _unload_adapter(self, name: str) -> None:
        await asyncio.to_thread(self.ready()[0].unload_adapter, name)

    def cancel(self) -> None:
        """End all that runs: its time is over."""
        for group in self.groups:
            group.cancel()


def visible(request: HttpRequest) -> Callable[[str], bool]:
    """Which names the request's API key may use."""
    key = Exchange.of(request).key
    return key.may_use if key else lambda _: True
