"""bitsandbytes: 4 bits as nf4 (arXiv:2305.14314) or 8 as int8 (arXiv:2208.07339); rounds without calibration."""

from __future__ import annotations

from pathlib import Path

import torch

from export.folder import copy_beside, read_config, write_json


def quantize(source: Path, out: Path, bits: int) -> None:
    """Write the model in `source` to `out` with 4 or 8 bits a weight, in the form that transformers loads."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

    dtype = getattr(torch, read_config(source).get("dtype") or "float32")
    if bits == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=dtype, device_map=device, local_files_only=True
    )
    model.generation_config = GenerationConfig()  # many a model's own is refused on saving; its file is copied below
    model.save_pretrained(out)
    settings = read_config(out)["quantization_config"]
    copy_beside(source, out)
    write_json(out / "config.json", {**read_config(source), "quantization_config": settings})
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)
