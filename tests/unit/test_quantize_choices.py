"""Which layers are quantized to how many bits: names from headers, rules by regular expression, and the knapsack."""

from __future__ import annotations

import itertools
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from export.quantize import Quantize, Search
from export.quantizers import calibration
from export.quantizers.layers import WHOLE, kept, linear_layers, pattern, torn
from export.quantizers.mixes import Mix, Option, families, front, group, layer_bytes
from suite import quantized
from suite.commands.flags import Parser, add_settings, values_of
from suite.errors import SuiteError
from suite.stages import Artifact

PARTS = {
    "self_attn": {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)},
    "mlp": {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)},
}
CONFIG = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "head_dim": 64}


def names(blocks: int = 2) -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{block}.{part}.{name}": shape
        for block in range(blocks)
        for part, layers in PARTS.items()
        for name, shape in layers.items()
    }


def checkpoint(folder: Path, blocks: int = 2, **config: Any) -> Artifact:
    """A model folder with tensors of no values."""
    folder.mkdir()
    shapes = {f"{name}.weight": shape for name, shape in names(blocks).items()}
    shapes |= {"model.embed_tokens.weight": (8, 64), "lm_head.weight": (8, 64), "model.norm.weight": (64,)}
    shapes |= {"model.layers.0.mlp.gate.weight": (4, 64), "model.layers.0.input_layernorm.weight": (64,)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return Artifact(folder, "model")


def test_the_matrices_of_the_blocks_are_the_layers(tmp_path: Path) -> None:
    assert linear_layers(checkpoint(tmp_path / "m").path) == names()


def test_rules_find_layers_by_regular_expression_and_the_first_counts() -> None:
    found = kept(names(), {r"layers\.0\..*down_proj$": 16, "down_proj": 8})
    assert found == {"model.layers.0.mlp.down_proj": 16, "model.layers.1.mlp.down_proj": 8}


@pytest.mark.parametrize(
    ("rule", "said", "hint"),
    [
        ("down_prj", "'down_prj' matches no layer", "did you mean 'mlp.down_proj'?"),
        (")", "is no regular expression", ""),
    ],
)
def test_a_rule_without_a_layer_names_the_nearest(rule: str, said: str, hint: str) -> None:
    with pytest.raises(SuiteError, match=said) as caught:
        kept(names(), {rule: 8})
    assert caught.value.where == "keep"
    assert caught.value.hint == hint


def test_parts_that_engines_fuse_are_told_when_their_widths_differ() -> None:
    widths = dict.fromkeys(names(), 4)
    assert torn(names(), widths) == []
    widths |= {"model.layers.1.self_attn.v_proj": 8, "model.layers.0.mlp.down_proj": 8}
    assert torn(names(), widths) == ["model.layers.1.self_attn.qkv_proj"]


def test_a_pattern_finds_its_layers_and_their_fused_form_and_nothing_else() -> None:
    chosen = [name for name in names(12) if ".1.mlp." in name] + ["model.layers.0.self_attn.q_proj"]
    found = re.compile(pattern(chosen))
    assert [name for name in names(12) if found.match(name)] == sorted(chosen, key=list(names(12)).index)
    assert found.match("model.layers.1.mlp.gate_up_proj")
    assert not found.match("model.layers.0.self_attn.qkv_proj")


def test_groups_are_blocks_of_shallow_models_and_thirds_of_deep_ones() -> None:
    assert list(group(names(2))) == ["0 attention", "0 mlp", "1 attention", "1 mlp"]
    deep = group(names(28))
    assert list(deep) == [f"{where} {part}" for where in ("0-9", "10-18", "19-27") for part in ("attention", "mlp")]
    assert sorted(itertools.chain(*deep.values())) == sorted(names(28))
    for where, layers in deep.items():
        first, last = map(int, where.split()[0].split("-"))
        assert {int(name.split(".")[2]) for name in layers} == {*range(first, last + 1)}


options = st.lists(
    st.builds(Option, st.sampled_from((2, 3, 4, 8)), st.integers(0, 20), st.integers(0, 20).map(float)),
    min_size=1,
    max_size=4,
)


@given(st.lists(options, min_size=1, max_size=4))
def test_the_front_has_the_best_mix_for_every_limit(groups: list[list[Option]]) -> None:
    every = [sum(chosen, start=Mix()) for chosen in itertools.product(*groups)]
    found = front(groups)
    assert [(mix.bytes, mix.kl) for mix in found] == sorted({(mix.bytes, mix.kl) for mix in found})
    for limit in range(max(mix.bytes for mix in every) + 1):
        best = min((mix.kl for mix in every if mix.bytes <= limit), default=None)
        within = [mix.kl for mix in found if mix.bytes <= limit]
        assert (within[-1] if within else None) == best


def test_bytes_of_a_layer_by_hand() -> None:
    # 64 x 128 weights; gptq: words, 2 groups of float16 scales and packed zeros, and a group index for each input
    assert layer_bytes("gptq", (64, 128), 4, 64) == 64 * 128 // 2 + 2 * 64 * 2 + 2 * 64 // 2 + 128 * 4
    assert layer_bytes("awq", (64, 128), 4, -1) == 64 * 128 // 2 + 64 * 2 + 64 // 2
    assert layer_bytes("bnb", (64, 128), 4, 128) == 64 * 128 // 2 + 64 * 128 // 64 * 4
    assert layer_bytes("bnb", (64, 128), 8, 128) == 64 * 128 + 64 * 4


@pytest.mark.parametrize(
    ("settings", "said", "hint"),
    [
        ({"keep": {"mlp": 3}}, "gptq with 4 bits keeps no layer at 3", "8 or 16"),
        ({"keep": {"mlp": 8}, "method": "awq"}, "awq with 4 bits keeps no layer at 8", "16"),
        ({"keep": {"mlp": 8}, "method": "bnb"}, "bnb with 4 bits keeps no layer at 8", "16"),
        ({"desc_act": True, "method": "awq"}, "desc_act is for gptq", "method = 'gptq'"),
        ({"sym": False, "method": "bnb"}, "sym is for gptq", "method = 'gptq'"),
        ({"format": "fp4"}, "format is for bnb with 4 bits", "leave it out"),
        ({"double_quant": True, "method": "bnb", "bits": 8}, "double_quant is for bnb with 4 bits", "leave it out"),
        ({"search": {"max_kl": 0.1}, "bits": 3}, "search chooses bits itself", "leave it out"),
        ({"search": {"max_kl": 0.1}, "calibration": None}, "search needs calibration data", "calibration"),
    ],
)
def test_settings_that_do_not_fit_each_other(settings: dict[str, Any], said: str, hint: str) -> None:
    with pytest.raises(SuiteError, match=said) as caught:
        Quantize(**{"model": "m", "calibration": "c", **settings}).check({})
    assert hint in caught.value.hint


def test_families_are_what_one_checkpoint_can_mix() -> None:
    assert families(["gptq", "awq", "bnb"], [4, 8]) == [
        ("gptq", (4, 8, WHOLE)),
        ("awq", (4, WHOLE)),
        ("bnb", (4, WHOLE)),
        ("bnb", (8, WHOLE)),
    ]
    assert families(["awq", "gptq"], [3, 2]) == [("gptq", (2, 3, WHOLE))]


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"max_kl": 0.1, "max_bytes": "1GB"},
        {"max_bytes": "much"},
        {"max_kl": 0},
        {"max_kl": 0.1, "bits": [3], "methods": ["awq", "bnb"]},
    ],
)
def test_a_search_has_one_limit_and_something_to_choose(search: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Quantize(model="m", calibration="c", search=search)


def test_kept_layers_are_looked_up_before_anything_runs(tmp_path: Path) -> None:
    model = {"model": [checkpoint(tmp_path / "m")]}
    stage: dict[str, Any] = {"model": "m", "calibration": "c", "group_size": 32}
    Quantize(**stage, keep={"down_proj": 8}).check(model)
    with pytest.raises(SuiteError, match="matches no layer"):
        Quantize(**stage, keep={"w1": 8}).check(model)
    with pytest.raises(SuiteError, match="keep leaves no layer to quantize"):
        Quantize(**stage, keep={"proj": 16}).check(model)


def test_settings_of_older_layouts_are_read_in_todays_words(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m").path
    assert quantized.settings(folder) is None
    (folder / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 64, "zero_point": true, "version": "GEMM"}')
    awq = {"bits": 4, "group_size": 64, "zero_point": True, "version": "gemm", "quant_method": "awq"}
    assert quantized.settings(folder) == awq
    (folder / "quantize_config.json").write_text('{"bits": 3, "desc_act": true}')
    assert quantized.settings(folder) == {"bits": 3, "desc_act": True, "quant_method": "gptq"}
    with pytest.raises(SuiteError, match="quantized already"):
        Quantize(model="m", calibration="c").check({"model": [Artifact(folder, "model")]})
    (folder / "quantize_config.json").write_text("[]")
    with pytest.raises(SuiteError, match=r"quantize_config\.json must hold a JSON object"):
        quantized.settings(folder)


def test_scripts_are_shares_of_letters() -> None:
    assert calibration.scripts(["abc, 你 1", "д"]) == {"LATIN": 0.6, "CJK": 0.2, "CYRILLIC": 0.2}
    assert calibration.scripts(["1 + 1"]) == {}


def test_training_data_is_found_through_the_lineage(tmp_path: Path) -> None:
    def made(name: str, **inputs: tuple[Path, str]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        entries = {field: [{"path": str(path), "type": kind, "digest": "d"}] for field, (path, kind) in inputs.items()}
        (folder / "artifact.json").write_text(json.dumps({"inputs": entries}))
        return folder

    (tmp_path / "rows.jsonl").touch()
    base = made("base", data=(tmp_path / "gone.jsonl", "dataset"))
    tuned = made("tuned", data=(tmp_path / "rows.jsonl", "dataset"), base=(base, "model"))
    merged = made("merged", adapter=(tuned, "adapter"), base=(base, "model"))
    assert calibration.training_data(Artifact(merged, "model")) == [tmp_path / "rows.jsonl"]


def test_tables_and_lists_of_numbers_are_flags_too() -> None:
    parser = Parser("quantize", "")
    add_settings(parser, Quantize)
    given = parser.read(
        ["--keep", r"layers\.0=8", "--keep", "down=16", "--search.bits", "2,4", "--search.max-kl", "0.1"]
    )
    values = values_of(Quantize, given)
    assert values["keep"] == {r"layers\.0": 8, "down": 16}
    stage = Quantize(model="m", calibration="c", search=values["search"])
    assert stage.search == Search(max_kl=0.1, bits=[2, 4])
    assert {action.metavar for action in parser._actions if "--keep" in action.option_strings} == {"KEY=VALUE"}
