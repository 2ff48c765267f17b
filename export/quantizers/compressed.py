"""compressed-tensors by llm-compressor, which runs in an environment of its own (`suite env install llmcompressor`).

w4a16   weights in 4 bits by groups, rounded by GPTQ (arXiv:2210.17323)
w8a8    weights in 8 bits by row, rounded by GPTQ; activations in 8 bits by token, while it runs
fp8     weights as float8 (e4m3) by row, activations likewise by token; needs no calibration data
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import save_file

from export.folder import copy_beside, read_config, read_json, write_json
from export.quantizers.layers import ROUTERS
from export.quantizers.recipe import Blocks, Progress, Recipe
from suite.processes import run_script

SCRIPT = Path(__file__).with_name("compressed_script.py")
SCHEMES = {"w4a16": "W4A16", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}
WIDER = "W8A16"
"""The scheme of layers of w4a16 that keep 8 bits."""
TOKENS = 4096
"""Tokens in one forward."""


def quantize(source: Path, out: Path, recipe: Recipe, blocks: Blocks, progress: Progress) -> None:
    """Write the model in `source` to `out` as compressed-tensors, calibrated on `blocks` (N, T) but for fp8.

    The folder gets the parent's tokenizer, template and generation settings, byte for byte. What llm-compressor says is
    in `llmcompressor.log` beside `out`. Raises StageFailed with its last lines when it fails.
    """
    assert recipe.python is not None
    with TemporaryDirectory(dir=out.parent) as temporary:
        raw, data = Path(temporary) / "model", Path(temporary) / "blocks.safetensors"
        described = {
            "source": str(source),
            "out": str(raw),
            "schemes": _schemes(recipe),
            "ignore": ["lm_head", f"re:.*\\.({'|'.join(ROUTERS)})$", *recipe.whole],
            "group_size": recipe.group_size,
            "blocks": None,
            "batch": 1,
        }
        if recipe.method != "fp8":
            save_file({"ids": np.asarray(blocks, dtype=np.int64)}, data)
            described |= {"blocks": str(data), "batch": max(1, TOKENS // len(blocks[0]))}
        job = Path(temporary) / "job.json"
        job.write_text(json.dumps(described), "utf-8")
        run_script(recipe.python, SCRIPT, [str(job)], out.with_name("llmcompressor.log"), progress)
        out.mkdir(parents=True, exist_ok=True)
        copy_beside(source, out)
        for file in raw.glob("*.safetensors*"):
            file.chmod(0o644)
            file.replace(out / file.name)
        made = read_json(raw / "config.json")
    changed = {key: made[key] for key in ("dtype", "quantization_config")}
    write_json(out / "config.json", {**read_config(source), **changed})


def _schemes(recipe: Recipe) -> dict[str, list[str]]:
    """By scheme, the layers that get it; "Linear" stands for those that are not named."""
    wider = [name for name, bits in recipe.widths.items() if name not in recipe.whole]
    return {SCHEMES[recipe.method]: ["Linear"], **({WIDER: wider} if wider else {})}
