"""The loss curve, as loss.csv and loss.png."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm")


def write(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write loss.csv and loss.png; `history` has one entry a step with (some of) COLUMNS, `step` and `loss` always."""
    names = [name for name in COLUMNS if any(name in entry for entry in history)]
    with (folder / "loss.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    _draw(folder / "loss.png", [entry["step"] for entry in history], [entry["loss"] for entry in history])


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias towards the first value (Kingma and Ba, arXiv:1412.6980, 3).

    >>> smooth([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    """
    sums = accumulate(values, lambda total, value: weight * total + (1 - weight) * value, initial=0.0)
    next(sums)
    return [total / (1 - weight**count) for count, total in enumerate(sums, 1)]


def _draw(file: Path, steps: Sequence[float], losses: Sequence[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.8, label="smoothed")
    axes.set(xlabel="step", ylabel="loss on assistant tokens (nats)", title=f"{losses[0]:.3f} → {losses[-1]:.3f}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)
