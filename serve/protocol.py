"""The bodies of OpenAI's requests, and its form of an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import JSONResponse

UNSUPPORTED: dict[str, Any] = {
    "response_format": {"type": "text"},
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "min_p": 0,
    "best_of": 1,
    "suffix": "",
    "function_call": "none",
    "functions": [],
    "use_beam_search": False,
    "audio": None,
}
"""Fields that would change the answer and are not built yet, each with the value that asks for nothing."""


MAX_ANSWERS = 2048


class ApiError(Exception):
    """An answer in OpenAI's error form with this HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after` seconds the client should wait before it asks again."""
        super().__init__(message)
        # a message may quote what JSON can say and UTF-8 cannot: half a surrogate pair
        message = message.encode("utf-8", "replace").decode()
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of completion take. Unknown fields are ignored, as OpenAI's clients expect of servers."""

    model_config = ConfigDict(extra="allow")

    model: str
    user: str | None = None
    """Of an alias, all requests of one user are answered by the same model."""
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=16)
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Body:
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value != UNSUPPORTED[name]:
                raise ValueError(f"'{name}' is not supported by this server")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatMessage(BaseModel):
    """One message; `content` may be OpenAI's list of text parts."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """The message with its content as one string; raises ApiError for parts that are no text."""
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in self.content):
                raise ApiError(400, "only parts of type 'text' are supported", param="messages")
            message["content"] = "".join(part["text"] for part in self.content)
        return {"content": "", **message}


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def limit(self) -> int | None:
        """The most tokens to generate, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionBody(Body):
    """POST /v1/completions; `max_tokens` 0 with `echo` scores a text."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list of texts or of token ids; raises ApiError where there is nothing, or a negative id."""
        prompt: Any = self.prompt
        prompts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not prompts or not all(prompts):
            raise ApiError(400, "the prompt is empty", param="prompt")
        if len(prompts) * self.n > MAX_ANSWERS:
            raise ApiError(400, f"more than {MAX_ANSWERS} answers in one request", param="prompt")
        if any(isinstance(given, list) and not 0 <= min(given) <= max(given) < 2**31 for given in prompts):
            raise ApiError(400, "token ids must be numbers of the model's vocabulary", param="prompt")
        return list(prompts)
