"""kill -9 of the runner and of the worker at every stage boundary, then the same command: the same artifacts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from suite.store import Store
from tests.quickstart.running import ROOT, command

PIPELINE = """
name = "crash"

[stage.train]
base = "nano"
data = "{data}"
max_steps = 4

[stage.merge]
adapter = "@train"

[stage.quantize]
model = "@merge"
method = "bnb"

[stage.eval]
model = "@quantize"
sets = ["ceval-mini"]
limit = 4

[stage.export]
to = "ollama"
model = "@merge"
needs = ["@eval"]
"""
STAGES = ["train", "merge", "quantize", "eval", "export"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("crash") / "crash.toml"
    file.write_text(PIPELINE.format(data=ROOT / "examples" / "data" / "identity.jsonl"), "utf-8")
    return file


def contents(home: Path) -> dict[str, str]:
    """The digest of each stage's artifact."""
    found = (Store(home).get(p.name) for p in (home / "artifacts").iterdir())
    return {str(a.record["name"]): a.digest for a in found if a}


@pytest.fixture(scope="module")
def undisturbed(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(
        [command(), "run", str(pipeline)], env={**os.environ, "SUITE_HOME": str(home)}, check=True, timeout=300
    )
    return contents(home)


def run_until(pipeline: Path, home: Path, stage: str, event: str, victim: str) -> int:
    """Run, kill -9 the runner or the worker when `event` of `stage` is seen, and return the runner's exit code."""
    environment = {**os.environ, "SUITE_HOME": str(home)}
    arguments = [command(), "run", str(pipeline), "--json"]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            seen = json.loads(line)
            if seen.get("stage") == stage and (seen["event"], seen.get("state", event)) in (
                (event, event),
                ("state", event),
            ):
                target = process.pid if victim == "runner" else worker_of(process.pid)
                os.kill(target, signal.SIGKILL)
        return process.wait(120)


def worker_of(runner: int) -> int:
    """The stage process below a runner, as soon as its warm server has forked it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [worker for server in children(runner) for worker in children(server)]
        if found:
            return found[0]
        time.sleep(0.001)
    raise AssertionError("no stage process was started")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_runner_is_killed_as_each_stage_begins_and_as_it_ends(
    pipeline: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    home = tmp_path / "home"
    for stage in STAGES:
        assert run_until(pipeline, home, stage, "began", "runner") == -signal.SIGKILL
        assert stage not in contents(home)
        assert run_until(pipeline, home, stage, "done", "runner") == -signal.SIGKILL
        assert contents(home)[stage] == undisturbed[stage]
    environment = {**os.environ, "SUITE_HOME": str(home)}
    subprocess.run([command(), "run", str(pipeline)], env=environment, check=True, timeout=300)
    assert contents(home) == undisturbed
    assert not list((home / "partial").iterdir())


def test_the_worker_is_killed_in_each_stage(pipeline: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    home = tmp_path / "home"
    for stage in STAGES:
        # as it starts: a small stage would be over before its first event was read
        assert run_until(pipeline, home, stage, "running", "worker") == 1
        assert stage not in contents(home)
    environment = {**os.environ, "SUITE_HOME": str(home)}
    subprocess.run([command(), "run", str(pipeline)], env=environment, check=True, timeout=300)
    assert contents(home) == undisturbed
