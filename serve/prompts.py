"""From the body of a request to what the engine reads: rendered by the chat template, tokenised, bounded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from serve.answers import Engine
from serve.constraints import constraint
from serve.errors import ApiError
from serve.generation import Pooling, Request, Sampling
from serve.grammar import Constraint
from serve.protocol import (
    Body,
    ChatBody,
    ChatMessage,
    CompletionBody,
    EmbeddingBody,
    TokenizeBody,
    check_ids,
)
from serve.reply import ReasoningParser, Reply
from serve.served import Served
from serve.text import TextStream
from suite.errors import SuiteError

Job = tuple[Request, TextStream]
"""A request for the engine, and where its text will gather."""


def conversation(
    body: ChatBody, served: Served, engine: Engine, *, inline: bool
) -> tuple[list[Job], list[Reply], Constraint | None]:
    """A job and an empty reply for each sample, and what all answers must be.

    `inline` leaves reasoning in the content where the body says nothing of it. Raises ApiError 400 for what the model
    or its template cannot take.
    """
    text = opened(body, served)
    ids = tokenised(text, served, "messages", special=False, limit=engine.max_length)
    hidden = served.hidden_beside_tools if body.usable_tools else served.hidden_in_chat
    top = (body.top_logprobs or 0) if body.logprobs else None
    limit = engine.max_length if body.limit is None else body.limit
    check_length(ids, limit, engine, "messages")
    jobs = [job(body, served, ids, sample, limit, hidden=hidden, logprobs=top) for sample in range(body.samples)]
    marks = served.dialect.reasoning
    rule = constraint(body, served, marks[1] if marks and _inside(text, marks) else "")
    return jobs, [empty_reply(body, served, text, inline=inline) for _ in range(body.samples)], rule


def opened(body: ChatBody, served: Served) -> str:
    """The prompt of a conversation: all up to where the answer begins. Raises ApiError 400."""
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        thinks = body.reasoning_effort != "none"
        variables = {"reasoning_effort": body.reasoning_effort, "enable_thinking": thinks, **variables}
    return rendered(served, body.messages, body.usable_tools, variables)


def empty_reply(body: ChatBody, served: Served, prompt: str, *, inline: bool) -> Reply:
    """What tells the answer to `prompt` apart, see `conversation`."""
    marks = served.dialect.reasoning
    apart = not inline if body.separate_reasoning is None else body.separate_reasoning
    thinking = ReasoningParser(marks, _inside(prompt, marks)) if marks and apart else None
    calling = served.dialect.parser(body.usable_tools or [], must=body.must_call)
    return Reply(thinking, calling, parallel=body.parallel_tool_calls is not False)


def _inside(prompt: str, marks: tuple[str, str]) -> bool:
    """Whether the prompt has opened reasoning."""
    return prompt.rstrip().endswith(marks[0])


def completions(
    body: CompletionBody, served: Served, engine: Engine
) -> tuple[list[Job], list[str | None], Constraint | None]:
    """A job for each sample of each prompt, the text that each echoes, and what all answers must be."""
    jobs: list[Job] = []
    echoes: list[str | None] = []
    limit = engine.max_length if body.max_tokens is None else body.max_tokens
    for given in body.prompts:
        ids = given if isinstance(given, list) else tokenised(given, served, "prompt", limit=engine.max_length)
        check_length(ids, limit, engine, "prompt")
        echo = None
        if body.echo:
            echo = decoded(given, served, "prompt") if isinstance(given, list) else given
        scored = body.logprobs if body.echo else None
        jobs += [
            job(body, served, ids, sample, limit, hidden=served.hidden, logprobs=body.logprobs, prompt_logprobs=scored)
            for sample in range(body.samples)
        ]
        echoes += [echo] * body.samples
    return jobs, echoes, constraint(body, served)


def embeddings(body: EmbeddingBody, served: Served, engine: Engine, pooling: Pooling) -> list[Job]:
    """A job for each text."""
    jobs: list[Job] = []
    for given in body.inputs:
        ids = given if isinstance(given, list) else tokenised(given, served, "input", limit=engine.max_length)
        check_length(ids, 0, engine, "input")
        jobs.append((Request(prompt=ids, adapter=served.adapter, embed=pooling), TextStream(served.tokenizer)))
    return jobs


def tokens(body: TokenizeBody, served: Served) -> list[int]:
    """The token ids of a prompt, or of a conversation."""
    if body.messages is None:
        return tokenised(body.prompt or "", served, "prompt", special=body.add_special_tokens is not False)
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or []]
    text = rendered(served, body.messages, tools, body.chat_template_kwargs or {}, generate=body.add_generation_prompt)
    return tokenised(text, served, "messages", special=bool(body.add_special_tokens))


def rendered(
    served: Served,
    messages: Sequence[ChatMessage],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
    *,
    generate: bool = True,
) -> str:
    """A conversation as the model reads it; `generate` opens the answer. Raises ApiError 400."""
    if served.chat is None:
        raise ApiError(400, f"'{served.name}' cannot chat: {served.no_chat}", param="model")
    if tools and not served.dialect.takes_tools:
        raise ApiError(400, f"'{served.name}' cannot use tools: its chat template leaves them out", param="tools")
    if variables and (taken := _reserved(type(served.tokenizer).apply_chat_template) & variables.keys()):
        raise ApiError(400, f"'{min(taken)}' is no variable of a chat template", param="chat_template_kwargs")
    try:
        return served.chat.text([message.plain() for message in messages], tools, generate, **variables)
    except SuiteError as error:
        raise ApiError(400, error.message, param="messages") from None


@lru_cache
def _reserved(render: Callable[..., str]) -> frozenset[str]:
    """A client must not bring a template of its own, nor steer how the model's is applied."""
    return frozenset({*inspect.signature(render).parameters, "messages", "generate"})


