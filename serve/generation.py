"""What passes between the gateway and an engine: requests of token ids, and generations on their way. No torch."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

Finish = Literal["stop", "length", "cancelled", "error"]

_arrivals = count()


@dataclass(frozen=True)
class Sampling:
    """How one request picks its tokens. Temperature 0 takes the likeliest; `top_k` 0 and `top_p` 1 leave all in."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    """The same seed gives the same tokens, whatever runs beside it."""
    random: random.Random = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "random", random.Random(self.seed))


@dataclass(frozen=True)
class Scored:
    """A token with its log probability under the model (before temperature), and the likeliest ones at its place."""

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
    logprobs: int | None = None
    """Score the new tokens, with that many of the likeliest at each place."""
    prompt_logprobs: int | None = None
    """Score the prompt too; its first token has no score."""


class Generation:
    """A request on its way: `tokens` (prompt and answer) grows while it runs; `finish` says why it ended.

    `cached` tokens of it have keys and values in the engine's cache.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.cached = 0
        self.arrival = next(_arrivals)
        self.scores: list[Scored] = []
        self.prompt_scores: list[Scored] = []
        self.finish: Finish | None = None
        self.error = ""
        self.cancelled = False
        self._done = threading.Event()

    @property
    def new(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[len(self.request.prompt) :]

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
        self.finish, self.error = finish, error
        self._done.set()
