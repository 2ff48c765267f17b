"""Merging a LoRA adapter: time against copying the files and against peft, and the memory that each needs.

    python benchmarks/merge.py [--quick] [--json]

Every way runs in a process of its own, alternating, on the same random model and disk. Memory is the peak of the
process (Linux) over its peak after the imports. `--quick`: a model of 256 MiB instead of 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, LAYER = 1024, 14.5 * (1 << 20)  # bytes of a layer in bfloat16, about
RANK = 16

OURS = """
from pathlib import Path
from export import lora
from export.merge import merge
measure(lambda: merge(Path(base), Path(adapter), Path(out), 5 * 10**9, lambda *_: None))
"""
PEFT = """
import torch, transformers
from peft import PeftModel
def merge():
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
measure(merge)
"""
COPY = """
import shutil
measure(lambda: shutil.copytree(base, out))
"""
PRELUDE = """
import json, re, sys, time
base, adapter, out = sys.argv[1:]
def peak():  # not ru_maxrss: that starts with the memory of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def measure(work):
    before, start = peak(), time.perf_counter()
    work()
    print(json.dumps({"seconds": time.perf_counter() - start, "mib": peak() - before}))
"""


def make(folder: Path, mib: int) -> tuple[Path, Path]:
    """A random model of about `mib` MiB in bfloat16, and an adapter for all its linear layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=max(1, round((mib - 16) * (1 << 20) / LAYER)),
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=HIDDEN // 8,
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    state = {n: torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02) for n, t in model.state_dict().items()}
    state.pop("lm_head.weight")
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file(state, base / "model.safetensors", {"format": "pt"})
    config.tie_word_embeddings = True
    config.architectures = ["Qwen3ForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(base)
    pairs = {}
    for name, weight in state.items():
        if name.endswith("proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{module}.lora_A.weight"] = 0.02 * torch.randn(RANK, weight.shape[1])
            pairs[f"{module}.lora_B.weight"] = 0.02 * torch.randn(weight.shape[0], RANK)
    save_file(pairs, adapter / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in pairs})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}), "utf-8")
    return base, adapter


def run(way: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Seconds and MiB of one way, in a fresh process, into a fresh folder."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + way, str(base), str(adapter), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(mib: int, rounds: int) -> list[dict[str, Any]]:
    """The measurements, each with its goal."""
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = make(Path(scratch), mib)
        largest = max(t["bytes"] for t in tensors(base)) / (1 << 20)
        found: dict[str, list[dict[str, float]]] = {OURS: [], COPY: [], PEFT: []}
        for _ in range(rounds):
            for way in (COPY, OURS):
                found[way].append(run(way, base, adapter, Path(scratch) / "out"))
        found[PEFT].append(run(PEFT, base, adapter, Path(scratch) / "out"))
    seconds = {way: statistics.median(r["seconds"] for r in runs) for way, runs in found.items()}
    memory = {way: max(r["mib"] for r in runs) for way, runs in found.items()}
    bound = 150 + largest
    return [
        row(f"merge {mib} MiB, time, theirs is cp", seconds[OURS], seconds[COPY], "s", 1.3),
        row(f"merge {mib} MiB, time, theirs is peft", seconds[OURS], seconds[PEFT], "s", 1.0),
        row(f"merge {mib} MiB, peak memory, theirs is peft", memory[OURS], memory[PEFT], "MiB", bound / memory[PEFT]),
    ]


def tensors(base: Path) -> list[dict[str, int]]:
    """The sizes of a model's tensors."""
    from export.tensors import read_checkpoint

    return [{"bytes": t.size} for t in read_checkpoint(base).values()]


def row(measure: str, ours: float, theirs: float, unit: str, goal: float) -> dict[str, Any]:
    """One line of the result; `goal` is the largest ratio wanted."""
    ratio = ours / theirs
    return {
        "measure": measure,
        "ours": round(ours, 3),
        "theirs": round(theirs, 3),
        "unit": unit,
        "ratio": round(ratio, 3),
        "goal": round(goal, 2),
        "met": ratio <= goal,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model; under 50 s")
    parser.add_argument("--json", action="store_true", help="one JSON line a row")
    options = parser.parse_args()
    start = time.perf_counter()
    for found in rows(256 if options.quick else 1024, 3 if options.quick else 5):
        if options.json:
            print(json.dumps(found), flush=True)
        else:
            met = "met" if found["met"] else "missed"
            print(
                f"{found['measure']:45} {found['ours']:9.2f} {found['theirs']:9.2f} {found['unit']:4} "
                f"ratio {found['ratio']:5.2f}  goal {found['goal']} {met}"
            )
    if not options.json:
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
