"""Likelihoods of texts, asked for as lm-evaluation-harness 0.4.13 does with `local-completions`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.contract.conftest import Served

PROMPTS = [[40, 41, 42, 43, 44, 45], [60, 61, 62], [70, 71, 72, 73]]
CONTEXTS = [2, 1, 3]
"""How many tokens of each prompt are not scored."""


def parsed(choices: list[Any], contexts: list[int]) -> list[tuple[float, bool]]:
    """Log likelihood of what follows the context, and whether it is the greedy answer: as the harness reads it."""
    scores = []
    for choice, start in zip(sorted(choices, key=lambda choice: choice["index"]), contexts, strict=True):
        tokens = choice["logprobs"]["token_logprobs"][start:-1]
        tops = choice["logprobs"]["top_logprobs"][start:-1]
        greedy = all(token == max(top.values()) for token, top in zip(tokens, tops, strict=True))
        scores.append((sum(tokens), greedy))
    return scores


@pytest.mark.parametrize("as_ids", [True, False])
def test_log_likelihoods(served: Served, as_ids: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.base)
    texts = ["The quick brown fox", "Who are you?", "Seven plus five"]
    prompts = PROMPTS if as_ids else [tokenizer(text)["input_ids"] for text in texts]
    contexts = CONTEXTS if as_ids else [1, 1, 1]
    body = {
        "model": "base",
        "prompt": PROMPTS if as_ids else texts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = served.http.post("/v1/completions", json=body).json()
    model = AutoModelForCausalLM.from_pretrained(served.base, dtype="float32")
    got = parsed(answer["choices"], contexts)
    for ids, start, (score, greedy) in zip(prompts, contexts, got, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = [logprobs[place - 1, ids[place]].item() for place in range(start, len(ids))]
        assert score == pytest.approx(sum(wanted), abs=1e-3)
        assert greedy == all(logprobs[place - 1].argmax().item() == ids[place] for place in range(start, len(ids)))


def test_generation_as_the_harness_asks(served: Served) -> None:
    body = {"model": "base", "prompt": PROMPTS, "max_tokens": 8, "temperature": 0, "stop": ["\n\n"], "seed": 1234}
    choices = served.http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert all(isinstance(choice["text"], str) for choice in choices)
