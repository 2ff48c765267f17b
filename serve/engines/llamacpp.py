"""llama.cpp: GGUF files behind the relay, by the server that comes with llama-cpp-python, in our own environment."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from serve.engines.process import Launch
from serve.engines.translation import JoinedText, Translation
from serve.settings import Settings
from suite import envs
from suite.envs import Environment
from suite.errors import SuiteError
from suite.processes import importing

NEEDED = ("llama_cpp", "starlette_context", "sse_starlette", "pydantic_settings")
CONTEXT = 2048
"""Tokens of prompt and answer, where the settings do not say: its server keeps the logits of all of them."""


class LlamaCpp:
    """One request at a time, on CPUs and GPUs; the chat template is the file's own. It has no adapters."""

    name = "llamacpp"
    loads_adapters = False
    parser = ""

    def translation(self, settings: Settings) -> Translation:  # noqa: ARG002
        """Fields of today in the words that it knows."""
        return OlderNames()

    def check(self, settings: Settings) -> None:
        """That it is installed, and that there is a file for it."""
        gguf_file(settings.model)
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise SuiteError(f"llama.cpp's server needs {missing[0]}", hint='pip install "suite[llamacpp]"')
        if settings.adapters or settings.lora_dir:
            hint = "merge them, and export the merged models: suite export --to gguf"
            raise SuiteError("a GGUF file is served without adapters", where="adapters", hint=hint)
        if settings.extra:
            raise SuiteError("llama.cpp's server is given no more options", where="extra")

    def precision(self, settings: Settings) -> str:
        """What the file holds."""
        return settings.dtype

    def room(self, settings: Settings) -> int | None:  # noqa: ARG002
        """It has no adapters."""
        return None

    def launch(self, settings: Settings, environment: Environment, port: int, key: str, replica: int) -> Launch:  # noqa: ARG002
        """`llamacpp_server`; it reads its key from a variable."""
        layers = "-1" if envs.device() == "cuda" else "0"
        command = [
            "env", f"PYTHONPATH={importing()['PYTHONPATH']}",
            str(environment.python), "-m", "serve.engines.llamacpp_server", "--model", str(gguf_file(settings.model)),
            "--model_alias", settings.name, "--host", "127.0.0.1", "--port", str(port),
            "--n_ctx", str(settings.max_length or CONTEXT), "--n_gpu_layers", layers,
            "--interrupt_requests", "false", "--disable_ping_events", "true", "--verbose", "false",
        ]  # fmt: skip
        return Launch(command, {"API_KEY": key})


class OlderNames(JoinedText):
    """For an engine that bounds answers by `max_tokens` alone, and tells the log probabilities of so many tokens."""

    def ask(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """In its words."""
        fields = super().ask(path, fields)
        longest = fields.get("max_completion_tokens")
        if longest is not None:
            fields = {name: value for name, value in fields.items() if name != "max_completion_tokens"}
            fields["max_tokens"] = longest
        if fields.get("logprobs") is True and fields.get("top_logprobs") is None:
            fields = {**fields, "top_logprobs": 0}
        return fields


def gguf_file(path: Path) -> Path:
    """The GGUF file at a path, or the only one in a folder; raises SuiteError."""
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(found) != 1 or found[0].suffix != ".gguf" or not found[0].is_file():
        said = f"{len(found)} GGUF files" if len(found) > 1 else "no GGUF file"
        raise SuiteError(f"there is {said} at {path}", hint="name one: suite export --to gguf makes them")
    return found[0]
