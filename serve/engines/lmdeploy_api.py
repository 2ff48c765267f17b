"""LMDeploy's API (0.18) as OpenAI's clients expect one.

It ignores fields that it does not know, and some that it lists: what would change an answer is refused here, in the
words of our own server. It ends answers at any token whose text contains a stop string, and leaves all of that token
out: it is told of none, and answers are cut here. Its log probabilities name tokens by pieces of the tokenizer's, and
its errors are flat.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

from serve import prompts
from serve.bodies import checked
from serve.engines.stopping import Ending
from serve.engines.translation import AsIs, events, openai_error
from serve.forms import encoded, event, new_id
from serve.protocol import ApiError, Body, ChatBody, CompletionBody, StructuredOutputs
from serve.served import Served
from serve.text import BROKEN

OWN = frozenset({
    "stop", "min_tokens", "structured_outputs", "presence_penalty", "frequency_penalty",
    "session_id", "migration_request", "with_cache", "preserve_cache",
})  # fmt: skip
"""What it is not told of: what is done here, is zero, or steers a cache that it shares with other servers."""
NEVER = ("presence_penalty", "frequency_penalty", "stop_token_ids")
"""Fields that it ignores."""
NEVER_OF_TEXT = (*NEVER, "logit_bias", "min_tokens", "structured_outputs", "echo", "logprobs")
"""Fields that it ignores where a text is to be gone on with."""
MOST_TOKENS = 2**31 - 1
COLDEST = 1e-3
"""A temperature below is none: divided by it, numbers of 16 bits are no numbers."""


class LmdeployApi(AsIs):
    """Both ways, for chats and texts with one model; its other routes are as they are."""

    def __init__(self, model: Served, limit: int | None) -> None:
        """`limit` is the longest context, in tokens, where that is known."""
        self._model, self._limit = model, limit

    def inside(self, adapter: str) -> str:
        """Another one: for an adapter that is named as one of its chat templates it takes that template."""
        return f"{adapter}@lora"

    def question(self, text: str, ids: Sequence[int], *, chat: bool) -> tuple[str, dict[str, Any]]:
        """As a chat, which alone takes token ids and tells them; asked to ignore ends, it would go round them."""
        asked = {
            "logprobs": True, "top_logprobs": 1, "return_token_ids": True, "include_stop_str_in_output": True,
        }  # fmt: skip
        given = {"messages": [{"role": "user", "content": text}]} if chat else {"messages": [], "input_ids": [*ids]}
        return "/v1/chat/completions", {**asked, **given}

    def ask(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """The request in its words. Raises ApiError 400 for what it would ignore, or fail on."""
        if path == "/v1/chat/completions":
            return _chat(fields, self._model, self._limit)
        return _text(fields, self._model, self._limit) if path == "/v1/completions" else fields

    def error(self, status: int, body: bytes) -> tuple[int, bytes]:
        """In OpenAI's form, with OpenAI's code in place of the status where there is one."""
        status, body = openai_error(status, body)
        error = json.loads(body)["error"]
        code = "context_length_exceeded" if "context length" in error["message"] else None
        known = {name: error[name] for name in ("message", "type", "param")}
        return status, encoded({"error": {**known, "code": code}})

    def answer(self, fields: Mapping[str, Any], body: bytes) -> bytes:
        """Cut at the first stop string, with log probabilities in OpenAI's form."""
        said = json.loads(body)
        if "choices" not in said:
            return body
        for choice in said["choices"]:
            ids = _choice(choice, fields, self._model)
            text = _text_of(choice)
            ending = Ending(_stops(fields))
            kept = ending.push(text or "") + ending.finish()
            if ending.stopped:
                choice["finish_reason"] = "stop"
                _set_text(choice, kept)
                _cut_logprobs(choice, ids, kept, self._model)
        if said.get("id") == "-1":
            said["id"] = new_id("cmpl")
        return encoded(said)

    async def stream(self, fields: Mapping[str, Any], chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Events as `answer`; ends when all choices have, unless the usage is asked for, which comes last."""
        counted = bool((fields.get("stream_options") or {}).get("include_usage"))
        endings = [Ending(_stops(fields)) for _ in range(fields.get("n") or 1)]
        text_id = new_id("cmpl")
        async for raw in events(chunks):
            try:
                said = json.loads(raw)
            except ValueError:
                if raw == b"[DONE]":
                    yield b"data: [DONE]\n\n"
                continue  # half an event: the connection broke, and an error follows
            if "error" in said:
                yield b"data: %b\n\n" % self.error(500, raw)[1]
                continue
            if not said.get("choices"):
                yield event(said)
                continue
            said["choices"] = [c for c in said["choices"] if not endings[c["index"]].stopped]
            for choice in said["choices"]:
                _choice(choice, fields, self._model)
                _end(choice, endings[choice["index"]])
            if said["choices"]:
                yield event({**said, "id": text_id} if said.get("id") == "-1" else said)
            if not counted and all(ending.stopped for ending in endings):
                yield b"data: [DONE]\n\n"
                return


# requests


def _chat(fields: dict[str, Any], served: Served, limit: int | None) -> dict[str, Any]:
    body = checked(partial(ChatBody.model_validate_json, json.dumps(fields)))
    _refuse(body, NEVER)
    if body.stops and body.min_tokens:
        raise ApiError(400, "LMDeploy cannot hold back stop strings for min_tokens", param="min_tokens")
    tools = body.usable_tools
    # what the template cannot render, or reads otherwise than it is meant, is an error here and not there
    prompt = prompts.rendered(served, body.messages, tools, dict(body.chat_template_kwargs or {}))
    _check_length(prompt, served, limit, "messages")
    asked = {**_shared(fields, body, served), "messages": [message.plain() for message in body.messages]}
    if not tools:
        asked = {k: v for k, v in asked.items() if k not in ("tools", "tool_choice")}
    if body.min_tokens:
        asked["min_new_tokens"] = body.min_tokens
    if body.structured_outputs:
        asked["response_format"] = _format(body.structured_outputs)
    return asked


def _text(fields: dict[str, Any], served: Served, limit: int | None) -> dict[str, Any]:
    body = checked(partial(CompletionBody.model_validate_json, json.dumps(fields)))
    _refuse(body, NEVER_OF_TEXT)
    if body.samples > 1:
        raise ApiError(400, "LMDeploy gives one answer to a text", param="n")
    if body.response_format and body.response_format.type != "text":
        raise ApiError(400, "LMDeploy goes on with a text in any form", param="response_format")
    texts = [given if isinstance(given, str) else _read(given, served) for given in body.prompts]
    for text in texts:
        _check_length(text, served, limit, "prompt")
    if body.stream and len(texts) > 1:
        raise ApiError(400, "LMDeploy streams the answer to one text only", param="prompt")
    asked = {**_shared(fields, body, served), "prompt": texts if len(texts) > 1 else texts[0]}
    if body.max_tokens is not None:
        asked["max_tokens"] = min(body.max_tokens, MOST_TOKENS)
    return asked


def _shared(fields: Mapping[str, Any], body: Body, served: Served) -> dict[str, Any]:
    """What chats and texts have: its own defaults for sampling (0.8, top 50) are neither OpenAI's nor the model's."""
    asked = {name: value for name, value in fields.items() if name not in OWN}
    given = {name: getattr(body, name) for name in served.sampling if getattr(body, name) is not None}
    asked |= {**served.sampling, **given}
    asked["top_k"] = max(0, int(asked["top_k"]))
    if asked["temperature"] < COLDEST:
        asked["temperature"] = 0
    if body.seed is not None:
        asked["seed"] = body.seed % 2**63
    for name in ("max_tokens", "max_completion_tokens"):
        if fields.get(name) is not None:
            asked[name] = min(fields[name], MOST_TOKENS)
    return asked


def _check_length(text: str, served: Served, limit: int | None, param: str) -> None:
    """Raise ApiError for what is surely too long: nobody else is answered while it splits a text into tokens."""
    if limit is not None and len(text) > limit * served.longest_token:
        raise prompts.overflow(f"at least {len(text) // served.longest_token}", limit, param)


def _refuse(body: Body, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(body, name)
        if value is not None and value not in ([], {}) and (value is not False) and (value != 0 or name == "logprobs"):
            raise ApiError(400, f"LMDeploy does not heed '{name}' here", param=name)


def _read(ids: list[int], served: Served) -> str:
    """The text that is read as these token ids: it takes no others."""
    text = prompts.decoded(ids, served, "prompt")
    if served.encode(text, True) != ids:
        raise ApiError(400, "LMDeploy takes texts, and none is read as these token ids", param="prompt")
    return text


def _format(wanted: StructuredOutputs) -> dict[str, Any]:
    """What an answer must be, in its words."""
    if wanted.grammar is not None:
        raise ApiError(400, "LMDeploy takes no grammars", param="structured_outputs")
    if wanted.schema_ is not None:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.schema_}}
    if wanted.json_object:
        return {"type": "json_object"}
    regex = wanted.regex or "|".join(f"({re.escape(choice)})" for choice in wanted.choice or ())
    return {"type": "regex_schema", "regex_schema": regex}


# answers


def _stops(fields: Mapping[str, Any]) -> list[str]:
    stop = fields.get("stop") or []
    return [stop] if isinstance(stop, str) else stop


def _text_of(choice: Mapping[str, Any]) -> str | None:
    """The text of a choice, or what an event adds to it; of a message its content."""
    inner = choice.get("message", choice.get("delta"))
    text: str | None = choice.get("text") if inner is None else inner.get("content")
    return text


def _set_text(choice: dict[str, Any], text: str) -> None:
    inner = choice.get("message", choice.get("delta"))
    if inner is None:
        choice["text"] = text
    else:
        inner["content"] = text


def _end(choice: dict[str, Any], ending: Ending) -> None:
    """Cut what an event adds to a choice."""
    text = ending.push(_text_of(choice) or "")
    if ending.stopped:
        choice["finish_reason"] = "stop"
        choice.pop("logprobs", None)  # of the tokens that are cut off
    elif choice["finish_reason"]:
        text += ending.finish()
    if _text_of(choice) is not None or text:
        _set_text(choice, text)


def _choice(choice: dict[str, Any], fields: Mapping[str, Any], served: Served) -> list[int]:
    """Make a choice OpenAI's, token ids as vLLM's; the ids of its log probabilities are returned."""
    choice.setdefault("finish_reason", None)
    if choice.get("output_ids") is not None:
        choice["token_ids"] = choice.pop("output_ids")
    scored = (choice.get("logprobs") or {}).get("content") or []
    if not scored:
        return []
    most = fields.get("top_logprobs") or 0
    ids = [served.tokenizer.convert_tokens_to_ids(entry["token"]) for entry in scored]
    choice["logprobs"] = {"content": [_scored(entry, most, served) for entry in scored], "refusal": None}
    return ids


def _scored(entry: Mapping[str, Any], most: int, served: Served) -> dict[str, Any]:
    """A token and the likeliest, among which it leaves out the one that was taken."""
    top = sorted([entry, *entry["top_logprobs"]], key=lambda one: -one["logprob"])[:most]
    return {**_token(entry, served), "top_logprobs": [_token(one, served) for one in top]}


def _token(entry: Mapping[str, Any], served: Served) -> dict[str, Any]:
    text = served.tokenizer.decode([served.tokenizer.convert_tokens_to_ids(entry["token"])])
    # a token that is a part of a character has no text of its own
    whole = list(text.encode()) if BROKEN not in text else None
    return {"token": text, "logprob": entry["logprob"], "bytes": whole}


def _cut_logprobs(choice: dict[str, Any], ids: Sequence[int], text: str, served: Served) -> None:
    """Keep the log probabilities of as many tokens as it takes to say `text`."""
    if not ids:
        return

    def said(tokens: int) -> int:
        return len(served.tokenizer.decode(ids[:tokens], skip_special_tokens=True))

    tokens = bisect.bisect_left(range(len(ids) + 1), len(text), key=said)
    choice["logprobs"]["content"] = choice["logprobs"]["content"][:tokens]
