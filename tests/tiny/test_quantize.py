"""Quantized models: they load, they are close to their parent, and two runs give the same bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from export.folder import TOKENIZER
from export.quantize import Quantize
from export.quantizers import calibrated, calibration
from export.quantizers.awq import best_clip
from suite import quantized
from suite.errors import SuiteError
from tests.tiny.export_jobs import run
from tests.tiny.tiny_models import tiny_model

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 64},
    "gptq, some layers wider": {"method": "gptq", "group_size": 64, "keep": {"down_proj": 8, "o_proj": 16}},
    "gptq 2 bits, ordered": {"method": "gptq", "bits": 2, "group_size": 32, "desc_act": True},
    "gptq 8 bits, whole rows": {"method": "gptq", "bits": 8, "group_size": -1, "sym": False},
    "awq": {"method": "awq", "group_size": 64},
    "nf4": {"method": "bnb"},
    "fp4, scales rounded too": {"method": "bnb", "format": "fp4", "double_quant": True},
    "int8": {"method": "bnb", "bits": 8},
}
KL = {
    "gptq": 0.05,
    "gptq, some layers wider": 0.05,
    "gptq 2 bits, ordered": 1.5,
    "gptq 8 bits, whole rows": 0.002,
    "awq": 0.1,
    "nf4": 0.1,
    "fp4, scales rounded too": 0.2,
    "int8": 0.005,
}
TWICE = ("gptq, some layers wider", "awq", "int8")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("quantize") / "model", dtype="bfloat16", std=0.05, layers=1)
    settings = {"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i}?"},
                {"role": "assistant", "content": f"{2 * i}."},
            ]
        }
        for i in range(48)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", METHODS)
def test_a_quantized_model_is_smaller_close_and_clean(name: str, parent: Path, chats: Path, tmp_path: Path) -> None:
    stage = Quantize(model="m", calibration="c", samples=40, length=64, **METHODS[name])
    events: list[dict[str, Any]] = []
    metrics = run(stage, tmp_path / "out", events, model=parent, calibration=chats)
    out = tmp_path / "out"
    assert metrics["bytes"] < metrics["parent_bytes"]
    assert metrics["parity"]["kl"] < KL[name]
    assert metrics["parity"]["positions"] > 100
    assert metrics["calibration"]["samples"] == 40
    assert len(metrics["calibration"]["blocks"]) == 64
    assert str(tmp_path) not in json.dumps(metrics)
    assert any(e["event"] == "progress" for e in events)
    warned = [event["text"] for event in events if event["event"] == "warn"]
    assert ["layers of different bits" in text for text in warned] == [True] * (name == "gptq, some layers wider")
    assert (out / "generation_config.json").read_bytes() == (parent / "generation_config.json").read_bytes()
    for file in TOKENIZER:
        assert (parent / file).is_file() == (out / file).is_file()
        if (parent / file).is_file():
            assert (parent / file).read_bytes() == (out / file).read_bytes()
    assert {oct(file.stat().st_mode & 0o777) for file in out.iterdir()} == {"0o644"}
    for file in out.glob("*.json"):
        assert "/tmp" not in file.read_text()
        assert str(tmp_path) not in file.read_text()
    model = quantized.load(out)
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    if name in TWICE:
        run(stage, tmp_path / "again", model=parent, calibration=chats)
        assert files(out) == files(tmp_path / "again")


def test_fewer_bits_are_further_from_the_parent(parent: Path, chats: Path, tmp_path: Path) -> None:
    found = []
    for bits in (8, 4):
        stage = Quantize(model="m", calibration="c", method="bnb", bits=bits)
        found.append(run(stage, tmp_path / str(bits), model=parent, calibration=chats)["parity"]["kl"])
    assert 0 < found[0] < found[1]


def test_samples_are_drawn_by_seed_and_cut_to_equal_blocks(parent: Path, chats: Path) -> None:
    drawn = calibration.draw(parent, [chats], {}, samples=32, length=50, seed=1)
    assert {len(block) for block in drawn.blocks} == {50}
    assert drawn.conversations == 32
    assert len(drawn.held_out) == calibration.HELD_OUT
    assert drawn.blocks == calibration.draw(parent, [chats], {}, samples=32, length=50, seed=1).blocks
    assert drawn.blocks != calibration.draw(parent, [chats], {}, samples=32, length=50, seed=2).blocks
    assert drawn.digest != calibration.draw(parent, [chats], {}, samples=32, length=50, seed=2).digest
    assert not drawn.warnings


def test_of_few_conversations_some_are_held_out_before_any_is_drawn(parent: Path, chats: Path) -> None:
    drawn = calibration.draw(parent, [chats], {}, samples=128, length=50, seed=1)
    assert (drawn.conversations, len(drawn.held_out)) == (42, 6)
    assert not drawn.warnings


def test_little_calibration_data_warns_and_none_is_an_error(parent: Path, chats: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chats.read_text().splitlines(keepends=True)[:3]))
    drawn = calibration.draw(parent, [few], {}, samples=32, length=4000, seed=0)
    assert len(drawn.blocks) == 1
    assert [warning.split(":")[0] for warning in drawn.warnings] == [
        "no conversation is left to measure the result on",
        "calibrated on 3 conversations only; 32 or more give steadier results",
    ]
    (warning,) = calibration.draw(parent, [chats], {}, samples=4, length=64, seed=0).warnings
    assert warning.startswith("calibrated on 4 conversations only")
    (warning,) = calibration.draw(parent, [chats], {}, samples=40, length=64, seed=0, widest=10**6).warnings
    assert "fewer than the 1000000 inputs of the widest layer" in warning
    few.write_text('{"messages": []}\n')
    with pytest.raises(SuiteError, match="no usable conversation"):
        calibration.draw(parent, [few], {}, samples=32, length=64, seed=0)


def test_the_clipping_bound_has_the_least_error_of_all_tried() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 2 * 8, generator=generator) ** 3
    features = torch.randn(3, 40, 2 * 8, generator=generator)

    def round_into(given: torch.Tensor, result: torch.Tensor) -> None:
        step = given.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 7
        result.copy_((given / step).round() * step)

    found = best_clip(weight, features, 8, round_into)
    groups, x = weight.reshape(6, 2, 8), features.reshape(-1, 2, 8)
    largest = groups.abs().amax(-1, keepdim=True)
    errors = []
    for step in range(10):
        rounded = torch.empty_like(groups)
        bound = largest * (1 - step / 20)
        round_into(groups.clamp(-bound, bound), rounded)
        errors.append(torch.einsum("ngs,ogs->nog", x, rounded - groups).square().mean(0))
    best = torch.stack(errors).argmin(0).unsqueeze(-1)
    torch.testing.assert_close(found, largest * (1 - best / 20))
    assert (found < largest).any()


def test_gptqmodel_has_workers_enough() -> None:
    assert int(os.environ["GPTQMODEL_CPU_WORKERS"]) >= 2
    assert calibrated.COMMON["offload_to_disk"] is False
