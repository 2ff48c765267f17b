"""bitsandbytes: 4 bits as nf4 or fp4 (arXiv:2305.14314) or 8 as int8 (arXiv:2208.07339); needs no calibration."""

from __future__ import annotations

from pathlib import Path

import torch

from export.folder import copy_beside, read_config, write_json
from export.quantizers.recipe import Blocks, Progress, Recipe


def quantize(source: Path, out: Path, recipe: Recipe, _blocks: Blocks, progress: Progress) -> None:
    """Write the model in `source` to `out` with 4 or 8 bits a weight, in the form that transformers loads."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

    given = read_config(source)
    dtype = getattr(torch, given.get("dtype") or given.get("torch_dtype") or "float32")
    # a list of our own takes the place of the head, which is left out otherwise
    skipped = [*recipe.whole, "lm_head"] if recipe.whole else None
    if recipe.bits == 4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.format,
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=dtype, device_map=device, local_files_only=True
    )
    progress(1, 2, "quantize")
    model.generation_config = GenerationConfig()  # many a model's own is refused on saving; its file is copied below
    model.save_pretrained(out)
    settings = read_config(out)["quantization_config"]
    copy_beside(source, out)
    write_json(out / "config.json", {**given, "quantization_config": settings})
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)
    progress(2, 2, "quantize")
