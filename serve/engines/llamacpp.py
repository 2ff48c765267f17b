"""llama.cpp: GGUF files behind the relay, by the server that comes with llama-cpp-python, in our own environment."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

from serve.bodies import checked
from serve.engines.process import Launch
from serve.engines.translation import AsIs, Translation
from serve.errors import ApiError
from serve.protocol import Body, ChatBody, CompletionBody
from serve.served import DEFAULTS
from serve.settings import Settings
from suite import envs
from suite.envs import Environment
from suite.errors import SuiteError
from suite.processes import importing

NEEDED = ("llama_cpp", "starlette_context", "sse_starlette", "pydantic_settings")
CONTEXT = 2048
"""Tokens of prompt and answer, where the settings do not say: its server keeps the logits of all of them."""
KINDS: dict[str, type[Body]] = {"/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody}
NEVER = ("stop_token_ids", "structured_outputs", "ignore_eos")
"""Fields that its server ignores."""


class LlamaCpp:
    """One request at a time, on CPUs and GPUs; the chat template is the file's own. It has no adapters."""

    name = "llamacpp"
    loads_adapters = False
    parser = ""

    def translation(self, settings: Settings) -> Translation:
        """Fields of today in the words that it knows."""
        return LlamaCppApi(inline=settings.inline_reasoning)

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
            str(environment.python), "-P", "-m", "serve.engines.llamacpp_server",
            "--model", str(gguf_file(settings.model)),
            "--model_alias", settings.name, "--host", "127.0.0.1", "--port", str(port),
            "--n_ctx", str(settings.max_length or CONTEXT), "--n_gpu_layers", layers,
            "--interrupt_requests", "false", "--disable_ping_events", "true", "--verbose", "false",
        ]  # fmt: skip
        return Launch(command, {"API_KEY": key})


class LlamaCppApi(AsIs):
    """Its words for how tokens are picked, and OpenAI's ways where a request does not say it.

    Left to itself the server samples (0.8, of 40 tokens) and punishes what was said before (by 1.1), which changes
    greedy answers too. `inline` leaves reasoning in the content.
    """

    def __init__(self, *, inline: bool = False) -> None:
        self._inline = inline

    def ask(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """In its words. Raises ApiError 400 for what it would ignore."""
        if path not in KINDS:
            return fields
        body = checked(partial(KINDS[path].model_validate_json, json.dumps(fields)))
        for name in NEVER:
            if fields.get(name):
                raise ApiError(400, f"llama.cpp's server does not heed '{name}'", param=name)
        if body.samples > 1:
            raise ApiError(400, "llama.cpp's server gives one answer at a time", param="n")
        asked = {**fields, **{name: getattr(body, name) for name in DEFAULTS if getattr(body, name) is not None}}
        asked = {**DEFAULTS, **{name: value for name, value in asked.items() if value is not None}}
        asked["repeat_penalty"] = asked.pop("repetition_penalty")
        asked["top_k"] = max(0, int(asked["top_k"]))
        if isinstance(body, ChatBody):
            asked.setdefault("separate_reasoning", not self._inline)
            if (longest := asked.pop("max_completion_tokens", None)) is not None:
                asked["max_tokens"] = longest
        return asked


def gguf_file(path: Path) -> Path:
    """The GGUF file at a path, or the only one in a folder; raises SuiteError."""
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(found) != 1 or found[0].suffix != ".gguf" or not found[0].is_file():
        said = f"{len(found)} GGUF files" if len(found) > 1 else "no GGUF file"
        raise SuiteError(f"there is {said} at {path}", hint="name one: suite export --to gguf makes them")
    return found[0]
