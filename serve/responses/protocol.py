"""The body of /v1/responses, and the chat request that it means."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.errors import ApiError
from serve.protocol import TEXT_PARTS, Body, ChatBody

CHAT_FIELDS = frozenset(Body.model_fields) - {"n", "max_tokens", "response_format", "stream_options"}
"""Fields that are no part of OpenAI's Responses API, and mean what they do in a chat."""

UNSUPPORTED: dict[str, Any] = {
    "previous_response_id": None,
    "conversation": None,
    "prompt": None,
    "background": False,
    "truncation": "disabled",
    "top_logprobs": 0,
    "store": False,
}
"""Fields that this server refuses, each with the value that asks for nothing."""
WHY = {
    "previous_response_id": "responses are not stored: send the whole conversation as 'input'",
    "conversation": "conversations are not stored: send the whole conversation as 'input'",
    "store": "responses are not stored: leave 'store' out, or say false",
    "top_logprobs": "/v1/chat/completions has log probabilities",
}


class FunctionTool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(BaseModel):
    """A choice of one tool."""

    type: Literal["function"]
    name: str


class TextFormat(BaseModel):
    """What the answer must be; with `json_schema`, name and schema stand beside the type."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text", "json_object", "json_schema"]


class Text(BaseModel):
    """How the answer's text is made."""

    model_config = ConfigDict(extra="allow", strict=True)

    format: TextFormat | None = None


class Reasoning(BaseModel):
    """How much the model thinks, where its template knows of that."""

    model_config = ConfigDict(extra="allow", strict=True)

    effort: str | None = Field(None, max_length=64)


class ResponsesBody(BaseModel):
    """POST /v1/responses. Nothing is stored: each request brings its whole conversation."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None

    @property
    def ignored(self) -> list[str]:
        """The fields that were given and mean nothing here."""
        heeded = {*UNSUPPORTED, *CHAT_FIELDS, "chat_template_kwargs"}
        return [name for name in self.model_extra or {} if name not in heeded]

    def chat(self) -> ChatBody:
        """The same as a chat request. Raises ApiError 400 for what it cannot say, and pydantic's ValidationError."""
        extra = self.model_extra or {}
        for name, nothing in UNSUPPORTED.items():
            if extra.get(name) is not None and extra[name] != nothing:
                raise ApiError(400, WHY.get(name, f"'{name}' is not supported by this server"), param=name)
        body: dict[str, Any] = {
            **{name: extra[name] for name in extra if name in CHAT_FIELDS or name == "chat_template_kwargs"},
            "model": self.model,
            "messages": messages(self.input, self.instructions),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "user": self.user,
            "parallel_tool_calls": self.parallel_tool_calls,
            "tool_choice": self.tool_choice,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "tools": [_nested(tool) for tool in self.tools or []],
        }
        if isinstance(self.tool_choice, FunctionChoice):
            body["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        if self.text and self.text.format and self.text.format.type != "text":
            body["response_format"] = _format(self.text.format)
        return ChatBody.model_validate(body)


def messages(given: str | list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """The messages of a chat; what one turn of the assistant left as several items is one message.

    Raises ApiError 400 for items that are neither text nor calls of functions.
    """
    chat: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*chat, {"role": "user", "content": given}]
    for number, item in enumerate(given):
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") != "assistant":
            chat.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call_output":
            output = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            chat.append(output)
        elif kind in ("message", "function_call", "reasoning"):
            if not chat or chat[-1]["role"] != "assistant":
                chat.append({"role": "assistant", "content": ""})
            _continue(chat[-1], kind, item)
        else:
            raise ApiError(400, f"input[{number}]: items of type '{kind}' are not supported", param="input")
    return chat


def _continue(turn: dict[str, Any], kind: str, item: dict[str, Any]) -> None:
    """Add an item to the assistant's turn."""
    if kind == "message":
        turn["content"] += _text(item.get("content"))
    elif kind == "reasoning":
        turn["reasoning_content"] = turn.get("reasoning_content", "") + _text(item.get("content"))
    else:
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        turn.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})


def _text(content: Any) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    if not isinstance(content, list) or not all(
        isinstance(part, dict)
        and part.get("type") in (*TEXT_PARTS, "reasoning_text")
        and isinstance(part.get("text"), str)
        for part in content
    ):
        raise ApiError(400, "only parts of text are supported", param="input")
    return "".join(part["text"] for part in content)


def _nested(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _format(given: TextFormat) -> dict[str, Any]:
    if given.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": given.model_dump(exclude={"type"})}
