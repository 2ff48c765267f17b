"""`suite doctor`: what this machine has, and what each part of the suite needs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from suite import envs, store
from suite.commands.flags import Parser
from suite.errors import SuiteError

ENGINE = ("torch", "transformers", "tokenizers", "safetensors")
# what the suite does, and the distributions that it takes
PARTS = {
    "train": (*ENGINE, "peft", "trl", "accelerate", "datasets"),
    "merge": ("torch", "safetensors", "peft"),
    "quantize gptq, awq": (*ENGINE, "gptqmodel", "optimum"),
    "quantize bnb": (*ENGINE, "bitsandbytes"),
    "export hf, ollama": ("huggingface_hub", "gguf", "safetensors"),
    "serve --backend torch": (*ENGINE, "fastapi", "uvicorn", "httptools", "uvloop", "prometheus-client"),
    "eval": ("aiohttp", "rouge-score", "rouge-chinese", "sacrebleu"),
}
# environments of their own, and what they are for
APART = {
    "llmcompressor": "quantize w4a16, w8a8, fp8",
    "vllm": "serve --backend vllm",
    "lmdeploy": "serve --backend lmdeploy",
}
LEAST_MEMORY_GB = 4
LEAST_DISK_GB = 5


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    state: Literal["ok", "warning", "missing", "not yet"]
    detail: str


def command(verb: str, arguments: list[str]) -> int:
    """Print what works and what to do about what does not; exit code 1 when something needed is missing."""
    parser = Parser(f"suite {verb}", "Check this machine: python, devices, memory, disk, libraries, backends.")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, for machines")
    given = parser.read(arguments)
    findings = [*machine(), *devices(), *parts(), *environments(), *tools()]
    if given.json:
        for finding in findings:
            print(json.dumps(asdict(finding)))
    else:
        styles = {"ok": "green", "warning": "yellow", "missing": "red", "not yet": "dim"}
        table = Table("what", "state", "detail", box=box.SIMPLE_HEAD)
        for f in findings:
            table.add_row(f.what, f"[{styles[f.state]}]{f.state}[/]", f.detail)
        Console().print(table)
    return int(any(f.state == "missing" for f in findings))


def machine() -> Iterator[Finding]:
    """Python, processor, memory, and the store's disk."""
    fine = sys.version_info >= (3, 11)
    yield Finding(
        "python", "ok" if fine else "missing", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    yield Finding("processor", "ok", f"{os.cpu_count()} cores")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Finding("memory", "ok" if memory >= LEAST_MEMORY_GB else "warning", f"{memory:.1f} GB")
    try:
        root = store.Store(store.home()).root
    except SuiteError as error:
        yield Finding("store", "missing", str(error))
        return
    free = shutil.disk_usage(root).free / 1e9
    used = sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and not p.is_symlink()) / 1e9
    enough = free >= LEAST_DISK_GB
    hint = "" if enough else "; set SUITE_HOME to a larger disk"
    yield Finding("store", "ok" if enough else "warning", f"{root}: {used:.2f} GB used, {free:.1f} GB free{hint}")


def devices() -> Iterator[Finding]:
    """What torch can compute on; this is the one check that imports it."""
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "missing", f"{error}: pip install .")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            yield Finding(f"cuda:{index}", "ok", f"{found.name}, {found.total_memory / 1e9:.1f} GB")
    else:
        yield Finding("gpu", "warning", "none: everything runs on the CPU, which suits small models only")


def parts() -> Iterator[Finding]:
    """Whether the libraries of each part are installed, with their versions."""
    for part, names in PARTS.items():
        found = {name: _version(name) for name in names}
        absent = [name for name, version in found.items() if version is None]
        if absent:
            yield Finding(part, "missing", f"{', '.join(absent)}: pip install .")
        else:
            yield Finding(part, "ok", ", ".join(f"{n} {v}" for n, v in found.items()))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environments() -> Iterator[Finding]:
    """What lives apart from the suite, because its pins exclude ours."""
    for name, purpose in APART.items():
        environment = envs.get(name)
        detail = f"{environment.python}" if environment.installed else f"suite env install {name}  ({environment.cost})"
        if name == "lmdeploy" and envs.device() == "cpu":
            yield Finding(purpose, "not yet", "needs a GPU: without one, tests run its server alone")
            continue
        yield Finding(purpose, "ok" if environment.installed else "not yet", detail)


def tools() -> Iterator[Finding]:
    """Programs that the suite does not bring."""
    ollama = shutil.which("ollama")
    detail = str(Path(ollama)) if ollama else "not found: packages are made without it; get it to run them"
    yield Finding("ollama", "ok" if ollama else "warning", detail)
