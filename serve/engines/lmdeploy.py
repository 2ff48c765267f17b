"""LMDeploy: its command line, and what it cannot do. Adapters are given to it when it starts, and at no other time."""

from __future__ import annotations

from pathlib import Path

from serve.dialect import Dialect
from serve.engines.kind import chat_template, flags, gpus, marked
from serve.engines.lmdeploy_api import LmdeployApi
from serve.engines.process import Launch
from serve.engines.translation import Translation
from serve.settings import Settings
from suite import envs, quantized
from suite.chat import Chat
from suite.envs import Environment
from suite.errors import SuiteError

KEY = "SUITE_ENGINE_KEY"
RUN = f"""
import os, runpy, sys, traceback
sys.argv = [*sys.argv[1:], "--api-keys", os.environ.pop("{KEY}")]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except Exception:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
"""
"""Runs its command with the key at the end, which other users of the machine could read from a command line.

Where that fails it ends at once: libraries would tell of what they leak, in more lines than the reason has.
"""

PARSERS = {
    "<function=": "qwen3coder",
    "<arg_key>": "glm47",
    "<tool_call>": "qwen3",
    "<|plugin|>": "internlm",
    "<|tool_calls_section_begin|>": "kimi_k2",
    "<|python_tag|>": "llama3",
}
"""Its parsers of calls by a mark in the chat template, the most telling first."""
THINK = ("<think>", "</think>")
"""The marks that its parser of reasoning knows."""
FORMATS = ("awq", "gptq", "compressed-tensors", "fp8")
"""Methods of quantization that it has an option for."""


class Lmdeploy:
    """Its PyTorch engine, which takes adapters; `extra = {backend = "turbomind"}` is the other one, which does not."""

    name = "lmdeploy"
    loads_adapters = False
    parser = (
        "from lmdeploy.cli.serve import SubCliServe\n"
        "SubCliServe.add_parser_api_server()\n"
        "parser = SubCliServe.subparsers.choices['api_server']\n"
        "parser._remove_action(next(a for a in parser._actions if a.dest == 'model_path'))"
    )

    def translation(self, settings: Settings) -> Translation:
        """Much."""
        return LmdeployApi(settings.model, settings.max_length)

    def check(self, settings: Settings) -> None:
        """Raise SuiteError for what it has no option for, or no engine."""
        # an interpreter of the user's own may have one for other devices
        ours = not settings.env_python or Path(settings.env_python).is_relative_to(envs.get(self.name).root)
        if ours and envs.device() != "cuda":
            hint = "backend 'torch' or 'vllm' serves the same model and adapters here"
            raise SuiteError("LMDeploy needs a GPU: it has no engine for processors", where="backend", hint=hint)
        if settings.dtype == "float32":
            raise SuiteError("LMDeploy computes in 16 bits", where="dtype", hint="auto, float16 or bfloat16")
        if settings.cache_memory is not None:
            hint = "give a share of the GPU's free memory with --memory"
            raise SuiteError("LMDeploy takes no number of bytes for keys and values", where="cache_memory", hint=hint)
        if settings.extra.get("backend") == "turbomind" and (settings.adapters or settings.lora_dir):
            raise SuiteError("turbomind takes no adapters", where="extra", hint="leave the backend to its default")

    def precision(self, settings: Settings) -> str:
        """Left to it: 16 bits, bfloat16 where the model's files say so."""
        return settings.dtype

    def room(self, settings: Settings) -> int | None:  # noqa: ARG002
        """Those that it starts with."""
        return None

    def launch(self, settings: Settings, environment: Environment, port: int, key: str, replica: int) -> Launch:
        """`lmdeploy serve api_server`."""
        command = [
            str(environment.python), "-c", RUN, str(environment.python.with_name("lmdeploy")),
            "serve", "api_server", str(settings.model),
            "--model-name", settings.name, "--server-name", "127.0.0.1", "--server-port", str(port),
            "--disable-fastapi-docs", "--backend", "pytorch", "--logprobs-mode", "raw_logprobs",
            "--max-batch-size", str(settings.max_batch), "--dtype", self.precision(settings),
            *_memory(settings),
            *_template(settings.model, reasoning=not settings.inline_reasoning),
            *_adapters(settings),
            *flags(settings.extra),
        ]  # fmt: skip
        # no line for each look at its /health
        variables = {KEY: key, "HF_HUB_OFFLINE": "1", "UVICORN_LOG_LEVEL": "warning"}
        if envs.device() == "cuda":
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus(replica, settings.tensor_parallel))
        return Launch(command, variables)


def _memory(settings: Settings) -> list[str]:
    """What fits where, and what is kept."""
    packed = (quantized.settings(settings.model) or {}).get("quant_method")
    given = {
        "session-len": settings.max_length,
        "tp": settings.tensor_parallel if settings.tensor_parallel > 1 else None,
        "model-format": settings.quantization or (packed if packed in FORMATS else None),
        "cache-max-entry-count": settings.memory,
        "enable-prefix-caching": settings.prefix_cache or None,
    }
    return flags({name: value for name, value in given.items() if value is not None})


def _template(model: Path, *, reasoning: bool) -> list[str]:
    """`hf` is the model's own: without it, the path's name may choose another. And what its answers are read by."""
    file = chat_template(model)
    if file is None:
        return ["--chat-template", "base"]
    calls = marked(file, PARSERS)
    chosen = ["--chat-template", "hf", *(["--tool-call-parser", calls] if calls else [])]
    # its parser takes an answer without marks for reasoning from beginning to end
    if reasoning and THINK[0] in file.read_text("utf-8") and _opens_reasoning(model):
        chosen += ["--reasoning-parser", "default"]
    return chosen


def _opens_reasoning(model: Path) -> bool:
    """Whether the template itself opens a block of reasoning for each answer."""
    chat = Chat.load(model)
    prompt = chat.text([{"role": "user", "content": "?"}], generate=True)
    return Dialect.of(chat).reasoning == THINK and prompt.rstrip().endswith(THINK[0])


def _adapters(settings: Settings) -> list[str]:
    named = [f"{name}={path}" for name, path in settings.adapters.items()]
    return ["--adapters", *named] if named else []
