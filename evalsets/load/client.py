"""Sends a load and notes when what of each answer came. Nothing is parsed before an answer is over."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from evalsets.ask import Client, http_error
from evalsets.load.requests import arrivals
from evalsets.load.timing import Timing

Progress = Callable[[Timing], None]
Event = tuple[float, bytes]
Body = dict[str, Any]
OPTIONS = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Load:
    """How requests come: `concurrency` at a time, each sent when another is answered, or at `rate` a second."""

    concurrency: int = 16
    rate: float | None = None
    seed: int = 0


def run(
    client: Client,
    load: Load,
    bodies: Sequence[Body],
    progress: Progress = lambda _: None,
    *,
    warm: Sequence[Body] = (),
) -> list[Timing]:
    """Send all requests; one that fails is a timing with its reason. In the order of `bodies`.

    Those of `warm` are sent before, at once, and are not among the timings.
    """

    async def all_of_them() -> list[Timing]:
        # a closed load opens no more connections than it needs, an open one as many
        async with replace(client, concurrency=0).session() as session:
            await asyncio.gather(*(_one(session, client.root, body, None) for body in warm))
            sending = _Sending(session, client.root, progress)
            return await (sending.at_rate(bodies, load) if load.rate else sending.closed(bodies, load.concurrency))

    return asyncio.run(all_of_them())


@dataclass
class _Sending:
    """What sends requests over connections that are open already."""

    session: aiohttp.ClientSession
    root: str
    progress: Progress

    async def closed(self, bodies: Sequence[Body], concurrency: int) -> list[Timing]:
        """So many at a time."""
        queue = iter(range(len(bodies)))
        timings: dict[int, Timing] = {}

        async def worker() -> None:
            for i in queue:
                timings[i] = await self.one(bodies[i])

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return [timings[i] for i in range(len(bodies))]

    async def at_rate(self, bodies: Sequence[Body], load: Load) -> list[Timing]:
        """At the times of a Poisson process, however many are on their way."""
        assert load.rate is not None
        began = time.perf_counter()
        due = [began + after for after in arrivals(len(bodies), load.rate, load.seed)]
        return list(await asyncio.gather(*map(self.one, bodies, due)))

    async def one(self, body: Body, due: float | None = None) -> Timing:
        if due is not None:
            await asyncio.sleep(due - time.perf_counter())
        timing = await _one(self.session, self.root, body, due)
        self.progress(timing)
        return timing


async def _one(session: aiohttp.ClientSession, root: str, body: Body, due: float | None) -> Timing:
    content = json.dumps(body | OPTIONS).encode()
    sent = time.perf_counter()
    events: list[Event] = []
    error = ""
    try:
        async with session.post(f"{root}/chat/completions", data=content) as response:
            if response.status != 200:
                error = http_error(response.status, await response.read())
            async for line in response.content:
                events.append((time.perf_counter(), line))
    except TimeoutError:
        error = "no answer in time"
    except (aiohttp.ClientError, ValueError) as failure:  # whose own text would have the port
        error = f"no connection ({type(failure).__name__})"
    return read(str(body["model"]), sent if due is None else due, sent, events, error)


def read(model: str, due: float, sent: float, events: Sequence[Event], error: str = "") -> Timing:
    """The timing of an answer's lines of server-sent events, each with the time at which it came.

    Tokens are counted by the endpoint's `usage`, or are as many as chunks with text where it sends none.
    """
    chunks: list[float] = []
    prompt_tokens = new_tokens = 0
    finished = False
    for came, line in events:
        if error or not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        try:
            event = json.loads(line[5:])
            if "error" in event:
                error = http_error(200, line[5:])
            for choice in event.get("choices") or ():
                finished = finished or bool(choice.get("finish_reason"))
                if _says(choice["delta"]):
                    chunks.append(came)
            if usage := event.get("usage"):
                prompt_tokens = int(usage.get("prompt_tokens") or 0)
                new_tokens = int(usage.get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError, AttributeError):
            error = "not a stream of chat completions"
    if not error and not (chunks and finished):
        error = "the answer breaks off" if chunks or not finished else "an empty answer"
    if error:
        return Timing(model, due, sent, error=error)
    return Timing(model, due, sent, tuple(chunks), prompt_tokens, new_tokens or len(chunks))


def _says(delta: dict[str, Any]) -> bool:
    return any(delta.get(field) for field in ("content", "reasoning_content", "reasoning", "tool_calls"))
