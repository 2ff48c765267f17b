"""Where engines differ from what OpenAI's clients expect, set right on the way; everything else stays as it is."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from serve.errors import ApiError


class Translation(Protocol):
    """Where an engine differs from what OpenAI's clients expect."""

    def inside(self, adapter: str) -> str:
        """The name that an adapter has in the engine."""

    def question(self, text: str, ids: Sequence[int], *, chat: bool) -> tuple[str, dict[str, Any]]:
        """Path and fields with which it is asked for the token ids of its answer, and how likely they are.

        `text` is a message, or what is to be gone on with and read as `ids`.
        """

    def ask(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a request as the engine wants them; the very same where its bytes are right as they are.

        Raises ApiError for what the engine cannot do, and would not say.
        """

    def error(self, status: int, body: bytes) -> tuple[int, bytes]:
        """An answer of 400 and above, in OpenAI's form."""

    def answer(self, fields: Mapping[str, Any], body: bytes) -> bytes:
        """A whole answer, as OpenAI would have given it."""

    def stream(self, fields: Mapping[str, Any], chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A streamed one; it may end before the engine does, whose answer is cancelled then."""


class AsIs:
    """For an engine that speaks OpenAI's language, and vLLM's; errors get OpenAI's form where they have another."""

    def inside(self, adapter: str) -> str:
        """The same."""
        return adapter

    def question(self, text: str, ids: Sequence[int], *, chat: bool) -> tuple[str, dict[str, Any]]:  # noqa: ARG002
        """By the fields that vLLM has for it."""
        asked = {"ignore_eos": True, "return_token_ids": True}
        if not chat:
            return "/v1/completions", {**asked, "prompt": text, "logprobs": 1}
        messages = [{"role": "user", "content": text}]
        return "/v1/chat/completions", {**asked, "messages": messages, "logprobs": True, "top_logprobs": 1}

    def ask(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """The request unchanged."""
        return fields

    def error(self, status: int, body: bytes) -> tuple[int, bytes]:
        """As `openai_error`."""
        return openai_error(status, body)

    def answer(self, fields: Mapping[str, Any], body: bytes) -> bytes:  # noqa: ARG002
        """The answer unchanged."""
        return body

    def stream(self, fields: Mapping[str, Any], chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:  # noqa: ARG002
        """The chunks unchanged."""
        return chunks


class JoinedText(AsIs):
    """For an engine that puts line ends between the text parts of a message: joined, they are what all engines read."""

    def ask(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """With one string where a message has a list of nothing but text."""
        messages = fields.get("messages")
        if not isinstance(messages, list) or not any(_joinable(message) for message in messages):
            return fields
        joined = [
            {**message, "content": "".join(part["text"] for part in message["content"])}
            if _joinable(message)
            else message
            for message in messages
        ]
        return {**fields, "messages": joined}


def _joinable(message: Any) -> bool:
    parts = message.get("content") if isinstance(message, dict) else None
    return isinstance(parts, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Server-sent events, each without the empty line at its end, wherever the chunks are cut."""
    kept = b""
    async for chunk in chunks:
        *whole, kept = (kept + chunk).split(b"\n\n")
        for each in filter(None, whole):
            yield each


def openai_error(status: int, body: bytes) -> tuple[int, bytes]:
    """An error in OpenAI's form: as it is, or made from a flat one, from FastAPI's `detail`, or from plain text.

    What FastAPI calls 422 is 400 with OpenAI, and a number is no `code`.
    """
    try:
        said = json.loads(body)
    except ValueError:
        said = body.decode("utf-8", "replace")
    nested = said.get("error") if isinstance(said, dict) else None
    given = nested if isinstance(nested, dict) else said if isinstance(said, dict) else {}
    whole = given is nested and {"message", "type", "param", "code"} <= given.keys()
    if whole and isinstance(given["code"], str | None):
        return status, body
    status = 400 if status == 422 and not whole else status
    kind = str(given.get("type") or ("invalid_request_error" if status < 500 else "server_error"))
    message = _message(nested or said)
    error = ApiError(status, message, kind=kind, param=given.get("param"), code=_code(given.get("code"), message))
    return status, json.dumps(error.body).encode()


def _code(given: Any, message: str) -> str | None:
    """OpenAI's code of an error; engines that put the status there say what happened in words only."""
    if isinstance(given, str):
        return given
    return "context_length_exceeded" if "context length" in message else None


def _message(said: Any) -> str:
    if isinstance(said, dict):
        found = said.get("message") or said.get("detail")
        if isinstance(found, list) and found and isinstance(found[0], dict):  # FastAPI's validation
            path = [str(part) for part in found[0].get("loc", ()) if part != "body"]
            return f"{'.'.join(path)}: {found[0].get('msg', '')}" if path else str(found[0].get("msg", ""))
        return str(found or json.dumps(said))
    return str(said) or "the engine gave no reason"
