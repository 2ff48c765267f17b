"""Each way to quantize, on each architecture: all of its layers are rounded, experts' too, and transformers reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from export.folder import read_config
from export.quantize import Quantize
from export.quantizers.layers import linear_layers, untouched
from suite.errors import SuiteError
from tests.tiny.export_jobs import run
from tests.tiny.test_gguf import SETTINGS
from tests.tiny.tiny_models import tiny_model

ARCHITECTURES = ("llama", "qwen2", "gemma3_text", "phi3")
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 32},
    "awq": {"method": "awq", "group_size": 32},
    "nf4": {"method": "bnb"},
}
CALIBRATED: dict[str, Any] = {"model": "m", "calibration": "c", "samples": 40, "length": 64}
ROOT = Path(__file__).parents[2]
REFUSED = {"awq": ("phi3",)}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = ({"instruction": f"What is {i} + {i}?", "output": f"Seven plus {i} is {2 * i}."} for i in range(48))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module", params=ARCHITECTURES)
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp(request.param) / "model", request.param)


def tiny(folder: Path, name: str) -> Path:
    shape = {"hidden": 64, "layers": 1, "dtype": "bfloat16", "std": 0.05}
    return tiny_model(folder, architecture=name, **shape, **SETTINGS.get(name, {}))


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_is_rounded_and_the_model_is_close_to_its_parent(
    method: str, parent: Path, chats: Path, tmp_path: Path
) -> None:
    stage = Quantize(**CALIBRATED, **METHODS[method])
    if read_config(parent)["model_type"] in REFUSED.get(method, ()):
        with pytest.raises(SuiteError, match="is more than GPTQModel can make"):
            run(stage, tmp_path / "refused", model=parent, calibration=chats)
        return
    found = run(stage, tmp_path / "out", model=parent, calibration=chats)
    assert 0 < found["parity"]["kl"] < 0.1
    assert untouched(linear_layers(parent), tmp_path / "out") == []


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("mixture") / "model", "qwen3_moe")


def test_bitsandbytes_leaves_experts_as_they_are_and_says_so(mixture: Path, chats: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    run(Quantize(**CALIBRATED, method="bnb"), tmp_path / "out", events, model=mixture, calibration=chats)
    layers = linear_layers(mixture)
    assert untouched(layers, tmp_path / "out") == [name for name in layers if ".experts." in name]
    (warning,) = [event["text"] for event in events if event["event"] == "warn"]
    assert "bnb leaves 12 of 16 layers as they are" in warning


def test_experts_are_rounded_chosen_for_and_read_by_another_process(mixture: Path, chats: Path, tmp_path: Path) -> None:
    """Apart, because GPTQModel changes transformers for the whole process."""
    (tmp_path / "p.toml").write_text(
        f"""
        [stage.quantize]
        model = {json.dumps(str(mixture))}
        calibration = {json.dumps(str(chats))}
        samples = 40
        length = 64
        group_size = 32
        search = {{ max_kl = 0.05, methods = ["gptq"] }}
        """
    )
    suite("run", "p.toml", cwd=tmp_path)
    made = json.loads(suite("show", "@quantize", "--json", cwd=tmp_path))
    assert untouched(linear_layers(mixture), Path(made["path"])) == []
    said = json.loads(suite("parity", str(mixture), "@quantize", "--json", cwd=tmp_path))
    assert 0 < said["kl"] == pytest.approx(made["metrics"]["parity"]["kl"], rel=0.5)


def suite(*arguments: str, cwd: Path) -> str:
    """What the command prints, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "suite.cli", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
