"""Reasoning apart from the answer, where the template opens it in the prompt; vLLM needs a parser's name for that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serve.backends import endpoint
from tests.tiny.tiny_models import CHAT_TEMPLATE, tiny_model

OPENING = "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
THINKING = CHAT_TEMPLATE.removesuffix(OPENING + "\n") + (
    "{{- '<|im_start|>assistant\\n' }}"
    "{{- '<think>\\n' if enable_thinking | default(true) else '<think>\\n\\n</think>\\n\\n' }}\n{%- endif %}"
)
ASK: list[Any] = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A model with random weights: it never stops thinking."""
    folder: Path = tiny_model(tmp_path_factory.mktemp("thinker") / "model", template=THINKING)
    with (
        endpoint(folder) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, extra: dict[str, Any] | None = None, **more: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 20, "messages": ASK, "extra_body": extra or {}, **more}
    return client.chat.completions.create(model="base", **settings)


def test_reasoning_is_apart_or_inline(client: openai.OpenAI) -> None:
    apart, inline = ask(client).choices[0].message, ask(client, {"separate_reasoning": False}).choices[0].message
    assert apart.content is None
    assert apart.reasoning_content == apart.reasoning == inline.content.strip()
    assert not hasattr(inline, "reasoning_content")


def test_the_stream_tells_the_same(client: openai.OpenAI) -> None:
    deltas = [chunk.choices[0].delta for chunk in ask(client, stream=True)]
    thoughts = [delta.reasoning_content for delta in deltas if hasattr(delta, "reasoning_content")]
    assert len(thoughts) > 1
    assert "".join(thoughts) == ask(client).choices[0].message.reasoning_content
    assert not "".join(delta.content or "" for delta in deltas)


@pytest.mark.parametrize("extra", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}])
def test_a_template_can_be_told_not_to_think(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    message = ask(client, extra).choices[0].message
    assert message.content
    assert not hasattr(message, "reasoning_content")


def test_responses_have_reasoning_as_an_item(client: openai.OpenAI) -> None:
    got = client.responses.create(model="base", input="Who are you?", temperature=0, max_output_tokens=20)
    (item,) = got.output
    assert item.type == "reasoning"
    assert item.content
    assert item.content[0].text == ask(client).choices[0].message.reasoning_content
    assert got.usage
    assert got.usage.output_tokens_details.reasoning_tokens > 0
    back = client.responses.create(
        model="base",
        input=[{"role": "user", "content": "x"}, item.to_dict(), {"role": "user", "content": "y"}],  # type: ignore[list-item]
        max_output_tokens=1,
    )
    assert back.status == "incomplete"
