"""Run directories: one for each `suite run`, with its pipeline, plan, events, logs, report and links to artifacts."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from suite.errors import SuiteError, near
from suite.stages import Artifact
from suite.store import Store, disk_error

PLAN = "plan.json"
"""What a run was to do; every run directory has it."""


def safe_name(name: str) -> str:
    """A stage's name as a file name."""
    return re.sub(r"[^\w\[\],.=-]", "_", name)


def new_run(store: Store, name: str, text: str, plan: list[dict[str, Any]]) -> Path:
    """A fresh run directory that holds the pipeline's text and its plan."""
    folder = store.root / "runs" / safe_name(name)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    number = 0
    while True:
        run_dir = folder / (f"{stamp}-{number}" if number else stamp)
        try:
            run_dir.mkdir(parents=True)
            break
        except FileExistsError:  # another run began within this second
            number += 1
        except OSError as error:
            raise disk_error(error, run_dir) from None
    (run_dir / "pipeline.toml").write_text(text, "utf-8")
    (run_dir / PLAN).write_text(json.dumps(plan, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return run_dir


def link_artifacts(run_dir: Path, artifacts: Iterable[tuple[str, Artifact]]) -> None:
    """`artifacts/<stage>` in the run's directory, for every stage that has one."""
    (run_dir / "artifacts").mkdir(exist_ok=True)
    for name, artifact in artifacts:
        with contextlib.suppress(FileExistsError):
            link(run_dir, name).symlink_to(artifact.path)


def link(run_dir: Path, stage: str) -> Path:
    """Where a run keeps the link to a stage's artifact."""
    return run_dir / "artifacts" / safe_name(stage)


def all_runs(root: Path) -> list[Path]:
    """Run directories of the store at `root`, oldest first."""
    return sorted((p for p in (root / "runs").glob("*/*") if p.is_dir()), key=lambda p: (p.stat().st_mtime_ns, p))


def find(root: Path, text: str) -> Path | None:
    """The run directory that `text` names: its path, or the newest whose NAME/TIME contains it; None for neither."""
    path = Path(text)
    if (path / PLAN).is_file():
        return path.resolve()
    known = [run for run in all_runs(root) if text in f"{run.parent.name}/{run.name}"]
    return known[-1] if known else None


def newest(root: Path, stage: str) -> Path:
    """The artifact of `@stage` on the command line: the one of the newest run that has it; raises SuiteError."""
    known: dict[str, None] = {}
    for run_dir in reversed(all_runs(root)):
        found = link(run_dir, stage)
        if found.exists():
            return found.resolve()
        known |= dict.fromkeys(p.name for p in sorted((run_dir / "artifacts").glob("*")))
    hint = near(stage, known) if known else "no run has made anything yet: suite run PIPELINE"
    raise SuiteError(f"no run has an artifact of a stage '{stage}'", hint=hint)
