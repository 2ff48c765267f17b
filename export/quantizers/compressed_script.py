"""Run by the interpreter of the environment `llmcompressor`, as `python compressed_script.py JOB.json`.

It imports nothing of the suite, and the suite does not import it. JOB.json:

    source, out    the model folder and where the result goes
    schemes        by llm-compressor's scheme name, the layers that get it: exact names, or "Linear" for all others
    ignore         layers that are not quantized: exact names, or "re:" and a regular expression
    group_size     weights that share one scale, where the scheme has groups; -1: a whole row
    blocks         safetensors file with `ids` (N, T), the calibration data; null for schemes that need none
    batch          blocks in one forward

Prints a line `{"step": ..., "total": ..., "what": ...}` after each group of layers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


class Gptq(GPTQModifier):  # type: ignore[misc]
    """GPTQ that says how far it is."""

    layers: int
    done: int = 0

    def on_sequential_epoch_end(self, *arguments: Any, **options: Any) -> None:
        super().on_sequential_epoch_end(*arguments, **options)
        self.done = min(self.done + 1, self.layers)
        print(json.dumps({"step": self.done, "total": self.layers, "what": "quantize"}), flush=True)


def scheme(name: str, layers: list[str], group_size: int) -> QuantizationScheme:
    """The preset `name` for these layers, with groups of the given size where it has groups."""
    found = preset_name_to_scheme(name, layers)
    if found.weights.group_size:
        groups = {"strategy": "group", "group_size": group_size} if group_size > 0 else {"strategy": "channel"}
        found.weights = QuantizationArgs(**{**found.weights.model_dump(exclude={"strategy", "group_size"}), **groups})
    return found


def batches(file: str, batch: int) -> DataLoader[dict[str, torch.Tensor]]:
    """The calibration blocks, `batch` of them at a time."""
    ids = load_file(file)["ids"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return DataLoader(rows, batch_size=batch)  # type: ignore[arg-type]


def main(job: dict[str, Any]) -> None:
    """Quantize and save; weights that no scheme names stay as they are."""
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto", local_files_only=True)
    groups = {
        f"group_{i}": scheme(name, layers, job["group_size"]) for i, (name, layers) in enumerate(job["schemes"].items())
    }
    if job["blocks"]:
        recipe = Gptq(config_groups=groups, ignore=job["ignore"], layers=model.config.num_hidden_layers)
        data = {"dataset": batches(job["blocks"], job["batch"]), "pipeline": "sequential"}
        data |= {"num_calibration_samples": None, "shuffle_calibration_samples": False}
    else:
        recipe, data = QuantizationModifier(config_groups=groups, ignore=job["ignore"]), {}
    oneshot(model=model, recipe=recipe, **data)
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
