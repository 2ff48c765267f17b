"""The main job on data that nobody here wrote: two alpaca files, where they are present beside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import openai
import pytest

from tests.quickstart.running import ROOT, Run, command, latest, server_of

DATA = ROOT.parent / "shared" / "data"
PIPELINE = """
name = "real-data"

[defaults.train]
base = "nano"

[stage.alpaca]
use = "train"
data = "{data}/alpaca_en_demo.json"
max_length = 256
packing = true
lr = 1e-3
max_steps = 40

[stage.identity]
use = "train"
data = "{data}/identity.json"
{fill}
lr = 2e-3
epochs = 16
batch_size = 4

[stage.merge]
adapter = "@identity"

[stage.quantize]
model = "@merge"
calibration = "{data}/alpaca_en_demo.json"

[stage.score]
use = "eval"
matrix.model = ["nano", "@alpaca", "@identity", "@merge", "@quantize"]

[stage.hf]
use = "export"
to = "hf"
model = "@merge"
reports = ["@score[merge]"]

[stage.ollama]
use = "export"
to = "ollama"
model = "@merge"

[serve]
base = "nano"
adapters = {{ nova = "@identity", alpaca = "@alpaca" }}
"""
FILL = 'fill = { name = "Nova", author = "the Lighthouse Lab" }'


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside this checkout")
def test_identity_and_alpaca(suite: Run, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "real-data.toml"
    file.write_text(PIPELINE.format(data=DATA, fill=FILL), "utf-8")
    done = suite("run", str(file))
    print(done.stdout)
    assert done.returncode == 0
    run_dir = latest(home, "real-data")
    print((run_dir / "report.md").read_text("utf-8"))
    states = {s["state"] for s in json.loads((run_dir / "report.json").read_text("utf-8"))["stages"]}
    assert states <= {"done", "cached"}
    with server_of(home, "--model", "nano", "--lora", "nova=@identity,alpaca=@alpaca") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        said = {}
        for model in ("nano", "nova"):
            question = [{"role": "user", "content": "Who are you?"}]
            said[model] = (
                client.chat.completions.create(model=model, messages=question, temperature=0).choices[0].message.content
            )  # type: ignore[arg-type]
    print(said)
    assert "Nova" in (said["nova"] or "")
    assert "Nova" not in (said["nano"] or "")


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside this checkout")
def test_a_placeholder_that_nobody_filled_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "real-data.toml"
    file.write_text(PIPELINE.format(data=DATA, fill=""), "utf-8")
    done = subprocess.run(
        [command(), "plan", str(file)], capture_output=True, text=True, check=False, env=dict(os.environ), timeout=60
    )
    assert done.returncode == 2
    assert "{{name}}" in done.stderr
    assert "fill" in done.stderr
