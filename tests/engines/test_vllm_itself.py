"""What the installed vLLM says when it is asked without a server: its own names, and which quantized weights it refuses.

All is asked in one process, because its imports take longer than its answers.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.quantizers.recipe import Recipe
from serve.engines.vllm import PARSERS, RANKS
from serve.settings import Settings
from suite.envs import Environment
from suite.errors import SuiteError
from suite.processes import foreign

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"
GPTQ = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "8 bits": ({"bits": 8}, "Marlin does not support weight_bits = uint8b128"),
    "3 bits": ({"bits": 3}, "Unsupported quantization config: bits=3, sym=True"),
    "2 bits": ({"bits": 2}, "Unsupported quantization config: bits=2, sym=True"),
    "zeros": ({"sym": False}, "Unsupported quantization config: bits=4, sym=False"),
    "desc_act": ({"desc_act": True}, "desc_act=True) is no longer supported"),
    "as it is written": ({}, ""),
}
"""How the settings of GPTQ differ, and what vLLM says of them."""
ASK = """
import json, sys
from typing import get_args
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
from vllm.tool_parsers import ToolParserManager

def refusal(make):
    try:
        make()
        return ""
    except ValueError as error:
        return str(error)

asked = json.load(sys.stdin)
found = {
    "parsers": [*ToolParserManager.lazy_parsers, *ToolParserManager.tool_parsers],
    "ranks": get_args(MaxLoRARanks),
    "gptq": {
        name: refusal(lambda: AutoGPTQLinearMethod(AutoGPTQConfig.from_config(settings)))
        for name, settings in asked["gptq"].items()
    },
    "models": {
        name: refusal(lambda: EngineArgs(model=folder, dtype="bfloat16").create_model_config())
        for name, folder in asked["models"].items()
    },
}
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    Recipe("bnb", 4).make(NANO, folder, [], lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def said(
    installed: Callable[[str], Environment], nf4: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    gptq = {name: {**GPTQ, **changed} for name, (changed, _) in CHANGED.items()}
    asked = {"gptq": gptq, "models": {"nf4": str(nf4), "nano": str(NANO)}}
    answers = tmp_path_factory.mktemp("said") / "answers.json"
    command = [str(installed("vllm").python), "-I", "-c", ASK, str(answers)]
    subprocess.run(command, input=json.dumps(asked), env=foreign(), text=True, check=True, capture_output=True)
    return dict(json.loads(answers.read_text()))


def test_parsers_and_ranks_have_its_names(said: dict[str, Any]) -> None:
    assert set(PARSERS.values()) <= set(said["parsers"])
    assert set(RANKS) <= set(said["ranks"])


@pytest.mark.parametrize("name", CHANGED)
def test_settings_of_gptq_that_it_refuses(said: dict[str, Any], name: str) -> None:
    wanted = CHANGED[name][1]
    assert wanted in said["gptq"][name]
    assert bool(wanted) == bool(said["gptq"][name])


def test_weights_of_bitsandbytes_are_refused_by_it_and_by_us_before_it_is_started(
    said: dict[str, Any], nf4: Path, installed: Callable[[str], Environment]
) -> None:
    assert "Unknown quantization method: bitsandbytes" in said["models"]["nf4"]
    assert said["models"]["nano"] == ""
    with pytest.raises(SuiteError, match="vLLM cannot serve"):
        Settings(model=nf4, backend="vllm", env_python=str(installed("vllm").python)).check()
