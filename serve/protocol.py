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
Stop = Annotated[str, Field(max_length=1024)]


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


TEXT_PARTS = {"text", "input_text", "output_text"}
"""Types of the parts of a message that are text: those of chat completions, and of responses."""


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    include_usage: bool | None = None


class Body(BaseModel):
    """What both kinds of completion take. Unknown fields are ignored, as OpenAI's clients expect of servers."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    user: str | None = None
    """Of an alias, all requests of one user are answered by the same model."""
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=16)
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Body:
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value != UNSUPPORTED[name]:
                raise ValueError(f"'{name}' is not supported by this server")
        return self

    @property
    def samples(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def ignored(self) -> list[str]:
        """The fields that were given and mean nothing here."""
        return [name for name in self.model_extra or {} if name not in UNSUPPORTED]

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatMessage(BaseModel):
    """One message; `content` may be OpenAI's list of text parts."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None

    def plain(self) -> dict[str, Any]:
        """The message with its content as one string; raises ApiError for parts that are no text."""
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            if any(part.get("type") not in TEXT_PARTS for part in self.content):
                raise ApiError(400, "only parts of type 'text' are supported", param="messages")
            message["content"] = "".join(str(part.get("text", "")) for part in self.content)
        if thought := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = thought
        return {"content": "", **message}


class FunctionCall(BaseModel):
    """What an assistant called; `arguments` is JSON text."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    arguments: str = ""


class ToolCall(BaseModel):
    """A call in an assistant's message."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(BaseModel):
    """What a tool is; `parameters` is the JSON schema of its arguments."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    """A function by its name."""

    name: str


class NamedTool(BaseModel):
    """A choice of one tool."""

    type: Literal["function"]
    function: FunctionName


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    separate_reasoning: bool | None = None
    """False leaves reasoning in the content, with its marks."""

    @model_validator(mode="after")
    def _choice_fits_tools(self) -> ChatBody:
        names = [tool.function.name for tool in self.tools or []]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names '{self.tool_choice.function.name}', which is not among the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is 'required', but there are no tools")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens to generate, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def usable_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]


class CompletionBody(Body):
    """POST /v1/completions; `max_tokens` 0 with `echo` scores a text."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list of texts or of token ids; raises ApiError where there is nothing, or a negative id."""
        prompt: Any = self.prompt
        prompts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not prompts or not all(prompts):
            raise ApiError(400, "the prompt is empty", param="prompt")
        if len(prompts) * self.samples > MAX_ANSWERS:
            raise ApiError(400, f"more than {MAX_ANSWERS} answers in one request", param="prompt")
        if any(isinstance(given, list) and not 0 <= min(given) <= max(given) < 2**31 for given in prompts):
            raise ApiError(400, "token ids must be numbers of the model's vocabulary", param="prompt")
        return list(prompts)
