"""A checkpoint without some of its weights is refused: transformers would make them up, and go on with a warning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from suite import quantized
from suite.errors import SuiteError
from suite.train import sft
from suite.train.stage import Train
from tests.tiny.tiny_models import tiny_model


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    folder = tiny_model(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if n != "lm_head.weight"}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def test_a_head_that_is_not_there_is_not_made_up(headless: Path) -> None:
    for load in (quantized.load, lambda folder: sft.load(folder, Train(base=str(folder), data=["x"]))):
        with pytest.raises(SuiteError, match=r"lm_head\.weight is missing\n") as refused:
            load(headless)
        assert "tie_word_embeddings" in refused.value.hint


def test_a_tied_head_need_not_be_there(headless: Path) -> None:
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = quantized.load(headless)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
