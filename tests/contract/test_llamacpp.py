"""A GGUF file as people talk to it: llama.cpp's own server behind our gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from export import gguf
from serve.backends import endpoint
from serve.engines.llamacpp import NEEDED, OlderNames, gguf_file
from suite.errors import SuiteError

for name in NEEDED:
    pytest.importorskip(name, reason="llama.cpp's server is not installed")

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    gguf.write(NANO, folder / "nano.gguf", "f16", "nano")
    return folder


@pytest.fixture(scope="module")
def client(package: Path) -> Iterator[openai.OpenAI]:
    with (
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
    assert OlderNames().ask("/v1/chat/completions", {"max_completion_tokens": 5}) == {"max_tokens": 5}
    asked = {"max_tokens": 5}
    assert OlderNames().ask("/v1/chat/completions", asked) is asked
