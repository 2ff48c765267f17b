"""How a template writes reasoning and calls is read off the template; what it writes itself is read back as calls."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from serve import grammar
from serve.dialect import Dialect
from serve.json_calls import CallParser
from serve.marked_calls import MarkedCalls, MarkedForm, Spelling
from serve.reply import ReasoningParser, Reply
from suite.chat import Chat
from suite.errors import SuiteError
from tests.tiny.test_grammar import follows, written
from tests.tiny.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

OURS = Path(__file__).parent / "templates"
REAL = Path(__file__).parents[3] / "shared" / "chat-templates"
FIRST = {
    "json-calls": "<tool_call>",
    "Bielik-11B-v3.0-Instruct": "<tool_call>",
    "Cohere2MoE": "<|START_ACTION|>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|START_ACTION|>",
    "GigaChat3.1-10B-A1.8B": "<|function_call|>",
    "MiMo-VL": "<tool_call>",
    "Mistral-Small-3.2-24B-Instruct-2506": "[TOOL_CALLS]",
    "NVIDIA-Nemotron-Nano-v2": "<TOOLCALL>",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "<tool_call>",
    "Qwen-Qwen2.5-7B-Instruct": "<tool_call>",
    "Reka-Edge": "<tool_call>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "ibm-granite-granite-4.0": "<tool_call>",
    "meta-llama-Llama-3.2-3B-Instruct": "",
    "mistralai-Mistral-Nemo-Instruct-2407": "[TOOL_CALLS]",
    "unsloth-mistral-Devstral-Small-2507": "[TOOL_CALLS]",
}
"""The mark before a call, of the templates that write names and JSON arguments."""
MARKED = {
    "keyed-calls": "<tool_call>",
    "tagged-calls": "<function=",
    "GLM-4.7-Flash": "<tool_call>",
    "MiniMax-M2": '<invoke name="',
    "Qwen3-Coder": "<function=",
    "StepFun3.5-Flash": "<function=",
    "deepseek-ai-DeepSeek-V3.2": '<｜DSML｜invoke name="',
    "deepseek-ai-DeepSeek-V4": '<｜DSML｜invoke name="',
    "inclusionai-ling-3.0-flash": "<tool_call>",
    "openbmb-MiniCPM5-1B": '<function name="',
    "poolside-Laguna-XS-2.1": "<tool_call>",
    "tencent-Hy3": "<tool_call:opensource>",
}
"""The same of the templates that put every argument between marks of its own."""
THINKING = {
    "json-calls": ("<think>", "</think>"),
    "keyed-calls": ("<think>", "</think>"),
    "tagged-calls": None,
    "GLM-4.7-Flash": ("<think>", "</think>"),
    "Cohere2MoE": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("<think>", "</think>"),
    "tencent-Hy3": ("<think:opensource>", "</think:opensource>"),
    "Qwen-Qwen2.5-7B-Instruct": None,
    "meta-llama-Llama-3.2-3B-Instruct": None,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "add")
]


def chat_of(template: str) -> Chat:
    tokenizer = tiny_tokenizer(512, template)
    tokenizer.bos_token = "<s>"
    return Chat(tokenizer)


def named(name: str) -> Chat:
    file = next((file for folder in (OURS, REAL) if (file := folder / f"{name}.jinja").is_file()), None)
    if file is None:
        pytest.skip("no shared/chat-templates beside the checkout")
    return chat_of(file.read_text("utf-8"))


def calling(name: str, arguments: dict[str, Any], number: str = "call00001") -> dict[str, Any]:
    call = {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def test_a_tokenizer_that_is_changed_is_nobody_elses() -> None:
    assert chat_of(CHAT_TEMPLATE).tokenizer.bos_token == "<s>"
    assert tiny_tokenizer(512, CHAT_TEMPLATE).bos_token is None


def test_our_own_templates() -> None:
    dialect = Dialect.of(chat_of(CHAT_TEMPLATE))
    assert dialect.calls
    assert dialect.calls.first == '<tool_call>\n{"name": "'
    assert (dialect.calls.middle, dialect.calls.last) == ('", "arguments": ', "}\n</tool_call>")
    assert (dialect.reasoning, dialect.takes_tools) == (None, True)


def test_a_template_without_tools() -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    assert Dialect.of(chat_of(plain)) == Dialect(None, None, takes_tools=False)


@pytest.mark.parametrize("name", FIRST)
def test_json_arguments_are_read_back(name: str) -> None:
    """The template's own rendering of a call, token borders aside, is what a model trained on it would write."""
    chat = named(name)
    dialect = Dialect.of(chat)
    form = dialect.calls
    assert form
    assert form.opening == FIRST[name]
    arguments = {"city": 'Pa"ris {', "days": [1, 2]}
    question = {"role": "user", "content": "q"}
    text = chat.text([question, calling("get_weather", arguments)], TOOLS)
    said = text[text.rindex(form.opening or '{"name"') :] if form.opening else text[text.rindex('{"name": "get') :]
    reply = Reply(calling=CallParser(form, ["get_weather"]))
    for char in said.partition("<|im_end|>")[0]:
        reply.feed(char)
    reply.feed("", final=True)
    (call,) = reply.calls
    assert call.name == "get_weather"
    assert json.loads(call.arguments) == arguments


