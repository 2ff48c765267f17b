"""What GPTQ and AWQ share: a run of GPTQModel over calibration samples, and an output folder without its traces."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from export.folder import copy_beside, read_config, read_json, write_json
from export.quantizers.layers import linear_layers
from export.quantizers.recipe import Blocks, Progress
from suite import quantized  # noqa: F401  it decides how many workers GPTQModel has

TOKENS = 4096
"""Tokens in one forward."""
SETTINGS = ("quantizer", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "act_group_aware")
"""What of the `meta` table says how the weights were made; the rest describes the machine, temporary paths included."""
COMMON: dict[str, Any] = {
    "offload_to_disk": False,
    "pack_impl": "original",  # the other one compiles C++ on first use: half a minute, and a compiler on the machine
}


def quantize(source: Path, out: Path, config: Any, blocks: Blocks, progress: Progress, **options: Any) -> None:
    """Quantize the model in `source` into `out`, by a GPTQModel QuantizeConfig and `blocks` (N, T) of token ids.

    The folder gets the parent's tokenizer, template and generation settings, byte for byte: GPTQModel changes them.
    """
    from gptqmodel import GPTQModel

    layers = read_config(source)["num_hidden_layers"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPTQModel.load(str(source), config, device=device)
    _turn_by_kind(model)
    model.layer_callback = lambda layer_idx, **_: progress(layer_idx + 1, layers, "quantize")
    rows = (torch.tensor([block]) for block in blocks)
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    batch = max(1, TOKENS // len(blocks[0]))
    model.quantize(samples, batch_size=batch, **options)
    out.mkdir(parents=True, exist_ok=True)
    copy_beside(source, out)
    _mend_rope(model.model.config)
    with TemporaryDirectory(dir=out.parent) as raw:
        model.save(raw)
        _join(Path(raw), linear_layers(source))
        for file in Path(raw).glob("*.safetensors*"):
            file.chmod(0o644)
            file.replace(out / file.name)
        made = read_json(Path(raw) / "config.json")
    settings = made["quantization_config"]
    settings["meta"] = {key: settings["meta"][key] for key in SETTINGS if settings["meta"].get(key) is not None}
    write_json(out / "config.json", {**read_config(source), "dtype": made["dtype"], "quantization_config": settings})
    write_json(out / "quantize_config.json", settings)


def _turn_by_kind(model: Any) -> None:
    """Give each layer the rotary embedding of its kind, where kinds have their own, as in Gemma 3.

    GPTQModel gives every layer the first one's; and for AWQ it asks for one of no kind, where it keeps none.
    """
    rotary = getattr(model.model.model, "rotary_emb", None)
    if rotary is None or "layer_type" not in inspect.signature(rotary.forward).parameters:
        return
    own = model.prepare_layer_replay_kwargs

    def prepare(layer: Any, layer_input: Any, additional_inputs: dict[str, Any], target_device: Any) -> dict[str, Any]:
        given: dict[str, Any] = own(layer, layer_input, additional_inputs, target_device)
        turned = rotary(layer_input[0], given["position_ids"], layer.self_attn.layer_type)
        return {**given, "position_embeddings": turned}

    model.prepare_layer_replay_kwargs = prepare
    model.awq_preserve_explicit_position_embeddings = True


def _mend_rope(config: Any) -> None:
    """Take out what GPTQModel adds where kinds of layers have rotary settings of their own, and cannot be saved."""
    rope = getattr(config, "rope_parameters", None) or {}
    if kinds := {kind: own for kind, own in rope.items() if isinstance(own, dict)}:
        config.rope_parameters = kinds


def _join(raw: Path, layers: Collection[str]) -> None:
    """Put together again what GPTQModel takes apart, and no reader expects so: `gate_up_proj` of `layers`, Phi-3's."""
    joined = {name.replace("gate_up_proj", "gate_proj"): name for name in layers if name.endswith("gate_up_proj")}
    files = sorted(raw.glob("*.safetensors*"))
    if not joined:
        return
    tensors = {name: t for file in files if file.suffix == ".safetensors" for name, t in load_file(file).items()}
    for gate, whole in joined.items():
        up = gate.replace("gate_proj", "up_proj")
        for part in [name.removeprefix(gate) for name in tensors if name.startswith(f"{gate}.")]:
            first, second = tensors.pop(f"{gate}{part}"), tensors.pop(f"{up}{part}")
            tensors[f"{whole}{part}"] = first if part == ".g_idx" else torch.cat([first, second], -1)
    for file in files:
        file.unlink()
    save_torch_state_dict(tensors, raw)


def describe(out: Path, **settings: Any) -> None:
    """Add what GPTQModel leaves unsaid, and other readers need, to both files that describe the quantization."""
    config = read_config(out)
    config["quantization_config"] |= settings
    write_json(out / "config.json", config)
    write_json(out / "quantize_config.json", config["quantization_config"])
