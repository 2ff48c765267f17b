"""compressed-tensors by the real llm-compressor: close to the parent, the same bytes twice, nothing of the machine."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from export import parity
from export.folder import weight_bytes
from export.quantizers import calibration
from export.quantizers.recipe import Blocks, Recipe
from suite.cli import main
from suite.envs import Environment
from suite.errors import StageFailed
from suite.store import Store, home
from tests.tiny.tiny_models import tiny_model

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"
CHATS = NANO.parents[1] / "data" / "calibration.jsonl"
BESIDE = ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
KL = {"w4a16": 0.05, "w8a8": 0.004, "fp8": 0.02}
BITS = {"w4a16": 4, "w8a8": 8, "fp8": 8}


@pytest.fixture(scope="module")
def python(installed: Callable[[str], Environment]) -> Path:
    return installed("llmcompressor").python


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    drawn = calibration.draw(NANO, [CHATS], {}, samples=64, length=256, seed=0)
    return drawn.blocks


def make(recipe: Recipe, folder: Path, blocks: Blocks) -> Path:
    folder.mkdir()
    recipe.make(NANO, folder / "out", blocks, lambda *_: None)
    return folder / "out"


def measured(made: Path) -> float:
    found = parity.measure(lambda: parity.load(NANO), lambda: parity.load(made, dtype="auto"), parity.probes(NANO))
    return float(found["kl"])


@pytest.mark.parametrize("method", KL)
def test_a_model_loads_here_and_is_close_to_its_parent(
    method: str, python: Path, blocks: Blocks, tmp_path: Path
) -> None:
    made = make(Recipe(method, BITS[method], python=python), tmp_path / "a", [] if method == "fp8" else blocks)
    assert 1e-6 < measured(made) < KL[method]
    assert weight_bytes(made) < 0.6 * weight_bytes(NANO)
    assert {f.name for f in made.iterdir()} == {*BESIDE, "config.json", "model.safetensors"}
    assert filecmp.cmpfiles(NANO, made, BESIDE, shallow=False) == ([*BESIDE], [], [])
    assert {f.stat().st_mode & 0o777 for f in made.iterdir()} == {0o644}
    config = (made / "config.json").read_text()
    assert str(tmp_path) not in config
    assert json.loads(config)["quantization_config"]["quant_method"] == "compressed-tensors"


def test_the_same_settings_give_the_same_bytes(python: Path, blocks: Blocks, tmp_path: Path) -> None:
    recipe = Recipe("w4a16", 4, group_size=64, python=python)
    first, second = (make(recipe, tmp_path / name, blocks) for name in "ab")
    names = sorted(f.name for f in first.iterdir())
    assert filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])


def test_layers_keep_the_bits_that_they_are_given(python: Path, blocks: Blocks, tmp_path: Path) -> None:
    attention = [f"model.layers.3.self_attn.{name}_proj" for name in "qkvo"]
    whole = "model.layers.0.mlp.down_proj"
    recipe = Recipe("w4a16", 4, group_size=64, widths={**dict.fromkeys(attention, 8), whole: 16}, python=python)
    made = make(recipe, tmp_path / "a", blocks)
    with safe_open(made / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    assert shapes[f"{whole}.weight"] == [256, 768]
    # 32-bit words of a row of 256 weights
    assert shapes["model.layers.3.self_attn.k_proj.weight_packed"] == [128, 64]
    assert shapes["model.layers.2.self_attn.k_proj.weight_packed"] == [128, 32]
    assert measured(made) < KL["w4a16"]


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("phi3", {}), ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128})],
)
def test_fused_layers_and_experts_are_quantized_too(
    architecture: str, shape: dict[str, Any], python: Path, tmp_path: Path
) -> None:
    parent = tiny_model(tmp_path / "parent", architecture=architecture, dtype="bfloat16", std=0.05, **shape)
    (tmp_path / "a").mkdir()
    made = tmp_path / "a" / "out"
    blocks = [[(7 * i + j) % 500 + 3 for j in range(128)] for i in range(16)]
    Recipe("w4a16", 4, group_size=64, python=python).make(parent, made, blocks, lambda *_: None)
    with safe_open(made / "model.safetensors", "pt") as weights:
        names = {name.removeprefix("model.layers.") for name in weights.keys()}  # noqa: SIM118
    kept = {name for name in names if name.endswith("proj.weight")}
    assert kept == set()
    assert not any("gate.weight_packed" in name for name in names)  # the router of experts
    found = parity.measure(lambda: parity.load(parent), lambda: parity.load(made, dtype="auto"), parity.probes(parent))
    assert 1e-6 < found["kl"] < KL["w4a16"]


def test_the_stage_makes_one_by_the_command_and_finds_it_again(
    installed: Callable[[str], Environment], capsys: pytest.CaptureFixture[str]
) -> None:
    environment = installed("llmcompressor")
    command = ["quantize", "--model", str(NANO), "--method", "fp8"]
    assert main(command) == 0
    (artifact,) = Store(home()).find("")
    assert artifact.record["libraries"]["env.llmcompressor"] == environment.digest
    assert artifact.record["settings"]["bits"] == 8
    assert artifact.metrics["parity"]["kl"] < KL["fp8"]
    assert main(command) == 0
    assert "1 cached" in capsys.readouterr().out


def test_what_llmcompressor_refuses_is_quoted(python: Path, blocks: Blocks, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"(?s)compressed_script.py ended with exit code 1.*group_size") as failed:
        make(Recipe("w4a16", 4, group_size=96, python=python), tmp_path / "a", blocks)
    assert str(tmp_path / "a" / "llmcompressor.log") in failed.value.hint
