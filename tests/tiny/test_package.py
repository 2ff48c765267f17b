"""Packages: what a hub folder and an Ollama folder hold, and that they load and render as the model does."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from export import hf
from export.ends import ends
from export.gguf import llamacpp
from export.ollama import modelfile
from export.ollama.dialogues import Dialogue, go_prompt
from export.package import Export
from suite.chat import Chat
from suite.errors import SuiteError
from suite.stages import Artifact
from tests.tiny.export_jobs import run
from tests.tiny.tiny_models import tiny_adapter, tiny_model

SBOM = importlib.util.find_spec("cyclonedx") is not None
IDS = torch.arange(3, 40).unsqueeze(0)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def recorded(folder: Path, kind: str, metrics: dict[str, Any], inputs: dict[str, Any], **settings: Any) -> None:
    record = {
        "kind": kind, "type": "model", "key": f"key-of-{kind}", "digest": f"digest-of-{kind}", "name": kind,
        "metrics": metrics, "inputs": inputs, "settings": settings, "libraries": {"torch": "2.13.0"},
    }  # fmt: skip
    (folder / "artifact.json").write_text(json.dumps(record))


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A model with everything around it, as a hub folder."""
    model = tiny_model(tmp_path / "m", architecture="llama", hidden=64, rope_parameters=LLAMA3)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    data = {"path": str(tmp_path / "rows.json"), "type": "dataset", "digest": "digest-of-rows", "name": "rows.json"}
    parity = {"kl": 1e-6, "top1": 1.0, "max_dlogit": 0.01, "ppl_parent": 2.5, "ppl_child": 2.51}
    measured = {"parity": parity, "rows": 12, "speed": {"seconds": 3.25}}
    recorded(model, "train", measured, {"data": [data]}, lr=0.25, seed=7, data=str(tmp_path / "rows.json"))
    report = tmp_path / "report"
    report.mkdir()
    scores = {"ceval-mini": {"acc": 0.8125, "low": 0.7, "high": 0.9}, "summaries": {"rougeL": 0.5}}
    recorded(report, "eval", scores, {})
    stage = Export(
        model="m", to="hf", name="org/tiny", license="apache-2.0", base_model="org/base", languages=["en", "zh"],
        description="A tiny model.", reports=["r"], datasets=["org/rows"], sbom=SBOM,
    )  # fmt: skip
    run(stage, tmp_path / "out", model=model, reports=report)
    return tmp_path / "out"


