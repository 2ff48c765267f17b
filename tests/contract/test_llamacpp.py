"""A GGUF file as people talk to it: llama.cpp's own server behind our gateway."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from export import gguf
from serve.backends import endpoint
from serve.engines.llamacpp import NEEDED, LlamaCppApi, gguf_file
from serve.errors import ApiError
from serve.forms import Json
from serve.protocol import ChatBody
from suite.chat import Chat
from suite.errors import SuiteError
from tests.namesakes import namesakes

for name in NEEDED:
    pytest.importorskip(name, reason="llama.cpp's server is not installed")

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"


def tool(name: str, **properties: str) -> dict[str, Any]:
    """A tool that needs arguments of these types; with a field and an order of fields that are nobody's own."""
    typed = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": typed, "required": [*typed]}
    return {"type": "function", "function": {"parameters": parameters, "name": name, "description": f"{name}.", "x": 1}}


TOOLS = [tool("get_weather", city="string"), tool("set_alarm", hour="integer")]
ASKED = {"role": "user", "content": "What is the weather in Rome?"}
CALLED = {
    "id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
}  # fmt: skip
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [ASKED],
    "another": [{"role": "user", "content": "Set an alarm for 7."}],
    "chinese": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "蚂蚁是什么动物？"}],
    "turns": [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "call00001", "content": '{"sky": "rain"}'},
    ],
    "next": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello!", "reasoning_content": "hm"},
        ASKED,
    ],
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    gguf.write(NANO, folder / "nano.gguf", "f16", "nano")
    return folder


