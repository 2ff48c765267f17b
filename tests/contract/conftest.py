"""One server for all contract tests and each backend: torch, and vLLM where `suite env install vllm` has made it.

Files named test_own_* and classes named Own* are about what only our engine has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.backends import Endpoint, endpoint
from suite import envs
from tests.tiny.tiny_models import tiny_adapter, tiny_model

VLLM = envs.get("vllm")  # before each test gets a store of its own
BACKENDS = ["torch", *(["vllm"] if VLLM.installed else [])]
OPTIONS: dict[str, dict[str, Any]] = {
    "torch": {},
    "vllm": {
        "env_python": str(VLLM.python),
        "max_length": 2048,
        "extra": {"enforce-eager": True, "enable-auto-tool-choice": True, "tool-call-parser": "hermes"},
    },
}


@dataclass(frozen=True)
class Served:
    """A running endpoint, the folders behind it, and clients for it."""

    endpoint: Endpoint
    base: Path
    adapters: dict[str, Path]
    openai: openai.OpenAI
    http: httpx.Client


@pytest.fixture(scope="session", params=BACKENDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    base = tiny_model(root / "base")
    adapters = {name: tiny_adapter(base, root / name, rank=4 * i, seed=i) for i, name in enumerate(("a", "b"), 1)}
    with (
        endpoint(base, adapters, backend=request.param, **OPTIONS[request.param]) as running,
        httpx.Client(base_url=running.url, timeout=60) as http,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield Served(running, base, adapters, client, http)
