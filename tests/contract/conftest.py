"""One server for all contract tests; a backend more in BACKENDS runs the whole suite over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from serve.backends import Endpoint, endpoint
from tests.tiny.tiny_models import tiny_adapter, tiny_model

BACKENDS = ["torch"]


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
        endpoint(base, adapters, backend=request.param) as running,
        httpx.Client(base_url=running.url, timeout=60) as http,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield Served(running, base, adapters, client, http)
