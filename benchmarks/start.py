"""How long the command and a stage take to start.

`suite --help` and `suite plan` against their limits; a stage forked from the warm server against one that imports the
same libraries itself. Prints one row a measure; `--json` one object a line; `--quick` fewer repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from suite.config import ArtifactType  # noqa: E402  the checkout must be importable first
from suite.pool import WorkerPool  # noqa: E402
from suite.stages import Job, Stage  # noqa: E402

LIBRARIES = ("torch", "transformers", "peft", "trl", "trl.trainer.sft_trainer")


class Nothing(Stage):
    """Makes an empty artifact; what is timed is everything around it."""

    preload: ClassVar[tuple[str, ...]] = LIBRARIES

    def makes(self) -> ArtifactType:
        return "report"

    def run(self, job: Job) -> dict[str, Any]:
        del job
        return {}


def seconds(command: list[str], home: Path, times: int) -> float:
    """Median wall time of a command."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        environment = {**os.environ, "SUITE_HOME": str(home), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def stage_starts(home: Path, times: int) -> list[float]:
    """Seconds from asking for a stage to the end of its process; the first one pays for the imports."""
    found = []
    with WorkerPool(threads=2, log=home / "worker.log") as pool:
        for number in range(times + 1):
            folder = home / f"stage{number}"
            folder.mkdir(parents=True)
            spec = {
                "name": "nothing", "kind": "benchmarks.start:Nothing", "key": f"{number:032}", "store": str(home),
                "settings": {}, "inputs": {}, "libraries": {}, "force": False,
            }  # fmt: skip
            (folder / "stage.json").write_text(json.dumps(spec), "utf-8")
            started = time.perf_counter()
            pool.start("nothing", folder, LIBRARIES)
            events: list[dict[str, Any]] = []
            while not any(e["event"] == "exit" for e in events):
                events += [event for _, event in pool.wait(1)]
            found.append(time.perf_counter() - started)
    return found


def row(measure: str, ours: float, theirs: float, goal: float) -> dict[str, Any]:
    """`goal` is the largest ratio that meets it."""
    ratio = ours / theirs
    return {
        "measure": measure, "ours": round(ours, 4), "theirs": round(theirs, 4), "unit": "s",
        "ratio": round(ratio, 3), "goal": goal, "met": ratio <= goal,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    times = 3 if given.quick else 11
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        suite = [sys.executable, "-m", "suite.cli"]
        rows = [row("suite --help against its limit of 0.1 s", seconds([*suite, "--help"], home, times), 0.1, 1.0)]
        plan = [*suite, "plan", "examples/quickstart.toml"]
        rows.append(row("suite plan of the quickstart against its limit of 1 s", seconds(plan, home, times), 1.0, 1.0))
        first, *warm = stage_starts(home, times)
        rows.append(row("a warm stage against its limit of 0.5 s", statistics.median(warm), 0.5, 1.0))
        rows.append(row("a warm stage against one that imports its libraries", statistics.median(warm), first, 0.2))
    for found in rows:
        print(json.dumps(found) if given.json else "  ".join(f"{k}={v}" for k, v in found.items()))


if __name__ == "__main__":
    main()
