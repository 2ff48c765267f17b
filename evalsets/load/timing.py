"""What a client sees of a streamed answer, in the definitions that vLLM's `bench serve` and NVIDIA's GenAI-Perf share.

    TTFT   time to first token: from sending the request to the first chunk with text
    E2E    end-to-end latency: from sending the request to the last chunk with text
    ITL    inter-token latency: between two chunks with text, which may hold several tokens each
    TPOT   time per output token: (E2E - TTFT) / (n - 1) for n new tokens, whichever way they came in chunks

Percentiles of ITL are over all gaps of all answers, the others over answers. An answer of one token has no TPOT.
Goodput is the rate of answers that keep all limits (Zhong et al. 2024, DistServe, arXiv:2401.09670).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)
MEASURES = ("ttft", "tpot", "itl", "e2e")
LIMITED = ("ttft", "tpot", "e2e")
"""Measures of one answer, for which there can be a limit."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """One request as its client saw it; times in seconds on one clock. One with an `error` counts for nothing else.

    `due` is when it should have been sent, `chunks` when each chunk with text came.
    """

    model: str
    due: float
    sent: float
    chunks: tuple[float, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
    error: str = ""

    @property
    def ended(self) -> float:
        """When the last text came."""
        return self.chunks[-1] if self.chunks else self.sent

    @property
    def ttft(self) -> float:
        """Seconds to the first text."""
        return self.chunks[0] - self.sent

    @property
    def e2e(self) -> float:
        """Seconds to the last text."""
        return self.ended - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first."""
        return (self.e2e - self.ttft) / (self.new_tokens - 1) if self.new_tokens > 1 else None

    @property
    def itl(self) -> tuple[float, ...]:
        """Seconds between chunks."""
        return tuple(after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False))

    def keeps(self, limits: Mapping[str, float]) -> bool:
        """Whether it was answered within limits in milliseconds, by measure."""
        return not self.error and all(1000 * (getattr(self, name) or 0) <= limit for name, limit in limits.items())


def figures(timings: Sequence[Timing], limits: Mapping[str, float] | None = None) -> Figures:
    """What a load gave: rates per second, latencies in milliseconds, and how many requests failed of what.

    The time is from the first request sent to the last text received. `late` is by how many milliseconds the client
    itself was behind its schedule at worst: where that is no small part of the latencies, they mean nothing.
    """
    answered = [timing for timing in timings if not timing.error]
    seconds = max(t.ended for t in timings) - min(t.sent for t in timings) if timings else 0.0
    found: Figures = {
        "requests": len(timings), "failed": len(timings) - len(answered),
        "errors": dict(Counter(t.error for t in timings if t.error).most_common()), "seconds": seconds,
        "late": 1000 * max((t.sent - t.due for t in timings), default=0.0),
        "requests_per_s": _rate(len(answered), seconds),
        "prompt_tokens_per_s": _rate(sum(t.prompt_tokens for t in answered), seconds),
        "new_tokens_per_s": _rate(sum(t.new_tokens for t in answered), seconds),
        "prompt_tokens": fmean(t.prompt_tokens for t in answered) if answered else 0.0,
        "new_tokens": fmean(t.new_tokens for t in answered) if answered else 0.0,
    }  # fmt: skip
    samples = {
        "ttft": [t.ttft for t in answered], "tpot": [t.tpot for t in answered if t.tpot is not None],
        "itl": [gap for t in answered for gap in t.itl], "e2e": [t.e2e for t in answered],
    }  # fmt: skip
    found |= {name: _spread(samples[name]) for name in MEASURES if samples[name]}
    if limits:
        kept = sum(t.keeps(limits) for t in timings)
        share = kept / len(timings) if timings else 0.0
        found["goodput"] = {"limits": dict(limits), "share": share, "requests_per_s": _rate(kept, seconds)}
    return found


def by_model(timings: Sequence[Timing], limits: Mapping[str, float] | None = None) -> dict[str, Figures]:
    """The same of each model by itself."""
    names = sorted({timing.model for timing in timings})
    return {name: figures([t for t in timings if t.model == name], limits) for name in names}


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    milliseconds = 1000 * np.asarray(seconds)
    values = np.percentile(milliseconds, PERCENTILES)
    found = {f"p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
    return {"mean": float(milliseconds.mean()), **found, "max": float(milliseconds.max())}
