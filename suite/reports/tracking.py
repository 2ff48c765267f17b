"""Results to trackers of experiments: MLflow and Weights & Biases, which are asked where they keep them as usual.

MLflow goes to MLFLOW_TRACKING_URI, W&B to the account of WANDB_API_KEY, or to a folder with WANDB_MODE=offline.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from suite.errors import SuiteError, near

PROJECT = "suite"
FILES = ("report.json", "report.md", "report.html", "junit.xml")
INSTALL = {"mlflow": "pip install mlflow-skinny", "wandb": "pip install wandb"}


def check(tracker: str) -> None:
    """Raise SuiteError for a tracker that nobody knows or that is not installed; before anything is computed."""
    if tracker not in INSTALL:
        raise SuiteError(f"--log: unknown tracker '{tracker}'", hint=near(tracker, INSTALL))
    try:
        importlib.import_module(tracker)
    except ImportError:
        raise SuiteError(f"--log: {tracker} is not installed", hint=INSTALL[tracker]) from None


def log(tracker: str, name: str, metrics: Mapping[str, Any], folder: Path) -> None:
    """One run called `name` with every number of `metrics` by its dotted path, and the reports in `folder`.

    Raises SuiteError with what the tracker says where it refuses.
    """
    numbers = dict(flat(metrics))
    files = [folder / file for file in FILES if (folder / file).is_file()]
    try:
        _LOG[tracker](name, numbers, files)
    except Exception as error:  # each has errors of its own, and what was measured is safe on the disk
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise SuiteError(f"--log {tracker}: {said}", hint=f"the reports are in {folder}") from error


def flat(metrics: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Every number with its dotted path.

    >>> dict(flat({"quiz": {"acc": 0.5, "n": 4, "title": "x"}}))
    {'quiz.acc': 0.5, 'quiz.n': 4.0}
    """
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path + name, float(value)


def _mlflow(name: str, numbers: Mapping[str, float], files: list[Path]) -> None:
    import mlflow

    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=name):
        mlflow.log_metrics({re.sub(r"[^\w\-. /:]", "_", path): value for path, value in numbers.items()})
        for file in files:
            mlflow.log_artifact(str(file))


def _wandb(name: str, numbers: Mapping[str, float], files: list[Path]) -> None:
    import wandb

    with wandb.init(project=PROJECT, name=name, settings=wandb.Settings(silent=True)) as run:
        run.summary.update(dict(numbers))
        reports = wandb.Artifact("report", type="report")
        for file in files:
            reports.add_file(str(file))
        run.log_artifact(reports)


_LOG: dict[str, Callable[[str, Mapping[str, float], list[Path]], None]] = {"mlflow": _mlflow, "wandb": _wandb}
