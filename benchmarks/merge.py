"""Merging a LoRA adapter: time against copying the files, peft and other tools, and the memory that each needs.

    python benchmarks/merge.py [--quick] [--swift COMMAND] [--llamafactory COMMAND] [--json]

On a random model of 1 GiB and one of 4 GiB (`--quick`: of 256 MiB), in bfloat16. Every way runs in a process of its
own, alternating, on the same disk. Against cp and peft, time and memory are those of the merge, without imports (memory
is the peak over that after them, on Linux); against ms-swift and LLaMA-Factory, which are given by their commands
(`.../bin/swift`, `.../bin/llamafactory-cli`), those of the whole command, ours with its imports too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
RANK = 16
SHAPES = {256: (1024, 8192), 1024: (2048, 16384), 4096: (4096, 16384)}
"""Hidden size and vocabulary by the size of the model in MiB."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

OURS = """
from pathlib import Path
from export.lora import blocks
from export.merge import merge
measure(lambda: merge(Path(base), [Path(adapter)], Path(out), 5 * 10**9))
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
MAKE = """
import pathlib, benchmarks.merge
benchmarks.merge.make(pathlib.Path(base).parent, int(out))
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


def make(folder: Path, mib: int) -> None:
    """A random Llama of about `mib` MiB in bfloat16 with a tokenizer, and an adapter for all its linear layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from export.folder import copy_tokenizer
    from suite.references import nano

    hidden, vocabulary = SHAPES[mib]
    layer = 2 * (2 * hidden * hidden + hidden * hidden + 3 * hidden * 2 * hidden)  # bytes: q, o, k, v, and the MLP
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=round((mib * MIB - 2 * vocabulary * hidden) / layer),
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 256,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    state = {n: torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02) for n, t in model.state_dict().items()}
    state.pop("lm_head.weight")
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file(state, base / "model.safetensors", {"format": "pt"})
    config.save_pretrained(base)
    copy_tokenizer(nano(), base)
    pairs = {}
    for name, weight in state.items():
        if name.endswith("proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{module}.lora_A.weight"] = 0.02 * torch.randn(RANK, weight.shape[1])
            pairs[f"{module}.lora_B.weight"] = 0.02 * torch.randn(weight.shape[0], RANK)
    save_file(pairs, adapter / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in pairs})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    settings |= {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), "utf-8")


class Bench:
    """Runs ways of merging one model, each in a process of its own, into a fresh folder."""

    def __init__(self, folder: Path, mib: int, swift: str, llamafactory: str) -> None:
        self.base, self.adapter, self.out = folder / "base", folder / "adapter", folder / "out"
        self.folder = folder
        self.python(MAKE, str(mib))
        self.peers = {}
        if swift:
            self.peers["ms-swift"] = self._swift(swift)
        if llamafactory:
            self.peers["LLaMA-Factory"] = self._llamafactory(llamafactory)

    def _swift(self, command: str) -> list[str]:
        model = ["--model", str(self.base), "--model_type", "llama", "--template", "chatml"]
        return [command, "export", *model, "--adapters", str(self.adapter), "--merge_lora", "true",
                "--output_dir", str(self.out)]  # fmt: skip

    def _llamafactory(self, command: str) -> list[str]:
        settings = {
            "model_name_or_path": str(self.base), "adapter_name_or_path": str(self.adapter), "template": "chatml",
            "export_dir": str(self.out), "export_size": 5, "export_device": "cpu", "export_legacy_format": False,
        }  # fmt: skip
        file = self.folder / "export.yaml"
        file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()), "utf-8")
        return [command, "export", str(file)]

    def python(self, way: str, out: str = "") -> dict[str, float]:
        """Seconds and MiB of a merge, and those of its whole process."""
        program = [sys.executable, "-W", "ignore", "-c", PRELUDE + way]
        return self.command([*program, str(self.base), str(self.adapter), out or str(self.out)])

    def command(self, command: list[str]) -> dict[str, float]:
        """Seconds and MiB of a whole command, and what it says of itself in its last line."""
        shutil.rmtree(self.out, ignore_errors=True)
        start = time.perf_counter()
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env={**os.environ, **OFFLINE})
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - start
            said.seek(0)
            lines = said.read().decode(errors="replace").splitlines()
        if process.returncode:
            raise RuntimeError("\n".join([f"{command[0]} failed", *lines[-20:]]))
        told = [line for line in lines if line.startswith('{"seconds"')]
        return {"whole": seconds, "whole_mib": usage.ru_maxrss / 1024, **(json.loads(told[-1]) if told else {})}


def rows(mib: int, rounds: int, swift: str, llamafactory: str) -> list[dict[str, Any]]:
    """The measurements of one size, each with its goal."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), mib, swift, llamafactory)
        largest = largest_tensor(bench.base)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", "cp", "peft", *bench.peers)}
        for i in range(rounds):
            found["cp"].append(bench.python(COPY))
            found["ours"].append(bench.python(OURS))
            if i % 3 == 0:
                found["peft"].append(bench.python(PEFT))
                for name, command in bench.peers.items():
                    found[name].append(bench.command(command))

    def median(way: str, value: str) -> float:
        return statistics.median(r[value] for r in found[way])

    def most(way: str, value: str) -> float:
        return max(r[value] for r in found[way])

    what, bound = f"merge {mib} MiB", 150 + largest
    result = [
        row(f"{what}, time, theirs is cp", median("ours", "seconds"), median("cp", "seconds"), "s", 1.3),
        row(f"{what}, time, theirs is peft", median("ours", "seconds"), median("peft", "seconds"), "s", 1.0),
        row(f"{what}, memory over imports, theirs is the limit", most("ours", "mib"), bound, "MiB", 1.0),
        row(f"{what}, memory over imports, theirs is peft", most("ours", "mib"), most("peft", "mib"), "MiB", 1.0),
    ]
    for name in bench.peers:
        whole = f"{what}, whole command"
        result.append(row(f"{whole}, time, theirs is {name}", median("ours", "whole"), median(name, "whole"), "s", 1.0))
        pair = most("ours", "whole_mib"), most(name, "whole_mib")
        result.append(row(f"{whole}, memory, theirs is {name}", *pair, "MiB", 1.0))
    return result


def largest_tensor(base: Path) -> float:
    """MiB of a model's largest tensor."""
    from export.tensors import read_checkpoint

    return max(t.size for t in read_checkpoint(base).values()) / MIB


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


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print a row."""
    if as_json:
        print(json.dumps(found), flush=True)
        return
    met = "met" if found["met"] else "missed"
    print(
        f"{found['measure']:65} {found['ours']:9.2f} {found['theirs']:9.2f} {found['unit']:4} "
        f"ratio {found['ratio']:5.2f}  goal {found['goal']} {met}",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model only; about a minute")
    parser.add_argument("--swift", default="", help="the command of an installed ms-swift")
    parser.add_argument("--llamafactory", default="", help="the command of an installed LLaMA-Factory")
    parser.add_argument("--json", action="store_true", help="one JSON line a row")
    options = parser.parse_args()
    start = time.perf_counter()
    for mib, rounds in ((256, 5),) if options.quick else ((1024, 7), (4096, 9)):
        for found in rows(mib, rounds, options.swift, options.llamafactory):
            show(found, options.json)
    if not options.json:
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
