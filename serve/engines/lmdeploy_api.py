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
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from serve.bodies import checked
from serve.engines.stopping import Ending
from serve.engines.translation import AsIs, events
from serve.errors import ApiError
from serve.forms import encoded, event, new_id
from serve.prompts import overflow
from serve.protocol import Body, ChatBody, CompletionBody, StructuredOutputs
from serve.served import sampling
from serve.text import BROKEN
from suite.chat import load_tokenizer

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


class Vocabulary:
    """The tokenizer of a model, without transformers, which would bring torch with it."""

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        file = model / "tokenizer.json"
        self._tokenizer: Any = (
            Tokenizer.from_file(str(file)) if file.is_file() else load_tokenizer(model).backend_tokenizer
        )

    @cached_property
    def longest(self) -> int:
        """No token stands for more characters."""
        return max(map(len, self._tokenizer.get_vocab()))

    def ids(self, text: str) -> list[int]:
        """What a text is read as."""
        return list(self._tokenizer.encode(text).ids)

    def text(self, ids: Sequence[int], *, special: bool = True) -> str:
        """What token ids say, with the special ones among them or without."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=not special))

    def number(self, piece: str) -> int:
        """The id of a piece, as tokenizers write tokens."""
        return self._tokenizer.token_to_id(piece) or 0


class LmdeployApi(AsIs):
    """Both ways, for chats and texts with one model; its other routes are as they are."""

    def __init__(self, model: Path, limit: int | None) -> None:
        """`limit` is the longest context, in tokens, where that is known."""
        self._vocabulary, self._sampling, self._limit = Vocabulary(model), sampling(model), limit

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
            return self._chat(fields)
        return self._text(fields) if path == "/v1/completions" else fields

    def answer(self, fields: Mapping[str, Any], body: bytes) -> bytes:
        """Cut at the first stop string, with log probabilities in OpenAI's form."""
        said = json.loads(body)
        if "choices" not in said:
            return body
        for choice in said["choices"]:
            ids = _choice(choice, fields, self._vocabulary)
            text = _text_of(choice)
            ending = Ending(_stops(fields))
            kept = ending.push(text or "") + ending.finish()
            if ending.stopped:
                choice["finish_reason"] = "stop"
                _set_text(choice, kept)
                _cut_logprobs(choice, ids, kept, self._vocabulary)
        if said.get("id") == "-1":
            said["id"] = new_id("cmpl")
        return encoded(said)

    async def stream(self, fields: Mapping[str, Any], chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Events as `answer`; ends when all choices have, unless the usage is asked for, which comes last."""
        counted = bool((fields.get("stream_options") or {}).get("include_usage"))
        endings = [Ending(_stops(fields)) for _ in range(fields.get("n") or 1)]
        text_id = new_id("cmpl")
        async for raw in events(chunks):
            if not raw.startswith(b"data: {"):  # the end, or an event of another route
                yield raw + b"\n\n"
                continue
            try:
                said = json.loads(raw.removeprefix(b"data: "))
            except ValueError:  # half of one: the connection broke, and an error follows
                continue
            if not said.get("choices"):
                yield b"data: %b\n\n" % self.error(500, encoded(said))[1] if "error" in said else event(said)
                continue
            said["choices"] = [c for c in said["choices"] if not endings[c["index"]].stopped]
            for choice in said["choices"]:
                _choice(choice, fields, self._vocabulary)
                _end(choice, endings[choice["index"]])
            if said["choices"]:
                yield event({**said, "id": text_id} if said.get("id") == "-1" else said)
            if not counted and all(ending.stopped for ending in endings):
                yield b"data: [DONE]\n\n"
                return

    def _chat(self, fields: dict[str, Any]) -> dict[str, Any]:
        body = checked(partial(ChatBody.model_validate_json, json.dumps(fields)))
        _refuse(body, NEVER)
        if body.stops and body.min_tokens:
            raise ApiError(400, "LMDeploy cannot hold back stop strings for min_tokens", param="min_tokens")
        if "chat_template" in (body.chat_template_kwargs or {}):
            raise ApiError(400, "'chat_template' is no variable of a chat template", param="chat_template_kwargs")
        messages = [message.plain() for message in body.messages]
        self._check_length(sum(len(message["content"]) for message in messages), "messages")
        asked = {**self._shared(fields, body), "messages": messages}
        if not body.usable_tools:
            asked = {k: v for k, v in asked.items() if k not in ("tools", "tool_choice")}
        if body.min_tokens:
            asked["min_new_tokens"] = body.min_tokens
        if body.structured_outputs:
            asked["response_format"] = _format(body.structured_outputs)
        return asked

    def _text(self, fields: dict[str, Any]) -> dict[str, Any]:
        body = checked(partial(CompletionBody.model_validate_json, json.dumps(fields)))
        _refuse(body, NEVER_OF_TEXT)
        if body.samples > 1:
            raise ApiError(400, "LMDeploy gives one answer to a text", param="n")
        if body.response_format and body.response_format.type != "text":
            raise ApiError(400, "LMDeploy goes on with a text in any form", param="response_format")
        texts = [given if isinstance(given, str) else self._read(given) for given in body.prompts]
        for text in texts:
            self._check_length(len(text), "prompt")
        if body.stream and len(texts) > 1:
            raise ApiError(400, "LMDeploy streams the answer to one text only", param="prompt")
        asked = {**self._shared(fields, body), "prompt": texts if len(texts) > 1 else texts[0]}
        if body.max_tokens is not None:
            asked["max_tokens"] = min(body.max_tokens, MOST_TOKENS)
        return asked

    def _shared(self, fields: Mapping[str, Any], body: Body) -> dict[str, Any]:
        """What chats and texts have. Its defaults for sampling (0.8, top 50) are neither OpenAI's nor the model's."""
        asked = {name: value for name, value in fields.items() if name not in OWN} | self._sampling
        asked |= {name: getattr(body, name) for name in self._sampling if getattr(body, name) is not None}
        asked["top_k"] = max(0, int(asked["top_k"]))
        if asked["temperature"] < COLDEST:
            asked["temperature"] = 0
        if body.seed is not None:
            asked["seed"] = body.seed % 2**63
        for name in ("max_tokens", "max_completion_tokens"):
            if fields.get(name) is not None:
                asked[name] = min(fields[name], MOST_TOKENS)
        return asked

    def _check_length(self, characters: int, param: str) -> None:
        """Raise ApiError for what is surely too long: nobody else is answered while it splits a text into tokens."""
        least = characters // self._vocabulary.longest
        if self._limit is not None and least > self._limit:
            raise overflow(f"at least {least}", self._limit, param)

    def _read(self, ids: list[int]) -> str:
        """The text that is read as these token ids: it takes no others."""
        text = self._vocabulary.text(ids)
        if self._vocabulary.ids(text) != ids:
            raise ApiError(400, "LMDeploy takes texts, and none is read as these token ids", param="prompt")
        return text


def _refuse(body: Body, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(body, name)
        if value or (name == "logprobs" and value is not None):  # none but the token's own are asked for with 0
            raise ApiError(400, f"LMDeploy does not heed '{name}' here", param=name)


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


def _choice(choice: dict[str, Any], fields: Mapping[str, Any], words: Vocabulary) -> list[int]:
    """Make a choice OpenAI's, token ids as vLLM's; the ids of its log probabilities are returned."""
    choice.setdefault("finish_reason", None)
    if choice.get("output_ids") is not None:
        choice["token_ids"] = choice.pop("output_ids")
    scored = (choice.get("logprobs") or {}).get("content") or []
    if not scored:
        return []
    most = fields.get("top_logprobs") or 0
    ids = [words.number(entry["token"]) for entry in scored]
    choice["logprobs"] = {"content": [_scored(entry, most, words) for entry in scored], "refusal": None}
    return ids


def _scored(entry: Mapping[str, Any], most: int, words: Vocabulary) -> dict[str, Any]:
    """A token and the likeliest, among which it leaves out the one that was taken."""
    top = sorted([entry, *entry["top_logprobs"]], key=lambda one: -one["logprob"])[:most]
    return {**_token(entry, words), "top_logprobs": [_token(one, words) for one in top]}


def _token(entry: Mapping[str, Any], words: Vocabulary) -> dict[str, Any]:
    text = words.text([words.number(entry["token"])])
    # a token that is a part of a character has no text of its own
    whole = list(text.encode()) if BROKEN not in text else None
    return {"token": text, "logprob": entry["logprob"], "bytes": whole}


def _cut_logprobs(choice: dict[str, Any], ids: Sequence[int], text: str, words: Vocabulary) -> None:
    """Keep the log probabilities of as many tokens as it takes to say `text`."""
    if not ids:
        return

    def said(tokens: int) -> int:
        return len(words.text(ids[:tokens], special=False))

    tokens = bisect.bisect_left(range(len(ids) + 1), len(text), key=said)
    choice["logprobs"]["content"] = choice["logprobs"]["content"][:tokens]
