"""Clients that nobody here wrote, as they are on PyPI: LangChain and LiteLLM chat, stream, call tools, follow schemas."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from serve.backends import Endpoint, endpoint

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # LiteLLM asks GitHub for prices otherwise
langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
litellm = pytest.importorskip("litellm", reason="litellm is not installed")

NANO = Path(__file__).parents[2] / "examples/nano/model"
ASK = "How is the weather in Paris?"


class Person(BaseModel):
    """Somebody"""

    name: str
    age: int


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def served() -> Iterator[Endpoint]:
    with endpoint(NANO, name="nano") as running:
        yield running


@pytest.fixture
def langchain(served: Endpoint) -> Any:
    return langchain_openai.ChatOpenAI(
        model="nano", base_url=f"{served.url}/v1", api_key="none", temperature=0, max_tokens=80, max_retries=0
    )


@pytest.fixture
def ask_litellm(served: Endpoint) -> Any:
    def ask(text: str, **more: Any) -> Any:
        settings = {"temperature": 0, "max_tokens": 80, "num_retries": 0, **more}
        return litellm.completion(
            model="openai/nano",
            api_base=f"{served.url}/v1",
            api_key="none",
            messages=[{"role": "user", "content": text}],
            **settings,
        )

    return ask


def test_langchain_chats_and_streams(langchain: Any) -> None:
    got = langchain.invoke([("system", "Be brief."), ("user", "Who are you?")])
    assert got.content
    assert got.response_metadata["finish_reason"] == "stop"
    assert got.usage_metadata["output_tokens"] > 0
    streamed = list(langchain.stream([("system", "Be brief."), ("user", "Who are you?")], stream_usage=True))
    assert "".join(chunk.content for chunk in streamed) == got.content
    assert (
        sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in streamed)
        == got.usage_metadata["output_tokens"]
    )


def test_langchain_calls_tools(langchain: Any) -> None:
    bound = langchain.bind_tools([WEATHER])
    got = bound.invoke(ASK)
    (call,) = got.tool_calls
    assert call["name"] == "get_weather"
    assert list(call["args"]) == ["city"]
    whole = None
    for chunk in bound.stream(ASK):
        whole = chunk if whole is None else whole + chunk
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [(call["name"], call["args"])]
    from langchain_core.messages import HumanMessage, ToolMessage

    after = bound.invoke([HumanMessage(ASK), got, ToolMessage('{"weather": "sunny"}', tool_call_id=call["id"])])
    assert after.content
    assert not after.tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_follows_a_schema(langchain: Any, method: str) -> None:
    got = langchain.with_structured_output(Person, method=method).invoke("Ann is 7 years old. Who is it?")
    assert isinstance(got, Person)


def test_langchain_embeds(served: Endpoint) -> None:
    embeddings = langchain_openai.OpenAIEmbeddings(
        model="nano", base_url=f"{served.url}/v1", api_key="none", max_retries=0, check_embedding_ctx_length=False
    )
    one, two = embeddings.embed_documents(["Who are you?", "Paris"])
    assert len(one) == len(two) > 100
    assert one != two
    assert embeddings.embed_query("Paris") == pytest.approx(two, abs=1e-4)


def test_langchain_uses_responses(served: Endpoint) -> None:
    model = langchain_openai.ChatOpenAI(
        model="nano", base_url=f"{served.url}/v1", api_key="none", temperature=0, max_retries=0, use_responses_api=True
    )
    assert model.invoke("Who are you?").text
    assert model.bind_tools([WEATHER]).invoke(ASK).tool_calls[0]["name"] == "get_weather"


def test_litellm_chats_and_streams(ask_litellm: Any) -> None:
    got = ask_litellm("Who are you?")
    assert got.choices[0].finish_reason == "stop"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask_litellm("Who are you?", stream=True))
    assert streamed == got.choices[0].message.content


def test_litellm_calls_tools(ask_litellm: Any) -> None:
    pytest.importorskip("mcp", reason="LiteLLM imports mcp where a request has tools, and mcp is not installed")
    (call,) = ask_litellm(ASK, tools=[WEATHER]).choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    chunks = list(ask_litellm(ASK, tools=[WEATHER], stream=True))
    whole = litellm.stream_chunk_builder(chunks)
    (streamed,) = whole.choices[0].message.tool_calls
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)


def test_litellm_follows_a_schema(ask_litellm: Any) -> None:
    got = ask_litellm("Ann is 7 years old. Who is it?", response_format=Person)
    assert Person.model_validate_json(got.choices[0].message.content)


def test_litellm_embeds(served: Endpoint) -> None:
    got = litellm.embedding(model="openai/nano", input=["Paris"], api_base=f"{served.url}/v1", api_key="none")
    assert len(got.data[0]["embedding"]) > 100


def test_litellm_knows_the_errors(ask_litellm: Any, served: Endpoint) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        ask_litellm("word " * 5000)
    with pytest.raises(litellm.BadRequestError):
        ask_litellm("x", temperature=-1)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(
            model="openai/other",
            messages=[{"role": "user", "content": "x"}],
            api_base=f"{served.url}/v1",
            api_key="none",
        )
