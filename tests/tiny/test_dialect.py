"""How a template writes reasoning and calls is read off the template; what it writes itself is read back as calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve.dialect import Dialect
from serve.json_calls import CallParser
from serve.marked_calls import MarkedForm
from serve.reply import ReasoningParser, Reply
from suite.chat import Chat
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
    assert isinstance(dialect.parser(TOOLS, must=True), CallParser)
    assert dialect.parser([], must=True) is None


@pytest.mark.parametrize("name", THINKING)
def test_marks_of_reasoning(name: str) -> None:
    marks = Dialect.of(named(name)).reasoning
    assert marks == THINKING[name]
    if marks:
        reply = Reply(ReasoningParser(marks))
        reply.feed(f"{marks[0]}\nwhy\n{marks[1]}\n\nbecause", final=True)
        assert (reply.reasoning, reply.content) == ("why", "because")
