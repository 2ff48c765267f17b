"""The shapes of answers in OpenAI's API: what the OpenAPI document says, and what `serve.forms` makes."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetail(TypedDict):
    """What went wrong; `param` is the field of the request that caused it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """Every answer that is no 200."""

    error: ErrorDetail


class CachedTokens(TypedDict):
    """How many tokens of a prompt were not read, as one before began with them too."""

    cached_tokens: int


class Usage(TypedDict):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TokenLogprob(TypedDict):
    """A token; `bytes` is None for one that is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ScoredToken(TokenLogprob):
    """A token of the answer, beside the likeliest at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    """Log probabilities of an answer's tokens."""

    content: list[ScoredToken]
    refusal: None


class CalledFunction(TypedDict):
    """What is called; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(TypedDict):
    """What the assistant says. `reasoning` and `reasoning_content` are the same: clients look for either."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """One of `n` answers."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(TypedDict):
    """What is new of one of `n` answers; `delta` has the keys of a message that have something new."""

    index: int
    delta: dict[str, Any]
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    """One event of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]


class CompletionLogprobs(TypedDict):
    """Lists with an entry for each token; the first token of a prompt has None."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One answer to one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """The answer of /v1/completions, and an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class PromptUsage(TypedDict):
    """Counts of tokens where none are generated."""

    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    """One vector of length 1, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(TypedDict):
    """The answer of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class Tokenized(TypedDict):
    """The answer of /tokenize; `token_strs` are the vocabulary's own spellings."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """The answer of /detokenize."""

    prompt: str


class Alias(TypedDict):
    """A name that stands for others: the share of each, and the shares `before` these, where there were any."""

    id: str
    object: Literal["alias"]
    targets: dict[str, float]
    before: dict[str, float] | None


class Aliases(TypedDict):
    """The answer of /v1/aliases."""

    object: Literal["list"]
    data: list[Alias]


class Deleted(TypedDict):
    """What is there no more."""

    id: str
    object: Literal["alias"]
    deleted: Literal[True]
