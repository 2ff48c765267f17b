"""What GPTQ and AWQ share: a run of GPTQModel over calibration samples, and an output folder without its traces."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from export.folder import copy_beside, read_config, read_json, write_json
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
    model.layer_callback = lambda layer_idx, **_: progress(layer_idx + 1, layers, "quantize")
    rows = (torch.tensor([block]) for block in blocks)
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    batch = max(1, TOKENS // len(blocks[0]))
    model.quantize(samples, batch_size=batch, **options)
    out.mkdir(parents=True, exist_ok=True)
    copy_beside(source, out)
    with TemporaryDirectory(dir=out.parent) as raw:
        model.save(raw)
        for file in Path(raw).glob("*.safetensors*"):
            file.chmod(0o644)
            file.replace(out / file.name)
        made = read_json(Path(raw) / "config.json")
    settings = made["quantization_config"]
    settings["meta"] = {key: settings["meta"][key] for key in SETTINGS if settings["meta"].get(key) is not None}
    write_json(out / "config.json", {**read_config(source), "dtype": made["dtype"], "quantization_config": settings})
    write_json(out / "quantize_config.json", settings)


def describe(out: Path, **settings: Any) -> None:
    """Add what GPTQModel leaves unsaid, and other readers need, to both files that describe the quantization."""
    config = read_config(out)
    config["quantization_config"] |= settings
    write_json(out / "config.json", config)
    write_json(out / "quantize_config.json", config["quantization_config"])
