"""What is wrong with a model or an adapter is told from the files' headers, before torch."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve.backends import check_backend
from serve.command import parse_loras, serve
from serve.folders import check_fits, check_layers, read_adapter, read_model, tensor_shapes
from serve.server import listen
from serve.settings import Settings
from suite.errors import SuiteError

SHAPES = {"model.embed_tokens.weight": (64, 8), "model.layers.0.self_attn.q_proj.weight": (16, 8)}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def safetensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file with the right header and no data behind it: only headers are read."""
    header = json.dumps({n: {"dtype": "F32", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)


def model(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "max_position_embeddings": 512, **config}))
    safetensors(folder / "model.safetensors", SHAPES)
    return folder


def adapter(
    folder: Path, inputs: int = 8, outputs: int = 16, rank: int = 2, module: str = Q_PROJ, **config: Any
) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = {f"{module}.lora_A.weight": (rank, inputs), f"{module}.lora_B.weight": (outputs, rank)}
    safetensors(folder / "adapter_model.safetensors", weights)
    return folder


def test_a_fitting_adapter(tmp_path: Path) -> None:
    base, lora = read_model(model(tmp_path / "m")), read_adapter(adapter(tmp_path / "a"))
    check_fits(lora, base)
    assert base.max_length == 512
    assert lora.rank == 2
    assert lora.modules["model.layers.0.self_attn.q_proj"].scaling == 2.0


@pytest.mark.parametrize("inside", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_the_language_model_of_one_that_sees_too(tmp_path: Path, inside: str) -> None:
    folder = model(tmp_path / "m")
    shapes = {name.replace("model.", inside): shape for name, shape in SHAPES.items()}
    safetensors(folder / "model.safetensors", shapes)
    check_fits(read_adapter(adapter(tmp_path / "a")), read_model(folder))
    with pytest.raises(SuiteError, match="maps 8 to 17 values"):
        check_fits(read_adapter(adapter(tmp_path / "b", outputs=17)), read_model(folder))


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 8}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 6}}, 3.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 6}}, 3.0),
        ({"alpha_pattern": {"k_proj": 6}}, 2.0),
        ({"alpha_pattern": {"proj": 6}}, 2.0),
    ],
)
def test_scaling(tmp_path: Path, config: dict[str, Any], scaling: float) -> None:
    (found,) = read_adapter(adapter(tmp_path / "a", **config)).modules.values()
    assert found.scaling == pytest.approx(scaling)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_adapters_that_are_more_than_lora_must_be_merged(tmp_path: Path, config: dict[str, Any], word: str) -> None:
    with pytest.raises(SuiteError, match=word) as error:
        read_adapter(adapter(tmp_path / "a", **config))
    assert error.value.hint


def test_dora_is_read_for_who_knows_it(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", use_dora=True)
    with pytest.raises(SuiteError, match="use_dora does not describe"):
        read_adapter(folder, dora=True)
    file = folder / "adapter_model.safetensors"
    pairs = tensor_shapes(file)
    name = next(iter(pairs)).rpartition(".lora_")[0]
    safetensors(file, {**pairs, f"{name}.lora_magnitude_vector": (16,)})
    read = read_adapter(folder, dora=True)
    assert read.dora
    assert read.parameters == 2 * (8 + 16) + 2 * 16
    with pytest.raises(SuiteError, match="use_dora cannot be served"):
        read_adapter(folder)


@pytest.mark.parametrize("wrong", [{"inputs": 16}, {"module": "base_model.model.model.layers.7.mlp.up_proj"}])
def test_an_adapter_for_another_base(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(SuiteError, match="another base"):
        check_fits(read_adapter(adapter(tmp_path / "a", **wrong)), read_model(model(tmp_path / "m")))


def test_an_adapter_that_is_cut_off(tmp_path: Path) -> None:
    file = adapter(tmp_path / "a") / "adapter_model.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"1234567")
    with pytest.raises(SuiteError, match="1 bytes are missing"):
        read_adapter(tmp_path / "a")


def test_an_adapter_that_changes_on_disk_is_noticed(tmp_path: Path) -> None:
    read = read_adapter(adapter(tmp_path / "a"))
    read.check_unchanged()
    safetensors(read.weights, {"x": (1, 1)})
    with pytest.raises(SuiteError, match="changed on disk"):
        read.check_unchanged()
    read.weights.unlink()
    with pytest.raises(SuiteError, match="is missing"):
        read.check_unchanged()
    assert read.parameters == 2 * (8 + 16)


def test_loras_of_single_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="expert"):
        read_adapter(adapter(tmp_path / "a", module="base_model.model.model.layers.0.mlp.experts.3.up_proj"))


def test_embedding_loras_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    safetensors(folder / "adapter_model.safetensors", {"base_model.model.model.embed_tokens.lora_embedding_A": (2, 64)})
    with pytest.raises(SuiteError, match="embed_tokens"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no \\*.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 20), "not a safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a safetensors"),
    ],
)
def test_damaged_models(tmp_path: Path, damage: Any, message: str) -> None:
    folder = model(tmp_path / "m")
    damage(folder)
    with pytest.raises(SuiteError, match=message):
        read_model(folder)


def test_models_that_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="encoder-decoder"):
        read_model(model(tmp_path / "t5", is_encoder_decoder=True))
    strange = {"layer_types": ["full_attention", "linear_attention", "compressed_sparse_attention"]}
    for name, config in {"strange": strange, "nested": {"text_config": strange}}.items():
        found = read_model(model(tmp_path / name, **config))
        with pytest.raises(SuiteError, match="type compressed_sparse_attention cannot be served") as error:
            check_layers(found.layer_types, found.path)
        assert "--backend" in error.value.hint
    with pytest.raises(SuiteError, match="an adapter, not a model"):
        read_model(adapter(tmp_path / "a"))
    with pytest.raises(SuiteError, match="no such folder"):
        read_model(tmp_path / "nowhere")


def test_shapes_of_a_file(tmp_path: Path) -> None:
    safetensors(tmp_path / "x", SHAPES)
    assert tensor_shapes(tmp_path / "x") == SHAPES


def test_parse_loras() -> None:
    assert parse_loras("a=x/y, b=z") == {"a": Path("x/y"), "b": Path("z")}
    assert parse_loras("runs/law") == {"law": Path("runs/law")}
    assert parse_loras("") == {}
    for bad in ("a=", "=x", "a b=x", "a=x,a=y", "x/law,y/law"):
        with pytest.raises(SuiteError):
            parse_loras(bad)


def test_unknown_backends() -> None:
    with pytest.raises(SuiteError, match="unknown backend 'troch'") as error:
        check_backend("troch")
    assert "torch" in error.value.hint


def test_serve_refuses_before_it_loads(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    with pytest.raises(SuiteError, match="both named 'm'"):
        serve(Settings(model=folder, adapters={"m": tmp_path}, name="m"))
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SuiteError, match=f"127.0.0.1:{port}"):
            serve(Settings(model=folder, name="m", port=port))


def test_nothing_heavy_is_imported_before_a_model_is_loaded() -> None:
    modules = "serve.backends, serve.command, serve.gateway, serve.server, serve.torch.scheduler"
    heavy = "{'torch', 'transformers', 'peft'}"
    code = f"import sys, {modules}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
