"""Generations as asyncio sees them: awaited or streamed, and cancelled when nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from serve.errors import ApiError, unreadable
from serve.generation import EngineEnded, Generation, Request, Stats, UnknownAdapter
from serve.text import TextStream
from suite.errors import SuiteError


class Engine(Protocol):
    """What the gateway needs of an engine."""

    max_length: int

    def submit(self, request: Request) -> Generation:
        """Queue a request; raises SuiteError: EngineEnded, UnknownAdapter, or for one that can never run."""

    def cancel(self, generation: Generation) -> None:
        """End a generation; its row is free before the next step."""

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""

    @property
    def load(self) -> tuple[int, int]:
        """How many generations run, and how many wait."""

    def stats(self) -> Stats:
        """What it does at the moment, and did since its start."""

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make an adapter known by its headers, or replace the one of that name; raises SuiteError."""

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run with it end with it."""

    def close(self) -> None:
        """Cancel everything and end."""


@dataclass(eq=False)
class Answer:
    """One generation with its text."""

    generation: Generation
    text: TextStream
    ended: bool = False
    _read: int = 0

    @property
    def tokens(self) -> list[int]:
        """The new tokens, without the stop token that ended them."""
        new, request = self.generation.new, self.generation.request
        return new[:-1] if self.generation.finish == "stop" and new[-1] in request.stop_ids else new

    def read(self) -> None:
        """Take into the text what came since the last time; where there are stop strings, the engine's thread does."""
        if not self.text.stops:
            request = self.generation.request
            came = self.generation.tokens[len(request.prompt) + self._read :]
            self._read += len(came)
            self.text.extend(token for token in came if token not in request.stop_ids)

    def end(self) -> None:
        """Complete the text; raises ApiError when there is none: the engine gave up, or its adapter is lost."""
        if self.generation.unreadable:
            raise unreadable(self.generation.request.adapter, self.generation.error)
        if self.generation.finish == "error":
            raise ApiError(500, f"the engine failed: {self.generation.error}", kind="server_error")
        if self.generation.finish == "timeout":
            raise ApiError(504, "the answer took longer than this server's limit", kind="server_error", code="timeout")
        if self.generation.finish == "cancelled":
            raise ApiError(503, "the server is shutting down", kind="server_error")
        self.read()
        self.text.finish()
        self.ended = True


class Group:
    """The answers to one HTTP request."""

    def __init__(self, answers: list[Answer], cancel: Callable[[], None]) -> None:
        self.answers = answers
        self.cancel = cancel
        self.wake = asyncio.Event()

    async def changes(self) -> AsyncIterator[tuple[int, Answer]]:
        """The index of an answer and the answer each time it has new text or has ended, until all have ended."""
        while not all(answer.ended for answer in self.answers):
            await self.wake.wait()
            self.wake.clear()
            for index, answer in enumerate(self.answers):
                if not answer.ended:
                    if answer.generation.finish:
                        answer.end()
                    else:
                        answer.read()
                    yield index, answer

    async def wait(self) -> list[Answer]:
        """All answers, ended."""
        async for _ in self.changes():
            pass
        return self.answers


class Bridge:
    """Joins an engine's thread and an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._groups: dict[Generation, tuple[Group, bool]] = {}

    def notify(self, generations: list[Generation]) -> None:
        """Called in the engine's thread after each step; makes one call into the loop for all of them."""
        changed = [g for g in generations if g.finish or self._groups.get(g, (None, False))[1]]
        if changed:
            self._loop.call_soon_threadsafe(self._wake, changed)

    @contextlib.contextmanager
    def open(self, engine: Engine, requests: list[tuple[Request, TextStream]], stream: bool) -> Iterator[Group]:
        """Submit requests; what still runs at the end of the block is cancelled.

        Raises ApiError: 503 where the engine has ended, 404 for an adapter that is gone, 400 for what can never run.
        """
        answers: list[Answer] = []

        def cancel() -> None:
            for answer in answers:
                if answer.generation.finish is None:
                    engine.cancel(answer.generation)

        group = Group(answers, cancel)
        try:
            for request, text in requests:
                generation = engine.submit(replace(request, stop=text.push if text.stops else None))
                answers.append(Answer(generation, text))
                self._groups[generation] = (group, stream)
            yield group
        except EngineEnded as error:
            raise ApiError(503, error.message, kind="server_error") from None
        except UnknownAdapter as error:
            raise ApiError(404, error.message, param="model", code="model_not_found") from None
        except SuiteError as error:
            raise ApiError(400, error.message, param=error.where or "prompt") from None
        finally:
            cancel()
            for answer in answers:
                del self._groups[answer.generation]

    def _wake(self, changed: list[Generation]) -> None:
        for generation in changed:
            if found := self._groups.get(generation):
                found[0].wake.set()
