"""The server that comes with llama-cpp-python, with conversations and the log-probabilities of prompts right.

    python -m serve.engines.llamacpp_server --model FILE ...    as `python -m llama_cpp.server`

Where it echoes a prompt that begins without a BOS token, the server gives each token the probability that the model
has for it after itself; and 0 new tokens are as many as fit. Here a prompt is read once, and its tokens are looked up.
Conversations are for `llamacpp_chat`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
from llama_cpp import Llama
from llama_cpp.server import types
from pydantic import ConfigDict

from serve.engines.llamacpp_chat import create_chat_completion

complete = Llama._create_completion


def create_completion(self: Llama, prompt: Any, **options: Any) -> Iterator[dict[str, Any]]:
    """What `Llama` answers to a prompt; only an echo with log-probabilities, in one piece, is made otherwise."""
    count = options.get("logprobs")
    if not options.get("echo") or count is None or options.get("stream") or options.get("suffix"):
        yield from complete(self, prompt=prompt, **options)
        return
    text = prompt if isinstance(prompt, str) else self.detokenize(prompt).decode("utf-8", "ignore")
    scored, read = score(self, prompt, count)
    if options.get("max_tokens") == 0:
        answer = {
            "id": f"cmpl-{uuid.uuid4()}", "object": "text_completion", "created": int(time.time()),
            "model": options.get("model") or self.model_path,
            "choices": [{"text": text, "index": 0, "logprobs": scored, "finish_reason": "length"}],
            "usage": {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read},
        }  # fmt: skip
        yield answer
        return
    for answer in complete(self, prompt=prompt, **{**options, "echo": False}):
        choice = answer["choices"][0]
        choice["text"] = text + choice["text"]
        choice["logprobs"] = {name: scored[name] + choice["logprobs"][name] for name in scored}
        yield answer


def score(model: Llama, prompt: str | list[int], count: int) -> tuple[dict[str, list[Any]], int]:
    """OpenAI's `logprobs` of a prompt's tokens, natural, with the `count` likeliest of each; and how many were read.

    A BOS token that the model puts first is the first of them. Raises ValueError, as its server expects it, for a
    prompt that is too long.
    """
    begins = isinstance(prompt, str) and model._model.add_bos_token() and model.token_bos() != -1
    given = model.tokenize(prompt.encode(), add_bos=False, special=True) if isinstance(prompt, str) else prompt
    ids = [model.token_bos()] * begins + given
    if len(ids) >= model.n_ctx():
        raise ValueError(f"Requested tokens ({len(ids)}) exceed context window of {model.n_ctx()}")
    model.reset()
    model.eval(ids)
    pieces = [piece(model, token, ids[:i]) for i, token in enumerate(ids)]
    found: dict[str, list[Any]] = {"tokens": pieces[:1], "token_logprobs": [None], "top_logprobs": [None]}
    for i, token in enumerate(ids[1:], start=1):
        logprobs = Llama.logits_to_logprobs(model._scores[i - 1])  # (V,)
        likeliest = np.argsort(-logprobs)[:count]
        top = {piece(model, int(j), ids[:i]): float(logprobs[j]) for j in likeliest}
        found["tokens"].append(pieces[i])
        found["token_logprobs"].append(float(logprobs[token]))
        found["top_logprobs"].append({**top, pieces[i]: float(logprobs[token])})
    return {**found, "text_offset": np.cumsum([0, *map(len, pieces)])[:-1].tolist()}, len(ids)


def piece(model: Llama, token: int, before: list[int]) -> str:
    """The text of a token after others."""
    return str(model.detokenize([token], prev_tokens=before).decode("utf-8", "ignore"))


class Conversation(types.CreateChatCompletionRequest):  # type: ignore[misc]
    """The body of a conversation with all its fields; it has been checked by the gateway."""

    model_config = ConfigDict(extra="allow")

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None


def run() -> None:
    """Serve until the end of the process."""
    types.CreateChatCompletionRequest = Conversation  # before its routes are made
    Llama._create_completion = create_completion
    Llama.create_chat_completion = create_chat_completion
    # no line for each look of the gateway
    logging.getLogger("uvicorn.access").addFilter(lambda record: "/health" not in record.getMessage())
    from llama_cpp.server.__main__ import main

    main()


if __name__ == "__main__":
    run()