def tokenised(text: str, served: Served, param: str, *, special: bool = True, limit: int | None = None) -> list[int]:
    """Token ids of `text`, with `special` ones around it. Raises ApiError 400.

    What cannot have so few tokens as `limit` is refused without counting them.
    """
    if limit is not None and len(text) > limit * served.longest_token:
        raise overflow(f"at least {len(text) // served.longest_token}", limit, param)
    return served.encode(text, special)


def decoded(ids: list[int], served: Served, param: str) -> str:
    """The text of token ids; raises ApiError 400 for numbers that are none."""
    check_ids(ids, param)
    return str(served.tokenizer.decode(ids))


def check_length(ids: list[int], new: int, engine: Engine, param: str) -> None:
    """Raise ApiError 400 for a prompt that leaves no place for one of `new` tokens."""
    if len(ids) + (new > 0) > engine.max_length:
        raise overflow(str(len(ids)), engine.max_length, param)


def overflow(tokens: str, limit: int, param: str) -> ApiError:
    """OpenAI's error, in the words that client libraries look for."""
    message = f"This model's maximum context length is {limit} tokens, but the prompt has {tokens}."
    return ApiError(400, message, param=param, code="context_length_exceeded")


def job(
    body: Body,
    served: Served,
    ids: list[int],
    sample: int,
    limit: int,
    *,
    hidden: frozenset[int],
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> Job:
    """The request for sample number `sample` of a body."""
    if (body.min_tokens or 0) > limit:
        raise ApiError(400, f"min_tokens is more than the {limit} tokens that may be generated", param="min_tokens")
    given = {key: getattr(body, key) for key in served.sampling if getattr(body, key) is not None}
    # the samples of one seed differ from each other, and are the same every time
    seed = None if body.seed is None else body.seed + sample
    request = Request(
        prompt=ids,
        adapter=served.adapter,
        max_tokens=limit,
        sampling=Sampling(
            **{**served.sampling, **given},
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=body.logit_bias or {},
            seed=seed,
        ),
        stop_ids=(frozenset() if body.ignore_eos else served.stops) | {*(body.stop_token_ids or [])},
        min_tokens=body.min_tokens or 0,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return request, TextStream(served.tokenizer, body.stops, hidden, body.min_tokens or 0)
