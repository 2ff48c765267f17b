"""Answers in the shapes of OpenAI's API."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from serve.answers import Answer
from serve.generation import Scored
from serve.protocol import ChatBody, CompletionBody
from serve.text import BROKEN, tool_calls

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def chat_completion(body: ChatBody, answers: Sequence[Answer], tools: bool) -> dict[str, Any]:
    """The body of a chat completion; texts are parsed for calls when the request had `tools`."""
    choices = [chat_choice(index, answer, tools) for index, answer in enumerate(answers)]
    return {**head("chat.completion", body.model), "choices": choices, "usage": usage(answers, body.n)}


def completion(body: CompletionBody, answers: Sequence[Answer], echoes: Sequence[str | None]) -> dict[str, Any]:
    """The body of a text completion; `echoes` are the prompts to put before the answers."""
    choices = [completion_choice(i, answer, echoes[i]) for i, answer in enumerate(answers)]
    return {**head("text_completion", body.model), "choices": choices, "usage": usage(answers, body.n)}


def head(kind: str, model: str) -> dict[str, Any]:
    """What every body of one answer begins with; `kind` is e.g. "chat.completion"."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(answers: Sequence[Answer], samples: int) -> dict[str, int]:
    """Token counts; the prompt of several `samples` counts once."""
    prompt = sum(len(answer.generation.request.prompt) for answer in answers[::samples])
    completion = sum(len(answer.generation.new) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_choice(index: int, answer: Answer, tools: bool) -> dict[str, Any]:
    """One choice of a chat completion; the text is parsed for calls when the request had tools."""
    content, calls = tool_calls(answer.text.text) if tools else (answer.text.text, [])
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message |= {"content": content or None, "tool_calls": [_call(call) for call in calls]}
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(answer, answer.generation.scores),
        "finish_reason": "tool_calls" if calls else answer.generation.finish,
    }


def chat_delta(index: int, delta: dict[str, Any], finish: str | None, logprobs: Any = None) -> dict[str, Any]:
    """One choice of a chat completion chunk."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def call_deltas(calls: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Tool calls as they stand in a chunk, each complete."""
    return [{"index": index, **_call(call)} for index, call in enumerate(calls)]


def chat_logprobs(answer: Answer, scores: Sequence[Scored]) -> dict[str, Any] | None:
    """The chat form of log probabilities, or None when they were not asked for."""
    if answer.generation.request.logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = _token_text(answer, token)
        # a token that is a part of a character has no text of its own
        whole = list(text.encode()) if BROKEN not in text else None
        return {"token": text, "logprob": max(logprob, LOWEST), "bytes": whole}

    content = [
        {**entry(s.token, s.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in s.top]}
        for s in scores
    ]
    return {"content": content, "refusal": None}


def completion_choice(index: int, answer: Answer, echo: str | None) -> dict[str, Any]:
    """One choice of a text completion; `echo` is the prompt to put before it, in text and log probabilities."""
    logprobs = None
    if answer.generation.request.logprobs is not None:
        scores: list[Scored | None] = [*answer.generation.scores]
        if echo is not None:
            scores = [None, *answer.generation.prompt_scores, *scores]
        logprobs = completion_logprobs(answer, scores, 0)
    return {
        "index": index,
        "text": (echo or "") + answer.text.text,
        "logprobs": logprobs,
        "finish_reason": answer.generation.finish,
    }


def completion_logprobs(answer: Answer, scores: Sequence[Scored | None], offset: int) -> dict[str, Any]:
    """The completions form: parallel lists. The first token of a prompt has no score, None."""
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


def event(body: dict[str, Any] | str) -> str:
    """One server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n"


def _call(call: dict[str, str]) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call}


def _top(answer: Answer, scored: Scored) -> dict[str, float]:
    """By token text; of tokens with the same text (parts of characters) the likeliest stays. Holds the token itself."""
    top: dict[str, float] = {}
    for token, logprob in [*scored.top, (scored.token, scored.logprob)]:
        top.setdefault(_token_text(answer, token), max(logprob, LOWEST))
    return top


def _token_text(answer: Answer, token: int) -> str:
    return str(answer.text.tokenizer.decode([token]))
