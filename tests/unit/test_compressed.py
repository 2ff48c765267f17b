"""Settings of compressed-tensors: widths that follow from the method, and what llm-compressor is told of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.quantize import Quantize
from export.quantizers.compressed import SCRIPT, _schemes
from export.quantizers.recipe import METHODS, Recipe
from suite.config import Where, parse
from suite.envs import BUILT_IN
from suite.errors import SuiteError


def stage(**settings: Any) -> Quantize:
    return parse(Quantize, {"model": "m", "calibration": "chat.jsonl", **settings}, Where())


@pytest.mark.parametrize(("method", "bits"), [("w8a8", 8), ("fp8", 8), ("w4a16", 4), ("gptq", 4), ("bnb", 4)])
def test_a_method_of_one_width_needs_no_bits(method: str, bits: int) -> None:
    assert stage(method=method).bits == bits
    stage(method=method).check({})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "w8a8", "bits": 4}, "w8a8 has no 4-bit form"),
        ({"method": "w8a8", "keep": {"q_proj": 8}}, "w8a8 with 8 bits keeps no layer at 8"),
        ({"method": "w4a16", "calibration": None}, "w4a16 needs calibration data"),
        ({"method": ["w8a8"]}, "method: input should be"),
    ],
)
def test_what_a_method_cannot_do_is_said(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SuiteError, match=said):
        stage(**settings).check({})


def test_float8_needs_no_calibration() -> None:
    parse(Quantize, {"model": "m", "method": "fp8"}, Where()).check({})


def test_environments_of_methods_are_built_in() -> None:
    needed = {name: method.environment for name, method in METHODS.items() if method.environment}
    assert set(needed) == {"w4a16", "w8a8", "fp8"}
    assert set(needed.values()) <= set(BUILT_IN)
    assert [stage(method=name).environments() for name in needed] == [(name,) for name in needed.values()]
    assert stage().environments() == ()


def test_layers_with_other_bits_are_named_and_the_rest_are_not() -> None:
    assert _schemes(Recipe("w8a8", 8, widths={"a": 16})) == {"W8A8": ["Linear"]}
    widths = {"a": 16, "b": 8, "c": 8}
    assert _schemes(Recipe("w4a16", 4, widths=widths)) == {"W4A16": ["Linear"], "W8A16": ["b", "c"]}


def test_the_script_imports_nothing_of_ours() -> None:
    text = Path(SCRIPT).read_text("utf-8")
    assert not any(f"{word} {package}" in text for word in ("from", "import") for package in ("suite", "export"))
