"""What an adapter changes in a base, and whether it fits one, from headers alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from export.lora.adapter import Adapter
from export.merge import Merge, plan
from suite.errors import SuiteError
from suite.stages import Artifact
from suite.store import Store, home

W = "model.safetensors"
EMBED, Q, HEAD = "model.embed_tokens", "model.layers.0.self_attn.q_proj", "lm_head"
DEEPER = "model.language_model.layers.0.self_attn.q_proj"


def base(folder: Path, tied: bool = True, **config: Any) -> Path:
    folder.mkdir()
    tensors = {f"{EMBED}.weight": np.ones((10, 8), np.float32), f"{Q}.weight": np.ones((6, 8), np.float32)}
    if not tied:
        tensors[f"{HEAD}.weight"] = np.ones((10, 8), np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied, **config}))
    return folder


def adapter(folder: Path, tensors: dict[str, tuple[int, ...]] | None = None, **config: Any) -> Path:
    folder.mkdir()
    shapes = tensors or {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2)}
    named = {f"base_model.model.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(named, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def check(base: Path, adapter: Path) -> None:
    inputs = {"adapter": [Artifact(adapter, "adapter")], "base": [Artifact(base, "model")]}
    Merge(adapter="a", base="b").check(inputs)


def test_only_the_named_weight_is_changed(tmp_path: Path) -> None:
    edits, config = plan(base(tmp_path / "b"), [adapter(tmp_path / "a")])
    assert {e.target.name: e.copied for e in edits} == {f"{EMBED}.weight": True, f"{Q}.weight": False}
    assert config["tie_word_embeddings"]


def test_the_language_model_of_one_that_sees_too(tmp_path: Path) -> None:
    folder = base(tmp_path / "b")
    tensors = {name: np.ones((6, 8), np.float32) for name in ("model.visual.proj.weight", f"{DEEPER}.weight")}
    save_file(tensors, folder / W)
    edits, _ = plan(folder, [adapter(tmp_path / "a")])
    assert {e.target.name: e.copied for e in edits} == {"model.visual.proj.weight": True, f"{DEEPER}.weight": False}


def test_the_tie_of_a_head_that_is_not_known_stays_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    save_file({"words.weight": np.ones((10, 8), np.float32), f"{Q}.weight": np.ones((6, 8), np.float32)}, folder / W)
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    assert plan(folder, [adapter(tmp_path / "a")])[1] == {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 4 / 2),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 7}}, 7 / 2),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 7}}, 4 / 2),
        ({"alpha_pattern": {"layers.[0-3].*q_proj": 7, "q_proj": 9}, "use_rslora": True}, 7 / math.sqrt(2)),
        ({"r": 64, "rank_pattern": {"q_proj": 2}}, 4 / 2),
    ],
)
def test_the_scale_is_that_of_peft(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    lora = Adapter.read(adapter(tmp_path / "a", **config)).loras[f"{Q}.weight"]
    assert lora.scale == pytest.approx(scale)


@pytest.mark.parametrize(
    "changed",
    [
        {f"{HEAD}.lora_A.weight": (2, 8), f"{HEAD}.lora_B.weight": (10, 2)},
        {f"{EMBED}.lora_embedding_A": (2, 10), f"{EMBED}.lora_embedding_B": (8, 2)},
        {f"{HEAD}.weight": (10, 8)},
    ],
)
def test_an_adapter_of_the_head_or_the_embedding_unties_them(
    tmp_path: Path, changed: dict[str, tuple[int, ...]]
) -> None:
    edits, config = plan(base(tmp_path / "b"), [adapter(tmp_path / "a", changed)])
    assert not config["tie_word_embeddings"]
    assert {e.target.name for e in edits} == {f"{EMBED}.weight", f"{Q}.weight", f"{HEAD}.weight"}
    assert sum(not e.copied or e.source is not e.target for e in edits) == 1


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {f"{Q}.lora_A.weight": (2, 16), f"{Q}.lora_B.weight": (6, 2)},
            "q_proj' is 6 x 8 there and 6 x 16 in the adapter",
        ),
        (
            {"model.h.1.fc.lora_A.weight": (2, 8), "model.h.1.fc.lora_B.weight": (6, 2)},
            "'model.h.1.fc', which this one",
        ),
        ({f"{HEAD}.weight": (12, 6)}, "'lm_head' is 10 x 8 there and 12 x 6"),
        ({f"{HEAD}.weight": (12, 8)}, "the embedding would be of 10 tokens, the head of 12"),
    ],
)
def test_an_adapter_of_another_base_is_named_before_anything_is_loaded(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    with pytest.raises(SuiteError, match="the adapter is for another base") as caught:
        check(base(tmp_path / "b"), adapter(tmp_path / "a", tensors))
    assert said in caught.value.message
    assert "'base'" in caught.value.hint or "modules_to_save" in caught.value.hint  # a name, without the path it had


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "a IA3 adapter"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"use_qalora": True}, "use_qalora"),
    ],
)
def test_adapters_that_cannot_be_merged_exactly_are_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(SuiteError, match=said):
        check(base(tmp_path / "b"), adapter(tmp_path / "a", **config))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{Q}.lora_A.weight": (2, 8)}, "only one half"),
        ({f"{EMBED}.token_adapter.trainable_tokens_delta": (3, 8)}, "3 tokens of '.*' were trained, and .* has 0"),
        (
            {f"{Q}.base_layer.{name}.weight": (2, 2) for name in ("lora_A", "lora_B")}
            | {f"{Q}.{name}.weight": (2, 2) for name in ("lora_A", "lora_B")},
            "its 2 LoRA pairs",
        ),
        ({f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 3)}, "different ranks"),
        ({f"{Q}.lora_lambda": (2,)}, "no kind of LoRA known"),
    ],
)
def test_unknown_adapter_tensors_are_refused(tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(SuiteError, match=said):
        check(base(tmp_path / "b"), adapter(tmp_path / "a", tensors))


def test_folders_that_are_none_say_what_they_lack(tmp_path: Path) -> None:
    good, empty = adapter(tmp_path / "a"), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SuiteError, match=r"no config\.json"):
        check(empty, good)
    with pytest.raises(SuiteError, match=r"no adapter_config\.json"):
        check(base(tmp_path / "b"), empty)
    with pytest.raises(SuiteError, match="the base is quantized"):
        check(base(tmp_path / "q", quantization_config={"bits": 4}), good)


def test_an_adapter_that_knows_no_base_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="does not record where its base is"):
        Merge(adapter="a").check({"adapter": [Artifact(adapter(tmp_path / "a"), "adapter")]})


def test_the_base_that_the_adapter_recorded_is_used(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", {f"{Q}.lora_A.weight": (2, 4), f"{Q}.lora_B.weight": (6, 2)})
    recorded = base(tmp_path / "b")
    made_from = {"path": str(recorded), "type": "model", "digest": Store(home()).digest(recorded)}
    (folder / "artifact.json").write_text(json.dumps({"inputs": {"base": [made_from]}}))
    with pytest.raises(SuiteError, match="another base"):
        Merge(adapter="a").check({"adapter": [Artifact(folder, "adapter")]})


def test_an_adapter_of_another_number_of_experts_is_named(tmp_path: Path) -> None:
    folder = base(tmp_path / "b")
    experts = "model.layers.0.mlp.experts"
    save_file({f"{experts}.down_proj": np.ones((4, 6, 8), np.float32)}, folder / "model.safetensors")
    pair = {f"{experts}.lora_A.weight": (6, 8), f"{experts}.lora_B.weight": (6, 6)}
    config = {"target_parameters": ["experts.down_proj"]}
    with pytest.raises(SuiteError, match=r"'model.layers.0.mlp.experts.down_proj' is 4 x 6 x 8 there and 6 x 8 in the"):
        plan(folder, [adapter(tmp_path / "a", pair, **config)])
