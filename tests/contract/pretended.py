"""An engine whose program is `tests/upstream.py`, in the place of vLLM: of a gateway in this process, or of any."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.engines import remote
from serve.engines.process import Launch
from serve.engines.translation import AsIs
from serve.gateway import create_app
from serve.settings import Settings
from suite.envs import Environment
from tests.contract.threaded import threaded

UPSTREAM = Path(__file__).parents[1] / "upstream.py"


@dataclass
class Pretended:
    """An engine whose program is `upstream.py`."""

    given: dict[str, Any]
    loads_adapters: bool = True
    name: str = "vllm"
    parser: str = "parser = None"
    most: int | None = None

    def translation(self, settings: Settings) -> AsIs:
        return AsIs()

    def check(self, settings: Settings) -> None:
        pass

    def room(self, settings: Settings) -> int | None:
        return self.most

    def precision(self, settings: Settings) -> str:
        return "float32"

    def launch(self, settings: Settings, environment: Environment, port: int, key: str, replica: int) -> Launch:
        journal = self.given.get("journal")
        if journal:
            with Path(journal).open("a") as file:
                file.write(f"launch {replica} {' '.join(settings.adapters)}\n")
        return Launch([sys.executable, "-S", str(UPSTREAM), str(port), json.dumps(self.given)], {"UPSTREAM_KEY": key})


@dataclass
class Running:
    """A gateway, its engine's processes, and what they noted."""

    http: httpx.Client
    journal: Path
    url: str

    def chat(self, text: str, model: str = "base", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        return self.http.post("/v1/chat/completions", json=body)

    def together(self, texts: list[str], *, streams: int = 0) -> list[httpx.Response]:
        """All at once; the first `streams` of the answers are streamed."""

        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
                asked = [{"model": "base", "messages": [{"role": "user", "content": text}]} for text in texts]
                bodies = [{**body, "stream": i < streams} for i, body in enumerate(asked)]
                return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

        return asyncio.run(ask())

    def lines(self, start: str = "") -> list[str]:
        return [line for line in self.journal.read_text().splitlines() if line.startswith(start)]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, self.journal.read_text()
            time.sleep(0.02)


def model_and_adapters(root: Path) -> Path:
    """`root` with a model "base", the adapter "a", and "b" and "c" in the folder "more"."""
    from tests.tiny.tiny_models import tiny_adapter, tiny_model  # with torch, which a gateway has no use for

    base = tiny_model(root / "base")
    for seed, place in enumerate(["a", "more/b", "more/c"]):
        tiny_adapter(base, root / place, seed=seed)
    return root


@contextlib.contextmanager
def gateway(folder: Path, scratch: Path, kind: Pretended, *, wait: bool = True, **options: Any) -> Iterator[Running]:
    """It has started inside the block, or with `wait` False may be starting."""
    journal = scratch / "journal"
    kind.given = {"journal": str(journal), **kind.given}
    given = {"probe": False, "log": "off", "adapters": {"a": folder / "a"}, **options}
    settings = Settings(model=folder / "base", backend="vllm", env_python=sys.executable, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(remote.KINDS, "vllm", kind)
        settings.check()
        ready = threading.Event()
        failed: list[Any] = []

        def loaded(error: Any) -> None:
            failed.append(error)
            ready.set()

        app = create_app(settings, loaded=loaded)
    with threaded(app) as url:
        if wait:
            assert ready.wait(30)
            if failed[0]:
                raise failed[0]
        with httpx.Client(base_url=url, timeout=60) as http:
            yield Running(http, journal, url)


PROGRAM = """#!{python}
import os, sys
variables = {{**os.environ, "UPSTREAM_KEY": os.environ["VLLM_API_KEY"]}}
port = sys.argv[sys.argv.index("--port") + 1]
os.execve(sys.executable, [sys.executable, "-S", {upstream!r}, port, {given!r}], variables)
"""


def pretended_vllm(folder: Path, given: dict[str, Any]) -> Path:
    """An interpreter in `folder`, for `--env-python`, which has a program `vllm` beside it that does as `given`."""
    python, program = folder / "python", folder / "vllm"
    python.symlink_to(sys.executable)
    program.write_text(PROGRAM.format(python=sys.executable, upstream=str(UPSTREAM), given=json.dumps(given)))
    program.chmod(0o755)
    return python
