"""How to serve: one class whose fields are the flags of `suite serve` and the keys of a pipeline's `[serve]` table."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field

from suite.config import Beside, Config
from suite.errors import SuiteError, near


def _split(value: Any) -> Any:
    """`law@v2:0.9,law@v3:0.1`, as a flag says it, as a table of weights; `law@v2` alone is all of it."""
    if not isinstance(value, str):
        return value
    weights: dict[str, str | float] = {}
    for part in filter(None, map(str.strip, value.split(","))):
        name, _, weight = part.rpartition(":")
        try:
            weights[name or part] = float(weight) if name else 1.0
        except ValueError:  # a colon of the name itself
            weights[part] = 1.0
    return weights


ALIAS = re.compile(r"[\w.@:-]+")
"""Names of aliases: a slash would be another address."""

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Split = Annotated[dict[str, float], BeforeValidator(_split)]


class Engine(Config):
    """engine"""

    backend: str = "torch"
    """Engine: torch, vllm, lmdeploy, or llamacpp for GGUF files."""
    dtype: Precision = "auto"
    """Precision; auto is float32 on a CPU and what the model's files say on a GPU."""
    max_batch: int = Field(64, ge=1)
    """Requests computed together."""
    max_length: int | None = Field(None, ge=2)
    """Most tokens of prompt and answer together; by default what the model was made for."""
    cache_memory: ByteSize | None = None
    """Memory for keys, values and states, e.g. 2GiB; by default a share of the machine's."""
    prefix_cache: bool = True
    """Whether prompts are not read again as far as they begin like earlier ones."""
    replicas: int = Field(1, ge=1, le=64)
    """Copies of the engine on this machine, each on GPUs of its own; a request goes to the one with the fewest."""
    pooling: Literal["mean", "last"] = "mean"
    """How the last hidden states of a text become its embedding: their mean, or those of its last token."""
    inline_reasoning: bool = False
    """Leave a model's reasoning in its answers' content, between its marks."""


class Foreign(Config):
    """what only engines of other programs are told"""

    tensor_parallel: int = Field(1, ge=1)
    """GPUs that hold the model together."""
    memory: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory that the engine may take; on a CPU, of the machine's for keys and values."""
    quantization: str = ""
    """How the weights are packed, where the engine does not see it in the model's files."""
    probe: bool = True
    """Whether the engine's answers are compared with our own engine's at the start, of the base and every adapter."""
    extra: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """More options of the engine's command line, e.g. `enforce-eager=true` or `max-num-batched-tokens=4096`."""


class Others(Foreign):
    """engines of other programs"""

    env_python: Annotated[str, Beside()] = ""
    """An interpreter that has the engine, in place of the suite's own environment for it."""


class Adapters(Config):
    """adapters"""

    lora_dir: Annotated[list[str], Beside()] = Field(default_factory=list)
    """Folders whose adapter folders are all offered, each by its folder's name; only from there are adapters loaded at
    run time."""
    adapter_memory: ByteSize | None = None
    """Memory for the weights of adapters, e.g. 4GiB: those asked for last stay; by default a share of the machine's.
    The copies that batches are computed with take four times as much at most."""


class Names(Config):
    """names"""

    alias: dict[str, Split] = Field(default_factory=dict)
    """Names that stand for other models, e.g. `prod=law@v2:0.9,law@v3:0.1`: each takes its share of the requests."""


class Access(Config):
    """who may ask, and from where"""

    host: str = "127.0.0.1"
    """Address to listen on; any other than this machine's own needs API keys, or `no_key`."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_key_file: Annotated[str | None, Beside()] = None
    """API keys: one a line, or a .toml file with a table for each (key, models, requests_per_minute,
    tokens_per_minute, concurrent, admin); read again when it changes. SUITE_API_KEYS may hold some too, with commas."""
    no_key: bool = False
    """Serve other machines without any key. What changes the server then stays forbidden."""
    cors: list[str] = Field(default_factory=list)
    """Origins whose web pages may ask, e.g. https://chat.example.org; * is any."""
    tls_cert: Annotated[str | None, Beside()] = None
    """Certificate chain (PEM): serve https."""
    tls_key: Annotated[str | None, Beside()] = None
    """Private key (PEM) of the certificate."""
    open_metrics: bool = False
    """Answer /metrics without a key."""


class Limits(Config):
    """limits"""

    max_queue: int = Field(1024, ge=1)
    """Requests that may wait; beyond, 429 says when to try again."""
    max_prompt: int | None = Field(None, ge=1)
    """Most tokens of a prompt."""
    max_tokens: int | None = Field(None, ge=1)
    """Most new tokens of an answer, whatever a request asks for."""
    max_body: ByteSize = Field(ByteSize(16 * 2**20), ge=1024)
    """Most bytes of a request's body, e.g. 16MiB."""
    timeout: float | None = Field(None, gt=0)
    """Seconds that a request may take, waiting included; beyond, 504."""
    drain: float = Field(30, ge=0)
    """Seconds that running requests have to end after SIGTERM or Ctrl-C."""


class Operation(Config):
    """log"""

    log: str = "stderr"
    """Where a JSON line a request goes, without contents: a file, stderr or off."""


GROUPS: tuple[type[Config], ...] = (Engine, Others, Adapters, Names, Access, Limits, Operation)


class Options(Operation, Limits, Access, Names, Adapters, Others, Engine):
    """All of them."""


def foreign(settings: Foreign) -> str:
    """The first of the settings that is for engines of other programs alone and not its default, or ""."""
    return next(iter(settings.model_dump(include={*Others.model_fields}, exclude_defaults=True)), "")


def check_aliases(aliases: Mapping[str, Mapping[str, float]], models: Collection[str]) -> None:
    """Raise SuiteError for an alias that is a model's name or no name, or whose targets or weights are wrong."""
    for alias, weights in aliases.items():
        where = f"alias.{alias}"
        if alias in models:
            raise SuiteError(f"there is a model '{alias}'", where=where, hint="give the alias another name")
        if not ALIAS.fullmatch(alias):
            raise SuiteError("an alias has letters, digits and . _ - @ : in its name", where=where)
        for name, weight in weights.items():
            if name not in models:
                raise SuiteError(f"there is no model '{name}'", where=where, hint=near(name, models))
            if not (math.isfinite(weight) and weight >= 0):
                raise SuiteError(f"{name} cannot weigh {weight}", where=where)
        if not sum(weights.values()) > 0:
            raise SuiteError("nothing has a weight", where=where, hint="e.g. law@v2:0.9,law@v3:0.1")
