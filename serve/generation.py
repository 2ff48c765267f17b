"""What passes between the gateway and an engine: requests of token ids, and generations on their way. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from serve.grammar import Grammar
from serve.torch.pool import PoolStats
from suite.errors import SuiteError

Finish = Literal["stop", "length", "cancelled", "timeout", "error"]
Pooling = Literal["mean", "last"]

_arrivals = count()


class UnknownAdapter(SuiteError):
    """A request names an adapter that the engine does not have, or has no more."""


class EngineEnded(SuiteError):
    """An engine takes no requests any more: it was closed, or its thread ended with an error."""


@dataclass(frozen=True)
class Sampling:
    """How one request picks its tokens; the defaults take the likeliest.

    They are applied in vLLM's order: `logit_bias`, penalties, temperature, `min_p`, `top_k`, `top_p`.
    """

    temperature: float = 0.0
    """0 takes the likeliest."""
    top_p: float = 1.0
    """Leaves the likeliest tokens that reach this probability together (arXiv:1904.09751)."""
    top_k: int = 0
    """Leaves so many of the likeliest; 0 or less leaves all."""
    min_p: float = 0.0
    """Leaves those at least this times as probable as the likeliest (arXiv:2407.01082)."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that was generated before, as OpenAI does."""
    frequency_penalty: float = 0.0
    """Taken off for each time that it was."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of the prompt's and generated tokens (arXiv:1909.05858)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever runs beside it."""


@dataclass(frozen=True)
class Scored:
    """A token with its log probability, and the likeliest ones at its place.

    These are the model's own, before bias, penalties, grammar and temperature: they say how sure the model is.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Request:
    """What to generate. `adapter` "" is the base; `max_tokens` 0 only reads the prompt."""

    prompt: list[int]
    adapter: str = ""
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    """The generation ends with any of these tokens (which is kept as its last token)."""
    stop: Callable[[int], bool] | None = None
    """Given each new token in turn, in the engine's thread, stop ids left out; True ends the generation."""
    min_tokens: int = 0
    """No stop id is generated before so many tokens, unless its grammar leaves nothing else."""
    grammar: Grammar | None = None
    """What the answer must be; the generation ends where it is complete and nothing may follow."""
    logprobs: int | None = None
    """Score the new tokens, with that many of the likeliest at each place."""
    prompt_logprobs: int | None = None
    """Score the prompt too; its first token has no score."""
    embed: Pooling | None = None
    """Generate nothing; pool the prompt's last hidden states to one vector instead."""
    deadline: float | None = None
    """When, on the clock of `time.monotonic`, it ends with what it has by then, running or waiting."""

    def __post_init__(self) -> None:
        if self.embed:
            object.__setattr__(self, "max_tokens", 0)

    @property
    def reads_all(self) -> bool:
        """Whether the outputs at all places of the prompt are asked for, not only at its last one."""
        return self.prompt_logprobs is not None or self.embed == "mean"


class Generation:
    """A request on its way: `tokens` (prompt and answer) grows while it runs; `finish` says why it ended.

    `cached` tokens of it have keys and values in the engine's cache; the outputs at the first `observed` places of its
    prompt went into `prompt_scores` or `embedding`. Times are those of `time.monotonic`, None for what did not happen.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.matcher = request.grammar.matcher() if request.grammar else None
        """Where it is in its grammar."""
        self.weights: Hashable = request.adapter
        """What keys and values depend on beside the tokens: the adapter, in the version that reads this request."""
        self.cached = 0
        self.row: int | None = None
        """Where in the cache they are."""
        self.observed = 0
        self.reused = 0
        """How many tokens of the prompt were not read, as a request before began with them too."""
        self.arrival = next(_arrivals)
        self.scores: list[Scored] = []
        self.prompt_scores: list[Scored] = []
        self.embedding: list[float] = []
        """(hidden size,), of length 1 once it has ended; empty where none was asked for."""
        self.finish: Finish | None = None
        self.error = ""
        self.unreadable = False
        """Whether the error is that its adapter cannot be read: the engine is well."""
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None
        self._done = threading.Event()

    @property
    def new(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def count(self) -> int:
        """How many tokens were generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """How many tokens have to be read before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.cached

    def wait(self, seconds: float | None = None) -> Generation:
        """Block until it ended; raises TimeoutError after `seconds`."""
        if not self._done.wait(seconds):
            raise TimeoutError(f"not finished after {seconds} s")
        return self

    def end(self, finish: Finish, error: str = "") -> None:
        """Note why it ended, and wake whoever waits."""
        self.ended = time.monotonic()
        self.finish, self.error = finish, error
        self._done.set()


@dataclass(frozen=True)
class Stats:
    """What an engine does at the moment, and did since its start."""

    running: int = 0
    waiting: int = 0
    cells: int = 0
    """Tokens that the cache of running requests may hold, and (`cells_used`) does, padding included."""
    cells_used: int = 0
    prefix_cells: int = 0
    """Tokens that are kept for requests that begin alike, at most, and (`prefix_cells_used`) now."""
    prefix_cells_used: int = 0
    prefix_queries: int = 0
    """Tokens that were looked for among those, and (`prefix_hits`) found."""
    prefix_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    failures: int = 0
    """Steps that ended in an exception."""
    last_failure: str = ""
    last_failure_time: float | None = None
    """Seconds since the epoch."""
    adapters: PoolStats = field(default_factory=PoolStats)
    adapter_slots: int = 0
    """Bytes of the copies of them that batches are computed with."""
