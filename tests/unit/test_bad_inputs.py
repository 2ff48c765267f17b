"""What a person gets wrong with real stages: one message each, exit code 2, before anything runs and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ROW = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})

CASES = {
    "missing data file": (
        {},
        '[stage.train]\nbase = "nano"\ndata = "no.jsonl"\n',
        "pipeline.toml:3: data: no such file or folder: no.jsonl",
    ),
    "malformed JSON line": (
        {"d.jsonl": ROW + '\n{"messages": [{"role": "user" "content": "x"}]}\n'},
        '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\n',
        "d.jsonl:2:",
    ),
    "unknown key": (
        {"d.jsonl": ROW},
        '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\nlora.rnak = 8\n',
        "pipeline.toml:4: unknown key 'rnak'\n  hint: did you mean 'rank'?",
    ),
    "unknown key for the library": (
        {"d.jsonl": ROW},
        '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\nextra = { weight_dacay = 0.1 }\n',
        "weight_decay",
    ),
    "wrong reference type": (
        {"d.jsonl": ROW},
        '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\n[stage.quantize]\nmethod = "bnb"\nmodel = "@train"\n',
        "pipeline.toml:6: 'model' takes a model, but '@train' makes an adapter",
    ),
    "unknown backend": (
        {},
        '[stage.eval]\nmodel = "nano"\nbackend = "vlm"\n',
        "pipeline.toml:3: backend: unknown backend 'vlm'",
    ),
    "unknown set": ({}, '[stage.eval]\nmodel = "nano"\nsets = ["ceval-mni"]\n', "ceval-mini"),
    "base without config.json": (
        {"base/model.safetensors": "", "d.jsonl": ROW},
        '[stage.train]\nbase = "base"\ndata = "d.jsonl"\n',
        "pipeline.toml:2: base: base: this folder has no config.json",
    ),
    "bits that a method has not": (
        {"d.jsonl": ROW},
        '[stage.quantize]\nmodel = "nano"\nmethod = "awq"\nbits = 8\ncalibration = "d.jsonl"\n',
        "pipeline.toml:4: bits: ",
    ),
    "no calibration": ({}, '[stage.quantize]\nmodel = "nano"\n', "calibration"),
    "placeholder without value": (
        {"d.jsonl": ROW.replace("ho", "I am {{name}}")},
        '[stage.train]\nbase = "nano"\ndata = "d.jsonl"\n',
        "{{name}}",
    ),
}


ALL = """
import contextlib, io, json, sys
from suite.cli import main
for file in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["run", file])
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, bool]]:
    """What the command says to each case, all in one interpreter: exit code, message, whether torch was imported."""
    pipelines = []
    for files, pipeline, _ in CASES.values():
        folder = tmp_path_factory.mktemp("case")
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, "utf-8")
        pipelines.append(folder / "pipeline.toml")
        pipelines[-1].write_text(pipeline, "utf-8")
    command = [sys.executable, "-c", ALL, *map(str, pipelines)]
    home = str(tmp_path_factory.mktemp("home"))
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, env={**os.environ, "SUITE_HOME": home}
    )
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_said_before_anything_runs(case: str, answers: dict[str, tuple[int, str, bool]]) -> None:
    code, said, torch = answers[case]
    assert code == 2, said
    assert CASES[case][2] in said
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert not torch
