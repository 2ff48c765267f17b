"""Conversations with a GGUF file, in the server's process: read and answered as our own engine does.

messages ──the file's own template──> text ──its vocabulary──> ids ──llama.cpp──> text ──Reply──> content, calls, …

The handler that comes with llama-cpp-python knows some templates by their look and puts others, without tools, in
their place; it leaves calls of tools in the content, and its server drops what it does not know of messages and tools.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import llama_cpp
from llama_cpp import Llama, LlamaGrammar
from llama_cpp.llama_chat_format import _convert_text_completion_logprobs_to_chat as chat_logprobs
from llama_cpp.llama_grammar import json_schema_to_gbnf
from llama_cpp.llama_tokenizer import LlamaTokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from serve import forms
from serve.errors import ApiError
from serve.json_calls import CallForm, CallParser
from serve.prompts import empty_reply, opened, overflow
from serve.protocol import ChatBody
from serve.reply import Reply
from serve.served import DEFAULTS, Served
from suite.chat import Chat
from suite.errors import SuiteError

TEMPLATE = "tokenizer.chat_template"
PROMPT = (
    "model", "messages", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "chat_template_kwargs",
    "separate_reasoning",
)  # fmt: skip
"""Fields of a conversation that say what is read, and how the answer is told apart."""
GENERATION = (
    "temperature", "top_p", "min_p", "top_k", "stop", "seed", "presence_penalty", "frequency_penalty",
    "repeat_penalty", "logit_bias", "logits_processor", "mirostat_mode", "mirostat_tau", "mirostat_eta", "grammar",
)  # fmt: skip
"""Fields that say how tokens are picked, under the names that `Llama.create_completion` has for them."""
HELD = CallForm('{"name": "', '", "arguments": ', None, "}")
"""How a call is written that has to be made."""


class Lossy(bytes):
    """Text whose broken characters are shown as such: the server would leave them out."""

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """As of `bytes`, but that nothing is ignored."""
        return super().decode(encoding, "replace" if errors == "ignore" else errors)


class Marking(LlamaTokenizer):  # type: ignore[misc]
    """The file's own, which in conversations writes some special tokens, `shown`, too: marks of reasoning and calls."""

    shown: frozenset[int] | None = None
    """None outside of conversations."""

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """The text of tokens after others."""
        if self.shown is None or special:
            return bytes(super().detokenize(tokens, prev_tokens, special))
        if self.shown.isdisjoint(tokens):
            return Lossy(super().detokenize(tokens, prev_tokens))
        pieces = [super(Marking, self).detokenize([t], prev_tokens, t in self.shown) for t in tokens]
        return Lossy(b"".join(pieces))


