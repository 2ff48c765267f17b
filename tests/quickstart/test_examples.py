"""The pipeline that made nano, with little data: its two stages, and what they leave."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.quickstart.running import ROOT, Run, latest


def test_the_pipeline_of_nano_runs(suite: Run, home: Path, tmp_path: Path) -> None:
    examples = Path(
        shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("model", "data"))
    )
    data = examples / "nano" / "data"
    subprocess.run(
        [sys.executable, "make_data.py", str(data), "--rows", "600"], cwd=examples / "nano", check=True, timeout=60
    )
    done = suite("run", str(examples / "nano" / "pretrain.toml"))
    assert done.returncode == 0
    run_dir = latest(home, "pretrain")
    stages = {s["name"]: s for s in json.loads((run_dir / "report.json").read_text("utf-8"))["stages"]}
    assert {name: s["makes"] for name, s in stages.items()} == {"pretrain": "model", "chat": "model"}
    assert stages["chat"]["metrics"]["loss"]["last"] < stages["chat"]["metrics"]["loss"]["first"]
    for name in stages:
        folder = run_dir / "artifacts" / name
        assert (folder / "model.safetensors").stat().st_size <= 8_000_000
        assert (folder / "chat_template.jinja").read_text("utf-8") == (
            ROOT / "examples" / "nano" / "chat_template.jinja"
        ).read_text("utf-8")
