"""The highest rate of requests at which an endpoint still keeps its limits."""

from __future__ import annotations

from collections.abc import Callable

from evalsets.load.timing import Figures

SHARE = 0.9
"""Part of the requests that must keep the limits, and of the rate at which they must be answered; DistServe
(arXiv:2401.09670) measures at the same share."""
CLOSE = 1.1
"""Where the next rate that is too high is so near, the search is over."""
LONGER = 4
"""How many times the requests are sent where a burst was over before it could be told whether its rate is borne."""
TIMES = 4
"""How often a burst is made longer at most."""
FASTER = 1.1
"""A longer burst that is answered less than so much faster is answered as fast as the endpoint can."""

Probe = Callable[[float, int], Figures]


def search(probe: Probe, start: float, probes: int, requests: int) -> tuple[float | None, list[Figures]]:
    """The highest rate found to keep the limits, and what each probe gave, its `rate` with it; None if none did.

    From `start` the rate is doubled or halved until one keeps them and one does not, and the range between halved on a
    logarithmic scale. `probe` sends so many requests at a rate and has "goodput", "requests" and "seconds"; at most
    `probes` rates are tried, with `requests` or more each. Where all were kept, the highest rate is higher.
    """
    low: float | None = None
    high: float | None = None
    rate = start
    made: list[Figures] = []
    while len(made) < probes and not (low and high and high / low < CLOSE):
        found = _long_enough(probe, rate, requests)
        kept = in_limits(found) and _pace(found) >= SHARE * rate
        made.append({"rate": rate, "kept": kept, **found})
        low, high = (rate, high) if kept else (low, rate)
        rate = (low * high) ** 0.5 if low and high else 2 * rate if kept else rate / 2
    return low, made


def in_limits(found: Figures) -> bool:
    """Whether enough of the requests kept the limits, if only because there were few of them."""
    return bool(found["goodput"]["share"] >= SHARE)


def _long_enough(probe: Probe, rate: float, requests: int) -> Figures:
    """What a rate gives, of so many requests that they cannot all wait their turn within the limits.

    A queue that is emptied after the last request came looks like a rate that is borne. So does none where answers
    come as fast as requests: a burst that is answered more slowly was too short, or the rate too high, and more
    requests tell which.
    """
    found = probe(rate, requests)
    before = 0.0
    for _ in range(TIMES):
        if not (in_limits(found) and FASTER * before < _pace(found) < SHARE * rate):
            break
        before, requests = _pace(found), LONGER * requests
        found = probe(rate, requests)
    return found


def _pace(found: Figures) -> float:
    """Requests a second that were done with, from the first that was sent to the last text."""
    return float(found["requests"] / found["seconds"])
