"""/v1/embeddings from any model that it serves: only our own engine does that beside generating."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from tests.contract.conftest import Served

TEXTS = ["The quick brown fox", "你好", "x" * 300]


def embed(served: Served, texts: Any = "The quick brown fox", model: str = "base", **more: Any) -> Any:
    return served.openai.embeddings.create(model=model, input=texts, **more)


def hidden(served: Served, text: str) -> torch.Tensor:
    """The last hidden states (T, H), by transformers."""
    model = AutoModel.from_pretrained(served.base, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(served.base)
    with torch.inference_mode():
        states: torch.Tensor = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return states


def test_mean_and_last(served: Served) -> None:
    for text in TEXTS:
        states = hidden(served, text)
        for pooling, wanted in (("mean", states.mean(0)), ("last", states[-1])):
            (got,) = embed(served, text, extra_body={"pooling": pooling}).data
            torch.testing.assert_close(torch.tensor(got.embedding), normalize(wanted, dim=0), rtol=1e-3, atol=1e-4)
    assert embed(served).data[0].embedding == embed(served, extra_body={"pooling": "mean"}).data[0].embedding


def test_several_texts_keep_their_order(served: Served) -> None:
    got = embed(served, TEXTS)
    assert [entry.index for entry in got.data] == [0, 1, 2]
    for entry, text in zip(got.data, TEXTS, strict=True):
        assert entry.embedding == pytest.approx(embed(served, text).data[0].embedding, abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(served.base)
    assert got.usage.prompt_tokens == got.usage.total_tokens == sum(len(tokenizer(t)["input_ids"]) for t in TEXTS)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    for entry, same in zip(got.data, embed(served, ids).data, strict=True):
        assert entry.embedding == pytest.approx(same.embedding, abs=1e-4)


def test_both_encodings(served: Served) -> None:
    packed = embed(served).data[0].embedding  # the client asks for base64 unless told otherwise, and unpacks it
    plain = embed(served, encoding_format="float").data[0].embedding
    assert packed == pytest.approx(plain)
    assert sum(value**2 for value in plain) == pytest.approx(1)
    raw = served.http.post("/v1/embeddings", json={"model": "base", "input": "x", "encoding_format": "base64"}).json()
    assert isinstance(raw["data"][0]["embedding"], str)


def test_adapters_have_their_own(served: Served) -> None:
    assert embed(served, model="a").data[0].embedding != pytest.approx(embed(served).data[0].embedding, abs=1e-3)


@pytest.mark.parametrize(
    ("texts", "more", "param"),
    [
        ("x", {"dimensions": 8}, "dimensions"),
        ("", {}, "input"),
        ([], {}, "input"),
        (["a", ""], {}, "input"),
        ([[99999]], {}, "prompt"),
        ("word " * 3000, {}, "input"),
    ],
)
def test_what_it_refuses(served: Served, texts: Any, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        embed(served, texts, **more)
    assert error.value.param == param