@pytest.fixture(scope="module")
def client(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with (
        contextlib.chdir(namesakes(tmp_path_factory.mktemp("here"))),
        endpoint(package, name="nano", backend="llamacpp", max_length=256) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def test_it_answers_by_the_files_own_template(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    question = {"role": "user", "content": [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]}
    answer = client.chat.completions.create(
        model="nano", messages=[question], temperature=0, max_completion_tokens=20, logprobs=True,  # type: ignore[list-item]
    )  # fmt: skip
    assert answer.choices[0].message.content == "I am nano, a small language model."
    assert answer.usage
    assert answer.usage.prompt_tokens == 12  # as transformers renders it
    assert answer.choices[0].logprobs
    assert answer.choices[0].logprobs.content
    assert -0.1 < answer.choices[0].logprobs.content[0].logprob <= 0


@pytest.fixture(scope="module")
def ours() -> Iterator[openai.OpenAI]:
    """The same model in our own engine."""
    with (
        endpoint(NANO, name="nano") as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def ask(client: openai.OpenAI, messages: list[dict[str, Any]], **fields: Any) -> Any:
    given = {"temperature": 0, "max_tokens": 60, **fields}
    return client.chat.completions.create(model="nano", messages=messages, **given)  # type: ignore[call-overload]


def said(answer: Any) -> tuple[Any, ...]:
    """What must be equal: what was read, and what was answered."""
    (choice,) = answer.choices
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    return answer.usage.prompt_tokens, choice.message.content, calls, choice.finish_reason


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_it_answers_as_the_model_does(
    client: openai.OpenAI, ours: openai.OpenAI, name: str, tools: list[dict[str, Any]] | None
) -> None:
    fields = {"tools": tools} if tools else {}
    whole = ask(client, CONVERSATIONS[name], **fields)
    assert said(whole) == said(ask(ours, CONVERSATIONS[name], **fields))
    content, names, arguments, finish = "", [], "", None
    for chunk in ask(client, CONVERSATIONS[name], stream=True, **fields):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
        finish = choice.finish_reason or finish
    _, text, calls, ended = said(whole)
    assert (content, names, finish) == (text or "", [call for call, _ in calls], ended)
    assert arguments == "".join(given for _, given in calls)
    if name == "one" and tools:
        assert calls == [("get_weather", '{"city": "Rome"}')]


def test_it_reads_what_the_model_was_trained_on(package: Path) -> None:
    from llama_cpp import Llama

    from serve.engines.llamacpp_chat import Conversations

    model = Llama(str(package / "nano.gguf"), n_ctx=512, verbose=False)
    found, chat = Conversations(model), Chat.load(NANO)
    for messages in CONVERSATIONS.values():
        body = ChatBody.model_validate({"model": "nano", "messages": messages, "tools": TOOLS})
        plain = [message.plain() for message in body.messages]
        assert found.prompt(body)[1] == chat.ids(plain, body.usable_tools, generate=True)
    model.metadata.clear()
    with pytest.raises(ApiError, match="the file has no chat template"):
        Conversations(model).prompt(body)
    model.close()


def test_marks_that_are_special_tokens_tell_calls_too(tmp_path: Path) -> None:
    from llama_cpp import Llama

    from serve.engines.llamacpp_chat import Conversations

    shutil.copytree(NANO, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    for token in tokenizer["added_tokens"]:
        token["special"] = True
    file.write_text(json.dumps(tokenizer), "utf-8")
    gguf.write(tmp_path / "model", tmp_path / "nano.gguf", "f16", "nano")
    model = Llama(str(tmp_path / "nano.gguf"), n_ctx=512, verbose=False)
    fields = {"model": "nano", "messages": [ASKED], "tools": TOOLS, "temperature": 0}
    answer = Conversations(model).answer(fields)
    assert isinstance(answer, Json)
    (call,) = json.loads(answer.body)["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert b"<tool_call>" not in model.detokenize([2044])  # as before, outside of conversations
    model.close()


def test_an_answer_is_held_to_what_it_must_be(client: openai.OpenAI) -> None:
    hello = [{"role": "user", "content": "Who are you?"}]
    for choice, names in [
        ("required", {"get_weather", "set_alarm"}),
        ({"type": "function", "function": {"name": "set_alarm"}}, {"set_alarm"}),
    ]:
        (call,) = ask(client, hello, tools=TOOLS, tool_choice=choice).choices[0].message.tool_calls
        assert call.function.name in names
        assert isinstance(json.loads(call.function.arguments), dict)
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    assert isinstance(json.loads(ask(client, hello, response_format=form).choices[0].message.content)["sum"], int)


def test_what_cannot_be_answered_is_refused(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "word " * 400}]
    for messages, fields, reason in [
        (long, {}, "maximum context length is 256"),
        ([ASKED], {"n": 2}, "one answer at a time"),
        ([ASKED], {"extra_body": {"stop_token_ids": [5]}}, "stop_token_ids"),
        ([ASKED], {"tools": [{"type": "other"}]}, "tools.0"),
        ([ASKED], {"extra_body": {"chat_template_kwargs": {"tools": 1}}}, "no variable of a chat template"),
    ]:
        with pytest.raises(openai.BadRequestError, match=reason):
            ask(client, messages, **fields)


def test_streams_and_scores(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "Who are you?"}
    chunks = client.chat.completions.create(
        model="nano", messages=[question], temperature=0, max_tokens=4, stream=True,  # type: ignore[list-item]
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith("I am nano")
    scored = client.completions.create(model="nano", prompt="The sky", max_tokens=1, echo=True, logprobs=1)
    assert scored.choices[0].logprobs
    assert scored.choices[0].logprobs.token_logprobs
    assert scored.choices[0].logprobs.token_logprobs[0] is None


def test_what_it_cannot_do_is_said_before_it_starts(package: Path, tmp_path: Path) -> None:
    for model, options, said in [
        (tmp_path, {}, "there is no GGUF file at"),
        (package, {"lora_dir": [str(tmp_path)]}, "served without adapters"),
        (package, {"max_prompt": 5}, "no limit of the prompt alone"),
    ]:
        with pytest.raises(SuiteError, match=said), endpoint(model, backend="llamacpp", **options):  # type: ignore[arg-type]
            pass
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    assert gguf_file(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    with pytest.raises(SuiteError, match="2 GGUF files"):
        gguf_file(tmp_path)


def test_fields_that_it_has_other_names_for() -> None:
    asked = {"model": "nano", "messages": [{"role": "user", "content": "Hi"}]}
    told = {
        **asked, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0,
        "separate_reasoning": True,
    }  # fmt: skip
    api = LlamaCppApi()
    assert api.ask("/v1/chat/completions", asked) == told
    given = {"max_completion_tokens": 5, "top_k": -1, "repetition_penalty": 1.2, "temperature": None}
    wanted = {**told, "max_tokens": 5, "repeat_penalty": 1.2}
    assert api.ask("/v1/chat/completions", {**asked, **given}) == wanted
    text = {"prompt": "Hi", "model": "nano"}
    assert api.ask("/v1/completions", text)["repeat_penalty"] == 1.0
    other = {"input": "Hi"}
    assert api.ask("/v1/embeddings", other) is other
