"""From the body of a request to what the engine reads: rendered by the chat template, tokenised, bounded."""

from __future__ import annotations

from serve.answers import Engine
from serve.calls import CallParser
from serve.catalog import Served
from serve.generation import Request, Sampling
from serve.protocol import ApiError, Body, ChatBody, CompletionBody
from serve.reply import ReasoningParser, Reply
from serve.text import TextStream
from suite.errors import SuiteError

Job = tuple[Request, TextStream]
"""A request for the engine, and where its text will gather."""


def conversation(body: ChatBody, served: Served, engine: Engine) -> tuple[list[Job], list[Reply]]:
    """A job and an empty reply for each sample. Raises ApiError 400 for what the model or its template cannot take."""
    if served.chat is None:
        raise ApiError(400, f"'{body.model}' cannot chat: {served.no_chat}", param="model")
    tools = body.usable_tools
    if tools and not served.dialect.takes_tools:
        raise ApiError(400, f"'{body.model}' cannot use tools: its chat template leaves them out", param="tools")
    try:
        text = served.chat.text(
            [message.plain() for message in body.messages], tools, generate=True, **(body.chat_template_kwargs or {})
        )
    except (SuiteError, TypeError, ValueError) as error:
        raise ApiError(400, str(error), param="messages") from None
    ids = tokenised(text, served, engine.max_length, "messages", special=False)
    hidden = served.hidden_beside_tools if tools else served.hidden_in_chat
    top = (body.top_logprobs or 0) if body.logprobs else None
    limit = engine.max_length if body.limit is None else body.limit
    check_length(ids, limit, engine, "messages")
    jobs = [job(body, served, ids, sample, limit, hidden=hidden, logprobs=top) for sample in range(body.samples)]

    def reply() -> Reply:
        marks = served.dialect.reasoning if body.separate_reasoning is not False else None
        thinking = ReasoningParser(marks, inside=text.rstrip().endswith(marks[0])) if marks else None
        names = {tool["function"]["name"] for tool in tools or []}
        calling = CallParser(served.dialect.calls, names) if tools and served.dialect.calls else None
        return Reply(thinking, calling, parallel=body.parallel_tool_calls is not False)

    return jobs, [reply() for _ in range(body.samples)]


def completions(body: CompletionBody, served: Served, engine: Engine) -> tuple[list[Job], list[str | None]]:
    """A job for each sample of each prompt, and the text that each echoes."""
    jobs: list[Job] = []
    echoes: list[str | None] = []
    limit = engine.max_length if body.max_tokens is None else body.max_tokens
    for given in body.prompts:
        ids = given if isinstance(given, list) else tokenised(given, served, engine.max_length, "prompt")
        echo = None
        if body.echo:
            try:
                echo = served.tokenizer.decode(given) if isinstance(given, list) else given
            except (OverflowError, TypeError) as error:
                raise ApiError(400, f"unknown token ids: {error}", param="prompt") from None
        check_length(ids, limit, engine, "prompt")
        scored = body.logprobs if body.echo else None
        jobs += [
            job(body, served, ids, sample, limit, hidden=served.hidden, logprobs=body.logprobs, prompt_logprobs=scored)
            for sample in range(body.samples)
        ]
        echoes += [echo] * body.samples
    return jobs, echoes


def tokenised(text: str, served: Served, limit: int, param: str, *, special: bool = True) -> list[int]:
    """Token ids of `text`, with `special` ones around it. Raises ApiError 400 for what is no text.

    What cannot have so few tokens as `limit` is refused without counting them.
    """
    if len(text) > limit * served.longest_token:
        raise overflow(f"at least {len(text) // served.longest_token}", limit, param)
    try:
        ids = list(served.tokenizer(text, add_special_tokens=special)["input_ids"])
    except (TypeError, ValueError) as error:  # half a surrogate pair is a string in JSON, and no text
        raise ApiError(400, f"the prompt cannot be tokenised: {error}", param=param) from None
    return ids


def check_length(ids: list[int], new: int, engine: Engine, param: str) -> None:
    """Raise ApiError 400 for a prompt that leaves no place for one token of `new` ones."""
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
    given = {key: getattr(body, key) for key in served.sampling if getattr(body, key) is not None}
    # the samples of one seed differ from each other, and are the same every time
    seed = None if body.seed is None else body.seed + sample
    request = Request(
        prompt=ids,
        adapter=served.adapter,
        max_tokens=limit,
        sampling=Sampling(**{**served.sampling, **given}, seed=seed),
        stop_ids=frozenset() if body.ignore_eos else served.stops,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return request, TextStream(served.tokenizer, body.stops, hidden)
