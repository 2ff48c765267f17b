"""A pipeline with vLLM in it, as a person runs it: evaluated there, then served beside our own engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from suite.envs import Environment

ROOT = Path(__file__).parents[2]
PIPELINE = """
[env.vllm]
python = "{python}"
[stage.score]
use = "eval"
model = "nano"
backend = "vllm"
sets = ["ceval-mini"]
limit = 6
gate = ["ceval-mini.acc >= 0.9"]
[serve]
port = 0
max_length = 512
alias.any = {{ ours = 1, theirs = 1 }}
[serve.models.ours]
model = "nano"
[serve.models.theirs]
model = "nano"
backend = "vllm"
cache_memory = "1GiB"
"""


@pytest.mark.timeout(900)
def test_a_pipeline_is_evaluated_by_vllm_and_served_beside_our_engine(
    installed: Callable[[str], Environment], tmp_path: Path, suite_home: Path
) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(PIPELINE.format(python=installed("vllm").python))
    command = [sys.executable, "-m", "suite.cli", "run", str(file), "--serve"]
    with (tmp_path / "said").open("w+") as said:
        running = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, text=True, env={**os.environ})
        try:
            url = until_ready(running, tmp_path / "said")
            question = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 20}
            with httpx.Client(base_url=url, timeout=120) as http:
                answers = [
                    http.post("/chat/completions", json={"model": model, **question}).raise_for_status().json()
                    for model in ("ours", "theirs", "any")
                ]
        finally:
            engines = children(running.pid)
            running.kill()
            running.wait()
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    (report,) = suite_home.glob("runs/*/*/report.json")
    (stage,) = json.loads(report.read_text())["stages"]
    assert (stage["name"], stage["metrics"]["ceval-mini"]["n"]) == ("score", 6)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in engines):
        assert time.monotonic() < deadline, engines
        time.sleep(0.1)


def until_ready(running: subprocess.Popen[str], said: Path) -> str:
    """The URL of the server, once it says it."""
    while running.poll() is None:
        for line in said.read_text().splitlines():
            if line.startswith("ready in "):
                return line.partition(" at ")[2]
        time.sleep(0.2)
    raise AssertionError(said.read_text())


def children(pid: int) -> list[int]:
    """Of a process, and theirs."""
    found = [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return [*found, *(grandchild for child in found for grandchild in children(child))]
