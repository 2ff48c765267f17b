"""Answers as server-sent events, and what happens when their reader goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve import forms
from serve.answers import Answer, Group
from serve.protocol import ApiError, Body, ChatBody, CompletionBody
from serve.text import tool_calls

Events = AsyncIterator[dict[str, Any]]


class EventStream(StreamingResponse):
    """Sends `events(group)`, then [DONE]. The requests are submitted when it is made, so their errors are answers."""

    def __init__(
        self,
        context: contextlib.AbstractContextManager[Group],
        request: Request,
        events: Callable[[Group], Events],
    ) -> None:
        self._request = request
        self._stack = contextlib.ExitStack()
        self._group = self._stack.enter_context(context)
        super().__init__(self._lines(events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, or cancel what still runs."""
        with self._stack:
            async with cancelled_when_gone(self._request, self._group):
                await super().__call__(scope, receive, send)

    async def _lines(self, events: Callable[[Group], Events]) -> AsyncIterator[str]:
        try:
            async for body in events(self._group):
                yield forms.event(body)
        except ApiError as error:  # the status is sent already
            yield forms.event(error.body)
        yield forms.event("[DONE]")


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


async def chat_events(group: Group, body: ChatBody, tools: bool) -> Events:
    """Chunks of a chat completion. With `tools` an answer comes whole at its end, where its calls can be told."""
    head = forms.head("chat.completion.chunk", body.model)
    for index in range(len(group.answers)):
        yield {**head, "choices": [forms.chat_delta(index, {"role": "assistant", "content": ""}, None)]}
    told = [0] * len(group.answers)
    async for index, answer in group.changes():
        delta: dict[str, Any] = {}
        finish: str | None = answer.generation.finish if answer.ended else None
        if tools and answer.ended:
            content, calls = tool_calls(answer.text.text)
            delta = {"content": content} if content else {}
            if calls:
                delta["tool_calls"], finish = forms.call_deltas(calls), "tool_calls"
        elif not tools and (text := answer.text.take(answer.ended)):
            delta = {"content": text}
        if delta or finish:
            scores = answer.generation.scores[told[index] :]
            told[index] += len(scores)
            choice = forms.chat_delta(index, delta, finish, forms.chat_logprobs(answer, scores))
            yield {**head, "choices": [choice]}
    async for last in _usage(group, body, head):
        yield last


async def completion_events(group: Group, body: CompletionBody, echoes: Sequence[str | None]) -> Events:
    """Chunks of a text completion; an echo comes first."""
    head = forms.head("text_completion", body.model)
    told = [0] * len(group.answers)
    for index, echo in enumerate(echoes):
        if echo:
            yield {**head, "choices": [_piece(index, echo, None, None)]}
    async for index, answer in group.changes():
        text = answer.text.take(answer.ended)
        if text or answer.ended:
            scores = answer.generation.scores[told[index] :]
            told[index] += len(scores)
            logprobs = None if body.logprobs is None else forms.completion_logprobs(answer, scores, 0)
            yield {**head, "choices": [_piece(index, text, logprobs, answer)]}
    async for last in _usage(group, body, head):
        yield last


def _piece(index: int, text: str, logprobs: dict[str, Any] | None, answer: Answer | None) -> dict[str, Any]:
    finish = answer.generation.finish if answer is not None and answer.ended else None
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


async def _usage(group: Group, body: Body, head: dict[str, Any]) -> Events:
    if body.stream_options and body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": forms.usage(group.answers, body.n)}
