"""The highest rate of requests at which an endpoint still keeps its limits."""

from __future__ import annotations

from collections.abc import Callable

from evalsets.load.timing import Figures

SHARE = 0.9
"""Part of the requests that must keep the limits; DistServe (arXiv:2401.09670) measures at the same."""
CLOSE = 1.1
"""Where the next rate that is too high is so near, the search is over."""

Probe = Callable[[float], Figures]


def search(probe: Probe, start: float, probes: int) -> tuple[float | None, list[Figures]]:
    """The highest rate found to keep the limits, and what each probe gave, its `rate` with it; None if none did.

    From `start` the rate is doubled or halved until one keeps them and one does not, and the range between halved on a
    logarithmic scale. `probe` measures at a rate and has "goodput"; at most `probes` are made.
    """
    low: float | None = None
    high: float | None = None
    rate = start
    made: list[Figures] = []
    while len(made) < probes and not (low and high and high / low < CLOSE):
        found = probe(rate)
        kept = found["goodput"]["share"] >= SHARE
        made.append({"rate": rate, "kept": kept, **found})
        low, high = (rate, high) if kept else (low, rate)
        rate = (low * high) ** 0.5 if low and high else 2 * rate if kept else rate / 2
    return low, made