def test_the_folder_loads_and_answers_as_the_model(package: Path) -> None:
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(package.parent / "m")(IDS).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(package)(IDS).logits, expected)
    ours, theirs = load_file(package / "model.safetensors"), load_file(package.parent / "m" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_older_readers_find_rope_template_and_stops(package: Path) -> None:
    config = json.loads((package / "config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"]["factor"] == 8.0
    assert "rope_theta" not in config["rope_scaling"]
    template = (package / "chat_template.jinja").read_text()
    assert json.loads((package / "tokenizer_config.json").read_text())["chat_template"] == template
    stops = json.loads((package / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [AutoTokenizer.from_pretrained(package).convert_tokens_to_ids("<|im_end|>"), 0]


def test_the_card_has_metadata_scores_and_lineage(package: Path) -> None:
    card = ModelCard.load(package / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en", "zh"]
    scores = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert scores == {("ceval-mini", "accuracy"): 0.8125, ("summaries", "rougeL"): 0.5}
    for text in ("A tiny model.", "rows.json", "0.700 to 0.900", "key-of-train", "lr 0.25", "torch 2.13.0", "2.51"):
        assert text in card.text
    assert card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["org/rows"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")


def test_the_lineage_says_what_it_would_take_to_make_it_again(package: Path) -> None:
    lineage = json.loads((package / "lineage.json").read_text())
    assert lineage["artifacts"] == [
        {"name": "rows.json", "type": "dataset", "digest": "digest-of-rows"},
        {
            "name": "train", "type": "model", "digest": "digest-of-train", "kind": "train", "key": "key-of-train",
            "inputs": {"data": ["digest-of-rows"]}, "settings": {"lr": 0.25, "seed": 7},
            "libraries": {"torch": "2.13.0"},
            "measured": {
                "rows": 12,
                "parity": {"kl": 1e-6, "top1": 1.0, "max_dlogit": 0.01, "ppl_parent": 2.5, "ppl_child": 2.51},
            },
        },
    ]  # fmt: skip
    assert lineage["exported_with"]["huggingface_hub"] == huggingface_hub.__version__


def test_the_bill_of_materials_fits_its_schema(package: Path) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json", reason="the extra 'sbom' is not installed")
    schema = pytest.importorskip("cyclonedx.schema", reason="the extra 'sbom' is not installed")
    text = (package / "sbom.cdx.json").read_text()
    assert validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    subject = bill["metadata"]["component"]
    assert (subject["name"], subject["type"]) == ("org/tiny", "machine-learning-model")
    assert subject["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    hashes = {part["name"]: part["hashes"][0]["content"] for part in subject["components"]}
    assert hashes["model.safetensors"] == hashlib.sha256((package / "model.safetensors").read_bytes()).hexdigest()
    named = {(part["type"], part["name"], part.get("version")) for part in bill["components"]}
    assert {("data", "rows.json", None), ("library", "torch", "2.13.0")} <= named
    assert "timestamp" not in bill["metadata"]


def test_checksums_are_right_and_nothing_names_this_machine(package: Path) -> None:
    checked = subprocess.run(
        ["sha256sum", "--strict", "-c", "checksums.txt"], cwd=package, capture_output=True, text=True, check=True
    )
    named = {line.removesuffix(": OK") for line in checked.stdout.splitlines()}
    assert named == {f.name for f in package.iterdir()} - {"checksums.txt"}
    root = str(package.parent).encode()
    assert not [name for name, content in files(package).items() if root in content]


GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("architecture", "settings", "older"),
    [
        (
            "gemma3_text",
            {"rope_parameters": GEMMA3, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        (
            "phi3",
            {"rope_parameters": LONG, "original_max_position_embeddings": 128, "max_position_embeddings": 512},
            {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **{k: LONG[k] for k in ("short_factor", "long_factor")}}},
        ),
        ("qwen3", {"dtype": "bfloat16"}, {"rope_scaling": None, "torch_dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_keys_for_older_readers_change_nothing_for_newer_ones(
    tmp_path: Path, architecture: str, settings: dict[str, Any], older: dict[str, Any]
) -> None:
    model = tiny_model(tmp_path / "m", architecture=architecture, hidden=64, **settings)
    (tmp_path / "out").mkdir()
    hf.write_model(model, tmp_path / "out", lambda *_: None)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written | older == written
    with torch.no_grad():
        given, exported = (AutoModelForCausalLM.from_pretrained(f) for f in (model, tmp_path / "out"))
        assert exported.dtype == given.dtype
        assert torch.equal(exported(IDS).logits, given(IDS).logits)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    text = "Hello 你好 <|im_end|> 123  x\n\t"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(model)(text)


def test_the_ollama_folder_renders_as_the_model(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", hidden=64)
    metrics = run(Export(model="m", to="ollama", name="tiny"), tmp_path / "out", model=model)
    assert set(files(tmp_path / "out")) == {"Modelfile", "README.md", "checksums.txt", "lineage.json", "model-f16.gguf"}
    assert metrics["weights"]["max_relative"] <= 2**-11
    assert metrics["template"]["dialogues"] > 10
    commands = dict(modelfile.parse((tmp_path / "out" / "Modelfile").read_text()))
    assert commands["FROM"] == "./model-f16.gguf"
    assert commands["PARAMETER stop"] == "<|im_end|>"
    assert commands["PARAMETER num_ctx"] == "2048"
    messages = [
        {"role": "system", "content": "Be {{ kind }}."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    for dialogue in (messages, messages[1:], messages[:2], messages[3:]):
        assert go_prompt(commands["TEMPLATE"], Dialogue(dialogue)) == Chat.load(model).text(dialogue, generate=True)


def test_every_form_names_all_tokens_that_end_an_answer(tmp_path: Path) -> None:
    """One in the generation config, one that the template writes, one that is the tokenizer's: three readers stop."""
    model = tiny_model(tmp_path / "m", hidden=64)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<|endoftext|>"}))
    assert list(ends(model)) == [2, 7, 0]
    for to in ("hf", "ollama"):
        run(Export(model="m", to=to, name="tiny"), tmp_path / to, model=model)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [2, 7, 0]
    commands = modelfile.parse((tmp_path / "ollama" / "Modelfile").read_text())
    stops = [value for command, value in commands if command == "PARAMETER stop"]
    assert stops == ["<|im_end|>", AutoTokenizer.from_pretrained(model).decode([7]), "<|endoftext|>"]
    fields = gguf.GGUFReader(tmp_path / "ollama" / "model-f16.gguf").fields
    named = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")]
    assert named == [0, 2, 7]


def test_an_adapter_with_a_template_of_its_own_ends_as_that_says(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    own = (base / "chat_template.jinja").read_text().replace("'<|im_end|>' }}", "'<|endoftext|>' }}")
    (adapter / "chat_template.jinja").write_text(own)
    assert ends(base) == {2: "<|im_end|>"}
    assert ends(base, adapter) == {0: "<|endoftext|>", 2: "<|im_end|>"}


def test_a_model_without_a_template_ends_as_its_settings_say(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", hidden=64, template=None)
    assert ends(model) == {2: "<|im_end|>"}
    (model / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert ends(model) == {2: "<|im_end|>"}


def test_layers_of_different_bits_are_shown_with_what_reads_them(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", hidden=64)
    settings = {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down_proj": {"bits": 8}}}
    for name, rules in (("mixed", settings["dynamic"]), ("whole", {"-:.*down_proj": {}})):
        folder = shutil.copytree(model, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": {**settings, "dynamic": rules}})
        )
        run(Export(model="m"), tmp_path / f"{name}-out", model=Artifact(folder, "quantized"))
        card = (tmp_path / f"{name}-out" / "README.md").read_text()
        assert ("GPTQModel.load" in card) == (name == "mixed")
        assert ("AutoModelForCausalLM" in card) == (name == "whole")


def test_sampling_settings_become_parameters(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", hidden=64)
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [2, 0]}
    (model / "generation_config.json").write_text(json.dumps(settings))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    settings = Export(
        model="m",
        to="ollama",
        template="jinja",
        weights="q8_0",
        system="Be kind.",
        messages=turns,
        context=512,
        license="mit",
    )
    run(settings, tmp_path / "out", model=model)
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "OLLAMA_GO_TEMPLATE=0" in text.partition("FROM")[0]  # the trap of templates that Ollama guesses
    assert modelfile.parse(text) == [
        ("FROM", "./model-q8_0.gguf"),
        ("SYSTEM", "Be kind."),
        ("PARAMETER stop", "<|im_end|>"),
        ("PARAMETER stop", "<|endoftext|>"),
        ("PARAMETER temperature", "0.6"),
        ("PARAMETER top_k", "20"),
        ("PARAMETER repeat_penalty", "1.1"),
        ("PARAMETER num_ctx", "512"),
        ("MESSAGE user", "Hi"),
        ("MESSAGE assistant", "Hello."),
        ("LICENSE", "mit"),
    ]


@pytest.mark.parametrize("to", ["gguf", "ollama"])
def test_an_adapter_lies_beside_its_base(tmp_path: Path, to: Any) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    stage = Export(model="a", base="b", to=to, weights="f32")
    metrics = run(stage, tmp_path / "out", model=Artifact(adapter, "adapter"), base=base)
    assert {"model-f32.gguf", "adapter.gguf"} <= set(files(tmp_path / "out"))
    assert metrics["adapter"]["weights"]["max_abs"] < 1e-6
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("The GGUF file, run by llama.cpp" in card) == llamacpp.installed()
    assert ("llama-server -m model-f32.gguf --lora adapter.gguf" in card) == (to == "gguf")
    if to == "ollama":
        commands = dict(modelfile.parse((tmp_path / "out" / "Modelfile").read_text()))
        assert (commands["FROM"], commands["ADAPTER"]) == ("./model-f32.gguf", "./adapter.gguf")


def test_an_adapter_with_another_template_needs_a_go_template(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text((base / "chat_template.jinja").read_text().replace("system", "rules"))
    inputs = {"model": [Artifact(adapter, "adapter")], "base": [Artifact(base, "model")]}
    Export(model="a", base="b", to="ollama").check(inputs)
    for settings in ({"to": "gguf"}, {"to": "ollama", "template": "jinja"}):
        with pytest.raises(SuiteError, match="a chat template of its own"):
            Export(model="a", base="b", **settings).check(inputs)


def test_a_template_that_go_cannot_match_stops_the_export(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content | replace('{', '(') + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    model = tiny_model(tmp_path / "m", hidden=64, template=template)
    with pytest.raises(SuiteError, match="plain: braces"):
        run(Export(model="m", to="ollama"), tmp_path / "out", model=model)
    dated = tiny_model(tmp_path / "d", hidden=64, template="{{ strftime_now('%A') }}" + template)
    with pytest.raises(SuiteError, match="date"):
        run(Export(model="m", to="ollama"), tmp_path / "out2", model=dated)


def test_an_adapter_is_published_with_the_name_of_its_base(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_model(tmp_path / "m", hidden=64)
    adapter = tiny_adapter(model, tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(model)}))
    subject = Artifact(adapter, "adapter")
    with pytest.raises(SuiteError, match="a path of this machine"):
        run(Export(model="a"), tmp_path / "refused", model=subject)
    run(Export(model="a", base_model="org/base"), tmp_path / "out", model=subject)
    out = tmp_path / "out"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    data = ModelCard.load(out / "README.md").data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", "adapter", "peft")
    assert data.tags == ["lora"]
    base = AutoModelForCausalLM.from_pretrained(model)
    assert PeftModel.from_pretrained(base, out).peft_config["default"].r == 4


def test_the_same_model_gives_the_same_package(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", hidden=64)
    for to in ("hf", "ollama"):
        for number in (1, 2):
            run(Export(model="m", to=to, name="x", sbom=SBOM), tmp_path / f"{to}-{number}", model=model)
        assert files(tmp_path / f"{to}-1") == files(tmp_path / f"{to}-2")
