"""Plots of a comparison as PNG: scores with their intervals, quality against size, latency."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

from evalsets.report import label, number
from suite.document import Image
from suite.reports.subjects import Subject

WIDTH = 7.0
"""Inches; 100 dots each."""
ABREAST = 4
"""Panels in a row."""
MARKERS = "osD^vPX*"
"""Told apart without colours, too."""


def plots(subjects: Sequence[Subject]) -> Iterator[Image]:
    """Those for which something was measured."""
    sets = list(dict.fromkeys(name for subject in subjects for name in subject.sets))
    measured = {name: found for name in sets if (found := [s for s in subjects if _score(s, name) is not None])}
    if measured:
        yield _scores(measured)
    sized = {name: [s for s in found if s.bytes] for name, found in measured.items()}
    quality = next((name for name, found in sized.items() if len(found) > 1 and not _lower(found[0], name)), None)
    if quality:
        yield _quality(sized[quality], quality)
    timed = [s for s in subjects if "latency_p50" in s.speed]
    if timed:
        yield _latency(timed)


def _score(subject: Subject, name: str) -> float | None:
    found = subject.sets.get(name)
    return found["total"].get(found["headline"]) if found else None


def _lower(subject: Subject, name: str) -> bool:
    return bool(subject.sets[name]["kind"] == "perplexity")


def _ends(subject: Subject, name: str) -> list[float]:
    """How far the interval reaches below and above the score, where there is one."""
    total, score = subject.sets[name]["total"], _score(subject, name) or 0.0
    return [max(0.0, score - total.get("low", score)), max(0.0, total.get("high", score) - score)]


def _figure(height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure whose rows of panels are `height` inches each, and the axes of its panels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(panels, ABREAST)
    rows = math.ceil(panels / columns)
    size = (max(WIDTH, 1.5 + 2.5 * columns), height * rows)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        if columns > 1:
            axis.xaxis.set_major_locator(MaxNLocator(4))
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure, axes[:panels]


def _image(figure: Any, name: str, about: str) -> Image:
    # without the version of the library, the same numbers give the same bytes
    with io.BytesIO() as png, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a font without the letters of some name
        figure.savefig(png, format="png", metadata={"Software": None})
        return Image(name, about, png.getvalue())


def _scores(measured: dict[str, list[Subject]]) -> Image:
    names = list(dict.fromkeys(s.name for found in measured.values() for s in found))
    figure, axes = _figure(1.2 + 0.35 * len(names), len(measured))
    for axis, (name, found) in zip(axes, measured.items(), strict=True):
        rows = [names.index(s.name) for s in found]
        ends = zip(*(_ends(s, name) for s in found), strict=True)
        axis.errorbar([_score(s, name) for s in found], rows, xerr=[list(e) for e in ends], fmt="o", capsize=3)
        axis.set_title("\n".join(_about(found[0], name)), fontsize="medium")
        _percents(axis.xaxis, found[0], name)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return _image(figure, "scores", "Scores with 95 % intervals")


def _about(subject: Subject, name: str) -> list[str]:
    """The set's name, and what its score is called."""
    called = label(subject.sets[name]["headline"])
    return [name, f"{called}, lower is better" if _lower(subject, name) else called]


def _percents(axis: Any, subject: Subject, name: str) -> None:
    """Shares are read as per cent."""
    from matplotlib.ticker import PercentFormatter

    if number(subject.sets[name]["headline"], 1.0).endswith("%"):
        axis.set_major_formatter(PercentFormatter(1.0))


def _quality(found: list[Subject], name: str) -> Image:
    figure, (axis,) = _figure(4.0)
    for subject, marker in zip(found, cycle(MARKERS), strict=False):
        low, high = _ends(subject, name)
        x, y = (subject.bytes or 0) / 1e6, _score(subject, name)
        axis.errorbar([x], [y], yerr=[[low], [high]], fmt=marker, capsize=3, label=subject.name)
    axis.set_xlim(left=0)
    axis.set_xlabel("size of the files, MB")
    axis.set_ylabel(", ".join(_about(found[0], name)))
    _percents(axis.yaxis, found[0], name)
    figure.legend(loc="outside right upper", fontsize="small")
    return _image(figure, "quality", "Quality with 95 % intervals against size")


def _latency(found: list[Subject]) -> Image:
    figure, (axis,) = _figure(1.4 + 0.35 * len(found))
    rows = range(len(found))
    for percentile, about, tint in (("latency_p95", "95 % within", 0.35), ("latency_p50", "median", 1.0)):
        axis.barh(rows, [s.speed[percentile] for s in found], color="tab:blue", alpha=tint, label=about)
    axis.set_yticks(rows, [s.name for s in found])
    axis.invert_yaxis()
    axis.set_xlabel("seconds from request to the whole reply")
    figure.legend(loc="outside upper right", ncols=2, fontsize="small")
    return _image(figure, "latency", "Latency")
