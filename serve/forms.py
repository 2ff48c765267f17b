"""Answers in the shapes of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import pydantic_core
from starlette.responses import Response

from serve import shapes
from serve.answers import Answer
from serve.calls import Part
from serve.generation import Scored
from serve.protocol import ChatBody, CompletionBody
from serve.reply import Call, Reply
from serve.text import BROKEN

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def encoded(body: Any) -> bytes:
    """`body` as JSON; pydantic's writer takes a fifth of the standard library's time."""
    return pydantic_core.to_json(body, inf_nan_mode="null")


class Json(Response):
    """An answer of JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """`content` as the body."""
        return encoded(content)


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % encoded(body)


def chat_completion(body: ChatBody, answers: Sequence[Answer], replies: Sequence[Reply]) -> shapes.ChatCompletion:
    """The body of a chat completion."""
    choices = [chat_choice(i, answer, reply) for i, (answer, reply) in enumerate(zip(answers, replies, strict=True))]
    return {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.model,
        "choices": choices,
        "usage": usage(answers, body.samples),
    }


def completion(body: CompletionBody, answers: Sequence[Answer], echoes: Sequence[str | None]) -> shapes.Completion:
    """The body of a text completion; `echoes` are the prompts to put before the answers."""
    return {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "choices": [completion_choice(i, answer, echoes[i]) for i, answer in enumerate(answers)],
        "usage": usage(answers, body.samples),
    }


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def usage(answers: Sequence[Answer], samples: int) -> shapes.Usage:
    """Token counts; the prompt of several `samples` counts once."""
    prompt = sum(len(answer.generation.request.prompt) for answer in answers[::samples])
    completion = sum(answer.generation.count for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.generation.reused for answer in answers[::samples])},
    }


def chat_choice(index: int, answer: Answer, reply: Reply) -> shapes.ChatChoice:
    """One choice of a chat completion; `reply` has not been fed."""
    reply.feed(answer.text.text, final=True)
    return {
        "index": index,
        "message": message(reply),
        "logprobs": chat_logprobs(answer, answer.generation.scores),
        "finish_reason": finish_reason(answer, reply),
    }


def message(reply: Reply) -> shapes.Message:
    """What the assistant says, when all of it is there."""
    made: shapes.Message = {"role": "assistant", "content": reply.content, "refusal": None}
    if reply.reasoning or reply.calls:
        made["content"] = reply.content or None
    if reply.reasoning:
        made["reasoning"] = made["reasoning_content"] = reply.reasoning
    if reply.calls:
        made["tool_calls"] = [tool_call(call) for call in reply.calls]
    return made


def finish_reason(answer: Answer, reply: Reply | None = None) -> shapes.FinishReason:
    """Why an answer that is no error ended."""
    if answer.generation.finish == "length":
        return "length"
    return "tool_calls" if reply and reply.calls else "stop"


def tool_call(call: Call) -> shapes.ToolCall:
    """A call in a message."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_delta(parts: Sequence[Part], reply: Reply) -> dict[str, Any]:
    """What `parts`, the newest of `reply`, add to its message."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        if part.kind == "content":
            delta["content"] = delta.get("content", "") + part.text
        elif part.kind == "reasoning":
            delta["reasoning"] = delta["reasoning_content"] = delta.get("reasoning", "") + part.text
        elif part.kind == "call":
            function = {"name": part.text, "arguments": ""}
            calls[part.call] = {
                "index": part.call,
                "id": reply.calls[part.call].id,
                "type": "function",
                "function": function,
            }
        else:
            call = calls.setdefault(part.call, {"index": part.call, "function": {"arguments": ""}})
            call["function"]["arguments"] += part.text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


def chat_logprobs(answer: Answer, scores: Sequence[Scored]) -> shapes.ChatLogprobs | None:
    """The chat form of log probabilities, or None when they were not asked for."""
    if answer.generation.request.logprobs is None:
        return None

    def entry(token: int, logprob: float) -> shapes.TokenLogprob:
        text = _token_text(answer, token)
        # a token that is a part of a character has no text of its own
        whole = list(text.encode()) if BROKEN not in text else None
        return {"token": text, "logprob": max(logprob, LOWEST), "bytes": whole}

    content: list[shapes.ScoredToken] = [
        {**entry(s.token, s.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in s.top]}
        for s in scores
    ]
    return {"content": content, "refusal": None}


def completion_choice(index: int, answer: Answer, echo: str | None) -> shapes.CompletionChoice:
    """One choice of a text completion; `echo` is the prompt to put before it, in text and log probabilities."""
    scores: list[Scored | None] = [*answer.generation.scores]
    if echo is not None:
        scores = [None, *answer.generation.prompt_scores, *scores]
    return {
        "index": index,
        "text": (echo or "") + answer.text.text,
        "logprobs": completion_logprobs(answer, scores),
        "finish_reason": finish_reason(answer),
    }


def completion_logprobs(
    answer: Answer, scores: Sequence[Scored | None], offset: int = 0
) -> shapes.CompletionLogprobs | None:
    """The completions form, parallel lists, or None when not asked for; a prompt's first token has no score, None."""
    if answer.generation.request.logprobs is None:
        return None
    first = answer.generation.request.prompt[0]
    tokens = [_token_text(answer, first if s is None else s.token) for s in scores]
    offsets = [offset]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [None if s is None else max(s.logprob, LOWEST) for s in scores],
        "top_logprobs": [None if s is None else _top(answer, s) for s in scores],
        "text_offset": offsets[:-1],
    }


def _top(answer: Answer, scored: Scored) -> dict[str, float]:
    """By token text; of tokens with the same text (parts of characters) the likeliest stays. Holds the token itself."""
    top: dict[str, float] = {}
    for token, logprob in [*scored.top, (scored.token, scored.logprob)]:
        top.setdefault(_token_text(answer, token), max(logprob, LOWEST))
    return top


def _token_text(answer: Answer, token: int) -> str:
    return str(answer.text.tokenizer.decode([token]))