@pytest.mark.parametrize("name", MARKED)
def test_arguments_between_marks_are_read_back(name: str) -> None:
    chat = named(name)
    dialect = Dialect.of(chat)
    assert isinstance(dialect.calls, MarkedForm)
    assert dialect.calls.opening == MARKED[name]
    arguments = {"city": "Paris, 7 <e>", "days": [1, 2], "code": "a = 1\nb = 2"}
    question = {"role": "user", "content": "q"}
    text = chat.text([question, calling("get_weather", arguments)], TOOLS)
    reply = Reply(calling=dialect.parser(TOOLS, must=False))
    for char in text[text.rindex(dialect.calls.opening) :].partition("<|im_end|>")[0]:
        reply.feed(char)
    reply.feed("", final=True)
    (call,) = reply.calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", arguments)
    assert isinstance(dialect.parser(TOOLS, must=True), MarkedCalls)
    assert dialect.parser([], must=True) is None


TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "where"},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}},
        "unit": {"type": "string", "enum": ["C", "°F"]},
    },
    "required": ["city", "days"],
    "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 7}},
}


@pytest.mark.parametrize("tokens", [False, True], ids=["spelled", "tokens"])
@pytest.mark.parametrize("name", MARKED)
def test_required_calls_are_held_to_the_form_of_the_template(name: str, tokens: bool) -> None:
    chat = named(name)
    dialect = Dialect.of(chat)
    form = dialect.held(must=True)
    assert isinstance(form, Spelling)
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.add_tokens([mark for mark in dialect.marks if tokens and mark.endswith(">")])
    functions = [{"name": "get_weather", "parameters": TRIP, "strict": True}, {"name": "add"}]
    bound = grammar.tool_calls(functions, form, tokenizer, "tools", parallel=True)

    def said(**arguments: Any) -> str:
        text = chat.text([{"role": "user", "content": "q"}, calling("get_weather", arguments)], TOOLS)
        return text[text.rindex(form.first) :].partition("<|im_end|>")[0].rstrip()

    right = {"city": "Pa<r>is\n", "days": [1, 7]}
    for text in (said(**right), said(**right, unit="°F"), f"{form.first}add{form.middle}{form.last}"):
        assert follows(bound, tokenizer, text), text
    for wrong in ({"city": "Paris"}, {**right, "days": [8]}, {**right, "unit": "K"}, {**right, "other": "x"}):
        assert not follows(bound, tokenizer, said(**wrong)), wrong
    numbers = {"type": "object", "properties": {"a": TRIP["$defs"]["day"], "unit": TRIP["properties"]["unit"]}}
    drawn = grammar.tool_calls([{"name": "add", "parameters": numbers}], form, tokenizer, "tools", parallel=True)
    reply = Reply(calling=MarkedCalls(dialect.calls, {"add": numbers}))  # type: ignore[arg-type]
    reply.feed(written(drawn, tokenizer, seed=1), final=True)
    assert reply.calls
    for call in reply.calls:
        jsonschema.validate(json.loads(call.arguments), {**numbers, "additionalProperties": False})


def test_what_cannot_be_enforced_between_marks_is_an_error_for_strict_tools() -> None:
    form = Dialect.of(named("tagged-calls")).held(must=False)
    assert form
    short = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 3}}}
    tool = {"name": "f", "parameters": short}
    assert grammar.tool_calls([tool], form, tiny_tokenizer(), "tools")
    for odd in ({"properties": [5]}, {"properties": {"a": {"type": "string", "enum": 5}}, "required": 7}):
        with pytest.raises(SuiteError, match="are no JSON schema"):
            grammar.tool_calls([{"name": "f", "parameters": odd}], form, tiny_tokenizer(), "tools")
    for odd in ({"a": 5}, {"a": {"type": "string", "enum": 5}}, {"a": {"type": ["string"]}}, {"a\ud800": True}):
        assert grammar.tool_calls([{"name": "f", "parameters": {"properties": odd}}], form, tiny_tokenizer(), "tools")
    with pytest.raises(SuiteError, match="'maxLength' of a text is not supported in the form of this model's calls"):
        grammar.tool_calls([{**tool, "strict": True}], form, tiny_tokenizer(), "tools")


@pytest.mark.parametrize("name", THINKING)
def test_marks_of_reasoning(name: str) -> None:
    marks = Dialect.of(named(name)).reasoning
    assert marks == THINKING[name]
    if marks:
        reply = Reply(ReasoningParser(marks))
        reply.feed(f"{marks[0]}\nwhy\n{marks[1]}\n\nbecause", final=True)
        assert (reply.reasoning, reply.content) == ("why", "because")