class Conversations:
    """Answers conversations with one loaded file, one at a time."""

    def __init__(self, model: Llama) -> None:
        self._model, self._served = model, _served(model)
        model.tokenizer_ = self._tokenizer = Marking(model)
        dialect = self._served.dialect
        self._marks, self._thinking = self._numbers(dialect.marks), self._numbers(dialect.reasoning or ())

    def answer(self, fields: Mapping[str, Any]) -> forms.Json | Iterator[dict[str, Any]]:
        """A chat completion, or its chunks. Raises ApiError 400 for what the template or the context cannot take."""
        body = ChatBody.model_validate({name: fields[name] for name in PROMPT if fields.get(name) is not None})
        prompt, ids = self.prompt(body)
        options = {name: fields[name] for name in GENERATION if fields.get(name) is not None}
        options["max_tokens"] = fields.get("max_tokens")
        if schema := _schema(body, fields.get("response_format") or {}):
            options["grammar"] = _grammar(schema, "tools" if body.must_call else "response_format")
        if fields.get("logprobs"):
            options["logprobs"] = fields.get("top_logprobs") or 0
        reply = _reply(body, self._served, prompt)
        shown = self._marks if body.usable_tools else self._thinking
        answers = self._completions(ids, shown, {**options, "model": body.model, "stream": bool(fields.get("stream"))})
        return _chunks(body, reply, answers) if fields.get("stream") else _whole(body, reply, answers)

    def prompt(self, body: ChatBody) -> tuple[str, list[int]]:
        """What the model reads: a conversation up to its answer, and the token ids of that. Raises ApiError 400."""
        text = opened(body, self._served)
        ids, context = self._ids(text), self._model.n_ctx()
        if len(ids) >= context:
            raise overflow(str(len(ids)), context, "messages")
        return text, ids

    def _completions(self, ids: list[int], shown: frozenset[int], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What llama.cpp goes on with, in one piece or in many."""
        self._tokenizer.shown = shown
        try:
            made = self._model.create_completion(ids, **options)
            yield from made if options["stream"] else [made]
        finally:
            self._tokenizer.shown = None

    def _numbers(self, marks: Sequence[str]) -> frozenset[int]:
        """Of the marks that are tokens."""
        read = [self._ids(mark) for mark in marks]
        return frozenset(ids[0] for ids in read if len(ids) == 1)

    def _ids(self, text: str) -> list[int]:
        """Special tokens come from the template alone."""
        return list(self._model.tokenize(text.encode("utf-8", "replace"), add_bos=False, special=True))


def _chunks(body: ChatBody, reply: Reply, answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The events of a stream, with what is certain of each piece."""
    head = _head("chat.completion.chunk", body)
    delta: dict[str, Any] = {"role": "assistant", "content": ""}
    yield {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}
    for answer in answers:
        (choice,) = answer["choices"]
        ended = choice["finish_reason"] is not None
        delta = forms.chat_delta(reply.feed(choice["text"], ended), reply)
        if delta or ended:
            yield {**head, "choices": [{"delta": delta, **_about(choice, reply)}]}


def _whole(body: ChatBody, reply: Reply, answers: Iterator[dict[str, Any]]) -> forms.Json:
    (answer,) = answers
    (choice,) = answer["choices"]
    reply.feed(choice["text"], final=True)
    made = {"message": forms.message(reply), **_about(choice, reply)}
    return forms.Json({**_head("chat.completion", body), "choices": [made], "usage": answer["usage"]})


def _about(choice: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    reason, scored = choice["finish_reason"], chat_logprobs(choice["logprobs"])
    return {
        "index": 0,
        "logprobs": json.loads(json.dumps(scored, default=float)),  # some numbers are numpy's
        "finish_reason": "tool_calls" if reason == "stop" and reply.calls else reason,
    }


def _head(kind: str, body: ChatBody) -> dict[str, Any]:
    return {"id": forms.new_id("chatcmpl"), "object": kind, "created": int(time.time()), "model": body.model}


def _reply(body: ChatBody, served: Served, prompt: str) -> Reply:
    if not body.must_call:
        return empty_reply(body, served, prompt, inline=False)
    return Reply(None, CallParser(HELD, [tool["name"] for tool in _offered(body)]))


def _offered(body: ChatBody) -> Sequence[Mapping[str, Any]]:
    """The functions that may be called: all, or the one that the request names."""
    functions = [tool["function"] for tool in body.usable_tools or []]
    if body.tool_choice is None or isinstance(body.tool_choice, str):
        return functions
    return [function for function in functions if function["name"] == body.tool_choice.function.name]


def _schema(body: ChatBody, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an answer must be: a call that has to be made, or what `response_format` says; None where it is free."""
    if body.must_call:
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for f in _offered(body)
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}
    kind = wanted.get("type")
    if kind == "json_schema":
        return dict(wanted["json_schema"].get("schema") or {"type": "object"})
    return dict(wanted.get("schema") or {"type": "object"}) if kind == "json_object" else None


def _grammar(schema: Mapping[str, Any], param: str) -> LlamaGrammar:
    """JSON of this schema, which the field `param` asks for. Raises ApiError 422.

    The rules that are made for schemas would let line ends stand in a text as they are.
    """
    try:
        rules = json_schema_to_gbnf(json.dumps(schema)).replace(r'[^"\\]', r'[^"\\\x00-\x1F\x7F]')
        return LlamaGrammar.from_string(rules, verbose=False)
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise ApiError(422, f"llama.cpp makes no grammar of the schema: {error}", param=param) from None


def _served(model: Llama) -> Served:
    """The file's template and its special tokens, as the code that renders for our own engine takes them."""
    inner = model._model
    ends = frozenset(i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(inner.vocab, i))
    named = {"bos_token": model.token_bos(), "eos_token": model.token_eos()}
    special = {name: inner.token_get_text(i) for name, i in named.items() if i != -1}
    words = {inner.token_get_text(i): i for i in {*ends, *named.values()} - {-1}}
    found = {key: text for key, text in model.metadata.items() if key.startswith(TEMPLATE)}
    templates = {key.removeprefix(TEMPLATE).removeprefix(".") or "default": text for key, text in found.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="")),  # no text is read by it
        chat_template=templates if len(templates) > 1 else templates.get("default"),
        **special,
    )
    try:
        chat, no_chat = Chat(tokenizer, ends), ""
    except SuiteError:
        chat, no_chat = None, "the file has no chat template"
    return Served("", "", "", tokenizer, chat, no_chat, ends, DEFAULTS)


def create_chat_completion(self: Llama, **fields: Any) -> Any:
    """What `Llama` answers to a conversation; a refusal has the form that OpenAI's clients expect."""
    if not hasattr(self, "_conversations"):
        self._conversations = Conversations(self)
    try:
        return self._conversations.answer(fields)
    except ApiError as error:
        return iter([error.body]) if fields.get("stream") else error.response()
