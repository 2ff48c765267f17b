"""Plots of a load: what latencies it had, or what each rate gave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evalsets.load.saturation import SHARE
from evalsets.load.timing import Figures, Timing

NAMES = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "end-to-end latency"}


def latencies(path: Path, timings: Sequence[Timing]) -> None:
    """The cumulative distribution of each measure of the answers, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axis, (measure, name) in zip(figure.subplots(1, len(NAMES), sharey=True), NAMES.items(), strict=True):
        for model in sorted({t.model for t in timings}):
            seconds = [getattr(t, measure) for t in timings if t.model == model and not t.error]
            values = np.sort([1000 * s for s in seconds if s is not None])
            axis.step(values, np.arange(1, len(values) + 1) / max(1, len(values)), where="post", label=model)
        axis.set(xlabel=f"{name}, ms", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of answers")
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper right", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)


def rates(path: Path, probes: Sequence[Figures]) -> None:
    """The share of requests that keep the limits at each rate, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(probes, key=lambda found: float(found["rate"]))
    axis.plot([p["rate"] for p in ordered], [p["goodput"]["share"] for p in ordered], color="C0")
    for kept, marker, name in ((True, "o", "kept"), (False, "x", "too few keep them, or answers too slow")):
        these = [p for p in ordered if p["kept"] is kept]
        axis.plot([p["rate"] for p in these], [p["goodput"]["share"] for p in these], f"C0{marker}", label=name)
    axis.axhline(SHARE, linestyle="--", color="grey", label=f"{SHARE:.0%} must keep them")
    axis.set(xlabel="requests a second", ylabel="share that keeps the limits", xscale="log", ylim=(0, 1.05))
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    figure.savefig(path, dpi=120)
