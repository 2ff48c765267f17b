"""OpenAI endpoints that somebody else runs: looked at now and then, and asked while they answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import aiohttp

from serve.engines.translation import AsIs
from serve.engines.upstream import Upstream
from serve.families import Family, Found
from serve.replicas import Replica
from serve.settings import Settings
from suite.errors import SuiteError

LOOK_SECONDS, AGAIN_SECONDS = 5.0, 0.5
"""From one look whether it answers to the next, and while it does not."""
PATIENCE = 15.0
"""How long a request waits for one that does not answer at the moment."""
ANSWER_SECONDS = 10.0


class Elsewhere(Upstream):
    """The endpoint at the `url` of `settings`, whose models are known by their cards."""

    def __init__(self, settings: Settings) -> None:
        scheme, _, address = settings.url.partition("://")
        if scheme not in ("http", "https") or not address:
            raise SuiteError(f"'{settings.url}' is no address", where="url", hint="e.g. http://127.0.0.1:9000")
        key = os.environ.get(settings.api_key_env, "") if settings.api_key_env else ""
        if settings.api_key_env and not key:
            raise SuiteError(f"{settings.api_key_env} is not set", where="api_key_env")
        self._replica = Replica(settings.name, settings.url.rstrip("/").removesuffix("/v1"))
        super().__init__(settings, AsIs(), key, [self._replica], PATIENCE)
        self.cards: dict[str, dict[str, Any]] = {}
        """Of its models, by the names that it gives them."""
        self._looking: asyncio.Task[None] | None = None
        self._broken = asyncio.Event()

    async def start(self) -> None:
        """Ask which models it has; raises SuiteError when it does not tell."""
        self.cards = await self._look()
        self._answers(True)
        self._looking = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Look no more."""
        if self._looking:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
        await super().stop()

    def family(self) -> Family:
        """Its models."""
        return Relayed(self)

    def inside(self, adapter: str) -> str:
        """Its name for a model, "" being the first one."""
        return adapter or next(iter(self.cards))

    async def broke(self, replica: Replica, life: int) -> None:  # noqa: ARG002
        """Look at once; until it answers, it gets no requests."""
        self._answers(False)
        self._broken.set()

    async def dies(self, replica: Replica, life: int) -> bool:  # noqa: ARG002
        """Nobody here would start it again."""
        return False

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Not for us to do."""
        raise SuiteError(f"'{self.settings.name}' runs elsewhere: load '{name}' there", where=str(folder))

    async def unload_adapter(self, name: str) -> None:
        """Not for us to do."""
        raise SuiteError(f"'{self.settings.name}' runs elsewhere: unload '{name}' there")

    async def _look(self) -> dict[str, dict[str, Any]]:
        url = f"{self._replica.url}/v1/models"
        try:
            async with self.session.get(url, timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as answer:
                said, status = await answer.read(), answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise SuiteError(f"{url} does not answer: {reason}", hint="start that server first") from None
        if status in (401, 403):
            raise SuiteError(f"{url} wants a key", hint="name the variable that holds it: api_key_env")
        try:
            cards = {str(card["id"]): card for card in json.loads(said)["data"]}
        except (ValueError, KeyError, TypeError):
            raise SuiteError(f"{url} is no list of models (status {status})", hint="is it an OpenAI API?") from None
        if not cards:
            raise SuiteError(f"{url} lists no model")
        return cards

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS if self._replica.ready else AGAIN_SECONDS):
                    await self._broken.wait()
            self._broken.clear()
            try:
                self.cards = await self._look()
            except SuiteError:
                self._answers(False)
            else:
                self._answers(True)

    def _answers(self, now: bool) -> None:
        if self._replica.ready != now:
            self.deaths += not now
            self._replica.ready = now
            self.replicas.changed()


class Relayed(Family):
    """The models of an endpoint: the first one has the name that the endpoint has here, and each is `here/there`."""

    def __init__(self, endpoint: Elsewhere) -> None:
        super().__init__(endpoint.settings, endpoint.load_adapter, endpoint.unload_adapter)
        self._endpoint = endpoint

    def __contains__(self, name: str) -> bool:
        return name == self.base or (name.startswith(f"{self.base}/") and self._there(name) in self._endpoint.cards)

    @property
    def names(self) -> list[str]:
        """Where there is but one model, it has one name."""
        cards = self._endpoint.cards
        return [self.base, *(f"{self.base}/{there}" for there in cards if len(cards) > 1)]

    async def find(self, name: str) -> Found:
        """What one of the names stands for; KeyError for another."""
        if name not in self:
            raise KeyError(name)
        return Found(name, self.base, "" if name == self.base else self._there(name))

    def stamps(self, name: str) -> list[Any]:
        """What the endpoint tells of the model."""
        card = self._endpoint.cards[self._endpoint.inside("" if name == self.base else self._there(name))]
        return [self._endpoint.settings.url, {k: v for k, v in card.items() if k != "created"}]

    def _there(self, name: str) -> str:
        return name[len(self.base) + 1 :]
