"""/v1/chat/completions and /v1/completions: prompts are rendered to token ids, answers take OpenAI's shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from serve import forms
from serve.answers import Answer, Engine, Group
from serve.catalog import Served
from serve.generation import Request as Prompt
from serve.generation import Sampling
from serve.protocol import ApiError, Body, ChatBody, CompletionBody
from serve.serving import Serving
from serve.streams import EventStream, cancelled_when_gone, chat_events, completion_events
from serve.text import TextStream
from suite.errors import SuiteError


def add(app: FastAPI, server: Serving) -> None:
    """Both routes."""

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        served = await server.find(request, body.model, body.user)
        body.model = served.name  # an alias: the answer says who gave it
        parsed = bool(body.tools) and body.tool_choice != "none"
        context = server.open(request, _chat_prompts(body, served, server.ready()[0]), body.stream, body.n)
        if body.stream:
            return EventStream(context, request, lambda group: chat_events(group, body, parsed))
        return await _answer(context, request, lambda answers: forms.chat_completion(body, answers, parsed))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        served = await server.find(request, body.model, body.user)
        body.model = served.name
        prompts, echoes = _completion_prompts(body, served, server.ready()[0])
        context = server.open(request, prompts, body.stream, body.n)
        if body.stream:
            return EventStream(context, request, lambda group: completion_events(group, body, echoes))
        return await _answer(context, request, lambda answers: forms.completion(body, answers, echoes))


def _chat_prompts(body: ChatBody, served: Served, engine: Engine) -> list[tuple[Prompt, TextStream]]:
    if served.chat is None:
        raise ApiError(400, f"'{body.model}' cannot chat: {served.no_chat}", param="model")
    messages = [message.plain() for message in body.messages]
    tools = body.tools if body.tool_choice != "none" else None
    try:
        ids = served.chat.ids(messages, tools, generate=True, **body.chat_template_kwargs)
    except (SuiteError, TypeError, ValueError) as error:
        raise ApiError(400, str(error), param="messages") from None
    top = (body.top_logprobs or 0) if body.logprobs else None
    hidden = served.hidden_beside_tools if tools else served.hidden
    prompt = partial(_prompt, body, served, ids, body.limit or engine.max_length, hidden, top)
    return [prompt(sample) for sample in range(body.n)]


def _completion_prompts(
    body: CompletionBody, served: Served, engine: Engine
) -> tuple[list[tuple[Prompt, TextStream]], list[str | None]]:
    """A request for each sample of each prompt, and the text that each echoes."""
    prompts: list[tuple[Prompt, TextStream]] = []
    echoes: list[str | None] = []
    limit = engine.max_length if body.max_tokens is None else body.max_tokens
    for given in body.prompts:
        try:
            ids = given if isinstance(given, list) else list(served.tokenizer(given)["input_ids"])
            text = served.tokenizer.decode(given) if isinstance(given, list) else given
        except (TypeError, ValueError) as error:  # half a surrogate pair is a string in JSON, and no text
            raise ApiError(400, f"the prompt cannot be tokenised: {error}", param="prompt") from None
        prompt = partial(_prompt, body, served, ids, limit, served.hidden, body.logprobs)
        prompts += [prompt(sample, body.logprobs if body.echo else None) for sample in range(body.n)]
        echoes += [text if body.echo else None] * body.n
    return prompts, echoes


def _prompt(
    body: Body,
    served: Served,
    ids: list[int],
    limit: int,
    hidden: frozenset[int],
    logprobs: int | None,
    sample: int,
    prompt_logprobs: int | None = None,
) -> tuple[Prompt, TextStream]:
    """The request for sample number `sample` of a body, and where its text will gather."""
    given = {key: getattr(body, key) for key in served.sampling if getattr(body, key) is not None}
    # the samples of one seed differ from each other, and are the same every time
    seed = None if body.seed is None else body.seed + sample
    prompt = Prompt(
        prompt=ids,
        adapter=served.adapter,
        max_tokens=limit,
        sampling=Sampling(**{**served.sampling, **given}, seed=seed),
        stop_ids=frozenset() if body.ignore_eos else served.stops,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return prompt, TextStream(served.tokenizer, body.stops, hidden)


async def _answer(
    context: contextlib.AbstractContextManager[Group], request: Request, form: Callable[[list[Answer]], dict[str, Any]]
) -> Response:
    with context as group:
        async with cancelled_when_gone(request, group):
            return JSONResponse(form(await group.wait()))
