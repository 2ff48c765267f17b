"""What merge, quantize and export refuse before anything runs, and that refusing needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from export.merge import Merge, parse_size
from export.package import Export
from export.package.lineage import walk
from export.quantize import Quantize
from suite.errors import SuiteError
from suite.stages import Artifact

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "head_dim": 64,
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def model(folder: Path, pre: dict[str, Any] = BYTE_LEVEL, template: str = "{{ messages }}", **config: Any) -> Artifact:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SHAPE, **config}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": pre}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return Artifact(folder, "model")


def test_importing_the_stages_leaves_torch_alone() -> None:
    modules = (
        "export.merge, export.quantize, export.package, export.gguf, export.ollama, export.hf, export.package.card"
    )
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'gptqmodel')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "awq", "bits": 8}, "awq has no 8-bit form"),
        ({"method": "bnb", "bits": 3}, "bnb has no 3-bit form"),
        ({"method": "gptq", "calibration": None}, "gptq needs calibration data"),
    ],
)
def test_methods_and_bits_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SuiteError, match=said) as caught:
        Quantize(**{"model": "m", "calibration": "c", **settings}).check({})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 192}, "hidden_size = 192 is no multiple of group_size = 128"),
        ({"head_dim": 40}, r"num_attention_heads \* head_dim = 160 is no multiple"),
        ({"quantization_config": {}}, "quantized already"),
        ({"template": ""}, "no chat template"),
    ],
)
def test_models_that_cannot_be_quantized(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(SuiteError, match=said):
        Quantize(model="m", calibration="c").check({"model": [model(tmp_path / "m", **config)]})


def test_a_smaller_group_or_bnb_is_suggested_for_odd_shapes(tmp_path: Path) -> None:
    odd = {"model": [model(tmp_path / "m", hidden_size=192)]}
    with pytest.raises(SuiteError) as caught:
        Quantize(model="m", calibration="c").check(odd)
    assert caught.value.hint == "group_size = 64"
    Quantize(model="m", calibration="c", group_size=64).check(odd)
    Quantize(model="m", method="bnb").check(odd)


def test_bad_calibration_data_is_found_while_planning(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"messages": [\n')
    with pytest.raises(SuiteError, match=r"c\.jsonl"):
        Quantize(model="m", calibration="c").check({"calibration": [Artifact(tmp_path / "c.jsonl", "dataset")]})


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("adapter", {}, "does not record where its base is"),
        ("model", {"architectures": ["MambaForCausalLM"]}, "no GGUF is written for MambaForCausalLM"),
        ("model", {"pre": {"type": "Digits", "individual_digits": True}}, "llama.cpp has no such pre-tokenizer"),
        ("model", {"pre": {**BYTE_LEVEL, "add_prefix_space": True}}, "llama.cpp has no such pre-tokenizer"),
        ("model", {"template": ""}, "no chat template"),
    ],
)
def test_what_ollama_cannot_take(tmp_path: Path, kind: Any, config: dict[str, Any], said: str) -> None:
    artifact = Artifact(model(tmp_path / "m", **config).path, kind)
    with pytest.raises(SuiteError, match=said):
        Export(model="m", to="ollama").check({"model": [artifact]})


def test_a_good_model_passes_every_check(tmp_path: Path) -> None:
    good = {"model": [model(tmp_path / "m")]}
    Quantize(model="m", calibration="c").check(good)
    for to in ("hf", "ollama"):
        Export(model="m", to=to).check(good)


def test_nothing_is_checked_of_artifacts_that_are_not_made_yet() -> None:
    Merge(adapter="a").check({"adapter": [None]})
    Quantize(model="m", calibration="c").check({"model": [None], "calibration": [None]})
    Export(model="m", to="ollama").check({"model": [None]})


def test_a_shard_size_is_read_or_refused() -> None:
    assert parse_size("5GB") == 5 * 10**9
    for wrong in ("5", "0MB", "x", "5 GiB"):
        with pytest.raises(ValidationError, match="expected a size"):
            Merge(adapter="a", max_shard_size=wrong)


def test_a_lineage_names_each_step_once_and_no_path(tmp_path: Path) -> None:
    def made(name: str, kind: str, settings: dict[str, Any], **inputs: list[Artifact]) -> Artifact:
        folder = tmp_path / name
        folder.mkdir()
        described = {
            field: [{"path": str(a.path), "type": a.type, "digest": a.digest, "name": a.path.name} for a in artifacts]
            for field, artifacts in inputs.items()
        }
        record = {"kind": kind, "key": f"k-{name}", "digest": f"d-{name}", "settings": settings, "inputs": described}
        (folder / "artifact.json").write_text(json.dumps(record))
        return Artifact(folder, "model", f"d-{name}")

    base, data = Artifact(tmp_path / "base", "model", "d-base"), Artifact(tmp_path / "rows.json", "dataset", "d-rows")
    base.path.mkdir()
    tuned = made("tuned", "train", {"base": str(base.path), "lr": 0.1, "log": str(tmp_path)}, base=[base], data=[data])
    merged = made("merged", "merge", {"max": "5GB"}, adapter=[tuned], base=[base])
    steps = walk(merged)
    assert [step.digest for step in steps] == ["d-base", "d-rows", "d-tuned", "d-merged"]
    assert [step.kind for step in steps] == ["", "", "train", "merge"]
    assert steps[2].settings == {"lr": 0.1}
    assert str(tmp_path) not in json.dumps([step.as_json() for step in steps])


def test_only_a_hub_takes_what_is_quantized_already() -> None:
    takes = {to: Export(model="m", to=to).accepts()["model"].types for to in ("hf", "gguf", "ollama")}
    assert ["quantized" in types for types in takes.values()] == [True, False, False]
