"""The bodies of OpenAI's requests."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.errors import ApiError
from serve.generation import Pooling

UNSUPPORTED: dict[str, Any] = {
    "best_of": 1,
    "suffix": "",
    "function_call": "none",
    "functions": [],
    "use_beam_search": False,
    "audio": None,
    "modalities": ["text"],
    "prediction": None,
    "web_search_options": None,
    "chat_template": None,
    "continue_final_message": False,
    "add_generation_prompt": True,
    "documents": None,
    "truncate_prompt_tokens": None,
    "include_stop_str_in_output": False,
    "allowed_token_ids": None,
    "bad_words": [],
    "length_penalty": 1,
    "prompt_logprobs": None,
    "guided_json": None,
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
}
"""Fields that would change the answer and are not built, each with the value that asks for nothing."""


MAX_ANSWERS = 2048
Stop = Annotated[str, Field(max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Prompts = str | list[int] | list[str] | list[list[int]]


TEXT_PARTS = {"text", "input_text", "output_text"}
"""Types of the parts of a message that are text: those of chat completions, and of responses."""


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    include_usage: bool | None = None


class JsonSchema(BaseModel):
    """A schema with a name; not `strict`, keywords that cannot be enforced are left out."""

    model_config = ConfigDict(strict=True)

    name: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonFormat(BaseModel):
    """What an answer must be: `json_object` is any object."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> JsonFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' and the type 'json_schema' go together")
        return self


class StructuredOutputs(BaseModel):
    """What an answer must be, as vLLM takes it: exactly one of the fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    """A JSON schema, or its text."""
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None
    """In llguidance's Lark or llama.cpp's GBNF."""
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar and json_object")
        return self

    @property
    def schema_(self) -> dict[str, Any] | None:
        """The schema as an object; raises ApiError where its text is none."""
        if not isinstance(self.json_, str):
            return self.json_
        try:
            schema = json.loads(self.json_)
        except (ValueError, RecursionError):
            schema = None
        if not isinstance(schema, dict):
            raise ApiError(400, "structured_outputs.json is no JSON schema", param="structured_outputs")
        return schema


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
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    """Tokens that end an answer too, and are no part of it."""
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    """No end and no stop string before so many tokens."""
    response_format: JsonFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _fits(self) -> Body:
        if self.response_format and self.response_format.type != "text" and self.structured_outputs:
            raise ValueError("response_format and structured_outputs exclude each other")
        return self

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
    reasoning_effort: str | None = Field(None, max_length=64)
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
    def must_call(self) -> bool:
        """Whether the answer has to be a call of a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def usable_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]


class CompletionBody(Body):
    """POST /v1/completions; `max_tokens` 0 with `echo` scores a text."""

    prompt: Prompts
    max_tokens: int | None = Field(16, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list; raises ApiError 400."""
        return listed(self.prompt, "prompt", MAX_ANSWERS // self.samples)


class EmbeddingBody(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    user: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Pooling | None = None
    """How the hidden states of a text's tokens become one vector; by default the server's choice."""

    @property
    def ignored(self) -> list[str]:
        """The fields that were given and mean nothing here."""
        return [*(self.model_extra or {})]

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """The texts as a list; raises ApiError 400."""
        if self.dimensions is not None:
            raise ApiError(400, "this model's embeddings have one size and no other", param="dimensions")
        return listed(self.input, "input", MAX_ANSWERS)


class TokenizeBody(BaseModel):
    """POST /tokenize, with a `prompt`, to which special tokens are added unless told otherwise, or with `messages`."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, max_length=128)
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    tokens: list[int]


def listed(given: Any, param: str, most: int) -> list[str] | list[list[int]]:
    """One or several texts, or one or several lists of token ids, as a list of either.

    Raises ApiError 400 where there is nothing, more than `most`, or a number that is no token's.
    """
    texts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not texts or not all(texts):
        raise ApiError(400, f"the {param} is empty", param=param)
    if len(texts) > most:
        raise ApiError(400, f"more than {MAX_ANSWERS} answers in one request", param=param)
    for ids in texts:
        if isinstance(ids, list):
            check_ids(ids, param)
    return list(texts)


def check_ids(ids: list[int], param: str) -> None:
    """Raise ApiError 400 for numbers that no vocabulary has."""
    if ids and not 0 <= min(ids) <= max(ids) < 2**31:
        raise ApiError(400, "token ids must be numbers of the model's vocabulary", param=param)
