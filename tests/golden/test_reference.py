"""Pages that are made from the code say what the code says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from suite import pipeline

ROOT = Path(__file__).parents[2]


def test_the_reference_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/make_reference.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_example_plans(tmp_path: Path) -> None:
    examples = Path(shutil.copytree(ROOT / "examples", tmp_path / "examples"))
    subprocess.run([sys.executable, "nano/make_data.py", "nano/data"], cwd=examples, check=True, timeout=120)
    files = sorted(examples.rglob("*.toml"))
    assert files
    for file in files:
        assert pipeline.read(file).nodes
