"""Answers as server-sent events, and what happens when their reader goes away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve import forms, shapes
from serve.answers import Group
from serve.errors import ApiError
from serve.generation import Scored
from serve.protocol import Body, ChatBody, CompletionBody
from serve.reply import Reply

Events = AsyncIterator[Mapping[str, Any]]


class EventStream(Response):
    """Sends `lines(group)`. The requests are submitted when it is made, so that their errors are answers."""

    media_type = "text/event-stream"

    def __init__(
        self,
        context: contextlib.AbstractContextManager[Group],
        request: Request,
        lines: Callable[[Group], AsyncIterator[bytes]],
    ) -> None:
        self._request, self._lines = request, lines
        self._stack = contextlib.ExitStack()
        self._group = self._stack.enter_context(context)
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache"})

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        """Send it all, or cancel what still runs."""
        with self._stack:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with cancelled_when_gone(self._request, self._group):
                async for line in self._lines(self._group):
                    await send({"type": "http.response.body", "body": line, "more_body": True})
                await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def cancelled_when_gone(request: Request, group: Group) -> AsyncIterator[None]:
    """Cancel the group's generations as soon as the client disconnects."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def chat_lines(group: Group, body: ChatBody, replies: Sequence[Reply]) -> AsyncIterator[bytes]:
    """A chat completion as server-sent events."""
    return _lines(_chat_events(group, body, replies))


def completion_lines(group: Group, body: CompletionBody, echoes: Sequence[str | None]) -> AsyncIterator[bytes]:
    """A text completion as server-sent events; an echo comes with the first."""
    return _lines(_completion_events(group, body, echoes))


async def _lines(events: Events) -> AsyncIterator[bytes]:
    try:
        async for body in events:
            yield forms.event(body)
    except ApiError as error:  # the status is sent already
        yield forms.event(error.body)
    yield b"data: [DONE]\n\n"


async def _chat_events(group: Group, body: ChatBody, replies: Sequence[Reply]) -> Events:
    head = _head("chatcmpl", "chat.completion.chunk", body)
    for index in range(len(group.answers)):
        choice: shapes.ChunkChoice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        yield {**head, "choices": [choice]}
    told = [0] * len(group.answers)
    async for index, answer in group.changes():
        reply = replies[index]
        delta = forms.chat_delta(reply.feed(answer.text.take(answer.ended), answer.ended), reply)
        if delta or answer.ended:
            scores = answer.generation.scores[told[index] :]
            told[index] += len(scores)
            choice = {
                "index": index,
                "delta": delta,
                "logprobs": forms.chat_logprobs(answer, scores),
                "finish_reason": forms.finish_reason(answer, reply) if answer.ended else None,
            }
            yield {**head, "choices": [choice]}
    for last in _usage(group, body, head):
        yield last


async def _completion_events(group: Group, body: CompletionBody, echoes: Sequence[str | None]) -> Events:
    head = _head("cmpl", "text_completion", body)
    told = [0] * len(group.answers)
    lengths = [0] * len(group.answers)
    async for index, answer in group.changes():
        text = answer.text.take(answer.ended)
        if text or answer.ended:
            scores: list[Scored | None] = [*answer.generation.scores[told[index] :]]
            told[index] += len(scores)
            if (echo := echoes[index]) is not None and not lengths[index]:
                text, scores = echo + text, [None, *answer.generation.prompt_scores, *scores]
            choice: shapes.CompletionChoice = {
                "index": index,
                "text": text,
                "logprobs": forms.completion_logprobs(answer, scores, lengths[index]),
                "finish_reason": forms.finish_reason(answer) if answer.ended else None,
            }
            lengths[index] += len(text)
            yield {**head, "choices": [choice]}
    for last in _usage(group, body, head):
        yield last


def _head(prefix: str, kind: str, body: Body) -> dict[str, Any]:
    """What all chunks of one answer begin with."""
    return {"id": forms.new_id(prefix), "object": kind, "created": int(time.time()), "model": body.model}


def _usage(group: Group, body: Body, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The last chunk, where it was asked for."""
    if not (body.stream_options and body.stream_options.include_usage):
        return []
    return [{**head, "choices": [], "usage": forms.usage(group.answers, body.samples)}]
