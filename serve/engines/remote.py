"""Engines in processes of their own as the gateway sees them: what must be there to start them, and their start."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from serve.engines.elsewhere import Elsewhere
from serve.engines.fleet import Fleet
from serve.engines.kind import Kind, check_extra, flags
from serve.engines.llamacpp import LlamaCpp
from serve.engines.lmdeploy import Lmdeploy
from serve.engines.own import Own
from serve.engines.upstream import Upstream
from serve.engines.vllm import Vllm
from serve.probe import ParityProbe
from serve.settings import Settings
from suite import envs, store
from suite.envs import Environment
from suite.errors import SuiteError

KINDS: dict[str, Kind] = {"torch": Own(), "vllm": Vllm(), "lmdeploy": Lmdeploy(), "llamacpp": LlamaCpp()}
OURS = ("torch", "llamacpp")
"""Those that run in our own environment, and are not probed: of one we are, and of a GGUF we have no other."""


def environment(settings: Settings) -> Environment:
    """Where the engine is installed: the suite's own environment, or an interpreter that the user names."""
    if settings.backend in OURS:
        return Environment(settings.backend, store.home() / "envs", interpreter=Path(sys.executable))
    python = str(Path(settings.env_python).absolute()) if settings.env_python else ""
    return envs.get(settings.backend, envs.Settings(python=python) if python else None)


def check(settings: Settings) -> None:
    """Raise SuiteError for what can be known to fail before anything is started."""
    if settings.url:
        Elsewhere(settings)
        return
    kind, where = KINDS[settings.backend], environment(settings)
    kind.check(settings)
    where.require()
    if settings.max_prompt is not None and settings.backend != "torch":
        hint = "limit prompt and answer together with --max-length"
        raise SuiteError(f"{kind.name} has no limit of the prompt alone", where="max_prompt", hint=hint)
    check_extra(kind, where, flags(settings.extra))


def upstreams(models: Sequence[Settings]) -> dict[str, Upstream]:
    """The engines of several models by the names of these, not started yet; GPUs are given out in turn."""
    found: dict[str, Upstream] = {}
    gpus = 0
    for each in models:
        if each.url:
            found[each.name] = Elsewhere(each)
            continue
        first = -(-gpus // each.tensor_parallel)
        found[each.name] = fleet(each, first)
        gpus = (first + each.replicas) * each.tensor_parallel
    return found


def fleet(settings: Settings, first: int = 0) -> Fleet:
    """A model's replicas, not started yet."""
    logs = store.home() / "engines" / "logs" / str(os.getpid())
    logs.mkdir(parents=True, exist_ok=True)
    kind = KINDS[settings.backend]
    exact = kind.precision(settings) == "float32"
    probed = settings.probe and settings.backend not in OURS
    probe = ParityProbe(settings.model, settings.name, exact=exact) if probed else None
    return Fleet(kind, settings, environment(settings), logs, probe=probe, first=first)


async def start(upstreams: Mapping[str, Upstream]) -> None:
    """Start them, one after the other: they may share memory, and measure how much of it is free.

    Raises SuiteError, which names the model, where one cannot start; none is left running then.
    """
    for name, upstream in upstreams.items():
        try:
            await upstream.start()
        except SuiteError as error:
            for other in upstreams.values():
                await other.stop()
            if len(upstreams) == 1:
                raise
            said = f"the model '{name}' cannot be served: {error.message}"
            raise SuiteError(said, where=error.where, hint=error.hint) from None
