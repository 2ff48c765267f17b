"""Quantized weights that vLLM would refuse after a minute are refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve.engines.packed import check
from serve.settings import Settings
from suite import envs
from suite.errors import SuiteError


def group(bits: int, activations: int | None = None) -> dict[str, Any]:
    inputs = {"num_bits": activations} if activations else None
    return {"weights": {"num_bits": bits, "type": "int"}, "input_activations": inputs}


GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}
W4 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group(4)}}
W8 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group(8, 8)}}


@pytest.fixture(params=["cpu", "cuda"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(envs, "device", lambda: request.param)
    return str(request.param)


def said(folder: Path, found: dict[str, Any] | None, **options: Any) -> str:
    (folder / "config.json").write_text(json.dumps({"quantization_config": found} if found else {}))
    try:
        check(Settings(model=folder, **options))
    except SuiteError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "found",
    [None, GPTQ, {"quant_method": "awq", "bits": 4}, W4, W8,
     {**GPTQ, "dynamic": {"-:.*mlp.*": {}}}, {"quant_method": "fp8"}],
)  # fmt: skip
def test_what_was_seen_to_work(tmp_path: Path, machine: str, found: dict[str, Any] | None) -> None:
    assert said(tmp_path, found) == ""


@pytest.mark.parametrize(
    ("found", "reason", "everywhere"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", True),
        ({**GPTQ, "bits": 3}, "not at 3", True),
        ({**GPTQ, "dynamic": {"+:.*q_proj.*": {"bits": 2}}}, "not at 2", True),
        ({**GPTQ, "sym": False}, "symmetric", True),
        ({**GPTQ, "desc_act": True}, "desc_act", True),
        ({"quant_method": "awq", "bits": 8}, "not at 8", True),
        ({**GPTQ, "bits": 8}, "4 bits only", False),
        ({**GPTQ, "dynamic": {"+:.*q_proj.*": {"bits": 8}}}, "4 bits only", False),
        ({**W4, "config_groups": {"group_0": group(4), "group_1": group(8)}}, "8-bit weights", False),
    ],
)
def test_what_it_refuses(tmp_path: Path, machine: str, found: dict[str, Any], reason: str, everywhere: bool) -> None:
    assert (reason in said(tmp_path, found)) == (everywhere or machine == "cpu")
    assert said(tmp_path, found, quantization="mine") == ""


def test_settings_that_go_with_none_of_them(tmp_path: Path, machine: str) -> None:
    assert ("16 bits only" in said(tmp_path, GPTQ, dtype="float32")) == (machine == "cpu")
    assert said(tmp_path, None, dtype="float32") == ""
    assert ("no adapters" in said(tmp_path, W8, adapters={"a": tmp_path})) == (machine == "cpu")
    assert said(tmp_path, W4, adapters={"a": tmp_path}) == ""
