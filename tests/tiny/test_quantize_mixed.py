"""Layers of different widths in one model, the search for them, and checkpoints of the archived tools: all are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from export import parity
from export.folder import weight_bytes
from export.quantize import Quantize
from export.quantizers import calibration, search
from export.quantizers.layers import WHOLE, linear_layers
from export.tensors import read_checkpoint
from serve.generation import Request
from serve.torch.engine import Engine
from suite import quantized
from suite.config import Takes
from suite.errors import SuiteError
from suite.references import detect
from suite.stages import Artifact
from tests.tiny.export_jobs import run
from tests.tiny.tiny_models import tiny_adapter, tiny_model

Make = Callable[..., tuple[Path, dict[str, Any]]]
PROMPT, NEW = [5, 60, 7, 81, 9, 300, 44], 12
LENGTH = 64
TOLERANCE = 0.02  # of log probabilities; kernels of quantized layers round differently in batches
SETTINGS: dict[str, Any] = {"model": "m", "calibration": "c", "samples": 40, "length": LENGTH, "group_size": 64}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("mixed") / "model", dtype="bfloat16", std=0.05, layers=2)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    pairs = [(f"What is {i} + {i}?", f"Seven plus {i} is {2 * i}.") for i in range(48)]
    file.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs))
    return file


@pytest.fixture(scope="module")
def uniform(parent: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Models whose layers have one width, each made once; with their metrics."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(**settings: Any) -> tuple[Path, dict[str, Any]]:
        name = json.dumps(settings)
        if name not in made:
            folder = tmp_path_factory.mktemp("uniform") / "out"
            made[name] = folder, run(Quantize(**SETTINGS, **settings), folder, model=parent, calibration=chats)
        return made[name]

    return make


def kl(parent: Path, child: Path) -> float:
    found = parity.measure(lambda: parity.load(parent), lambda: parity.load(child), parity.probes(parent))
    return float(found["kl"])


def answer(folder: Path) -> list[int]:
    """What the torch engine answers."""
    engine = Engine(folder, max_batch=2)
    try:
        (generation,) = engine.generate([Request(PROMPT, "", NEW)])
        return generation.new
    finally:
        engine.close()


def greedy(folder: Path) -> list[int]:
    """What transformers answers, loading the model as parity does."""
    model, ids = parity.load(folder), torch.tensor([PROMPT])
    model.generation_config.max_length = None
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in out[0, len(PROMPT) :]]


@pytest.mark.parametrize(
    ("settings", "widths"),
    [
        ({"keep": {r"\.0\.mlp": 8, "o_proj": WHOLE}}, {".0.mlp.": 8, "o_proj": WHOLE}),
        ({"keep": {r"\.0\.": WHOLE}}, {".0.": WHOLE}),
        ({"keep": {"down_proj": WHOLE}, "method": "awq"}, {"down_proj": WHOLE}),
        ({"keep": {"down_proj": WHOLE}, "method": "bnb"}, {"down_proj": WHOLE}),
        ({"keep": {"self_attn": WHOLE}, "method": "bnb", "bits": 8}, {"self_attn": WHOLE}),
    ],
)
def test_layers_that_keep_more_bits_are_read_by_every_loader_here(
    settings: dict[str, Any], widths: dict[str, int], parent: Path, chats: Path, uniform: Make, tmp_path: Path
) -> None:
    metrics = run(Quantize(**SETTINGS, **settings), tmp_path / "out", model=parent, calibration=chats)
    plain = {name: value for name, value in settings.items() if name != "keep"}
    _, before = uniform(**plain)
    assert metrics["parity"]["kl"] < before["parity"]["kl"]
    assert metrics["bytes"] > before["bytes"]
    stored = read_checkpoint(tmp_path / "out")
    for name, (_, inputs) in linear_layers(parent).items():
        bits = next((bits for part, bits in widths.items() if part in name), None)
        if bits == WHOLE:
            assert stored[f"{name}.weight"].dtype == "BF16"
        elif bits:
            assert stored[f"{name}.qweight"].shape[0] == inputs * bits // 32
    assert answer(tmp_path / "out") == greedy(tmp_path / "out")


def test_parts_that_engines_fuse_are_warned_of(parent: Path, chats: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    stage = Quantize(**SETTINGS, method="bnb", keep={r"1\.self_attn\.v_proj": WHOLE})
    run(stage, tmp_path / "out", events, model=parent, calibration=chats)
    (warning,) = [event["text"] for event in events if event["event"] == "warn"]
    assert "model.layers.1.self_attn.qkv_proj" in warning


def test_a_model_that_is_too_far_from_its_parent_fails(parent: Path, chats: Path, tmp_path: Path) -> None:
    stage = Quantize(**SETTINGS, method="bnb", max_kl=1e-7)
    with pytest.raises(SuiteError, match=r"KL to the parent is .* above 1e-07") as caught:
        run(stage, tmp_path / "out", model=parent, calibration=chats)
    assert "worst on" in str(caught.value)


@pytest.mark.parametrize("where", ["config.json", "quantize_config.json"])
def test_a_checkpoint_of_autogptq_is_read(where: str, parent: Path, uniform: Make, tmp_path: Path) -> None:
    """The file of weights has a name of its own, and older versions left config.json alone."""
    made, _ = uniform()
    old = shutil.copytree(made, tmp_path / "old", ignore=shutil.ignore_patterns("*config.json"))
    (old / "model.safetensors").rename(old / "gptq_model-4bit-64g.safetensors")
    config = json.loads((made / "config.json").read_text())
    sym = config.pop("quantization_config")["sym"]
    settings = {"bits": 4, "group_size": 64, "damp_percent": 0.01, "desc_act": False, "static_groups": False}
    settings |= {"sym": sym, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}
    if where == "config.json":  # as 0.7 writes it
        settings |= {"is_marlin_format": False, "quant_method": "gptq"}
        config["quantization_config"] = settings
    (old / "quantize_config.json").write_text(json.dumps(settings))
    (old / "config.json").write_text(json.dumps(config))
    assert detect(old, Takes("model", "quantized")) == "quantized"
    assert kl(parent, old) == kl(parent, made)
    assert answer(old) == answer(made)


@pytest.mark.parametrize("where", ["config.json", "quant_config.json"])
def test_a_checkpoint_of_autoawq_is_read(where: str, parent: Path, uniform: Make, tmp_path: Path) -> None:
    made, _ = uniform(method="awq")
    old = shutil.copytree(made, tmp_path / "old", ignore=shutil.ignore_patterns("*config.json"))
    config = json.loads((made / "config.json").read_text())
    del config["quantization_config"]
    if where == "config.json":  # as 0.2 writes it
        settings = {"bits": 4, "group_size": 64, "modules_to_not_convert": None, "version": "gemm", "zero_point": True}
        config["quantization_config"] = {**settings, "quant_method": "awq"}
    else:
        settings = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
        (old / where).write_text(json.dumps(settings))
    (old / "config.json").write_text(json.dumps(config))
    assert detect(old, Takes("model", "quantized")) == "quantized"
    assert kl(parent, old) == kl(parent, made)
    assert answer(old) == answer(made)


@pytest.mark.parametrize("settings", [{}, {"method": "awq"}, {"method": "bnb"}, {"method": "bnb", "bits": 8}])
def test_adapters_over_a_quantized_base_are_peft(
    settings: dict[str, Any], parent: Path, uniform: Make, tmp_path: Path
) -> None:
    folder, adapter = uniform(**settings)[0], tiny_adapter(parent, tmp_path / "a")
    other = tiny_adapter(tiny_model(tmp_path / "other", hidden=64), tmp_path / "foreign", target_modules=["up_proj"])
    engine = Engine(folder, {"a": adapter}, max_batch=4)
    try:
        with pytest.raises(SuiteError, match=r"maps 64 to 128 values, that of .* 128 to 256"):
            engine.load_adapter("b", other)
        asked = [Request(PROMPT[i:], ("", "a")[i % 2], NEW, prompt_logprobs=0, logprobs=0) for i in range(4)]
        given = engine.generate(asked)
    finally:
        engine.close()
    model = PeftModel.from_pretrained(quantized.load(folder, dtype=torch.float32), adapter).eval()
    for generation in given:
        with torch.no_grad(), nullcontext() if generation.request.adapter else model.disable_adapter():
            wanted = model(torch.tensor([generation.tokens])).logits[0].log_softmax(-1)
        scores = [*generation.prompt_scores, *generation.scores]
        exact = [float(wanted[place, scored.token]) for place, scored in enumerate(scores)]
        assert [scored.logprob for scored in scores] == pytest.approx(exact, abs=TOLERANCE)
    assert given[0].new != given[1].new


def test_a_pickled_checkpoint_of_autogptq_is_read_and_one_that_runs_code_is_not(uniform: Make, tmp_path: Path) -> None:
    made, _ = uniform()
    old = shutil.copytree(made, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(made / "model.safetensors")
    torch.save(weights, old / "gptq_model-4bit-64g.bin")
    assert detect(old, Takes("model", "quantized")) == "quantized"
    assert kl(made, old) == 0
    torch.save({**weights, "more": Path("x")}, old / "gptq_model-4bit-64g.bin")
    with pytest.raises(SuiteError, match="more than weights"):
        quantized.load(old)


def test_settings_that_do_not_describe_the_weights_are_refused(uniform: Make, tmp_path: Path) -> None:
    torn = shutil.copytree(uniform(method="awq")[0], tmp_path / "torn")
    config = json.loads((torn / "config.json").read_text())
    config["quantization_config"] |= {"quant_method": "gptq", "checkpoint_format": "gptq"}
    (torn / "config.json").write_text(json.dumps(config))
    with pytest.raises(SuiteError, match=r"do not describe its weights: .*g_idx is missing"):
        quantized.load(torn)


def test_a_search_keeps_its_limit_and_beats_one_width(parent: Path, chats: Path, uniform: Make, tmp_path: Path) -> None:
    _, plain = uniform(bits=3)
    limits = {"max_bytes": f"{plain['bytes'] / 1e6}MB", "methods": ["gptq"], "bits": [2, 3, 4]}
    found = run(Quantize(**SETTINGS, search=limits), tmp_path / "small", model=parent, calibration=chats)
    assert found["bytes"] == weight_bytes(tmp_path / "small") <= plain["bytes"]
    assert found["parity"]["kl"] <= plain["parity"]["kl"]
    assert {group["name"] for group in found["search"]["groups"]} == {
        f"{block} {part}" for block in (0, 1) for part in ("attention", "mlp")
    }
    assert "| 0 attention | 4 |" in (tmp_path / "small" / "search.md").read_text()
    assert answer(tmp_path / "small") == greedy(tmp_path / "small")


def test_a_search_within_a_loss_tries_the_methods_it_is_given(parent: Path, chats: Path, tmp_path: Path) -> None:
    limits = {"max_kl": 0.01, "methods": ["bnb", "gptq"]}
    found = run(Quantize(**SETTINGS, search=limits), tmp_path / "out", model=parent, calibration=chats)
    held = [made for made in found["search"]["tried"] if made["kl"] <= 0.01]
    assert found["parity"]["kl"] <= 0.01
    assert found["bytes"] == min(made["bytes"] for made in held)
    assert {made["method"] for made in found["search"]["tried"]} == {"bnb", "gptq"}


def test_a_size_that_no_mix_has_names_the_smallest(parent: Path, chats: Path, uniform: Make, tmp_path: Path) -> None:
    stage = Quantize(**SETTINGS, search={"max_bytes": "10KB", "methods": ["gptq"], "bits": [2, 8]})
    with pytest.raises(SuiteError, match="no mix of widths is that small") as caught:
        run(stage, tmp_path / "out", model=parent, calibration=chats)
    smallest = uniform(bits=2, max_kl=9)[1]["bytes"]
    named = float(caught.value.hint.split('"')[1].removesuffix("MB")) * 1e6
    assert smallest <= named < 1.1 * smallest


def test_rounding_has_the_values_of_its_width() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4):
        found = search.rounded(weight, bits, 32).reshape(8, 2, 32)
        assert max(len(group.unique()) for row in found for group in row) == 2**bits
    torch.testing.assert_close(search.rounded(weight, 8, 32), weight, atol=0.02, rtol=0)
    assert torch.equal(search.rounded(torch.ones(2, 4), 4, -1), torch.ones(2, 4))


def test_calibration_in_other_languages_than_the_training_data_warns(parent: Path, tmp_path: Path) -> None:
    def rows(name: str, *texts: str) -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps({"instruction": text, "output": text}) + "\n" for text in texts * 40))
        return file

    english = "The capital of France is Paris. What is the capital?"
    chinese = "你好，请问你是谁？我是一个人工智能助手，很高兴为你服务。今天天气怎么样？"
    trained_on = [rows("mixed.jsonl", english, chinese)]

    def warnings(file: Path) -> list[str]:
        drawn = calibration.draw(parent, [file], {}, samples=40, length=LENGTH, seed=0, trained_on=trained_on)
        return drawn.warnings

    assert warnings(trained_on[0]) == []
    (warning,) = warnings(rows("english.jsonl", english))
    assert "are CJK, and 0% of those in the calibration data" in warning
    (warning,) = warnings(rows("russian.jsonl", "Маяк стоял на скале, и каждый вечер смотритель зажигал лампу."))
    assert "spells the calibration data out" in warning


def test_what_calibration_saw_is_recorded_by_digest(parent: Path, chats: Path, tmp_path: Path) -> None:
    artifact = Artifact(chats, "dataset", "digest-of-the-file")
    stage = Quantize(**{**SETTINGS, "seed": 3}, method="bnb")
    recorded = run(stage, tmp_path / "out", model=parent, calibration=artifact)["calibration"]
    drawn = calibration.draw(parent, [chats], {}, samples=40, length=LENGTH, seed=3)
    tokens = sum(map(len, drawn.blocks))
    expected = {"samples": 40, "tokens": tokens, "length": LENGTH, "seed": 3, "blocks": drawn.digest}
    assert recorded == {**expected, "files": ["digest-of-the-file"]}
