"""What exports and their proofs cost: writing against copying, proving against the bare forward passes, and memory.

    python benchmarks/export.py [--quick] [--converter convert_hf_to_gguf.py] [--json]

On a random model of 1 GiB (`--quick`: of 256 MiB) in bfloat16; every way runs in a process of its own, alternating, on
the same disk. Time and memory are without imports. `--converter`: llama.cpp's own, of the same version (it needs
sentencepiece); it knows the tokenizer by this script's word.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.merge import COPY, Bench, row, show  # noqa: E402

FOLDER = """
from pathlib import Path
from export import hf
from suite.chat import Chat
Chat.load(Path(base))
def work():
    Path(out).mkdir()
    hf.write_model(Path(base), Path(out), lambda *_: None)
    hf.write_checksums(Path(out))
measure(work)
"""
CHECKED_COPY = """
import hashlib, shutil
from pathlib import Path
def work():
    shutil.copytree(base, out)
    for folder in (base, out):
        for file in Path(folder).iterdir():
            hashlib.file_digest(file.open("rb"), "sha256")
measure(work)
"""
GGUF = """
from pathlib import Path
import gguf as _, torch as _
from transformers import AutoTokenizer as _, PreTrainedTokenizerFast as _
from export import gguf
def work():
    Path(out).mkdir()
    gguf.write(Path(base), Path(out) / "model.gguf", "{weights}", "random")
measure(work)
"""
CONVERTER = """
import pathlib, runpy
root = pathlib.Path({converter!r}).parent
sys.path[:0] = [str(root), str(root / "gguf-py")]
import torch, transformers
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
def work():
    pathlib.Path(out).mkdir()
    sys.argv = ["convert", base, "--outtype", "f16", "--outfile", out + "/model.gguf"]
    try:
        runpy.run_path({converter!r}, run_name="__main__")
    except SystemExit:
        pass
measure(work)
"""
PROOF = """
from pathlib import Path
import torch, transformers, peft
from export import parity
def load():
    return parity.load(Path(base), streamed={streamed})
measure(lambda: parity.measure(load, load, parity.probes(Path(base))))
"""
FORWARD = """
from pathlib import Path
import torch, transformers, peft
from export import parity
@torch.inference_mode()
def work():
    for _ in range(2):
        model = parity.load(Path(base), streamed=False)
        for probe in parity.probes(Path(base)):
            model(input_ids=torch.tensor([probe.ids]))
measure(work)
"""
WAYS = {
    "cp": COPY,
    "hf": FOLDER,
    "cp and hashes": CHECKED_COPY,
    "f16": GGUF.format(weights="f16"),
    "q8_0": GGUF.format(weights="q8_0"),
    "proof": PROOF.format(streamed=False),
    "streamed": PROOF.format(streamed=True),
    "forward": FORWARD,
}


def rows(mib: int, rounds: int, converter: str) -> list[dict[str, Any]]:
    """The measurements, each with its goal."""
    ways: Mapping[str, str] = WAYS
    if converter:
        ways = {**WAYS, "llama.cpp": CONVERTER.format(converter=str(Path(converter).resolve()))}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), mib, "", "")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                found[name].append(bench.python(way))
    seconds = {name: statistics.median(r["seconds"] for r in runs) for name, runs in found.items()}
    memory = {name: max(r["mib"] for r in runs) for name, runs in found.items()}
    result = [
        row(
            f"hf folder of {mib} MiB, theirs is cp and the hashes of both",
            seconds["hf"],
            seconds["cp and hashes"],
            "s",
            2,
        ),
        row(f"gguf f16 of {mib} MiB, theirs is cp", seconds["f16"], seconds["cp"], "s", 5),
        row("gguf f16, memory over imports, theirs is the limit", memory["f16"], 150, "MiB", 1),
        row(f"gguf q8_0 of {mib} MiB, theirs is cp", seconds["q8_0"], seconds["cp"], "s", 20),
        row("proof, theirs is loading both and asking each once", seconds["proof"], seconds["forward"], "s", 2),
        row("streamed proof, time, theirs is the proof in memory", seconds["streamed"], seconds["proof"], "s", 3),
        row("streamed proof, memory, theirs is one model in float32", memory["streamed"], 2 * mib, "MiB", 0.5),
    ]
    if converter:
        result.append(
            row("gguf f16, time, theirs is llama.cpp's converter", seconds["f16"], seconds["llama.cpp"], "s", 1)
        )
        result.append(row("gguf f16, memory, theirs is llama.cpp's", memory["f16"], memory["llama.cpp"], "MiB", 1))
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model; about two minutes")
    parser.add_argument("--converter", default="", help="llama.cpp's convert_hf_to_gguf.py, to compare with")
    parser.add_argument("--json", action="store_true", help="one JSON line a row")
    options = parser.parse_args()
    start = time.perf_counter()
    for found in rows(256 if options.quick else 1024, 3, options.converter):
        show(found, options.json)
    if not options.json:
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
